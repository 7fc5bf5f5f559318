"""Calls that may be repeated, for a retry to find: some clients repeat a call, but send no key to know it by."""

from __future__ import annotations

from darkroom.queue.connection import RedisConnection


class LeftCalls:
    """Every method raises `QueueUnavailable`."""

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection

    async def leave(self, asked: str, idempotency_key: str, *, kept_s: float) -> None:
        """Note that a call may be repeated, as its client has left or it was refused. `asked` is a hash of who asked
        for what."""
        key = self._connection.keys.left(asked)
        await self._connection.transaction(("RPUSH", key, idempotency_key), ("PEXPIRE", key, int(kept_s * 1000)))

    async def take(self, asked: str) -> str | None:
        """The idempotency key of such a call for the same; each is given out once."""
        found = await self._connection.command("LPOP", self._connection.keys.left(asked))
        return None if found is None else str(found.decode())
