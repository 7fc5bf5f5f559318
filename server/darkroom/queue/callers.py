"""What is kept for callers who know none of their jobs' ids: which are unfinished, and what they chose once for all.

A caller is any text that tells one from another; it is stored as its hash.
"""

from __future__ import annotations

from darkroom.queue.connection import RedisConnection
from darkroom.queue.keys import digest

CALLS_TTL_S = 86400
CHOICES_TTL_S = 30 * 86400


class Callers:
    """Every method raises `QueueUnavailable`."""

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection

    async def begin(self, caller: str, job_id: str, task: str = "") -> None:
        """Note that a job is this caller's, under the name `task` of the caller's own."""
        key = self._connection.keys.calls(digest(caller))
        await self._connection.transaction(("HSET", key, job_id, task), ("EXPIRE", key, CALLS_TTL_S))

    async def end(self, caller: str, *job_ids: str) -> None:
        """Forget jobs that have ended."""
        if job_ids:
            await self._connection.command("HDEL", self._connection.keys.calls(digest(caller)), *job_ids)

    async def jobs(self, caller: str, task: str | None = None) -> list[str]:
        """The ids of a caller's jobs, or of those that it called `task`. Some may have ended."""
        found = await self._connection.command("HGETALL", self._connection.keys.calls(digest(caller)))
        names = {job_id.decode(): name.decode() for job_id, name in found.items()}
        return [job_id for job_id, name in names.items() if task is None or name == task]

    async def choose(self, caller: str, choices: dict[str, str]) -> None:
        """Keep choices beside those of before."""
        if choices:
            key = self._connection.keys.choices(digest(caller))
            fields = [part for choice in choices.items() for part in choice]
            await self._connection.transaction(("HSET", key, *fields), ("EXPIRE", key, CHOICES_TTL_S))

    async def choices(self, caller: str) -> dict[str, str]:
        """What a caller chose, by name."""
        found = await self._connection.command("HGETALL", self._connection.keys.choices(digest(caller)))
        return {name.decode(): value.decode() for name, value in found.items()}
