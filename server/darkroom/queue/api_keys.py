"""API keys: who may call, for what, and how much. Redis holds their hashes; a secret is known to its owner alone."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from contextlib import suppress
from typing import NamedTuple

import msgspec

from darkroom.errors import JobError, QueueUnavailable
from darkroom.jobs import MESSAGE_VERSION, Priority, decode, encode
from darkroom.queue.connection import RedisConnection

# What each scope lets its key do: `generate` includes reading one's own jobs, `admin` everything.
SCOPES: dict[str, frozenset[str]] = {
    "read": frozenset({"read"}),
    "generate": frozenset({"read", "generate"}),
    "admin": frozenset({"read", "generate", "admin"}),
}
# How long a revoked key may still work in a process that has just seen it.
CACHE_S = 1.0
# A key's last use is written down this often at most.
LAST_USED_EVERY_S = 60.0
_MAX_CACHED = 10_000
_TOKEN = re.compile(r"dk_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")


class Rate(msgspec.Struct, frozen=True):
    """`count` calls in each `period_s` seconds in the long run, and `burst` at once."""

    count: int
    period_s: int
    burst: int


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """A key as it is stored: `secret_hash` is the SHA-256 of the whole token.

    Keys of one `tenant` share its jobs. `weight` is the tenant's share of the workers beside others; `max_cost` bounds
    the cost of the key's unfinished jobs; `max_priority` is the highest class it may ask for. None is no limit.
    """

    id: str
    secret_hash: bytes
    name: str
    tenant: str
    scopes: list[str]
    created_at_ms: int
    weight: float = 1.0
    rate: Rate | None = None
    max_cost: int | None = None
    max_priority: Priority = Priority.HIGH
    expires_at_ms: int | None = None
    version: int = MESSAGE_VERSION

    @property
    def permissions(self) -> frozenset[str]:
        return frozenset().union(*(SCOPES.get(scope, frozenset()) for scope in self.scopes))


class Taken(NamedTuple):
    """What a rate limit says of one call: `remaining` more may follow at once, all of the burst after `reset_s`."""

    is_allowed: bool
    remaining: int
    retry_after_s: float
    reset_s: float


def new_key(
    *,
    name: str,
    tenant: str,
    scopes: list[str],
    weight: float = 1.0,
    rate: Rate | None = None,
    max_cost: int | None = None,
    max_priority: Priority = Priority.HIGH,
    expires_at_ms: int | None = None,
) -> tuple[ApiKey, str]:
    """A key to store, and its token `dk_<id>_<secret>`, which nobody can make out from what is stored."""
    key_id = secrets.token_hex(6)
    token = f"dk_{key_id}_{secrets.token_urlsafe(32)}"
    key = ApiKey(
        id=key_id,
        secret_hash=_hash(token),
        name=name,
        tenant=tenant,
        scopes=scopes,
        created_at_ms=int(time.time() * 1000),
        weight=weight,
        rate=rate,
        max_cost=max_cost,
        max_priority=max_priority,
        expires_at_ms=expires_at_ms,
    )
    return key, token


class KeyStore:
    """The keys of one shard. Every method raises `QueueUnavailable` while Redis cannot serve it."""

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection
        self._cache: dict[str, tuple[float, ApiKey | None]] = {}
        self._used_at: dict[str, float] = {}

    async def add(self, key: ApiKey) -> None:
        await self._connection.command("HSET", self._connection.keys.api_keys, key.id, encode(key))

    async def revoke(self, key_id: str) -> bool:
        """Whether there was such a key. Every process refuses it after `CACHE_S` seconds at the latest."""
        keys = self._connection.keys
        gone, _ = await self._connection.transaction(
            ("HDEL", keys.api_keys, key_id), ("HDEL", keys.api_keys_used, key_id)
        )
        return bool(gone)

    async def all(self) -> list[tuple[ApiKey, int | None]]:
        """Every key with the ms of its last use (to a minute), None for one that was never used; oldest first.

        A key that this release cannot read is left out; it cannot be used either.
        """
        keys = self._connection.keys
        stored, used = await self._connection.transaction(("HGETALL", keys.api_keys), ("HGETALL", keys.api_keys_used))
        found = []
        for key_id, data in stored.items():
            with suppress(JobError):
                found.append((decode(data, ApiKey), int(used[key_id]) if key_id in used else None))
        return sorted(found, key=lambda entry: entry[0].created_at_ms)

    async def find(self, token: str) -> ApiKey | None:
        """The key that `token` belongs to; None for one that is malformed, unknown, revoked, expired or wrong."""
        parts = _TOKEN.fullmatch(token)
        if parts is None:
            return None
        key = await self._read(parts[1])
        if key is None or not hmac.compare_digest(key.secret_hash, _hash(token)):
            return None
        if key.expires_at_ms is not None and key.expires_at_ms <= time.time() * 1000:
            return None
        await self._note_use(key.id)
        return key

    async def take(self, key_id: str, rate: Rate) -> Taken:
        """Count one call against a key's rate (the generic cell rate algorithm); a refused one does not count."""
        interval_us = rate.period_s * 1_000_000 // rate.count
        reply = await self._connection.script("take", key_id, interval_us, rate.burst)
        is_allowed, remaining, retry_us, reset_us = reply
        return Taken(bool(is_allowed), remaining, retry_us / 1e6, reset_us / 1e6)

    async def _read(self, key_id: str) -> ApiKey | None:
        read_at, key = self._cache.get(key_id, (float("-inf"), None))
        if time.monotonic() - read_at > CACHE_S:
            asked_at = time.monotonic()
            data = await self._connection.command("HGET", self._connection.keys.api_keys, key_id)
            key = None
            if data is not None:
                with suppress(JobError):
                    key = decode(data, ApiKey)
            if len(self._cache) >= _MAX_CACHED:
                # Filled by somebody who guesses: real keys come back with one read each.
                self._cache.clear()
            self._cache[key_id] = (asked_at, key)
        return key

    async def _note_use(self, key_id: str) -> None:
        now = time.monotonic()
        if now - self._used_at.get(key_id, float("-inf")) < LAST_USED_EVERY_S:
            return
        self._used_at[key_id] = now
        # A server that takes no writes must not keep callers from reading.
        with suppress(QueueUnavailable):
            keys = self._connection.keys
            await self._connection.command("HSET", keys.api_keys_used, key_id, int(time.time() * 1000))


def _hash(token: str) -> bytes:
    # The secret has 256 random bits: nothing that a slow hash would make harder to guess.
    return hashlib.sha256(token.encode()).digest()
