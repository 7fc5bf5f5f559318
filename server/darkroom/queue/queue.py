"""`JobQueue`: one object per process, used by the API and by workers."""

from __future__ import annotations

from darkroom.config import Settings
from darkroom.queue.admission import MemoryGauge
from darkroom.queue.client_side import ClientSide
from darkroom.queue.connection import RedisConnection
from darkroom.queue.dead_letters import DeadLetters
from darkroom.queue.notices import Notices
from darkroom.queue.overview import Overview
from darkroom.queue.results import ResultStore
from darkroom.queue.worker_side import WorkerSide


class JobQueue(ClientSide, WorkerSide, Overview):
    """The queue of one shard. Every method raises `QueueUnavailable` while Redis cannot serve it, and works again by
    itself when Redis is back."""

    def __init__(self, settings: Settings, url: str) -> None:
        results = ResultStore(settings, settings.result_store) if settings.result_store else None
        connection = RedisConnection(settings, url)
        notices = Notices(connection)
        memory = MemoryGauge(connection)
        ClientSide.__init__(
            self,
            connection,
            notices,
            results,
            memory,
            max_queue_jobs=settings.max_queue_jobs,
            tenant_queue_share=settings.tenant_queue_share,
            result_ttl_s=settings.result_ttl_s,
        )
        WorkerSide.__init__(
            self,
            connection,
            notices,
            results,
            lease_s=settings.lease_s,
            result_ttl_s=settings.result_ttl_s,
            job_ttl_s=settings.job_ttl_s,
            suspect_failures=settings.suspect_failures,
        )
        Overview.__init__(self, connection, memory)

    @classmethod
    async def connect(cls, settings: Settings, url: str) -> JobQueue:
        """Open the queue and log what the server's settings promise. Raises `ConfigError` for an unusable URL or result
        store, `QueueUnavailable` when the server cannot be reached."""
        queue = cls(settings, url)
        try:
            await queue.ping()
            await queue.log_promise()
        except BaseException:  # a process that ends while it connects cancels this
            await queue.close()
            raise
        return queue

    async def log_promise(self) -> None:
        """Log what the server's settings let `accepted` mean, and where that is less than was asked for."""
        await self._connection.log_promise()

    @property
    def dead_letters(self) -> DeadLetters:
        """The jobs that were given up."""
        return DeadLetters(self, self._connection)

    @property
    def num_waiters(self) -> int:
        """Calls of `wait` and `events` that are under way in this process."""
        return self._notices.num_waiters

    async def close(self) -> None:
        await self._notices.close()
        await self._connection.close()
