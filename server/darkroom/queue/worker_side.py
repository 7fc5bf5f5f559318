"""The queue as a worker sees it: claim, renew, settle, hand back, reap."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from typing import cast

import structlog

from darkroom import metrics
from darkroom.errors import JobError, QueueUnavailable
from darkroom.jobs import BatchView, Failure, Job, JobState, ModelCard, Previews, Result, encode
from darkroom.queue.connection import BLOCK_S, RedisConnection, is_out_of_memory
from darkroom.queue.notices import Notices
from darkroom.queue.records import LOOK_MS, PREVIEW_TTL_MS, Reaped, Renewal, WorkerInfo, job_of
from darkroom.queue.results import ResultStore

log = structlog.get_logger(__name__)

_REAP_BATCH = 100
_MAX_DEAD_LETTERS = 1000
# From here on two copies of the pictures cost the server more than the commands that avoid them.
_STAGED_BYTES = 32 << 10


class WorkerSide:
    def __init__(
        self,
        connection: RedisConnection,
        notices: Notices,
        results: ResultStore | None,
        *,
        lease_s: float,
        result_ttl_s: float,
        job_ttl_s: float,
        suspect_failures: int,
    ) -> None:
        self._connection = connection
        self._notices = notices
        self._results = results
        self._alive_ms = int(max(lease_s, 3.0) * 1000)
        self._result_ttl_ms = int(result_ttl_s * 1000)
        self._job_ttl_ms = int(job_ttl_s * 1000)
        self._suspect_failures = suspect_failures
        self._registered: dict[str, list[bytes | str]] = {}
        self._claim_tokens: dict[str, str] = {}
        self._free_first: set[str] = set()

    async def register(self, worker_id: str, cards: Iterable[ModelCard]) -> None:
        """Offer models. The worker counts as alive while `heartbeat` is called at least every few seconds."""
        by_model = {card.id: card for card in cards}
        info = WorkerInfo(id=worker_id, models=sorted(by_model), started_at_ms=int(time.time() * 1000))
        described: list[bytes | str] = [encode(info)]
        for model, card in sorted(by_model.items()):
            described += [model, encode(card)]
        self._registered[worker_id] = described
        await self.heartbeat(worker_id)

    async def heartbeat(self, worker_id: str, rates: Mapping[str, float] | None = None) -> bool:
        """Stay alive for another lease time. Registers again if the server has lost us. Returns whether someone looks
        on at the batches.

        `rates` says what cost per second the worker makes when its ticks are full, for models where it knows.
        """
        info, *described = self._registered[worker_id]
        by_model: list[bytes | str | float] = []
        for model, card in zip(described[::2], described[1::2], strict=True):
            by_model += [model, card, (rates or {}).get(str(model), "")]
        is_watched = await self._connection.script("heartbeat", worker_id, self._alive_ms, info, *by_model)
        return bool(is_watched)

    async def tell_batch(self, worker_id: str, batch: BatchView) -> None:
        """Tell those who look on what this worker has in hand."""
        await self._connection.command("SET", self._connection.keys.batch(worker_id), encode(batch), "PX", LOOK_MS)

    async def unregister(self, worker_id: str) -> None:
        """Stop counting as a live worker; the models stay known."""
        models = self._registered.pop(worker_id, [b""])[1::2]
        self._claim_tokens.pop(worker_id, None)
        await self._connection.script("unregister", worker_id, *models)

    async def forget_workers(self) -> None:
        """Count no worker as alive until its next heartbeat. For a start that knows of none: those of an earlier life
        that was killed would count for another lease time."""
        await self._connection.script("forget_workers")

    async def wait_for_work(self, models: Sequence[str], timeout_s: float) -> bool:
        """Sleep until a job for one of `models` may be ready; False after `timeout_s` without a sign of one."""
        keys = [self._connection.keys.notify(model) for model in models]
        ends_at = time.monotonic() + timeout_s
        while (left_s := ends_at - time.monotonic()) > 0:
            # Zero would mean for ever.
            if await self._connection.command("BLPOP", *keys, max(0.01, min(left_s, BLOCK_S))):
                return True
        return False

    async def claim(
        self,
        worker_id: str,
        models: Sequence[str],
        max_jobs: int,
        max_model_rows: int,
        min_rank: int = 0,
        held: Collection[Job] = (),
    ) -> list[Job]:
        """Lease up to `max_jobs` jobs, most urgent first, each with its fencing token in `attempt`.

        The first job may be larger than `max_model_rows` (model rows: images, twice that with guidance), those after it
        fit. A full worker passes `min_rank` to ask only for more urgent classes, and for a job of a tenant of whose
        jobs it holds none. No more than this worker's share of the backlog is taken. `held` is what the worker has: a
        job with which `suspect_failures` workers were lost is given only to one that has nothing, and by itself, so
        that it takes no others along. Jobs that are past their deadline, or cannot be read, are settled on the way. A
        claim whose reply was lost is repeated by the next call, which then returns the jobs of the lost one.
        """
        if max_jobs < 1 or max_model_rows < 1:
            return []
        token = self._claim_tokens.setdefault(worker_id, secrets.token_hex(8))
        holds_suspect = any(job.failures >= self._suspect_failures for job in held)
        holds = "nothing" if not held else "suspect" if holds_suspect else "jobs"
        replies = await self._connection.script(
            "claim",
            worker_id,
            token,
            max_jobs,
            max_model_rows,
            min_rank,
            holds,
            len(models),
            *models,
            *({job.tenant for job in held} if min_rank else ()),
        )
        del self._claim_tokens[worker_id]
        self._free_first.discard(worker_id)
        if replies == [b"free_first"]:
            self._free_first.add(worker_id)
            return []
        jobs = []
        for job_id, payload, attempt, failures, created_ms, deadline_ms, claimed_ms, num_checkpoints, looks in replies:
            try:
                job = job_of(
                    payload,
                    created_ms=created_ms,
                    claimed_ms=claimed_ms,
                    deadline_ms=int(deadline_ms) if deadline_ms else None,
                    attempt=attempt,
                    failures=failures,
                    num_checkpoints=num_checkpoints,
                    previews=looks.decode(),
                )
            except JobError as error:
                log.warning("job_unreadable", job_id=job_id.decode(), error=str(error))
                failure = Failure(code=error.code, message=str(error))
                try:
                    await self._settle(worker_id, job_id.decode(), attempt, JobState.FAILED, failure=failure)
                except QueueUnavailable as outage:
                    # The others must not be lost with it. Its lease runs out, and a later claim meets it again.
                    log.warning("job_not_settled", job_id=job_id.decode(), reason=str(outage))
            else:
                jobs.append(job)
        return jobs

    def must_be_free_first(self, worker_id: str) -> bool:
        """Whether a worker's last claim brought nothing because it holds something, and a suspect is there or waits. It
        should claim again as soon as it holds nothing."""
        return worker_id in self._free_first

    async def renew(self, worker_id: str, held: Mapping[str, int]) -> Renewal:
        """Keep the leases of `held`, job id → attempt."""
        if not held:
            return Renewal()
        flat = [part for item in held.items() for part in item]
        answers = dict(zip(held, await self._connection.script("renew", worker_id, *flat), strict=True))
        return Renewal(
            lost={job_id for job_id, answer in answers.items() if answer == 0},
            cancelled={job_id for job_id, answer in answers.items() if answer == 2},
            cut_short={job_id for job_id, answer in answers.items() if answer == 3},
        )

    async def progress(
        self, worker_id: str, updates: Sequence[tuple[str, int, int, int]]
    ) -> dict[tuple[str, int], Previews]:
        """Record (job id, attempt, step, num_steps) of running jobs, in one round trip. Returns what those who watch
        want to see, by job id and attempt. Lost jobs are left alone."""
        if not updates:
            return {}
        looks = await self._connection.script("progress", worker_id, *(part for update in updates for part in update))
        return {update[:2]: look.decode() for update, look in zip(updates, looks, strict=True) if look}

    async def show(self, worker_id: str, previews: Mapping[tuple[str, int, int], tuple[int, bytes]]) -> None:
        """Show previews (step, JPEG) of running images by (job id, attempt, image index), in one round trip. Those of
        lost jobs are dropped."""
        if previews:
            parts = ((*image, *preview) for image, preview in previews.items())
            await self._connection.script("preview", worker_id, PREVIEW_TTL_MS, *(part for p in parts for part in p))

    async def keep_checkpoints(self, worker_id: str, states: Mapping[tuple[str, int, int], bytes]) -> None:
        """Keep the packed state of running images, by (job id, attempt, image index), in one round trip. Those of lost
        jobs are dropped."""
        if not states:
            return
        keys, ttl_ms = self._connection.keys, self._job_ttl_ms
        staged = [("SET", keys.staged(*image), state, "PX", ttl_ms) for image, state in states.items()]
        await self._connection.script_after(
            staged, "checkpoint", worker_id, *(part for image in states for part in image)
        )

    async def checkpoints(self, job: Job) -> dict[int, bytes]:
        """What an earlier attempt at a claimed job left, by image index."""
        if not job.num_checkpoints:
            return {}
        keys = [self._connection.keys.checkpoint(job.id, index) for index in range(job.num_checkpoints)]
        states: list[bytes | None] = await self._connection.command("MGET", *keys)
        return {index: state for index, state in enumerate(states) if state is not None}

    async def check_result_store(self) -> None:
        """See that pictures can be written. Raises `ConfigError` when the result store refuses them."""
        if self._results is not None:
            await self._results.check()

    async def store_images(self, job: Job, result: Result, images: Sequence[bytes]) -> Result:
        """Bring a job's pictures to where `succeed` expects them and return the manifest to give it: into the result
        store, if there is one. Keep renewing the lease meanwhile. Raises `ResultStoreUnavailable`."""
        return result if self._results is None else await self._results.store(job, result, images)

    async def succeed(self, worker_id: str, job: Job, result: Result, images: Sequence[bytes]) -> bool:
        """Store a job's pictures, or the place that `store_images` gave them, and end it, if this attempt still owns
        it; False if not. Harmless to repeat."""
        in_redis = images if not result.location else ()
        stored = await self._settle(worker_id, job.id, job.attempt, JobState.SUCCEEDED, result=result, images=in_redis)
        if not stored and result.location and self._results is not None:
            await self._results.discard(result)
        return stored

    async def fail(self, worker_id: str, job: Job, failure: Failure) -> bool:
        """End a job without pictures, if this attempt still owns it. Harmless to repeat."""
        return await self._settle(worker_id, job.id, job.attempt, JobState.FAILED, failure=failure)

    async def acknowledge_cancel(self, worker_id: str, job: Job) -> bool:
        """Say that a cancelled job has left, if this attempt still owns it. Harmless to repeat."""
        return await self._settle(worker_id, job.id, job.attempt, JobState.CANCELLED)

    async def expire(self, worker_id: str, job: Job) -> bool:
        """End a running job that is past its deadline, if this attempt still owns it. Harmless to repeat."""
        return await self._settle(worker_id, job.id, job.attempt, JobState.EXPIRED)

    async def hand_back(self, worker_id: str, job: Job, *, is_failure: bool = False) -> bool:
        """Put a job back at its old place, if this attempt still owns it. `is_failure` counts it as a lost worker does:
        the job may be what took the device away."""
        counted = int(is_failure)
        handed = await self._connection.script("hand_back", job.id, worker_id, job.attempt, counted, _MAX_DEAD_LETTERS)
        metrics.DEAD_LETTERS.inc(handed == 2)
        return bool(handed)

    async def reap(self) -> Reaped:
        """Take back jobs of lost workers, end overdue ones and cancel abandoned ones. Any process may call it at any
        time."""
        *lists, left_ms = await self._connection.script("reap", _REAP_BATCH, _MAX_DEAD_LETTERS)
        requeued, dead, cancelled, expired, abandoned = ([job_id.decode() for job_id in ids] for ids in lists)
        next_lease_s = None if left_ms < 0 else left_ms / 1000
        reaped = Reaped(requeued, dead, cancelled, expired, abandoned, next_lease_s)
        metrics.REDELIVERIES.inc(len(reaped.requeued))
        metrics.DEAD_LETTERS.inc(len(reaped.dead))
        metrics.JOBS_ABANDONED.inc(len(reaped.abandoned))
        return reaped

    async def looks(self, worker_id: str) -> AsyncIterator[tuple[str, int, Previews]]:
        """(job id, attempt, what is wanted) of this worker's jobs as somebody begins to watch them. A hint: `claim` and
        `progress` say it, too."""
        messages: asyncio.Queue[str] = asyncio.Queue()
        channel = f"look:{worker_id}"
        with self._notices.listen(channel, messages.put_nowait):
            await self._notices.subscribe(channel)
            while True:
                job_id, attempt, wanted = (await messages.get()).split()
                yield job_id, int(attempt), cast("Previews", wanted)

    async def cancellations(self, worker_id: str) -> AsyncIterator[tuple[str, bool]]:
        """Ids of this worker's jobs as they are cancelled, and whether to keep what was drawn. A hint: `renew` names
        those that were missed."""
        messages: asyncio.Queue[str] = asyncio.Queue()
        channel = f"cancel:{worker_id}"
        with self._notices.listen(channel, messages.put_nowait):
            await self._notices.subscribe(channel)
            while True:
                job_id, _, how = (await messages.get()).partition(" ")
                yield job_id, how == "keep"

    async def _settle(
        self,
        worker_id: str,
        job_id: str,
        attempt: int,
        state: JobState,
        *,
        result: Result | None = None,
        failure: Failure | None = None,
        images: Sequence[bytes] = (),
    ) -> bool:
        arguments = (
            job_id,
            worker_id,
            attempt,
            state.value,
            encode(result) if result else b"",
            failure.code if failure else "",
            failure.message if failure else "",
        )
        # Replicas are waited for on the connection that the script was sent on, which a transaction does not allow.
        if sum(map(len, images)) >= _STAGED_BYTES and not self._connection.replicates:
            staged = [
                ("SET", self._connection.keys.staged(job_id, attempt, index), image, "PX", self._result_ttl_ms)
                for index, image in enumerate(images)
            ]
            try:
                return bool(await self._connection.script_after(staged, "settle", *arguments, len(staged)))
            except QueueUnavailable as error:
                # At its memory limit the server takes pictures from a script alone: room for them was reserved.
                if not is_out_of_memory(error):
                    raise
        settled, is_safe = await self._connection.replicated_script("settle", *arguments, 0, *images)
        if not is_safe:
            # The job itself is safe: after a failover it would be run again, with the same picture.
            metrics.NOT_REPLICATED.labels("result").inc()
            log.warning("result_not_replicated", job_id=job_id)
        return bool(settled)
