"""What all routes of one API process share: the settings, the way to the queue, and the state of the drain."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from urllib.parse import urlsplit

import structlog
from starlette.requests import HTTPConnection

from darkroom.api.intake import Intake
from darkroom.api.observe import observe_outage, observe_queue
from darkroom.api.prompts import PromptRules
from darkroom.api.resolve import accepted_values
from darkroom.config import Settings
from darkroom.errors import Draining, QueueUnavailable
from darkroom.queue import JobQueue

log = structlog.get_logger("darkroom.api")

# How often the queue is looked at: for the gauges, and to say in the log when it goes and when it is back.
_WATCH_INTERVAL_S = 1.0


class Service:
    """The API starts and lives without Redis: until it is reached, `queue` raises `QueueUnavailable`."""

    def __init__(self, settings: Settings, queue: JobQueue | None) -> None:
        self.settings = settings
        self.accepted = accepted_values(settings)
        self.prompt_rules = PromptRules(settings)
        self.intake = Intake(settings.max_image_pixels)
        self.is_draining = False
        self._num_waiting = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.was_ready = False
        # Set when waiting calls must be answered with their job's URL because the process is about to end.
        self.handing_over = asyncio.Event()
        self._queue = queue
        self._owns_queue = queue is None
        self._reached: bool | None = None

    @property
    def queue(self) -> JobQueue:
        if self._queue is None:
            raise QueueUnavailable("Redis cannot be reached")
        return self._queue

    def refuse_if_draining(self) -> None:
        if self.is_draining:
            raise Draining("this server is shutting down; another one will answer", retry_after_s=1.0)

    @property
    def num_waiting(self) -> int:
        return self._num_waiting

    @contextlib.contextmanager
    def waiting_call(self) -> Iterator[None]:
        """Count a call that waits for its job, so that a drain can wait for it."""
        self._num_waiting += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_waiting -= 1
            if self._num_waiting == 0:
                self._idle.set()

    async def all_answered(self, timeout_s: float) -> None:
        """Return when no call waits for its job any more, or after `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Connect, stay connected, keep the gauges fresh, for as long as the context lasts."""
        await self.look()
        watch = asyncio.ensure_future(self._watch())
        try:
            yield
        finally:
            while not watch.done():
                # Again and again: a cancellation can get lost where the Redis client times out at the same moment.
                watch.cancel()
                await asyncio.wait((watch,), timeout=0.1)
            if self._queue is not None and self._owns_queue:
                await self._queue.close()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_INTERVAL_S)
            await self.look()

    async def look(self) -> None:
        """One look at the queue, the first that reaches it included. Raises `ConfigError` for an unusable URL or result
        store."""
        try:
            if self._queue is None:
                self._queue = await JobQueue.connect(self.settings, self.settings.redis_url or "")
            # Workers do it too; this one ends overdue jobs also where no worker is left.
            await self._queue.reap()
            observe_queue(await self._queue.stats(), await self._queue.memory())
            await self._queue.sweep_results()
        except QueueUnavailable as error:
            if self._reached is not False:
                log.error(
                    "queue_unavailable",
                    redis=_without_password(self.settings.redis_url),
                    reason=str(error),
                    meanwhile="work is answered 503; the connection is tried again every second",
                )
            self._reached = False
            observe_outage()
            return
        if self._reached is False:
            log.info("queue_reached", redis=_without_password(self.settings.redis_url))
            # It may be another server by now.
            await self._queue.log_promise()
        self._reached = True


def service_of(connection: HTTPConnection) -> Service:
    service: Service = connection.app.state.service
    return service


def _without_password(url: str | None) -> str:
    parts = urlsplit(url or "")
    if parts.password is None:
        return url or ""
    return parts._replace(netloc=f"***@{parts.netloc.rpartition('@')[2]}").geturl()
