"""One publish/subscribe connection per process that wakes whoever waits for news of a job."""

from __future__ import annotations

import asyncio
import contextvars
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import structlog
from redis import exceptions

from darkroom.queue.connection import SOCKET_TIMEOUT_S, RedisConnection

log = structlog.get_logger(__name__)

_RECONNECT_S = 0.25


class Notices:
    """Channels of job ids, shared by all waiters of a process.

    A notice is a hint: it may be lost while the connection is down, so each (re)subscription wakes every waiter to look
    again, and waiters also look by themselves now and then.
    """

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection
        self._channels: dict[bytes, str] = {}
        self._acknowledged: dict[str, asyncio.Event] = {}
        self._listeners: dict[str, set[Callable[[str], None]]] = defaultdict(set)
        self._waiters: dict[str, set[asyncio.Event]] = defaultdict(set)
        self._pubsub: Any = None
        self._task: asyncio.Task[None] | None = None

    @property
    def num_waiters(self) -> int:
        return sum(len(events) for events in self._waiters.values())

    async def subscribe(self, *channels: str, timeout_s: float = 1.0) -> None:
        """Make sure that notices on `channels` arrive from here on. Returns after `timeout_s` at the latest: without a
        server there is nothing to hear, and a later reconnection wakes every waiter anyway."""
        for channel in channels:
            if channel not in self._acknowledged:
                self._acknowledged[channel] = asyncio.Event()
                self._channels[self._connection.keys.channel(channel).encode()] = channel
                if self._pubsub is not None:
                    try:
                        await self._pubsub.subscribe(self._connection.keys.channel(channel))
                    except (exceptions.RedisError, OSError):
                        # A connection that the client mends by itself would lack this channel: begin afresh.
                        await self.close()
        if self._task is None or self._task.done():
            # It outlives the call that happens to be the first, so it takes nothing from that one's log lines or trace.
            self._task = asyncio.create_task(self._listen(), name="queue-notices", context=contextvars.Context())
        missing = [event.wait() for channel in channels if not (event := self._acknowledged[channel]).is_set()]
        if missing:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await asyncio.gather(*missing)

    @contextmanager
    def watch(self, job_id: str) -> Iterator[asyncio.Event]:
        """An event that is set by each notice about the job, for as long as the block lasts."""
        woken = asyncio.Event()
        self._waiters[job_id].add(woken)
        try:
            yield woken
        finally:
            self._waiters[job_id].discard(woken)
            if not self._waiters[job_id]:
                del self._waiters[job_id]

    @contextmanager
    def listen(self, channel: str, listener: Callable[[str], None]) -> Iterator[None]:
        """Call `listener` with each job id of a channel, for as long as the block lasts."""
        self._listeners[channel].add(listener)
        try:
            yield
        finally:
            self._listeners[channel].discard(listener)

    async def close(self) -> None:
        # Again and again: a cancellation can get lost where the Redis client times out at the same moment.
        while self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait((self._task,), timeout=0.1)
        self._task = None

    async def _listen(self) -> None:
        while True:
            pubsub: Any = self._connection.pubsub()
            try:
                subscribed: set[bytes] = set()
                while missing := self._channels.keys() - subscribed:
                    await pubsub.subscribe(*missing)
                    subscribed |= missing
                # Only from here on may other tasks add channels to it: two first commands would open two connections.
                self._pubsub = pubsub
                await self._read(pubsub)
            except (TimeoutError, exceptions.RedisError, OSError) as error:
                if self._pubsub is not None:
                    log.info("queue_notices_lost", error=type(error).__name__)
            finally:
                for event in self._acknowledged.values():
                    event.clear()
                self._pubsub = None
                with suppress(exceptions.RedisError, OSError):
                    await pubsub.aclose()
            await asyncio.sleep(_RECONNECT_S)

    async def _read(self, pubsub: Any) -> None:
        """Dispatch messages until the connection breaks. Silence is answered with a ping, so a dead peer is noticed."""
        silent = 0
        while True:
            message = await pubsub.get_message(timeout=SOCKET_TIMEOUT_S)
            if message is None:
                silent += 1
                if silent > 1:
                    raise exceptions.TimeoutError("no answer to a ping")
                await pubsub.ping()
                continue
            silent = 0
            channel = self._channels.get(message["channel"] or b"")
            if message["type"] == "subscribe" and channel is not None:
                self._acknowledged[channel].set()
                self._wake_all()
            elif message["type"] == "message" and channel is not None:
                self._wake(channel, message["data"].decode())

    def _wake(self, channel: str, job_id: str) -> None:
        for woken in self._waiters.get(job_id, ()):
            woken.set()
        for listener in self._listeners.get(channel, ()):
            listener(job_id)

    def _wake_all(self) -> None:
        for events in self._waiters.values():
            for woken in events:
                woken.set()


async def wait_for(woken: asyncio.Event, timeout_s: float) -> bool:
    """Wait for a notice. False when `timeout_s` passed first."""
    try:
        async with asyncio.timeout(timeout_s):
            await woken.wait()
    except TimeoutError:
        return False
    return True
