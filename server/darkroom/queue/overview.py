"""The service as a whole: which models and workers there are, what they have in hand, and how full the queue is."""

from __future__ import annotations

import asyncio
import contextlib
import time

from darkroom.errors import JobError
from darkroom.jobs import BatchView, JobState, ModelCard, Priority, decode
from darkroom.queue.admission import MemoryGauge, MemorySample
from darkroom.queue.client_side import HEAD_START_S
from darkroom.queue.connection import RedisConnection
from darkroom.queue.records import LOOK_MS, Cards, QueueStats, WorkerInfo, pairs

_CARDS_AGE_S = 1.0
_BATCHES_AGE_S = 0.2
# For how long a model without a worker still takes jobs: one that is started again finds them waiting.
MODEL_GRACE_S = 60.0


class Overview:
    def __init__(self, connection: RedisConnection, memory: MemoryGauge) -> None:
        self._connection = connection
        self._memory = memory
        self._cards = Cards({}, {}, {})
        self._cards_read_at = float("-inf")
        self._batches: list[BatchView] = []
        self._batches_read_at = float("-inf")
        self._looking = asyncio.Lock()

    async def cards(self) -> Cards:
        """The models that workers serve or have served lately; up to a second old. A card this release cannot read is
        left out."""
        if time.monotonic() - self._cards_read_at > _CARDS_AGE_S:
            stored = await self._connection.script("cards")
            cards = Cards({}, {}, {})
            for model, data, idle_ms in sorted(zip(stored[::3], stored[1::3], stored[2::3], strict=True)):
                try:
                    card = decode(data, ModelCard)
                except JobError:
                    continue
                cards.known[model.decode()] = card
                if idle_ms <= MODEL_GRACE_S * 1000:
                    cards.recent[model.decode()] = card
                if idle_ms < 0:
                    cards.live[model.decode()] = card
            self._cards, self._cards_read_at = cards, time.monotonic()
        return self._cards

    async def live_workers(self) -> list[WorkerInfo]:
        """Workers whose heartbeat is fresh, by id."""
        keys = self._connection.keys
        names: list[bytes] = await self._connection.command("ZRANGE", keys.workers, 0, -1)
        if not names:
            return []
        # A worker's own key expires with its heartbeat; the index may still hold its name.
        infos = await self._connection.command("MGET", *(keys.worker(name.decode()) for name in sorted(names)))
        return [decode(info, WorkerInfo) for info in infos if info is not None]

    async def batches(self) -> list[BatchView]:
        """What the live workers have in hand, by their names; a fifth of a second old at most.

        Workers tell it only to those who look on: a first look may find nothing yet, and one must look again within
        `LOOK_MS`. A batch this release cannot read is left out.
        """
        async with self._looking:
            if time.monotonic() - self._batches_read_at > _BATCHES_AGE_S:
                batches = []
                for told in await self._connection.script("watch", LOOK_MS):
                    with contextlib.suppress(JobError):
                        batches.append(decode(told, BatchView))
                self._batches, self._batches_read_at = batches, time.monotonic()
        return self._batches

    async def memory(self) -> MemorySample:
        """What the server's memory is used for; up to a second old."""
        return await self._memory.sample()

    async def stats(self) -> QueueStats:
        """Depth, backlog, jobs in flight, oldest wait, counters, reservations and live workers at one moment."""
        head_starts = (HEAD_START_S[priority] * 1_000_000 for priority in Priority)
        reply = await self._connection.script("stats", *head_starts)
        models, in_flight, oldest_ms, now_ms, counters, live_workers, dead_letters, num_tenants, largest = reply
        counts = {name.decode(): int(value) for name, value in pairs(counters).items()}
        ends = ["accepted", *(state.value for state in JobState if state.is_terminal)]
        return QueueStats(
            depth={model.decode(): depth for model, depth, *_ in models},
            backlog_s={
                model.decode(): cost / (float(rate) * max(1, serving))
                for model, _, cost, serving, rate in models
                if rate and float(rate) > 0
            },
            in_flight=in_flight,
            oldest_wait_s=max(0.0, (now_ms - oldest_ms) / 1000) if oldest_ms != b"" else 0.0,
            counters={name: counts.get(name, 0) for name in ends},
            reserved_bytes=counts.get("reserved_bytes", 0),
            live_workers=live_workers,
            dead_letters=dead_letters,
            num_tenants=num_tenants,
            largest_tenant=largest,
        )
