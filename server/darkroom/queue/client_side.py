"""The queue as the API sees it: enqueue, look, wait, cancel."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, NoReturn

from darkroom import metrics, tracing
from darkroom.errors import (
    BudgetExceeded,
    DeadlineUnmet,
    IdempotencyMismatch,
    ImageNotFound,
    InvalidRequest,
    JobNotFinished,
    JobNotFound,
    NotReplicated,
    QueueFull,
    QueueUnavailable,
    ResultStoreUnavailable,
    StorageFull,
    TenantQueueFull,
)
from darkroom.jobs import Job, JobState, JobStatus, Previews, Priority, Result, decode, encode
from darkroom.queue.admission import JOB_OVERHEAD_BYTES, MemoryGauge
from darkroom.queue.api_keys import KeyStore
from darkroom.queue.callers import Callers
from darkroom.queue.connection import RedisConnection
from darkroom.queue.events import read_events
from darkroom.queue.keys import digest
from darkroom.queue.left_calls import LeftCalls
from darkroom.queue.notices import Notices, wait_for
from darkroom.queue.records import (
    LOOK_MS,
    Enqueued,
    JobEvent,
    pairs,
    seconds_of,
    status_of,
)
from darkroom.queue.results import ResultStore

# Whose jobs those of a server without API keys are; nothing bounds its share.
DEFAULT_TENANT = "default"
# A class is a head start, not a rank: a waiting job of a lower class is passed only by jobs that came at most twenty
# minutes (low against high) or ten (its neighbour) after it, so nothing starves.
HEAD_START_S = {Priority.LOW: -600, Priority.NORMAL: 0, Priority.HIGH: 600}

SAFETY_POLL_S = 5.0
_OUTAGE_PAUSE_S = 0.25
# Past this, a refused caller is told this time but promised nothing.
LONGEST_PROMISE_MS = 600_000
# Clients round up to seconds, and take a moment to connect.
PROMISE_GRACE_MS = 5_000
# For how long pictures outlive a job that was never accepted because this process was lost.
_STAGED_MS = 60_000
# Before any pace is known.
UNKNOWN_WAIT_S = 5.0
# Other workers, and other callers, may change much of a longer one.
LONGEST_BUDGET_WAIT_S = 60.0


class ClientSide:
    def __init__(
        self,
        connection: RedisConnection,
        notices: Notices,
        results: ResultStore | None,
        memory: MemoryGauge,
        *,
        max_queue_jobs: int,
        tenant_queue_share: float,
        result_ttl_s: int,
    ) -> None:
        self._connection = connection
        self._notices = notices
        self._results = results
        self._max_queue_jobs = max_queue_jobs
        self._max_tenant_jobs = max(1, int(tenant_queue_share * max_queue_jobs))
        self._result_ttl_s = result_ttl_s
        self._memory = memory
        self.api_keys = KeyStore(connection)
        self.callers = Callers(connection)
        self.left_calls = LeftCalls(connection)

    async def ping(self) -> None:
        """Ask the server for a sign of life. Raises `QueueUnavailable`."""
        await self._connection.command("PING")

    async def enqueue(
        self,
        job: Job,
        *,
        result_bytes: int,
        checkpoint_bytes: int = 0,
        inputs: Mapping[str, bytes] | None = None,
        deadline_s: float | None = None,
        idempotency_key: str | None = None,
        body_hash: str = "",
        caller: str = "",
        weight: float = 1.0,
        max_waiting: int | None = None,
        cancel_when_left: bool = False,
        payer: str = "",
        max_cost: int | None = None,
    ) -> Enqueued:
        """Accept a job, for good once this returns. Harmless to repeat with the same job id.

        `result_bytes` is the most its pictures may take, unless they go to a result store, `checkpoint_bytes` the most
        that its running images may; memory for the larger is reserved until the job ends. `inputs` are the pictures
        that it begins with, by name; they are kept beside it until then. A job that still waits
        `deadline_s` seconds from now expires. With an `idempotency_key` seen before, the earlier job is returned if
        `body_hash` is the same.

        When the queue is full, `QueueFull.retry_after_s` is a promise: a caller that asks for the same then (by its
        `idempotency_key` or `body_hash`) is let in. `caller` names the connection, so that one who asks too early is
        told the same time again.

        Jobs of `job.tenant` and those of others that wait share the workers by `weight`, which
        may change from job to job. No more than `max_waiting` of them may wait; where that is left out, one tenant's
        share of the queue, or all of it where there are no tenants. Until the job ends its cost counts against the
        budget of `payer`, which may hold `max_cost` at most.

        With `cancel_when_left` the job is cancelled when for `disconnect_grace_s` nobody calls `stay`; from the moment
        on at which somebody comes back for it in another way, it is not.

        A deadline that comes before the job would be done is refused, if the workers have measured how fast they are.

        Where durability is `replicated` and too few replicas have the job in time, it is not accepted: without an
        `idempotency_key` it is taken back, with one it waits for the call to be repeated, and may be run meanwhile.

        Raises `BudgetExceeded`, `QueueFull`, `TenantQueueFull`, `StorageFull`, `DeadlineUnmet`, `InvalidRequest` for a
        deadline that an empty queue would not meet either, `IdempotencyMismatch`, `NotReplicated`, `QueueUnavailable`.
        """
        if max_waiting is None and job.tenant != DEFAULT_TENANT:
            max_waiting = self._max_tenant_jobs
        inputs = inputs or {}
        with tracing.enqueueing(job) as job:
            payload = encode(job)
            memory = await self._memory.sample()
            staged = {self._connection.keys.staged(job.id, 0, name): content for name, content in inputs.items()}
            reply, is_safe = await self._connection.replicated_script(
                "enqueue",
                job.id,
                payload,
                job.request.model,
                job.priority.rank,
                job.request.num_model_rows,
                # Checkpoints go before pictures come.
                max(checkpoint_bytes, result_bytes if self._results is None else 0)
                + sum(map(len, inputs.values()))
                + len(payload)
                + JOB_OVERHEAD_BYTES,
                "" if deadline_s is None else int(deadline_s * 1000),
                "" if idempotency_key is None else digest(idempotency_key, job.tenant),
                body_hash,
                self._max_queue_jobs,
                memory.base_bytes,
                memory.limit_bytes,
                HEAD_START_S[job.priority] * 1_000_000,
                int(job.cost),
                caller,
                LONGEST_PROMISE_MS,
                PROMISE_GRACE_MS,
                job.tenant or DEFAULT_TENANT,
                weight,
                "" if max_waiting is None else max_waiting,
                int(cancel_when_left),
                payer,
                "" if max_cost is None else max_cost,
                *inputs,
                after=[("SET", key, content, "PX", _STAGED_MS) for key, content in staged.items()],
            )
            outcome: bytes = reply[0]
            if staged and outcome != b"new":
                # They would go by themselves, but later.
                with contextlib.suppress(QueueUnavailable):
                    await self._connection.command("UNLINK", *staged)
            if outcome == b"mismatch":
                raise IdempotencyMismatch("this Idempotency-Key was used before with another body")
            if outcome == b"budget_exceeded":
                wait_s = UNKNOWN_WAIT_S if reply[2] == b"" else min(reply[2] / 1000, LONGEST_BUDGET_WAIT_S)
                raise BudgetExceeded(
                    f"this key's unfinished jobs cost {reply[1]}; {int(job.cost)} more is above its {max_cost}",
                    retry_after_s=wait_s,
                )
            if outcome == b"queue_full":
                wait_s = UNKNOWN_WAIT_S if reply[2] == b"" else reply[2] / 1000
                raise QueueFull(f"the queue is full: {reply[1]} jobs are waiting", retry_after_s=wait_s)
            if outcome == b"tenant_queue_full":
                wait_s = UNKNOWN_WAIT_S if reply[2] == b"" else min(reply[2], LONGEST_PROMISE_MS) / 1000
                raise TenantQueueFull(
                    f"{reply[1]} jobs of yours are waiting, which is as many as may; others have room",
                    retry_after_s=wait_s,
                )
            if outcome == b"storage_full":
                raise StorageFull("the memory for results is used up for now", retry_after_s=5.0)
            if outcome == b"deadline_unmet" and deadline_s is not None:
                raise _unmet(deadline_s, eta_s=reply[1] / 1000, least_s=reply[2] / 1000)
            job_id = reply[1].decode()
            if not is_safe:
                await self._refuse_unsafe(job_id, is_taken_back=outcome == b"new" and idempotency_key is None)
            tracing.mark_enqueued(job_id)
            return Enqueued(
                job_id=job_id,
                is_new=outcome == b"new",
                state=JobState(reply[2].decode()),
                position=reply[3] if reply[3] >= 0 else None,
                eta_s=seconds_of(reply[4]),
            )

    async def _refuse_unsafe(self, job_id: str, *, is_taken_back: bool) -> NoReturn:
        metrics.NOT_REPLICATED.labels("job").inc()
        if is_taken_back:
            with contextlib.suppress(QueueUnavailable):
                await self._connection.script("cancel", job_id, "")
        error = NotReplicated("too few replicas have the job: it is not accepted yet", retry_after_s=2.0)
        error.job_id = job_id
        raise error

    async def status(self, job_id: str, *, tenant: str | None = None, is_back: bool = False) -> JobStatus:
        """Look at a job; `is_back` for a client that has come for it, so that it is not abandoned.

        Here and below, a job of another tenant than `tenant` is one that does not exist; None sees all. Raises
        `JobNotFound`, `JobError` (bad_message) for a damaged record, `QueueUnavailable`.
        """
        reply = await self._connection.script("status", job_id, int(is_back), tenant or "")
        return _read_view(job_id, reply, tenant)

    async def stay(self, job_id: str) -> None:
        """Say that somebody waits for a job, or did until now."""
        await self._connection.script("stay", job_id)

    async def inputs(self, job: Job) -> dict[str, bytes]:
        """The pictures that a job begins with, by name; those that the server has lost are left out."""
        names = job.request.input_names
        if not names:
            return {}
        contents: list[bytes | None] = await self._connection.command(
            "MGET", *(self._connection.keys.input(job.id, name) for name in names)
        )
        return {name: content for name, content in zip(names, contents, strict=True) if content is not None}

    async def cancel(self, job_id: str, *, tenant: str | None = None, keep: bool = False) -> JobStatus:
        """Cancel a waiting job at once, ask the worker of a running one to drop it, leave an ended one as it is.

        With `keep` that worker makes pictures of what it has drawn by then, and the job succeeds with them.

        Returns the status after that; a running job is still `running` until its worker acknowledges. Raises as
        `status`.
        """
        return _read_view(job_id, await self._connection.script("cancel", job_id, tenant or "", int(keep)), tenant)

    async def wait(self, job_id: str, timeout_s: float) -> JobStatus:
        """Wait until a job has ended, for `timeout_s` at most, and return its status then.

        An outage of Redis within the time is waited out. Raises as `status`; `QueueUnavailable` if Redis is away at
        the end.
        """
        ends_at = time.monotonic() + timeout_s
        with self._notices.watch(job_id) as woken:
            await self._notices.subscribe("ended", timeout_s=min(timeout_s, 1.0))
            while True:
                woken.clear()
                left_s = ends_at - time.monotonic()
                try:
                    status = await self.status(job_id)
                except QueueUnavailable:
                    if left_s <= 0:
                        raise
                    await asyncio.sleep(min(left_s, _OUTAGE_PAUSE_S))
                    continue
                if status.state.is_terminal or left_s <= 0:
                    return status
                # Some spread, so that many waiters do not look in the same instant.
                await wait_for(woken, min(left_s, SAFETY_POLL_S * random.uniform(0.8, 1.2)))

    def events(self, job_id: str, after: str | None = None, *, previews: Previews = "off") -> AsyncIterator[JobEvent]:
        """A job's history from its start, or from after the event id `after`, until its end; in between the `previews`
        that are asked for, each the latest of its image: who is slow misses some.

        Close the iterator (`contextlib.aclosing`) when leaving early. Raises `JobNotFound`, and `QueueUnavailable` for
        an outage of more than half a minute.
        """
        return read_events(self._connection, self._notices, job_id, after, previews)

    async def preview(
        self, job_id: str, index: int, previews: Previews = "linear", *, tenant: str | None = None
    ) -> bytes:
        """A JPEG of what an image of a running job looked like lately. Asking makes it watched for `LOOK_MS`, so the
        first time there may be none yet. Raises `JobNotFound`, `ImageNotFound`."""
        await self.status(job_id, tenant=tenant, is_back=True)
        await self._connection.script("look", job_id, previews, LOOK_MS)
        image: bytes | None = await self._connection.command("GET", self._connection.keys.preview(job_id, index))
        if image is None:
            raise ImageNotFound(f"job {job_id} has no preview of image {index} now")
        return image

    async def images(self, job_id: str) -> list[bytes]:
        """All pictures of a succeeded job. Raises `JobNotFound`, `JobNotFinished`, `ImageNotFound`,
        `ResultStoreUnavailable`."""
        result, _ = await self._succeeded(job_id)
        if result.location:
            return await asyncio.gather(*(self._fetch(job_id, result, index) for index in range(len(result.images))))
        keys = (self._connection.keys.image(job_id, index) for index in range(len(result.images)))
        images: list[bytes | None] = await self._connection.command("MGET", *keys)
        found = [image for image in images if image is not None]
        if len(found) < len(images):
            raise ImageNotFound(f"the images of job {job_id} have expired")
        return found

    async def image(self, job_id: str, index: int, *, tenant: str | None = None) -> bytes:
        """One picture of a succeeded job. Raises as `images`."""
        keys = self._connection.keys
        image: bytes | None
        if tenant is None:
            image = await self._connection.command("GET", keys.image(job_id, index))
        else:
            image, payload = await self._connection.transaction(
                ("GET", keys.image(job_id, index)), ("HGET", keys.job(job_id), "payload")
            )
            if payload is None or decode(payload, Job).tenant != tenant:
                raise _not_found(job_id)
        if image is not None:
            return image
        result, _ = await self._succeeded(job_id, index)
        return await self._fetch(job_id, result, index)

    async def image_url(self, job_id: str, index: int, *, tenant: str | None = None) -> str | None:
        """Where to get one picture of a succeeded job without this service, for as long as it is kept; None if only
        `image` has it. Raises as `images`."""
        if self._results is None or not self._results.signs_urls:
            return None
        if tenant is not None:
            await self.status(job_id, tenant=tenant)
        result, left_s = await self._succeeded(job_id, index)
        return await self._results.signed_url(result, index, left_s) if result.location else None

    async def _fetch(self, job_id: str, result: Result, index: int) -> bytes:
        image: bytes | None = None
        if result.location:
            if self._results is None:
                raise ResultStoreUnavailable("the picture is in a result store, and this server was given none")
            image = await self._results.fetch(result, index)
        if image is None:
            raise ImageNotFound(f"image {index} of job {job_id} has expired")
        return image

    async def _succeeded(self, job_id: str, index: int = 0) -> tuple[Result, float]:
        """The manifest of a job that has image `index`, and the seconds for which a result store still keeps it.

        A bucket may keep it longer than `result_ttl_s`; it is refused here once its time is up.
        """
        state, encoded, finished_ms = await self._connection.command(
            "HMGET", self._connection.keys.job(job_id), "state", "result", "finished_ms"
        )
        if state is None:
            raise _not_found(job_id)
        if not JobState(state.decode()).is_terminal:
            raise JobNotFinished(f"job {job_id} is still {state.decode()}")
        if not encoded:
            raise ImageNotFound(f"job {job_id} has no images: it is {state.decode()}")
        result = decode(encoded, Result)
        if not 0 <= index < len(result.images):
            raise ImageNotFound(f"job {job_id} has {len(result.images)} images, numbered from 0")
        if not result.location:
            return result, 0.0
        seconds, microseconds = await self._connection.command("TIME")
        left_s = self._result_ttl_s - (seconds + microseconds / 1e6 - int(finished_ms) / 1000)
        if left_s <= 0:
            raise ImageNotFound(f"image {index} of job {job_id} has expired")
        return result, left_s

    async def sweep_results(self) -> None:
        """Remove expired pictures that would not go by themselves: those in a directory. Cheap to call often."""
        if self._results is not None:
            await self._results.sweep()


def _read_view(job_id: str, reply: Any, tenant: str | None) -> JobStatus:
    record, position, eta_ms = reply
    if not record:
        raise _not_found(job_id)
    status = status_of(pairs(record), position, seconds_of(eta_ms))
    if tenant is not None and status.job.tenant != tenant:
        raise _not_found(job_id)
    return status


def _not_found(job_id: str) -> JobNotFound:
    return JobNotFound(f"there is no job {job_id}, or its record has expired")


def _unmet(deadline_s: float, *, eta_s: float, least_s: float) -> DeadlineUnmet | InvalidRequest:
    if least_s > deadline_s:
        return InvalidRequest(
            "deadline_s", deadline_s, f"at least {least_s:.1f}, which this job takes here with nothing before it"
        )
    return DeadlineUnmet("deadline_s", deadline_s, f"at least {eta_s:.1f}", retry_after_s=eta_s - deadline_s)
