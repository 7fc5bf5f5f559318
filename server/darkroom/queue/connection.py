"""One bounded pool of Redis connections, the scripts, and the one place where Redis errors become ours."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from typing import Any

import structlog
from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.client import PubSub
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import ExponentialWithJitterBackoff

from darkroom import metrics
from darkroom.config import Settings
from darkroom.errors import ConfigError, QueueUnavailable, StorageFull, shorten
from darkroom.jobs import INPUT_NAMES, JobState, Priority
from darkroom.queue.durability import SETTINGS, Kept, promise_of
from darkroom.queue.keys import Keys
from darkroom.queue.sentinel import is_sentinel_url, sentinel_pool

SOCKET_TIMEOUT_S = 5.0
# A blocking command must answer well before the socket gives up, or an idle worker looks like a dead server.
BLOCK_S = 2.0
MAX_CONNECTIONS = 32
# How long replicas may take to have a job before the caller is told that it is not safe yet.
REPLICAS_TIMEOUT_MS = 1000

SCRIPTS = (
    "enqueue",
    "claim",
    "renew",
    "progress",
    "checkpoint",
    "settle",
    "hand_back",
    "cancel",
    "stay",
    "reap",
    "status",
    "heartbeat",
    "unregister",
    "forget_workers",
    "cards",
    "stats",
    "watch",
    "take",
    "look",
    "preview",
)

log = structlog.get_logger(__name__)


# The code of an error reply -> the reason it is counted under, a safe sentence, seconds to wait.
_REFUSALS = {
    "OOM": ("memory", "the queue's memory is full", 5.0),
    "READONLY": ("read_only", "the queue's server is a read-only replica; a failover may be under way", 1.0),
    "MASTERDOWN": ("read_only", "the queue's server is a replica without its master", 1.0),
    "MISCONF": ("disk", "the queue's server cannot write to its disk", 5.0),
    "NOREPLICAS": ("replicas", "the queue's server has too few replicas to take writes", 2.0),
}


@contextmanager
def redis_errors() -> Iterator[None]:
    """Turn whatever Redis or its client raises into `QueueUnavailable`, with a sentence that is safe to show."""
    try:
        yield
    except exceptions.BusyLoadingError as error:
        metrics.REDIS_REFUSALS.labels("loading").inc()
        raise QueueUnavailable("the queue is starting and still loads its data", retry_after_s=2.0) from error
    except exceptions.AuthenticationError as error:
        metrics.REDIS_REFUSALS.labels("other").inc()
        raise QueueUnavailable("the queue refuses our credentials", retry_after_s=10.0) from error
    except (exceptions.TimeoutError, TimeoutError) as error:
        raise QueueUnavailable("the queue does not answer in time") from error
    except (exceptions.ConnectionError, OSError) as error:
        raise QueueUnavailable("the queue cannot be reached") from error
    except exceptions.RedisError as error:
        reason, message, retry_after_s = _refusal(error)
        metrics.REDIS_REFUSALS.labels(reason).inc()
        code = StorageFull.code if reason == "memory" else None
        raise QueueUnavailable(message, retry_after_s=retry_after_s, code=code) from error


def is_out_of_memory(error: QueueUnavailable) -> bool:
    """Whether the server refused a command because it may need memory."""
    return error.code == StorageFull.code


def _code(error: exceptions.RedisError) -> str:
    """The code of an error reply, '' for any that is not looked for. The client strips some codes from the text, and
    Redis 6 wraps a script's error into another."""
    text = str(error)
    for kind, code in _CODES.items():
        if isinstance(error, kind):
            return code
    return next((code for code in _REFUSALS if text.startswith(f"{code} ") or f"-{code} " in text), "")


_CODES: dict[type[exceptions.RedisError], str] = {
    exceptions.OutOfMemoryError: "OOM",
    exceptions.ReadOnlyError: "READONLY",
    exceptions.MasterDownError: "MASTERDOWN",
}


def _refusal(error: exceptions.RedisError) -> tuple[str, str, float]:
    code = _code(error)
    if code not in ("OOM", "READONLY"):
        # Some tell what is wrong with the server, others are faults of our own.
        log.warning("queue_error", error=shorten(str(error), 300))
    return _REFUSALS.get(code, ("other", "the queue refuses the command", 1.0))


class RedisConnection:
    """A pool, the shard's keys and its scripts. Every method raises `QueueUnavailable` when Redis cannot serve it."""

    def __init__(self, settings: Settings, url: str) -> None:
        self.keys = Keys(settings.shard)
        self._durability, self._num_replicas = settings.durability, settings.durability_replicas
        options: dict[str, Any] = {
            "max_connections": MAX_CONNECTIONS,
            "timeout": SOCKET_TIMEOUT_S,
            "socket_timeout": SOCKET_TIMEOUT_S,
            "socket_connect_timeout": 2.0,
            "decode_responses": False,
            "protocol": 2,
            # Every script may be sent twice, so a lost reply is retried here; a longer outage is the caller's.
            "retry": Retry(ExponentialWithJitterBackoff(cap=0.2, base=0.02), 2),
            "redis_connect_func": self._greet,
        }
        self._is_closed = False
        self._sentinel: Sentinel | None = None
        try:
            if is_sentinel_url(url):
                self._sentinel, pool = sentinel_pool(url, options)
            else:
                pool = BlockingConnectionPool.from_url(url, **options)
        except ValueError as error:
            raise ConfigError(f"DARKROOM_REDIS_URL cannot be used: {error}") from error
        # The client's own types are unions of sync and async replies, and its command methods are untyped.
        self._redis: Any = Redis.from_pool(pool)
        head = _script_head(settings)
        self._scripts = {name: head + _read_lua(name) for name in SCRIPTS}
        self._shas = {name: hashlib.sha1(text.encode()).hexdigest() for name, text in self._scripts.items()}

    async def close(self) -> None:
        self._is_closed = True
        await self._redis.aclose()
        if self._sentinel is not None:
            await self._sentinel.aclose()

    async def _greet(self, connection: AbstractConnection) -> None:
        """The handshake of a new connection. A command that `close` interrupts is tried again by the client, on a
        connection that nobody would close."""
        if self._is_closed:
            raise exceptions.ConnectionError("closed")
        await connection.on_connect()

    async def command(self, *args: Any) -> Any:
        return await self._ask(lambda: self._redis.execute_command(*args))

    async def transaction(self, *commands: Sequence[Any]) -> list[Any]:
        """Run commands as one MULTI/EXEC in one round trip. An error in a reply is raised."""
        replies: list[Any] = await self._ask(lambda: self._execute(*commands))
        return replies

    async def script(self, name: str, *args: Any) -> Any:
        """Run a script by its digest; a server that has lost it (restart, flush, failover) is sent the text again."""
        return await self._ask(lambda: self._by_digest(name, args, self._redis.execute_command))

    async def script_after(self, commands: Sequence[Sequence[Any]], name: str, *args: Any) -> Any:
        """Run commands and then a script as one MULTI/EXEC in one round trip, and return the script's reply. As
        `script`, a server that has lost it is sent everything again, so the commands must be harmless to repeat."""

        async def execute(*script: Any) -> Any:
            return (await self._execute(*commands, script))[-1]

        return await self._ask(lambda: self._by_digest(name, args, execute))

    @property
    def replicates(self) -> bool:
        return self._durability == "replicated"

    async def replicated_script(self, name: str, *args: Any, after: Sequence[Sequence[Any]] = ()) -> tuple[Any, bool]:
        """As `script`, or as `script_after` the commands of `after`, and where durability is `replicated` whether
        enough replicas have what it wrote. A script that may have been sent before must write something then too, or
        nothing is waited for."""
        if not self.replicates:
            return await (self.script_after(after, name, *args) if after else self.script(name, *args)), True
        acknowledged = 0

        async def execute(*script: Any) -> Any:
            nonlocal acknowledged
            # On one connection: WAIT is for what that one has written, and a failover between them must break it.
            *_, reply, acknowledged = await self._execute(
                *after, script, ("WAIT", self._num_replicas, REPLICAS_TIMEOUT_MS), is_transaction=False
            )
            return reply

        reply = await self._ask(lambda: self._by_digest(name, args, execute))
        return reply, acknowledged >= self._num_replicas

    async def _by_digest(self, name: str, args: Sequence[Any], execute: Callable[..., Awaitable[Any]]) -> Any:
        try:
            return await execute("EVALSHA", self._shas[name], 1, self.keys.prefix, *args)
        except exceptions.NoScriptError:
            return await execute("EVAL", self._scripts[name], 1, self.keys.prefix, *args)

    async def _execute(self, *commands: Sequence[Any], is_transaction: bool = True) -> list[Any]:
        async with self._redis.pipeline(transaction=is_transaction) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            replies: list[Any] = await pipeline.execute()
            return replies

    async def _ask(self, ask: Callable[[], Awaitable[Any]]) -> Any:
        """Ask the server; where that has become a replica, ask again on a new connection. After a failover the address
        leads to the new master, but a replica leaves old connections open."""
        with redis_errors():
            try:
                return await ask()
            except exceptions.RedisError as error:
                if _code(error) != "READONLY":
                    raise
                await self._redis.connection_pool.disconnect(inuse_connections=False)
                return await ask()

    def pubsub(self) -> PubSub:
        pubsub: PubSub = self._redis.pubsub()
        return pubsub

    async def log_promise(self) -> None:
        """Say in one line what the server's settings let `accepted` mean, and warn where that is less than was asked
        for. A server that hides its settings is asked no more."""
        try:
            config = await self._asked_config()
            replication = await self._asked_replication()
        except (exceptions.ConnectionError, exceptions.TimeoutError, OSError):
            return
        promise = promise_of(config, replication)
        for kept in Kept:
            metrics.REDIS_DURABILITY.labels(kept.value).set(kept is promise.kept)
        found = {key.replace("-", "_"): value for key, value in (config or {}).items()}
        log.info("queue_promise", promise=promise.sentence, durability=self._durability, **found)
        if shortfall := promise.shortfall(self._durability, self._num_replicas):
            log.warning("queue_promises_less", wanted=f"DARKROOM_DURABILITY={self._durability}", found=shortfall)
        if promise.policy not in ("noeviction", "unknown"):
            log.error(
                "queue_may_lose_jobs",
                risk=f"maxmemory-policy is {promise.policy}: near its memory limit this server deletes accepted jobs; "
                "set it to noeviction",
            )

    async def _asked_config(self) -> dict[str, str] | None:
        found: dict[str, str] = {}
        try:
            for name in SETTINGS:
                reply = await self._redis.config_get(name)
                found.update({str(key): str(value) for key, value in reply.items()})
        except exceptions.ResponseError:
            return None
        return found

    async def _asked_replication(self) -> dict[str, object] | None:
        try:
            info: dict[str, object] = await self._redis.info("replication")
        except exceptions.ResponseError:
            return None
        return info


def _read_lua(name: str) -> str:
    return (resources.files("darkroom.queue") / "lua" / f"{name}.lua").read_text(encoding="utf-8")


def _script_head(settings: Settings) -> str:
    """The constants that every script shares, then `prelude.lua`."""
    inputs = ", ".join(f"'{name}'" for name in INPUT_NAMES)
    terminal = ", ".join(f"{state.value} = true" for state in JobState if state.is_terminal)
    constants = (
        "local JOB_TTL_MS, RESULT_TTL_MS, LEASE_MS, GRACE_MS, MAX_FAILURES, SUSPECT_FAILURES, NUM_RANKS, TERMINAL, "
        "INPUT_NAMES = "
        f"{int(settings.job_ttl_s * 1000)}, {int(settings.result_ttl_s * 1000)}, {int(settings.lease_s * 1000)}, "
        f"{int(settings.disconnect_grace_s * 1000)}, {settings.max_failures}, {settings.suspect_failures}, "
        f"{len(Priority)}, {{ {terminal} }}, {{ {inputs} }}\n"
    )
    return constants + _read_lua("prelude")
