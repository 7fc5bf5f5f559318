"""Redis behind Sentinel: an address that names the sentinels and the service, and a pool that asks them who leads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

from redis.asyncio import BlockingConnectionPool
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff

_SCHEMES = {"redis+sentinel": False, "rediss+sentinel": True}
_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\[\]:,]+)(?::(\d{1,5}))?")
_PORT = 26379
_SENTINEL_TIMEOUT_S = 1.0


class _Pool(SentinelConnectionPool, BlockingConnectionPool):
    """Bounded as the pool of a plain address is, and connected to the master of the moment."""


def is_sentinel_url(url: str) -> bool:
    return urlsplit(url).scheme in _SCHEMES


def sentinel_pool(url: str, options: Mapping[str, Any]) -> tuple[Sentinel, BlockingConnectionPool]:
    """The sentinels and the pool for `redis+sentinel://[user:password@]host[:port],host[:port].../service[/db]`.

    `rediss+sentinel` uses TLS to Redis; user and password are Redis's own. Raises `ValueError` for anything else.
    """
    parts = urlsplit(url)
    credentials, _, hosts = parts.netloc.rpartition("@")
    addresses = [_ADDRESS.fullmatch(host) for host in hosts.split(",")]
    service, _, database = parts.path.strip("/").partition("/")
    if not all(addresses) or not service or (database and not database.isdigit()) or parts.query:
        raise ValueError("expected redis+sentinel://[user:password@]host[:port],host[:port].../service[/db]")
    user, _, password = credentials.partition(":")
    sentinel = Sentinel(  # type: ignore[no-untyped-call]
        [(found[1].strip("[]"), int(found[2] or _PORT)) for found in addresses if found],
        sentinel_kwargs={
            "socket_timeout": _SENTINEL_TIMEOUT_S,
            "socket_connect_timeout": _SENTINEL_TIMEOUT_S,
            "protocol": 2,
            "retry": Retry(NoBackoff(), 0),
        },
    )
    pool = _Pool(  # type: ignore[no-untyped-call]
        service,
        sentinel,
        ssl=_SCHEMES[parts.scheme],
        username=unquote(user) or None,
        password=unquote(password) or None,
        db=int(database or 0),
        **options,
    )
    return sentinel, pool
