"""A worker process: claim jobs, run them through the engine, publish what comes out.

Redis I/O runs on an asyncio loop in the main thread, ticks on the engine's own thread. Nothing here touches tensors.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import faulthandler
import functools
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import structlog

from darkroom import metrics, tracing
from darkroom.config import Settings
from darkroom.engine.engine import Engine
from darkroom.engine.events import Cancelled, Event, Expired, Failed, Finished, TickReport
from darkroom.engine.pulse import Phase
from darkroom.errors import EXIT_HUNG, DeviceLost, QueueUnavailable, ResultStoreUnavailable
from darkroom.jobs import Failure, Job, Priority, Result
from darkroom.queue import JobQueue
from darkroom.worker.observe import Rates, observe_end, observe_state, observe_tick, trace_end, trace_tick
from darkroom.worker.outages import every, pause, until_answered
from darkroom.worker.reports import Reports

log = structlog.get_logger("darkroom.worker")

WAKE_TIMEOUT_S = 2.0
# A drain must fit into what a supervisor grants. So long after its beginning it waits no more for a claim under way,
# the tick under way, results under way, and jobs being handed back.
CLAIM_STOP_S = 0.4
ENGINE_STOP_S = 1.1
PUBLISH_STOP_S = 1.5
HAND_BACK_STOP_S = 2.0
MAX_EARLY_CANCELLATIONS = 1024
FULL_POLL_S = 0.5
SHARE_PAUSE_S = 0.05
# A lease that was renewed in time is never this near to its end, so only lost ones are looked at as often.
REAP_PAUSE_S = 0.1
WATCH_INTERVAL_S = 1.0
CANCEL_AGAIN_S = 0.2


def worker_id() -> str:
    """Unique per process and start, readable in logs."""
    return f"{socket.gethostname()[:32]}-{os.getpid()}-{time.time_ns() // 1_000_000 % 100_000_000}"


class Worker:
    """Runs one engine against one queue until it is told to drain."""

    def __init__(
        self,
        settings: Settings,
        queue: JobQueue,
        make_engine: Callable[..., Engine],
        end_process: Callable[[int], None] = os._exit,
    ) -> None:
        self._end_process = end_process
        self._settings = settings
        self._queue = queue
        self.id = worker_id()
        self._loop = asyncio.get_running_loop()
        self._engine_ready = asyncio.Event()
        self._held: dict[str, Job] = {}
        self._reports = Reports(settings, queue, self.id, self._held)
        self._engine = make_engine(
            worker=self.id,
            on_event=self._from_engine,
            on_tick=self._ticked,
            on_saved=self._reports.saved,
            on_preview=self._reports.previewed,
            on_ready=lambda: self._loop.call_soon_threadsafe(self._engine_ready.set),
        )
        self._models = sorted(self._engine.models)
        self._rates = Rates()
        metrics.MAX_MODEL_ROWS.set(self._engine.batcher.max_model_rows)
        metrics.RESIDENT_ROWS.set_function(self._engine.resident_model_rows)
        observe_state("starting")
        self._claimed_s: dict[tuple[str, int], float] = {}
        self._traces: dict[tuple[str, int], tracing.JobTrace] = {}
        self._lost: set[tuple[str, int]] = set()
        self._ending: set[tuple[str, int]] = set()
        # A job may be cancelled between the script that claims it and that script's reply.
        self._early_cancellations: dict[str, bool] = {}
        self._overdue: Phase | None = None
        self._claiming = asyncio.Lock()
        self._registered = asyncio.Event()
        self._room = asyncio.Event()
        self._idle = asyncio.Event()
        self._drain = asyncio.Event()
        self._publishing: set[asyncio.Task[None]] = set()

    @property
    def is_draining(self) -> bool:
        return self._drain.is_set()

    def drain(self) -> None:
        """Stop claiming, hand unfinished jobs back, let `run` return."""
        observe_state("draining")
        self._drain.set()

    async def run(self, on_ready: Callable[[], None] | None = None) -> None:
        """Serve until `drain`. Every held job is then settled or handed back.

        Raises what broke the engine. Its jobs are handed back then as well, but those that may have broken it count a
        failure, so that one that breaks every engine is not tried for ever.
        """
        engine = self._start_engine()
        tasks = [
            asyncio.create_task(loop)
            for loop in (
                self._stay_registered(on_ready),
                self._claim_loop(),
                every(self._settings.lease_s / 3, self._renew),
                self._reap(),
                self._follow_cancellations(),
                every(WATCH_INTERVAL_S, self._watch_engine),
                *self._reports.loops(self._engine),
            )
        ]
        drained = asyncio.create_task(self._drain.wait())
        try:
            ends: list[asyncio.Future[Any]] = [drained, engine, *tasks]
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for ended in done - {drained}:
                ended.result()
        finally:
            self._drain.set()
            await self._stop([drained, *tasks], engine)

    def _start_engine(self) -> asyncio.Future[None]:
        """Run the engine on a daemon thread: the process may end while a long tick is under way."""
        ended: asyncio.Future[None] = self._loop.create_future()

        def run() -> None:
            error: BaseException | None = None
            try:
                self._engine.run()
            except BaseException as broke:
                error = broke
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(settle, error)

        def settle(error: BaseException | None) -> None:
            if error is None:
                ended.set_result(None)
            else:
                ended.set_exception(error)

        threading.Thread(target=run, name="engine", daemon=True).start()
        return ended

    async def _stop(self, tasks: list[asyncio.Task[Any]], engine: asyncio.Future[None]) -> None:
        began_s = self._loop.time()

        def left_s(stop_s: float) -> float:
            return max(0.0, began_s + stop_s - self._loop.time())

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(left_s(CLAIM_STOP_S)), self._claiming:
                pass
        # Again and again: a cancellation that meets a command's last byte may get lost in the client library.
        while tasks := [task for task in tasks if not task.done()]:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=CANCEL_AGAIN_S)
        self._engine.stop()
        await asyncio.wait([engine], timeout=left_s(ENGINE_STOP_S))
        # Callbacks that the engine's threads scheduled before they ended run now.
        await asyncio.sleep(0)
        if self._publishing:
            await asyncio.wait(self._publishing, timeout=left_s(PUBLISH_STOP_S))
        error = engine.exception() if engine.done() else None
        # Any job that was there may have broken the engine; a device is lost by what was under way.
        to_blame = error.job_ids if isinstance(error, DeviceLost) else set(self._held) if error else set()
        held = list(self._held.values())
        try:
            # A server that says nothing is not waited for: its leases run out.
            async with asyncio.timeout(left_s(HAND_BACK_STOP_S)):
                try:
                    await self._reports.keep_checkpoints()
                except QueueUnavailable as refusal:
                    # At its memory limit Redis takes no states, but jobs.
                    log.warning("checkpoints_not_kept", worker=self.id, reason=str(refusal))
                outcomes = await asyncio.gather(
                    *(self._queue.hand_back(self.id, job, is_failure=job.id in to_blame) for job in held),
                    return_exceptions=True,
                )
                await self._queue.unregister(self.id)
                for outcome in outcomes:
                    if isinstance(outcome, BaseException):
                        raise outcome
        except (QueueUnavailable, TimeoutError) as outage:
            log.warning("jobs_not_handed_back", worker=self.id, jobs=sorted(self._held), reason=str(outage))
        for (job_id, _), trace in self._traces.items():
            trace.end("lost" if job_id in to_blame else "handed_back")
        log.info("worker_stopped", worker=self.id, handed_back=len(held), to_blame=len(to_blame))

    async def _stay_registered(self, on_ready: Callable[[], None] | None) -> None:
        await self._engine_ready.wait()
        await until_answered(lambda: self._queue.register(self.id, [m.card for m in self._engine.models.values()]))
        self._registered.set()
        observe_state("draining" if self.is_draining else "ready")
        log.info("worker_ready", worker=self.id, models=self._models)
        if on_ready is not None:
            on_ready()
        await every(1.0, self._heartbeat)

    async def _heartbeat(self) -> None:
        self._reports.is_watched = await self._queue.heartbeat(self.id, self._rates.by_model())

    async def _claim_loop(self) -> None:
        wake: asyncio.Task[Any] | None = None
        idle: asyncio.Task[Any] | None = None
        await self._registered.wait()
        try:
            while not self._drain.is_set():
                self._room.clear()
                self._idle.clear()
                room = self._engine.batcher.max_model_rows - self._engine.resident_model_rows()
                claimed = await self._claim(room)
                if room <= 0:
                    # Woken early by a row that leaves; an urgent class is noticed by asking again.
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(FULL_POLL_S):
                            await self._room.wait()
                    continue
                # After a claim, other workers get a moment to take their share of what is left. After one that brought
                # nothing there is no backlog, and only a new job matters.
                wake = wake or asyncio.create_task(self._wait_for_work())
                signs = [wake]
                if self._queue.must_be_free_first(self.id):
                    idle = asyncio.create_task(self._idle.wait())
                    signs.append(idle)
                await asyncio.wait(
                    signs, timeout=SHARE_PAUSE_S if claimed else None, return_when=asyncio.FIRST_COMPLETED
                )
                if wake.done():
                    wake = None
                if idle is not None:
                    idle.cancel()
        finally:
            for task in (wake, idle):
                if task is not None:
                    task.cancel()

    async def _wait_for_work(self) -> None:
        try:
            await self._queue.wait_for_work(self._models, WAKE_TIMEOUT_S)
        except QueueUnavailable as error:
            await pause(error)

    async def _claim(self, room: int) -> int:
        """Claim what fits into `room` model rows; without room, only jobs more urgent than the least urgent held, and
        one for each tenant that has none here."""
        min_rank = 0
        if room <= 0:
            min_rank = 1 + min((job.priority.rank for job in self._held.values()), default=Priority.HIGH.rank)
            if room <= -self._engine.batcher.max_model_rows:
                return 0
        try:
            async with self._claiming:
                jobs = await self._queue.claim(
                    self.id,
                    self._models,
                    max_jobs=max(1, room),
                    max_model_rows=max(1, room),
                    min_rank=min_rank,
                    held=self._held.values(),
                )
                jobs = [job for job in jobs if not await self._has_already(job)]
                for job in jobs:
                    metrics.JOBS_CLAIMED.labels("again" if job.attempt > 1 else "first").inc()
                    if job.id in self._held:
                        self._drop_lost(self._held[job.id])
                    self._held[job.id] = job
                    self._claimed_s[job.id, job.attempt] = claimed_s = time.monotonic()
                    if (trace := tracing.follow(job, claimed_s)) is not None:
                        self._traces[job.id, job.attempt] = trace
                # From here on they are handed back, whatever happens.
                for job in jobs:
                    # An outage is waited out: without its pictures the job cannot be drawn.
                    inputs = await until_answered(functools.partial(self._queue.inputs, job))
                    self._submit(job, await self._checkpoints(job), inputs)
        except QueueUnavailable as error:
            await pause(error)
            return 0
        return len(jobs)

    async def _has_already(self, job: Job) -> bool:
        """Whether this very attempt is here: a server that has lost our claim, by a failover or an old snapshot, gives
        it once more. If we are at it, we go on; if we have given it up meanwhile, it goes back, for a new attempt."""
        attempt = (job.id, job.attempt)
        if attempt in self._lost:
            await self._queue.hand_back(self.id, job)
            return True
        return self._holds(*attempt)

    async def _checkpoints(self, job: Job) -> dict[int, bytes]:
        """What an earlier attempt left; without it the job starts anew, which is only slower."""
        try:
            return await self._queue.checkpoints(job)
        except QueueUnavailable as error:
            log.warning("checkpoints_not_read", job_id=job.id, reason=str(error), **tracing.log_fields(job))
            return {}

    def _submit(self, job: Job, checkpoints: dict[int, bytes], inputs: dict[str, bytes]) -> None:
        deadline_in_s = None
        if job.deadline_at_ms is not None:
            deadline_in_s = (job.deadline_at_ms - job.claimed_at_ms) / 1000
        self._engine.submit(job, deadline_in_s=deadline_in_s, checkpoints=checkpoints, inputs=inputs)
        model = job.request.model
        log.info("job_claimed", job_id=job.id, attempt=job.attempt, model=model, **tracing.log_fields(job))
        if job.id in self._early_cancellations:
            self._cancel(job.id, job.attempt, keep=self._early_cancellations.pop(job.id))

    async def _watch_engine(self) -> None:
        """End a process whose engine hangs, with all stacks in the log. Its leases were not renewed meanwhile.

        What is overdue must be so at two looks: a process that was stopped as a whole (SIGSTOP, a frozen container)
        finds it so when it wakes, and goes on.
        """
        phase = self._engine.pulse.overdue()
        if phase is None or phase is not self._overdue:
            self._overdue = phase
            return
        allowed_s, jobs = round(phase.allowed_s, 1), sorted(self._held)
        log.error("engine_hangs", worker=self.id, phase=phase.kind, allowed_s=allowed_s, jobs=jobs)
        faulthandler.dump_traceback(all_threads=True)
        self._end_process(EXIT_HUNG)

    async def _renew(self) -> None:
        # One that hangs must lose its jobs, however well this thread is.
        if not self._held or self._engine.pulse.overdue() is not None:
            return
        held = {job.id: job.attempt for job in self._held.values()}
        renewal = await self._queue.renew(self.id, held)
        for job_id in renewal.lost:
            if self._holds(job_id, held[job_id]):  # else it ended while the renewal was under way
                self._drop_lost(self._held[job_id])
        for job_id in renewal.cancelled:
            self._cancel(job_id, held[job_id], keep=False)
        for job_id in renewal.cut_short:
            self._cancel(job_id, held[job_id], keep=True)

    def _drop_lost(self, job: Job) -> None:
        """Spend nothing more on an attempt whose lease ran out, if it is not at its end already."""
        attempt = (job.id, job.attempt)
        if attempt not in self._ending:
            metrics.LEASES_LOST.inc()
            log.warning("lease_lost", job_id=job.id, **tracing.log_fields(job))
            self._lost.add(attempt)
            self._engine.cancel(*attempt)

    def _cancel(self, job_id: str, attempt: int, *, keep: bool) -> None:
        (self._engine.cut_short if keep else self._engine.cancel)(job_id, attempt)

    def _holds(self, job_id: str, attempt: int) -> bool:
        return job_id in self._held and self._held[job_id].attempt == attempt

    async def _reap(self) -> None:
        """Take back the jobs of lost workers as their leases run out."""
        while True:
            pause_s = self._settings.lease_s / 3
            try:
                reaped = await self._queue.reap()
            except QueueUnavailable as error:
                await pause(error)
            else:
                if reaped.requeued or reaped.dead:
                    log.warning("jobs_reaped", requeued=reaped.requeued, dead=reaped.dead)
                if reaped.next_lease_s is not None:
                    pause_s = min(pause_s, max(REAP_PAUSE_S, reaped.next_lease_s))
            await asyncio.sleep(pause_s)

    async def _follow_cancellations(self) -> None:
        while True:
            try:
                async for job_id, keep in self._queue.cancellations(self.id):
                    if job_id in self._held:
                        self._cancel(job_id, self._held[job_id].attempt, keep=keep)
                        continue
                    self._early_cancellations[job_id] = keep
                    while len(self._early_cancellations) > MAX_EARLY_CANCELLATIONS:
                        del self._early_cancellations[next(iter(self._early_cancellations))]
            except QueueUnavailable as error:
                await pause(error)

    def _ticked(self, report: TickReport) -> None:
        """Engine thread: note it and go on."""
        observe_tick(report)
        self._loop.call_soon_threadsafe(self._note_tick, report)

    def _note_tick(self, report: TickReport) -> None:
        self._rates.note(report)
        if self._traces:
            trace_tick(report, self._traces)
        self._reports.note_progress(report)
        if report.left:
            self._room.set()

    def _from_engine(self, event: Event) -> None:
        """Engine threads: hand a terminal event to the loop."""
        self._loop.call_soon_threadsafe(self._start_publishing, event)

    def _start_publishing(self, event: Event) -> None:
        self._reports.forget_progress(event.job.id)
        self._ending.add((event.job.id, event.job.attempt))
        self._room.set()
        task = self._loop.create_task(self._publish(event))
        self._publishing.add(task)
        task.add_done_callback(self._publishing.discard)

    async def _publish(self, event: Event) -> None:
        """Store a job's end and stop holding it, whatever happens: a job that stays held is never tried again."""
        try:
            if (event.job.id, event.job.attempt) not in self._lost:
                await self._settle(event)
        except Exception:
            log.exception("job_not_settled", job_id=event.job.id, **tracing.log_fields(event.job))
        finally:
            self._forget(event.job)

    async def _settle(self, event: Event) -> None:
        """A refusal by the script means that somebody else holds the job: nothing to do."""
        job, settling_since_s = event.job, time.monotonic()
        if isinstance(event, Finished):
            event = await self._with_stored_images(event)
        if isinstance(event, Finished):
            result, images = event.result, event.images
            stored = await until_answered(lambda: self._queue.succeed(self.id, job, result, images))
            outcome = "succeeded"
        elif isinstance(event, Cancelled):
            stored = await until_answered(lambda: self._queue.acknowledge_cancel(self.id, job))
            outcome = "cancelled"
        elif isinstance(event, Expired):
            stored = await until_answered(lambda: self._queue.expire(self.id, job))
            outcome = "expired"
        else:
            failure = event.failure
            stored = await until_answered(lambda: self._queue.fail(self.id, job, failure))
            outcome = "failed"
        if stored:
            observe_end(event, outcome, time.monotonic() - self._claimed_s[job.id, job.attempt])
            if (trace := self._traces.get((job.id, job.attempt))) is not None:
                trace_end(trace, event, outcome, settling_since_s)
        log.info("job_ended", job_id=job.id, outcome=outcome, stored=stored, **tracing.log_fields(job))

    async def _with_stored_images(self, event: Finished) -> Finished | Failed:
        """The event once its pictures are in the result store, if there is one, or the failure that they are not. The
        lease is renewed meanwhile, because the job is still held."""
        try:
            result = await self._queue.store_images(event.job, with_queue_time(event), event.images)
        except ResultStoreUnavailable as error:
            return Failed(event.job, Failure(code=error.code, message=str(error)))
        return dataclasses.replace(event, result=result)

    def _forget(self, job: Job) -> None:
        """Stop holding this attempt; a later attempt at the same job may be held by now."""
        self._lost.discard((job.id, job.attempt))
        self._ending.discard((job.id, job.attempt))
        self._claimed_s.pop((job.id, job.attempt), None)
        if (trace := self._traces.pop((job.id, job.attempt), None)) is not None:
            trace.end("lost")
        if self._holds(job.id, job.attempt):
            del self._held[job.id]
            if not self._held:
                self._idle.set()


def with_queue_time(event: Finished) -> Result:
    """The engine's manifest, completed with what only the queue record knows."""
    queue_s = (event.job.claimed_at_ms - event.job.created_at_ms) / 1000
    timings = msgspec.structs.replace(event.result.timings, queue_s=queue_s)
    return msgspec.structs.replace(event.result, timings=timings)
