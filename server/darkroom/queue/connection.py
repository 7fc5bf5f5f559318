"""One bounded pool of Redis connections, the scripts, and the one place where Redis errors become ours."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from typing import Any

import structlog
from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.client import PubSub
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff

from darkroom.config import Settings
from darkroom.errors import ConfigError, QueueUnavailable, shorten
from darkroom.jobs import JobState, Priority
from darkroom.queue.keys import Keys

SOCKET_TIMEOUT_S = 5.0
# A blocking command must answer well before the socket gives up, or an idle worker looks like a dead server.
BLOCK_S = 2.0
MAX_CONNECTIONS = 32

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
)

log = structlog.get_logger(__name__)


@contextmanager
def redis_errors() -> Iterator[None]:
    """Turn whatever Redis or its client raises into `QueueUnavailable`, with a sentence that is safe to show."""
    try:
        yield
    except exceptions.BusyLoadingError as error:
        raise QueueUnavailable("the queue is starting and still loads its data", retry_after_s=2.0) from error
    except exceptions.AuthenticationError as error:
        raise QueueUnavailable("the queue refuses our credentials", retry_after_s=10.0) from error
    except (exceptions.TimeoutError, TimeoutError) as error:
        raise QueueUnavailable("the queue does not answer in time") from error
    except (exceptions.ConnectionError, OSError) as error:
        raise QueueUnavailable("the queue cannot be reached") from error
    except exceptions.RedisError as error:
        message, retry_after_s = _refusal(error)
        raise QueueUnavailable(message, retry_after_s=retry_after_s) from error


def is_out_of_memory(error: QueueUnavailable) -> bool:
    """Whether the server refused a command because it may need memory."""
    return isinstance(error.__cause__, exceptions.OutOfMemoryError)


def _refusal(error: exceptions.RedisError) -> tuple[str, float]:
    """A safe sentence for an error reply. Redis 6 wraps a script's error into a text, so both forms are looked for."""
    text = str(error)
    if isinstance(error, exceptions.OutOfMemoryError) or "-OOM " in text:
        return "the queue's memory is full", 5.0
    if isinstance(error, exceptions.ReadOnlyError) or "-READONLY " in text:
        return "the queue's server is a read-only replica; a failover may be under way", 1.0
    # -MISCONF, -MASTERDOWN, -NOREPLICAS, -BUSY ... and faults of our own, so the text is logged.
    log.warning("queue_error", error=shorten(text, 300))
    return "the queue refuses the command", 1.0


class RedisConnection:
    """A pool, the shard's keys and its scripts. Every method raises `QueueUnavailable` when Redis cannot serve it."""

    def __init__(self, settings: Settings, url: str) -> None:
        self.keys = Keys(settings.shard)
        try:
            pool = BlockingConnectionPool.from_url(
                url,
                max_connections=MAX_CONNECTIONS,
                timeout=SOCKET_TIMEOUT_S,
                socket_timeout=SOCKET_TIMEOUT_S,
                socket_connect_timeout=2.0,
                decode_responses=False,
                protocol=2,
                # Every script may be sent twice, so a lost reply is retried here; a longer outage is the caller's.
                retry=Retry(ExponentialWithJitterBackoff(cap=0.2, base=0.02), 2),
            )
        except ValueError as error:
            raise ConfigError(f"DARKROOM_REDIS_URL cannot be used: {error}") from error
        # The client's own types are unions of sync and async replies, and its command methods are untyped.
        self._redis: Any = Redis.from_pool(pool)
        head = _script_head(settings)
        self._scripts = {name: head + _read_lua(name) for name in SCRIPTS}
        self._shas = {name: hashlib.sha1(text.encode()).hexdigest() for name, text in self._scripts.items()}

    async def close(self) -> None:
        await self._redis.aclose()

    async def command(self, *args: Any) -> Any:
        with redis_errors():
            return await self._redis.execute_command(*args)

    async def transaction(self, *commands: Sequence[Any]) -> list[Any]:
        """Run commands as one MULTI/EXEC in one round trip. An error in a reply is raised."""
        with redis_errors():
            return await self._execute(*commands)

    async def _execute(self, *commands: Sequence[Any]) -> list[Any]:
        async with self._redis.pipeline(transaction=True) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            replies: list[Any] = await pipeline.execute()
            return replies

    async def script(self, name: str, *args: Any) -> Any:
        """Run a script by its digest; a server that has lost it (restart, flush, failover) is sent the text again."""
        with redis_errors():
            try:
                return await self._redis.execute_command("EVALSHA", self._shas[name], 1, self.keys.prefix, *args)
            except exceptions.NoScriptError:
                return await self._redis.execute_command("EVAL", self._scripts[name], 1, self.keys.prefix, *args)

    async def script_after(self, commands: Sequence[Sequence[Any]], name: str, *args: Any) -> Any:
        """Run commands and then a script as one MULTI/EXEC in one round trip, and return the script's reply. As
        `script`, a server that has lost it is sent everything again, so the commands must be harmless to repeat."""
        with redis_errors():
            try:
                return (await self._execute(*commands, ("EVALSHA", self._shas[name], 1, self.keys.prefix, *args)))[-1]
            except exceptions.NoScriptError:
                return (await self._execute(*commands, ("EVAL", self._scripts[name], 1, self.keys.prefix, *args)))[-1]

    def pubsub(self) -> PubSub:
        pubsub: PubSub = self._redis.pubsub()
        return pubsub

    async def log_promise(self) -> None:
        """Say in one line what the server's settings let `accepted` mean. A server that hides them is asked no more."""
        found: dict[str, str] = {}
        for name in ("appendonly", "appendfsync", "maxmemory-policy"):
            try:
                reply = await self._redis.config_get(name)
            except exceptions.ResponseError:
                log.info("queue_promise", promise="unknown: the server does not show its settings")
                return
            except (exceptions.RedisError, OSError):
                return
            found.update({str(key): str(value) for key, value in reply.items()})
        if found.get("appendonly") != "yes":
            promise = "an accepted job survives any crash but the server's own: appendonly is off"
        elif found.get("appendfsync") == "always":
            promise = "an accepted job survives any crash, the server's and the machine's included"
        elif found.get("appendfsync") == "everysec":
            promise = "an accepted job survives any process's crash; a machine's crash may lose the last second"
        else:
            promise = "an accepted job survives any process's crash; a machine's crash may lose the last half minute"
        log.info("queue_promise", promise=promise, **{key.replace("-", "_"): value for key, value in found.items()})
        policy = found.get("maxmemory-policy", "noeviction")
        if policy != "noeviction":
            log.warning(
                "queue_may_lose_jobs",
                risk=f"maxmemory-policy is {policy}: near its memory limit this server deletes accepted jobs; "
                "set it to noeviction",
            )


def _read_lua(name: str) -> str:
    return (resources.files("darkroom.queue") / "lua" / f"{name}.lua").read_text(encoding="utf-8")


def _script_head(settings: Settings) -> str:
    """The constants that every script shares, then `prelude.lua`."""
    terminal = ", ".join(f"{state.value} = true" for state in JobState if state.is_terminal)
    constants = (
        "local JOB_TTL_MS, RESULT_TTL_MS, LEASE_MS, GRACE_MS, MAX_FAILURES, NUM_RANKS, TERMINAL = "
        f"{int(settings.job_ttl_s * 1000)}, {int(settings.result_ttl_s * 1000)}, {int(settings.lease_s * 1000)}, "
        f"{int(settings.disconnect_grace_s * 1000)}, {settings.max_failures}, {len(Priority)}, {{ {terminal} }}\n"
    )
    return constants + _read_lua("prelude")
