"""A worker between a real queue and a real engine."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from darkroom import metrics
from darkroom.config import Settings
from darkroom.diffusion.loader import DiffusionModel, load_model
from darkroom.engine.batcher import Choice
from darkroom.engine.checkpoint import HEADER, Checkpoint
from darkroom.engine.engine import Engine
from darkroom.engine.events import Saved
from darkroom.engine.local import generate_images
from darkroom.engine.pulse import Phase, Pulse
from darkroom.errors import EXIT_HUNG, DeviceLost, QueueUnavailable
from darkroom.jobs import BatchRow, Job, JobState, Priority, new_job_id
from darkroom.queue import EmbeddedRedis, JobQueue
from darkroom.queue.keys import Keys
from darkroom.worker import worker as worker_module
from darkroom.worker.outages import every
from darkroom.worker.reports import Reports
from darkroom.worker.worker import Worker

from tests.support.engines import job_for, request_for
from tests.support.jobs import end_lease
from tests.support.metrics import Change
from tests.support.tiny_models import write_tiny_model

REPRODUCIBLE = {"batching": "reproducible", "reproducible_rows": 4, "num_threads": 1, "encode_threads": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiffusionModel]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_model(write_tiny_model(tmp_path_factory.mktemp("model"), "sd1", seed=5))
    torch.set_num_threads(threads)


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update=REPRODUCIBLE)


@contextlib.asynccontextmanager
async def serving(
    settings: Settings, queue: JobQueue, model: DiffusionModel, make_engine: Callable[..., Engine] = Engine
) -> AsyncIterator[Worker]:
    worker = Worker(settings, queue, functools.partial(make_engine, {model.id: model}, settings))
    running = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        worker.drain()
        await asyncio.wait_for(running, 20)


def slow_engine(*arguments: object, **keywords: object) -> Engine:
    """An engine whose every tick takes at least 20 ms, so that a test can act while a job runs."""
    engine = Engine(*arguments, **keywords)  # type: ignore[arg-type]
    gate, tick = threading.Event(), engine._tick

    def slow(*rest: object) -> None:
        gate.wait(0.02)
        tick(*rest)  # type: ignore[arg-type]

    engine._tick = slow  # type: ignore[method-assign, assignment]
    return engine


def gated_engine(gate: threading.Event, *arguments: object, **keywords: object) -> Engine:
    """An engine whose ticks stand still until the gate is open."""
    engine = Engine(*arguments, **keywords)  # type: ignore[arg-type]
    tick = engine._tick
    engine._tick = lambda *rest: gate.wait(30) and tick(*rest)  # type: ignore[method-assign, assignment]
    return engine


async def enqueue(queue: JobQueue, job: Job, **options: object) -> Job:
    job = Job(id=new_job_id(), request=job.request, priority=job.priority, tenant=job.tenant)
    await queue.enqueue(job, result_bytes=1 << 20, **options)  # type: ignore[arg-type]
    return job


async def state_of(queue: JobQueue, job: Job, wanted: JobState) -> None:
    """Wait for a state that is not an end; the job's own events say when."""
    async for event in queue.events(job.id):
        if event.kind == wanted.value:
            return


async def test_a_queued_job_becomes_the_picture_that_the_engine_draws(
    settings: Settings, queue: JobQueue, model: DiffusionModel
) -> None:
    request = request_for(model, num_images_per_prompt=2)
    expected, _ = generate_images(model, request, settings)
    async with serving(settings, queue, model):
        job = await enqueue(queue, job_for(model, "", num_images_per_prompt=2))
        status = await queue.wait(job.id, 30)
    assert status.state is JobState.SUCCEEDED
    assert status.result is not None
    assert [image.seed for image in status.result.images] == [7, 8]
    assert await queue.images(job.id) == expected


async def test_jobs_that_wait_before_the_worker_starts_are_all_drawn(
    settings: Settings, queue: JobQueue, model: DiffusionModel
) -> None:
    jobs = [await enqueue(queue, job_for(model, "", seed=seed)) for seed in range(12)]
    async with serving(settings, queue, model):
        states = [(await queue.wait(job.id, 30)).state for job in jobs]
    assert states == [JobState.SUCCEEDED] * 12
    stats = await queue.stats()
    assert (stats.counters["accepted"], stats.counters["succeeded"], stats.in_flight) == (12, 12, 0)


async def looks(queue: JobQueue) -> AsyncIterator[list[BatchRow]]:
    """What the workers tell to one who looks on."""
    while True:
        yield [row for batch in await queue.batches() for row in batch.rows]
        await asyncio.sleep(0.05)


async def test_those_who_look_on_see_the_images_in_hand_and_how_far_they_are(
    settings: Settings, queue: JobQueue, model: DiffusionModel
) -> None:
    async with serving(settings, queue, model, slow_engine):
        jobs = [await enqueue(queue, job_for(model, "", num_inference_steps=500, seed=seed)) for seed in (1, 2)]
        async with asyncio.timeout(20):
            async for rows in looks(queue):
                if len(rows) == 2 and all(row.step for row in rows):
                    break
        assert {row.job_id for row in rows} == {job.id for job in jobs}
        assert {row.num_steps for row in rows} == {500}
        assert {row.state for row in rows} <= {"in_tick", "waiting"}
        for job in jobs:
            await queue.cancel(job.id)
            await queue.wait(job.id, 10)
        async with asyncio.timeout(20):
            async for rows in looks(queue):
                if not rows:
                    break


async def test_a_worker_tells_nothing_of_its_batch_while_nobody_looks_on(
    settings: Settings, queue: JobQueue, model: DiffusionModel
) -> None:
    async with serving(settings, queue, model) as worker:
        job = await enqueue(queue, job_for(model, ""))
        assert (await queue.wait(job.id, 20)).state is JobState.SUCCEEDED
        keys = queue._connection.keys
        assert await queue._connection.command("EXISTS", keys.batch(worker.id)) == 0


async def all_keys(queue: JobQueue) -> dict[bytes, bytes]:
    """All that the server knows of this queue."""
    names: list[bytes] = await queue._connection.command("KEYS", f"{queue._connection.keys.prefix}*")
    return dict(zip(names, await queue._connection.transaction(*(("DUMP", name) for name in names)), strict=True))


async def replace_all(queue: JobQueue, older: dict[bytes, bytes]) -> None:
    """Another server takes over that knows this and nothing later."""
    names = await queue._connection.command("KEYS", f"{queue._connection.keys.prefix}*")
    await queue._connection.transaction(
        ("DEL", "none", *names), *(("RESTORE", name, 0, value) for name, value in older.items())
    )


@pytest.mark.parametrize("is_given_up", [False, True], ids=["at work", "given up"])
async def test_a_claim_that_the_server_has_forgotten_is_drawn_once(
    settings: Settings, queue: JobQueue, model: DiffusionModel, is_given_up: bool
) -> None:
    """A new master that knows the job as waiting gives the worker the attempt that it holds already."""
    settings = settings.model_copy(update={"lease_s": 0.9 if is_given_up else 15.0})
    gate = threading.Event()
    steps, lost = metrics.ROW_STEPS._value.get(), metrics.LEASES_LOST._value.get()
    job = await enqueue(queue, job_for(model, ""))
    older = await all_keys(queue)
    async with serving(settings, queue, model, functools.partial(gated_engine, gate)):
        await state_of(queue, job, JobState.RUNNING)
        if is_given_up:
            await replace_all(queue, {})
            while metrics.LEASES_LOST._value.get() == lost:  # noqa: ASYNC110 - a metric has no event to give
                await asyncio.sleep(0.02)
        await replace_all(queue, older)
        await state_of(queue, job, JobState.RUNNING)
        gate.set()
        status = await queue.wait(job.id, 30)
    assert (status.state, status.job.attempt, status.job.failures) == (JobState.SUCCEEDED, 1 + is_given_up, 0)
    # What was given up may have had a tick under way.
    assert 0 <= metrics.ROW_STEPS._value.get() - steps - 4 <= is_given_up


async def test_a_running_job_is_cancelled_within_a_moment_and_others_go_on(
    settings: Settings, queue: JobQueue, model: DiffusionModel
) -> None:
    async with serving(settings, queue, model, slow_engine):
        long = await enqueue(queue, job_for(model, "", num_inference_steps=500))
        other = await enqueue(queue, job_for(model, ""))
        await state_of(queue, long, JobState.RUNNING)
        await queue.cancel(long.id)
        assert (await queue.wait(long.id, 20)).state is JobState.CANCELLED
        assert (await queue.wait(other.id, 20)).state is JobState.SUCCEEDED


async def test_progress_is_told_while_a_job_runs(settings: Settings, queue: JobQueue, model: DiffusionModel) -> None:
    async with serving(settings, queue, model, slow_engine):
        job = await enqueue(queue, job_for(model, "", num_inference_steps=60))
        events = [event async for event in queue.events(job.id)]
    steps = [event.step for event in events if event.kind == "progress"]
    assert [event.kind for event in events if event.kind != "progress"] == ["queued", "running", "succeeded"]
    assert len(steps) >= 2
    assert steps == sorted(steps)
    assert {event.num_steps for event in events if event.kind == "progress"} == {60}


async def test_a_drained_worker_hands_its_job_back_and_the_next_one_finishes_it(
    settings: Settings, queue: JobQueue, model: DiffusionModel
) -> None:
    async with serving(settings, queue, model, slow_engine):
        job = await enqueue(queue, job_for(model, "", num_inference_steps=500))
        await state_of(queue, job, JobState.RUNNING)
    status = await queue.status(job.id)
    assert (status.state, status.job.failures) == (JobState.QUEUED, 0)
    async with serving(settings, queue, model):
        assert (await queue.wait(job.id, 30)).state is JobState.SUCCEEDED


async def test_a_full_worker_still_takes_an_urgent_job(
    settings: Settings, queue: JobQueue, model: DiffusionModel
) -> None:
    settings = settings.model_copy(update={"max_rows": 4})
    async with serving(settings, queue, model, slow_engine):
        patient = [await enqueue(queue, job_for(model, "", num_inference_steps=400)) for _ in range(2)]
        for job in patient:
            await state_of(queue, job, JobState.RUNNING)
        waiting = await enqueue(queue, job_for(model, ""))
        urgent = await enqueue(queue, job_for(model, "", Priority.HIGH))
        assert (await queue.wait(urgent.id, 10)).state is JobState.SUCCEEDED
        assert (await queue.status(waiting.id)).state is JobState.QUEUED
        for job in patient:
            assert (await queue.cancel(job.id)).state is JobState.RUNNING
        assert (await queue.wait(waiting.id, 20)).state is JobState.SUCCEEDED


async def test_a_full_worker_still_takes_the_job_of_a_tenant_that_has_none_there(
    settings: Settings, queue: JobQueue, model: DiffusionModel
) -> None:
    settings = settings.model_copy(update={"max_rows": 4})

    def job_of(tenant: str, **fields: Any) -> Job:
        return msgspec.structs.replace(job_for(model, "", **fields), tenant=tenant)

    async with serving(settings, queue, model, slow_engine):
        greedy = [await enqueue(queue, job_of("greedy", num_inference_steps=400)) for _ in range(6)]
        for job in greedy[:2]:
            await state_of(queue, job, JobState.RUNNING)
        small = await enqueue(queue, job_of("small"))
        assert (await queue.wait(small.id, 10)).state is JobState.SUCCEEDED
        assert [(await queue.status(job.id)).state.value for job in greedy] == ["running"] * 2 + ["queued"] * 4
        for job in greedy:
            await queue.cancel(job.id)


async def lose_twice(queue: JobQueue, model: DiffusionModel, job: Job) -> None:
    """Let two workers be lost with a waiting job."""
    for _ in range(2):
        (claimed,) = await queue.claim("lost", [model.id], 1, 8)
        assert claimed.id == job.id
        await queue.hand_back("lost", claimed, is_failure=True)


@pytest.mark.parametrize("holds_first", ["a suspect", "another job"])
async def test_a_worker_that_has_become_free_looks_at_once_for_what_it_was_not_given_before(
    settings: Settings,
    queue: JobQueue,
    model: DiffusionModel,
    monkeypatch: pytest.MonkeyPatch,
    holds_first: str,
) -> None:
    monkeypatch.setattr(worker_module, "WAKE_TIMEOUT_S", 60.0)
    # Full with one job, so that a test may lose jobs while it runs.
    settings = settings.model_copy(update={"reproducible_rows": 2, "lease_s": 60.0})
    gate = threading.Event()
    first = await enqueue(queue, job_for(model, ""))
    if holds_first == "a suspect":
        await lose_twice(queue, model, first)
    async with serving(settings, queue, model, functools.partial(gated_engine, gate)) as worker:
        while first.id not in worker._held:  # noqa: ASYNC110 - its own events tell of earlier workers, too
            await asyncio.sleep(0.02)
        second = await enqueue(queue, job_for(model, ""))
        await lose_twice(queue, model, second)
        await queue._connection.command("DEL", queue._connection.keys.notify(model.id))
        gate.set()
        assert (await queue.wait(first.id, 20)).state is JobState.SUCCEEDED
        assert (await queue.wait(second.id, 20)).state is JobState.SUCCEEDED


async def test_a_lost_job_is_taken_back_as_its_lease_runs_out_and_not_at_the_next_round(
    settings: Settings, queue: JobQueue, model: DiffusionModel
) -> None:
    """A round is a third of the lease, so that alone would cost up to forty seconds here."""
    job = await enqueue(queue, job_for(model, ""))
    await queue.claim("lost", [model.id], 1, 8)
    soon_ms = int(time.time() * 1000) + 500
    await queue._connection.command("ZADD", f"{queue._connection.keys.prefix}leases", soon_ms, job.id)
    async with serving(settings.model_copy(update={"lease_s": 120.0}), queue, model):
        status = await queue.wait(job.id, 20)
    assert (status.state, status.job.attempt) == (JobState.SUCCEEDED, 2)


async def test_a_job_that_was_taken_over_by_another_worker_is_dropped_and_nothing_is_written(
    settings: Settings, queue: JobQueue, model: DiffusionModel
) -> None:
    # Full with this one job, so that the worker does not claim it back itself.
    settings = settings.model_copy(update={"lease_s": 0.6, "reproducible_rows": 2})
    late = await JobQueue.connect(settings, str(settings.redis_url))
    try:
        async with serving(settings, late, model, slow_engine) as worker:
            job = await enqueue(queue, job_for(model, "", num_inference_steps=500))
            await state_of(queue, job, JobState.RUNNING)
            held = worker._held[job.id]
            assert await late.hand_back(worker.id, held)
            (taken,) = await queue.claim("another", [model.id], 1, 8)
            assert taken.attempt == held.attempt + 1
            while worker._held:  # noqa: ASYNC110 - a worker says nothing when it drops a lost job
                await asyncio.sleep(0.02)
        status = await queue.status(job.id)
        assert (status.state, status.job.attempt) == (JobState.RUNNING, taken.attempt)
    finally:
        await late.close()


async def test_a_worker_that_is_given_its_own_lost_job_drops_the_earlier_attempt(
    settings: Settings, queue: JobQueue, model: DiffusionModel
) -> None:
    """Both were drawn side by side, and no renewal named the earlier one any more."""
    async with serving(settings, queue, model, slow_engine) as worker:
        job = await enqueue(queue, job_for(model, "", num_inference_steps=500))
        await state_of(queue, job, JobState.RUNNING)
        await end_lease(queue, job)
        assert (await queue.reap()).requeued == [job.id]

        async def attempts() -> AsyncIterator[set[int]]:
            while True:
                yield {row.active.job.attempt for row in list(worker._engine._rows.values())}
                await asyncio.sleep(0.02)

        async with asyncio.timeout(20):
            async for here in attempts():
                if here == {2}:
                    break
        await queue.cancel(job.id)
        assert (await queue.wait(job.id, 20)).state is JobState.CANCELLED


async def test_a_drain_hands_jobs_back_also_where_redis_takes_no_states_any_more(
    settings: Settings, model: DiffusionModel, tmp_path: Path
) -> None:
    """At its memory limit it refuses those, and the jobs were left to run out of their leases: three such drains made a
    dead letter."""
    settings = settings.model_copy(update={"data_dir": tmp_path})
    with EmbeddedRedis(settings) as server:
        queue = await JobQueue.connect(settings, server.url)
        try:
            async with serving(settings, queue, model, slow_engine):
                job = await enqueue(queue, job_for(model, "", num_inference_steps=500))
                async for event in queue.events(job.id):
                    if event.step > 1:
                        break
                await queue._connection.command("CONFIG", "SET", "maxmemory", "1")
            status = await queue.status(job.id)
            assert (status.state, status.job.failures) == (JobState.QUEUED, 0)
            assert (await queue.stats()).live_workers == 0
        finally:
            await queue.close()


async def test_what_an_outage_interrupts_is_done_as_soon_as_redis_is_back() -> None:
    """Renewals had waited for their next round, and leases ended in outages of half their length."""
    calls = 0
    done = asyncio.Event()

    async def renew() -> None:
        nonlocal calls
        calls += 1
        if calls < 3:
            raise QueueUnavailable("not now", retry_after_s=0.01)
        done.set()

    renewing = asyncio.create_task(every(600, renew))
    await asyncio.wait_for(done.wait(), 20)
    renewing.cancel()


def broken_engine(*arguments: object, **keywords: object) -> Engine:
    engine = Engine(*arguments, **keywords)  # type: ignore[arg-type]

    def breaks(*_: object) -> None:
        raise MemoryError("the batcher is out of its mind")

    engine.batcher.choose = breaks  # type: ignore[method-assign, assignment]
    return engine


async def test_a_job_that_breaks_every_engine_ends_as_a_dead_letter(
    settings: Settings, queue: JobQueue, model: DiffusionModel
) -> None:
    """It is handed back at once, and counted."""
    change = Change()
    job = await enqueue(queue, job_for(model, ""))
    for failures in range(1, settings.max_failures + 1):
        worker = Worker(settings, queue, functools.partial(broken_engine, {model.id: model}, settings))
        with pytest.raises(MemoryError):
            await asyncio.wait_for(worker.run(), 20)
        assert (await queue.status(job.id)).job.failures == failures
    status = await queue.status(job.id)
    assert (status.state, status.failure and status.failure.code) == (JobState.FAILED, "dead_letter")
    assert (await queue.stats()).dead_letters == 1
    assert change("dead_letters_total") == 1


async def test_a_worker_that_loses_its_device_hands_back_all_jobs_and_counts_those_under_way(
    settings: Settings, queue: JobQueue, model: DiffusionModel
) -> None:
    """The third job has another size, so it is never in a tick with the other two."""
    sizes = [(64, 64), (64, 64), (32, 32)]
    wanted = [job_for(model, "", guidance_scale=1.0, num_inference_steps=50, width=w, height=h) for w, h in sizes]
    jobs = [await enqueue(queue, job) for job in wanted]

    def losing_engine(*arguments: object, **keywords: object) -> Engine:
        engine = slow_engine(*arguments, **keywords)
        tick = engine._tick

        def lose(choice: Choice, *rest: Any) -> None:
            tick(choice, *rest)
            if len(choice.ids) == 2 and len(engine._rows) == 3:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

        engine._tick = lose  # type: ignore[method-assign]
        engine._device.is_lost = lambda error: True  # type: ignore[method-assign]
        return engine

    worker = Worker(settings, queue, functools.partial(losing_engine, {model.id: model}, settings))
    with pytest.raises(DeviceLost):
        await asyncio.wait_for(worker.run(), 20)
    statuses = [await queue.status(job.id) for job in jobs]
    assert [status.job.failures for status in statuses] == [1, 1, 0]
    assert {status.state for status in statuses} == {JobState.QUEUED}


async def reports_of_a_held_job(settings: Settings, queue: JobQueue, model: DiffusionModel) -> tuple[Reports, Job]:
    await enqueue(queue, job_for(model, ""))
    [job] = await queue.claim("w1", [model.id], 1, 8)
    return Reports(settings, queue, "w1", {job.id: job}), job


def state_at(job: Job, num_done: int) -> Saved:
    latents = torch.zeros(4, 8, 8)
    return Saved(job, Checkpoint(0, num_done, latents, latents.new_zeros(2, 4, 8, 8), 0, b"f" * 16))


async def step_kept(queue: JobQueue, settings: Settings, job: Job) -> int | None:
    """The step of the checkpoint that Redis has."""
    packed = await queue._connection.command("GET", Keys(settings.shard).checkpoint(job.id, 0))
    return None if packed is None else int(HEADER.unpack_from(packed)[4])


async def test_a_state_that_comes_while_others_are_about_to_be_written_is_written_after_them(
    settings: Settings, queue: JobQueue, model: DiffusionModel
) -> None:
    """It was put among those that had been written already, and forgotten with them."""
    reports, job = await reports_of_a_held_job(settings, queue, model)
    reports.saved(state_at(job, 3))
    await reports.keep_checkpoints()
    assert await step_kept(queue, settings, job) is None
    await reports.keep_checkpoints()
    assert await step_kept(queue, settings, job) == 3


async def test_states_that_redis_did_not_take_are_written_when_it_is_back_unless_newer_ones_came(
    settings: Settings, queue: JobQueue, model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object) -> None:
        raise QueueUnavailable("not now")

    reports, job = await reports_of_a_held_job(settings, queue, model)
    for newer in (None, 5):
        reports.saved(state_at(job, 3))
        await asyncio.sleep(0)
        with monkeypatch.context() as outage:
            outage.setattr(queue, "keep_checkpoints", refuse)
            with pytest.raises(QueueUnavailable):
                await reports.keep_checkpoints()
        if newer is not None:
            reports.saved(state_at(job, newer))
            await asyncio.sleep(0)
        await reports.keep_checkpoints()
        assert await step_kept(queue, settings, job) == (newer or 3)


async def test_a_worker_that_hangs_loses_its_lease_and_is_ended(
    settings: Settings, queue: JobQueue, model: DiffusionModel, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = settings.model_copy(update={"lease_s": 0.5})
    impatient = await JobQueue.connect(settings, str(settings.redis_url))
    released, ended = threading.Event(), asyncio.Event()
    codes: list[int] = []

    def hanging_engine(*arguments: object, **keywords: object) -> Engine:
        engine = Engine(*arguments, **keywords)  # type: ignore[arg-type]
        engine.pulse = Pulse(settings.lease_s, first_s=0.0)
        engine._tick = lambda *_: released.wait(30)  # type: ignore[method-assign, assignment, return-value]
        return engine

    def end_process(code: int) -> None:
        codes.append(code)
        ended.set()

    make_engine = functools.partial(hanging_engine, {model.id: model}, settings)
    worker = Worker(settings, impatient, make_engine, end_process)
    running = asyncio.create_task(worker.run())
    try:
        job = await enqueue(queue, job_for(model, ""))
        await state_of(queue, job, JobState.RUNNING)
        await asyncio.wait_for(ended.wait(), 20)
        # A lease ends by the server's clock; the worker, which lives on here, may take the job back itself.
        while (await queue.status(job.id)).job.failures == 0:
            await impatient.reap()
            await asyncio.sleep(0.02)
    finally:
        released.set()
        worker.drain()
        await asyncio.wait_for(running, 20)
        await impatient.close()
    assert codes[0] == EXIT_HUNG
    assert "test_worker.py" in capfd.readouterr().err, "where it hung"


async def test_a_worker_that_was_stopped_as_a_whole_is_not_taken_for_one_that_hangs(
    settings: Settings, queue: JobQueue, model: DiffusionModel
) -> None:
    """After SIGSTOP and SIGCONT the first look found the tick under way overdue, and the process ended itself."""
    codes: list[int] = []

    def waking_engine(*arguments: object, **keywords: object) -> Engine:
        engine = slow_engine(*arguments, **keywords)
        overdue = engine.pulse.overdue
        engine.pulse.overdue = lambda: looks.pop() if looks else overdue()  # type: ignore[method-assign]
        return engine

    looks = [Phase("tick", 0.0, 1.5)]
    worker = Worker(settings, queue, functools.partial(waking_engine, {model.id: model}, settings), codes.append)
    running = asyncio.create_task(worker.run())
    try:
        job = await enqueue(queue, job_for(model, "", num_inference_steps=100))
        assert (await queue.wait(job.id, 30)).state is JobState.SUCCEEDED
    finally:
        worker.drain()
        await asyncio.wait_for(running, 20)
    assert (looks, codes) == ([], [])


async def test_a_drain_does_not_wait_for_a_long_tick_and_hands_its_job_back(
    settings: Settings, queue: JobQueue, model: DiffusionModel
) -> None:
    ticking, may_end = threading.Event(), threading.Event()

    def stuck_engine(*arguments: object, **keywords: object) -> Engine:
        engine = Engine(*arguments, **keywords)  # type: ignore[arg-type]

        def long_tick(*_: object) -> None:
            ticking.set()
            may_end.wait(30)

        engine._tick = long_tick  # type: ignore[method-assign, assignment]
        return engine

    worker = Worker(settings, queue, functools.partial(stuck_engine, {model.id: model}, settings))
    running = asyncio.create_task(worker.run())
    job = await enqueue(queue, job_for(model, ""))
    await asyncio.to_thread(ticking.wait, 20)
    worker.drain()
    try:
        await asyncio.wait_for(running, 15)
        status = await queue.status(job.id)
        assert (status.state, status.job.failures) == (JobState.QUEUED, 0)
    finally:
        may_end.set()


async def test_a_job_past_its_deadline_ends_as_expired_while_it_runs(
    settings: Settings, queue: JobQueue, model: DiffusionModel
) -> None:
    async with serving(settings, queue, model, slow_engine):
        job = await enqueue(queue, job_for(model, "", num_inference_steps=500), deadline_s=0.5)
        assert (await queue.wait(job.id, 20)).state is JobState.EXPIRED


async def test_a_cancellation_that_overtakes_the_claims_reply_is_not_missed(
    settings: Settings, queue: JobQueue, model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = queue.claim

    async def slow_reply(*arguments: object, **keywords: object) -> list[Job]:
        jobs = await claim(*arguments, **keywords)  # type: ignore[arg-type]
        for job in jobs:
            await queue.cancel(job.id)
            await asyncio.sleep(0.2)
        return jobs

    monkeypatch.setattr(queue, "claim", slow_reply)
    async with serving(settings, queue, model, slow_engine):
        job = await enqueue(queue, job_for(model, "", num_inference_steps=100))
        assert (await queue.wait(job.id, 10)).state is JobState.CANCELLED


async def test_a_drain_during_a_claim_hands_back_what_it_brings(
    settings: Settings, queue: JobQueue, model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim, claimed = queue.claim, asyncio.Event()

    async def slow_reply(*arguments: object, **keywords: object) -> list[Job]:
        jobs = await claim(*arguments, **keywords)  # type: ignore[arg-type]
        if jobs:
            claimed.set()
            await asyncio.sleep(0.1)
        return jobs

    monkeypatch.setattr(queue, "claim", slow_reply)
    async with serving(settings, queue, model, slow_engine):
        job = await enqueue(queue, job_for(model, "", num_inference_steps=100))
        await claimed.wait()
    status = await queue.status(job.id)
    assert (status.state, status.job.failures) == (JobState.QUEUED, 0)


async def test_a_worker_can_be_stopped_while_redis_is_away(
    settings: Settings, queue: JobQueue, model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unreachable(*_: object) -> None:
        raise QueueUnavailable("the queue cannot be reached")

    monkeypatch.setattr(queue, "register", unreachable)
    monkeypatch.setattr(queue, "unregister", unreachable)
    async with serving(settings, queue, model):
        pass


async def test_nothing_is_left_in_a_worker_after_its_jobs_have_ended(
    settings: Settings, queue: JobQueue, model: DiffusionModel
) -> None:
    settings = settings.model_copy(update={"lease_s": 0.6})
    async with serving(settings, queue, model) as worker:
        jobs = [await enqueue(queue, job_for(model, "", seed=seed, num_inference_steps=1)) for seed in range(60)]
        for job in jobs:
            assert (await queue.wait(job.id, 30)).state is JobState.SUCCEEDED
        assert queue.num_waiters == 0
    assert (worker._held, worker._lost, worker._ending, worker._reports._progress) == ({}, set(), set(), {})
    assert (worker._engine._roster._jobs, worker._engine._rows) == ({}, {})
