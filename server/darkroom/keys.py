"""`darkroom keys`: make, list and revoke API keys in the queue's Redis, whether or not a server runs on it."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime

from darkroom.config import Settings
from darkroom.errors import InvalidRequest, RequestError
from darkroom.jobs import Priority
from darkroom.queue import SCOPES, ApiKey, JobQueue, KeyStore, Rate, new_key, redis_of

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_RATE = re.compile(r"([1-9]\d{0,6})/([smhd])")
_SPAN = re.compile(r"([1-9]\d{0,4})([smhd])")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@asynccontextmanager
async def _store(settings: Settings) -> AsyncIterator[KeyStore]:
    with redis_of(settings) as url:
        queue = JobQueue(settings, url)
        try:
            yield queue.api_keys
        finally:
            await queue.close()


async def create(
    settings: Settings,
    *,
    name: str,
    tenant: str | None,
    scopes: Sequence[str],
    weight: float,
    rate: str | None,
    burst: int | None,
    max_cost: int | None,
    priority: Priority,
    expires: str | None,
) -> tuple[ApiKey, str]:
    """Store a new key and return it with its token. Raises `InvalidRequest` for an option that says nothing sensible,
    `QueueUnavailable`, `ConfigError`."""
    for option, value in (("--name", name), ("--tenant", tenant or name)):
        if _NAME.fullmatch(value) is None:
            raise InvalidRequest(option, value, "1 to 64 letters, digits, dots, dashes or underscores")
    for scope in scopes:
        if scope not in SCOPES:
            raise InvalidRequest("--scope", scope, f"one of {', '.join(SCOPES)}")
    if burst is not None and rate is None:
        raise InvalidRequest("--burst", burst, "a --rate beside it")
    key, token = new_key(
        name=name,
        tenant=tenant or name,
        scopes=sorted(set(scopes)),
        weight=weight,
        rate=None if rate is None else _rate(rate, burst),
        max_cost=max_cost,
        max_priority=priority,
        expires_at_ms=None if expires is None else _moment_ms(expires),
    )
    async with _store(settings) as store:
        await store.add(key)
    return key, token


async def revoke(settings: Settings, key_id: str) -> None:
    """Raises `RequestError` when there is no such key, `QueueUnavailable`, `ConfigError`."""
    async with _store(settings) as store:
        if not await store.revoke(key_id):
            raise RequestError(f"there is no key {key_id}; `darkroom keys list` shows those there are")


async def table(settings: Settings) -> list[tuple[str, ...]]:
    """The head of a table and a row for each key. Raises `QueueUnavailable`, `ConfigError`."""
    async with _store(settings) as store:
        found = await store.all()
    head = ("ID", "NAME", "TENANT", "SCOPES", "WEIGHT", "RATE", "MAX COST", "PRIORITY", "LAST USED", "EXPIRES")
    return [head, *(_row(key, used_at_ms) for key, used_at_ms in found)]


def _row(key: ApiKey, used_at_ms: int | None) -> tuple[str, ...]:
    expires = "never" if key.expires_at_ms is None else _shown(key.expires_at_ms)
    if key.expires_at_ms is not None and key.expires_at_ms <= time.time() * 1000:
        expires = "expired"
    return (
        key.id,
        key.name,
        key.tenant,
        ",".join(key.scopes),
        f"{key.weight:g}",
        "-" if key.rate is None else f"{key.rate.count} in {key.rate.period_s} s, {key.rate.burst} at once",
        "-" if key.max_cost is None else str(key.max_cost),
        key.max_priority.value,
        "never" if used_at_ms is None else _shown(used_at_ms),
        expires,
    )


def _shown(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M")


def _rate(text: str, burst: int | None) -> Rate:
    parts = _RATE.fullmatch(text)
    if parts is None:
        raise InvalidRequest("--rate", text, "calls per second, minute, hour or day, such as 60/m")
    count = int(parts[1])
    return Rate(count, _UNITS[parts[2]], burst or count)


def _moment_ms(text: str) -> int:
    span = _SPAN.fullmatch(text)
    if span is not None:
        return int((time.time() + int(span[1]) * _UNITS[span[2]]) * 1000)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise InvalidRequest(
            "--expires", text, "a time from now such as 90d or 12h, or a date such as 2030-01-31"
        ) from error
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    if moment.timestamp() <= time.time():
        raise InvalidRequest("--expires", text, "a moment that is still to come")
    return int(moment.timestamp() * 1000)
