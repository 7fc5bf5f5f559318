"""A picture that one worker began and another finished is the picture that one would have drawn."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import torch
from darkroom.config import Settings
from darkroom.diffusion.loader import DiffusionModel, load_model
from darkroom.engine.checkpoint import HEADER, VERSION
from darkroom.engine.engine import Engine
from darkroom.engine.events import Saved, TickReport
from darkroom.jobs import JobState
from darkroom.queue import JobQueue
from darkroom.queue.keys import Keys
from darkroom.sampling import SAMPLERS

from tests.support.engines import Outcome, job_for, run_jobs
from tests.support.jobs import end_lease, make_job
from tests.support.metrics import Change
from tests.support.tiny_models import write_tiny_model
from tests.support.twin_device import TwinDevice
from tests.test_worker import REPRODUCIBLE, enqueue, serving, slow_engine

STEPS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiffusionModel]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_model(write_tiny_model(tmp_path_factory.mktemp("model"), "sd1", seed=5))
    torch.set_num_threads(threads)


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update=REPRODUCIBLE)


def stopped_after(model: DiffusionModel, settings: Settings, num_ticks: int, **fields: object) -> dict[int, bytes]:
    """What an engine leaves of a job when it is stopped after that many ticks, by image."""
    states: dict[int, bytes] = {}

    def saved(one: Saved) -> None:
        states[one.checkpoint.index] = one.checkpoint.pack()

    engine = Engine({model.id: model}, settings, on_event=lambda _: None, on_saved=saved, on_tick=lambda _: ticked())
    left = num_ticks

    def ticked() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            engine.stop()

    engine.submit(job_for(model, "one", num_inference_steps=STEPS, **fields))
    engine.run()
    return states


def resumed(model: DiffusionModel, settings: Settings, states: dict[int, bytes], **fields: object) -> Outcome:
    """The same job in an engine that is given what the other left."""
    return run_jobs(
        model, [job_for(model, "one", num_inference_steps=STEPS, **fields)], settings, checkpoints={"one": states}
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_resumed_picture_is_bit_equal_with_every_sampler(
    model: DiffusionModel, settings: Settings, sampler: str
) -> None:
    whole = run_jobs(model, [job_for(model, "one", num_inference_steps=STEPS, sampler=sampler)], settings)
    states = stopped_after(model, settings, 3, sampler=sampler)
    change = Change()
    rest = resumed(model, settings, states, sampler=sampler)
    assert rest.images("one") == whole.images("one")
    assert len(rest.ticks) == len(whole.ticks) - 3, "no step is done twice"
    assert (change("resumes_total"), change("steps_saved_total")) == (1, 3)


@pytest.mark.parametrize("num_ticks", range(1, STEPS))
def test_it_may_be_resumed_at_every_step(model: DiffusionModel, settings: Settings, num_ticks: int) -> None:
    fields = {"sampler": "dpmpp_2m_sde"}
    whole = run_jobs(model, [job_for(model, "one", num_inference_steps=STEPS, **fields)], settings)
    states = stopped_after(model, settings, num_ticks, **fields)
    assert resumed(model, settings, states, **fields).images("one") == whole.images("one")


def test_images_of_a_job_are_resumed_where_each_of_them_was(model: DiffusionModel, settings: Settings) -> None:
    """Ticks hold two of the three images, so two are done when the third has begun."""
    fields = {"num_images_per_prompt": 3, "guidance_scale": 1.0}
    narrow = settings.model_copy(update={"reproducible_rows": 2})
    whole = run_jobs(model, [job_for(model, "one", num_inference_steps=STEPS, **fields)], narrow)
    states = stopped_after(model, narrow, STEPS + 2, **fields)
    assert sorted(HEADER.unpack_from(state)[4] for state in states.values()) == [2, STEPS, STEPS]
    assert resumed(model, narrow, states, **fields).images("one") == whole.images("one")


def test_what_cannot_be_read_is_begun_anew(model: DiffusionModel, settings: Settings) -> None:
    whole = run_jobs(model, [job_for(model, "one", num_inference_steps=STEPS)], settings)
    (state,) = stopped_after(model, settings, 3).values()
    newer = state[:4] + (VERSION + 1).to_bytes(2, "little") + state[6:]
    other = stopped_after(model, settings, 3, seed=99)[0]
    for unusable in (b"", b"garbage", newer, state[:-1], state + b"\0", other):
        outcome = resumed(model, settings, {0: unusable})
        assert outcome.images("one") == whole.images("one")
        assert len(outcome.ticks) == STEPS
    assert len(resumed(model, settings, {0: state}).ticks) == STEPS - 3


def test_a_checkpoint_holds_only_the_history_that_will_be_read(model: DiffusionModel, settings: Settings) -> None:
    sizes = {
        sampler: len(stopped_after(model, settings, 3, sampler=sampler)[0])
        for sampler in ("euler", "dpmpp_2m", "unipc")
    }
    one = 4 * model.latent_channels * (64 // model.vae_scale_factor) ** 2
    assert sizes == {"euler": HEADER.size + one, "dpmpp_2m": HEADER.size + 2 * one, "unipc": HEADER.size + 3 * one}


def test_a_running_image_is_saved_when_its_time_has_come_and_not_before(
    model: DiffusionModel, settings: Settings
) -> None:
    now_s, saved = 0.0, list[int]()

    def clock() -> float:
        return now_s

    def on_tick(engine: Engine, report: TickReport, num_ticks: int) -> None:
        nonlocal now_s
        now_s += 0.4

    run_jobs(
        model,
        [job_for(model, "one", num_inference_steps=10)],
        # A quarter of a second of it is for the way to Redis.
        settings.model_copy(update={"checkpoint_interval_s": 1.25}),
        on_tick=on_tick,
        clock=clock,
        on_saved=lambda one: saved.append(one.checkpoint.num_done),
    )
    assert saved == [4, 7]


@pytest.mark.parametrize(("every_s", "expected"), [(0.0, [3, 6, 9]), (0.7, [2, 4, 6, 8]), (3600.0, [3, 6, 9])])
def test_an_image_is_saved_every_few_steps_where_those_come_before_the_seconds(
    model: DiffusionModel, settings: Settings, every_s: float, expected: list[int]
) -> None:
    now_s, saved = 0.0, list[int]()

    def on_tick(engine: Engine, report: TickReport, num_ticks: int) -> None:
        nonlocal now_s
        now_s += 0.4 if num_ticks != 1 else 0.8

    run_jobs(
        model,
        [job_for(model, "one", num_inference_steps=10)],
        settings.model_copy(update={"checkpoint_interval_s": every_s, "checkpoint_steps": 3}),
        on_tick=on_tick,
        clock=lambda: now_s,
        on_saved=lambda one: saved.append(one.checkpoint.num_done),
    )
    assert saved == expected


@pytest.mark.parametrize("device", [None, TwinDevice], ids=["cpu", "ticks ahead"])
def test_without_an_interval_nothing_is_saved(
    model: DiffusionModel, settings: Settings, device: type[TwinDevice] | None
) -> None:
    def saved(_: Saved) -> None:
        pytest.fail("saved")

    run_jobs(
        model,
        [job_for(model, "one", num_inference_steps=3)],
        settings.model_copy(update={"checkpoint_interval_s": 0.0, "checkpoint_steps": 0}),
        on_saved=saved,
        device=None if device is None else device(has_graphs=False),
    )


def test_a_state_is_asked_for_once_while_ticks_are_ahead(model: DiffusionModel, settings: Settings) -> None:
    saved: list[int] = []
    run_jobs(
        model,
        [job_for(model, "one", num_inference_steps=8)],
        settings.model_copy(update={"checkpoint_interval_s": 0.0, "checkpoint_steps": 3}),
        on_saved=lambda one: saved.append(one.checkpoint.num_done),
        device=TwinDevice(has_graphs=False),
    )
    assert saved == [3, 6]


async def run_some_steps(queue: JobQueue, job_id: str, num_steps: int) -> None:
    async for event in queue.events(job_id):
        if event.step >= num_steps:
            return


async def test_a_drained_worker_hands_its_steps_to_the_next_one(
    settings: Settings, queue: JobQueue, model: DiffusionModel
) -> None:
    fields = {"num_inference_steps": 200, "num_images_per_prompt": 2, "guidance_scale": 1.0}
    whole = run_jobs(model, [job_for(model, "one", **fields)], settings)
    change = Change()
    async with serving(settings, queue, model, slow_engine):
        job = await enqueue(queue, job_for(model, "", **fields))
        await run_some_steps(queue, job.id, 8)
    status = await queue.status(job.id)
    assert (status.state, status.job.failures) == (JobState.QUEUED, 0)
    ticks_before = change("ticks_total")
    assert 8 <= ticks_before < 200
    async with serving(settings, queue, model):
        assert (await queue.wait(job.id, 30)).state is JobState.SUCCEEDED
    assert await queue.images(job.id) == whole.images("one")
    assert change("ticks_total") == 200
    assert change("steps_saved_total") == 2 * ticks_before


async def test_a_killed_worker_costs_no_more_than_the_checkpoint_interval(
    settings: Settings, queue: JobQueue, model: DiffusionModel
) -> None:
    """The first worker is cut off from its queue without a word, as kill -9 would do it."""
    settings = settings.model_copy(update={"checkpoint_interval_s": 0.05, "lease_s": 0.6})
    whole = run_jobs(model, [job_for(model, "one", num_inference_steps=300)], settings)
    lost = await JobQueue.connect(settings, str(settings.redis_url))
    change = Change()
    try:
        async with serving(settings, lost, model, slow_engine) as worker:
            job = await enqueue(queue, job_for(model, "", num_inference_steps=300))
            await run_some_steps(queue, job.id, 20)
            keys = Keys(settings.shard)
            while not await queue._connection.command("EXISTS", keys.checkpoint(job.id, 0)):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            # It writes nothing any more, and another takes the job over.
            await queue._connection.command("HSET", keys.job(job.id), "owner", "nobody")
            await end_lease(queue, job)
            (held,) = worker._held.values()
            worker._engine.cancel(held.id, held.attempt)
            worker.drain()
        await queue.reap()
        async with serving(settings, queue, model):
            assert (await queue.wait(job.id, 60)).state is JobState.SUCCEEDED
    finally:
        await lost.close()
    assert await queue.images(job.id) == whole.images("one")
    assert change("steps_saved_total") > 0
    assert (await queue.status(job.id)).job.failures == 1


async def test_checkpoints_are_fenced_and_end_with_their_job(queue: JobQueue, settings: Settings) -> None:
    job = make_job(num_images=2)
    keys = Keys(settings.shard)
    await queue.enqueue(job, result_bytes=1000)
    [held] = await queue.claim("w1", [job.request.model], 1, 8)
    await queue.keep_checkpoints("w1", {(job.id, held.attempt, 1): b"state"})
    await queue.keep_checkpoints("w1", {(job.id, held.attempt + 1, 0): b"not mine"})
    await queue.keep_checkpoints("w2", {(job.id, held.attempt, 0): b"not mine"})
    assert await queue.hand_back("w1", held)
    [again] = await queue.claim("w2", [job.request.model], 1, 8)
    assert again.num_checkpoints == 2
    assert await queue.checkpoints(again) == {1: b"state"}
    await queue.keep_checkpoints("w1", {(job.id, held.attempt, 1): b"too late"})
    assert await queue.checkpoints(again) == {1: b"state"}
    assert await queue.acknowledge_cancel("w2", again)
    left = await queue._connection.command("KEYS", f"{keys.prefix}*:{job.id}*")
    assert {key.decode().removeprefix(keys.prefix).split(":")[0] for key in left} == {"job", "events"}
