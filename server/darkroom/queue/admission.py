"""Who may enter: memory for results is counted before a job is accepted."""

from __future__ import annotations

import time
from dataclasses import dataclass

from darkroom.queue.connection import RedisConnection

# Above this share of maxmemory nothing is accepted, so running jobs can always store what they made.
MEMORY_SHARE = 0.8
# Kept free per job beside its pictures and its encoded self, by measurement with MEMORY USAGE: a full event stream
# (11.4 kB; 4.8 kB with 20 steps), the rest of the record (2.5 kB), the idempotency key and entries in indexes.
JOB_OVERHEAD_BYTES = 14 << 10
SAMPLE_AGE_S = 1.0


@dataclass(frozen=True)
class MemorySample:
    """Memory in use, the same less the result bytes ever stored at that moment, the limit for new jobs and the server's
    own (0: none).

    The script adds the result bytes stored by now, so a sample that is a second old still counts every picture.
    """

    used_bytes: int
    base_bytes: int
    limit_bytes: int
    maxmemory_bytes: int


class MemoryGauge:
    """Samples the server's memory at most once a second, however many jobs ask."""

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection
        self._sample: MemorySample | None = None
        self._taken_at = float("-inf")

    async def sample(self) -> MemorySample:
        if self._sample is None or time.monotonic() - self._taken_at > SAMPLE_AGE_S:
            # Callers that come meanwhile use the old sample.
            self._taken_at = time.monotonic()
            info, stored = await self._connection.transaction(
                ("INFO", "memory"), ("HGET", self._connection.keys.counters, "stored_bytes")
            )
            used, maxmemory = int(info["used_memory"]), int(info.get("maxmemory", 0))
            self._sample = MemorySample(used, used - int(stored or 0), int(maxmemory * MEMORY_SHARE), maxmemory)
        return self._sample
