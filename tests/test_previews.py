"""What a running image looks like: for those who watch, at once, and without anybody else noticing."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from darkroom.config import Settings, load_settings
from darkroom.diffusion.loader import DiffusionModel, load_model
from darkroom.diffusion.previews import MAX_PX, encode_preview, fit_previews
from darkroom.engine.checkpoint import Checkpoint
from darkroom.engine.decode import decode_latents
from darkroom.engine.engine import Engine
from darkroom.engine.events import Preview, Saved, TickReport
from darkroom.jobs import JobState, Previews
from darkroom.queue import JobQueue
from darkroom.queue import events as queue_events
from PIL import Image

from tests.support.engines import Outcome, job_for, run_jobs
from tests.support.http import served
from tests.support.instant_worker import InstantWorker
from tests.support.metrics import Change
from tests.support.tiny_models import write_tiny_model
from tests.support.twin_device import TwinDevice
from tests.test_worker import enqueue, serving, slow_engine

STEPS = 8
DEVICES = pytest.mark.parametrize("device", [None, TwinDevice], ids=["cpu", "ticks ahead"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiffusionModel]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_model(write_tiny_model(tmp_path_factory.mktemp("model"), "sd1", seed=3))
    torch.set_num_threads(threads)


def run_watched(
    model: DiffusionModel,
    previews: Previews,
    *,
    from_tick: int = 1,
    device: type[TwinDevice] | None = None,
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Outcome, list[Preview]]:
    """One job and what is shown of it when somebody begins to watch after `from_tick` ticks."""
    shown: list[Preview] = []

    def watch(engine: Engine, _: TickReport, ticks: int) -> None:
        if ticks == from_tick:
            engine.show("one", 0, previews)

    outcome = run_jobs(
        model,
        [job_for(model, "one", num_inference_steps=STEPS)],
        load_settings(num_threads=1, encode_threads=1, batching="reproducible", **(settings or {})),
        on_tick=watch,
        on_preview=shown.append,
        device=None if device is None else device(has_graphs=False),
        **options,
    )
    return outcome, shown


def opened(image: bytes) -> np.ndarray[Any, Any]:
    picture = Image.open(io.BytesIO(image))
    assert picture.format == "JPEG"
    return np.asarray(picture.convert("RGB")).astype(np.int16)


@DEVICES
@pytest.mark.parametrize("from_tick", [1, 3])
def test_the_first_preview_comes_within_two_ticks_of_somebody_watching(
    model: DiffusionModel, device: type[TwinDevice] | None, from_tick: int
) -> None:
    _, shown = run_watched(
        model, "linear", from_tick=from_tick, device=device, settings={"preview_interval_s": 60.0}, warm_up=True
    )
    assert [(preview.index, preview.num_steps) for preview in shown] == [(0, STEPS)]
    # Of the tick that was enqueued next: on a device that works ahead, the one after the one under way.
    assert shown[0].step - from_tick <= (2 if device else 1)
    assert opened(shown[0].image).shape == (32, 32, 3)


@DEVICES
def test_nothing_is_computed_when_nobody_watches(
    model: DiffusionModel, device: type[TwinDevice] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = Change()
    _, shown = run_watched(model, "off", device=device)
    assert shown == []
    assert change("previews_total") == 0


@pytest.mark.parametrize("previews", ["linear", "vae"])
def test_a_picture_is_the_same_whether_or_not_it_is_watched(model: DiffusionModel, previews: Previews) -> None:
    watched, _ = run_watched(model, previews, settings={"preview_interval_s": 0.02}, clock=ticking(1.0))
    unwatched, _ = run_watched(model, "off")
    assert watched.images("one") == unwatched.images("one")


def ticking(seconds: float) -> Callable[[], float]:
    """A clock that goes on by as much each time that it is read."""
    now_s = 0.0

    def clock() -> float:
        nonlocal now_s
        now_s += seconds
        return now_s

    return clock


def test_previews_keep_to_their_interval_in_seconds_and_in_steps(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def note(_previews: object, _row: object, _latents: object, step: int) -> None:
        asked.append(step)

    monkeypatch.setattr("darkroom.engine.previews.Previews.show", note)
    now_s = 0.0

    def after_tick(engine: Engine, _: TickReport, ticks: int) -> None:
        nonlocal now_s
        now_s += 0.1
        engine.show("one", 0, "linear")

    def steps_with(**fields: Any) -> list[int]:
        nonlocal now_s
        now_s = 0.0
        asked.clear()
        run_jobs(
            model,
            [job_for(model, "one", num_inference_steps=9)],
            load_settings(num_threads=1, encode_threads=1, **fields),
            on_tick=after_tick,
            on_preview=lambda _: None,
            clock=lambda: now_s,
        )
        return list(asked)

    assert steps_with(preview_interval_s=0.02) == [2, 3, 4, 5, 6, 7, 8], "the last step is followed by the picture"
    assert steps_with(preview_interval_s=0.25) == [2, 5, 8]
    assert steps_with(preview_interval_s=0.02, preview_steps=4) == [2, 6]


def test_with_many_watchers_every_image_has_a_first_preview_and_the_others_keep_to_their_share(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    def note(previews: Any, row: Any, _latents: object, step: int) -> None:
        previews.cost_s = 0.004
        asked.append((step, row.seed))

    monkeypatch.setattr("darkroom.engine.previews.Previews.show", note)
    now_s = 0.0

    def after_tick(engine: Engine, _: TickReport, ticks: int) -> None:
        nonlocal now_s
        now_s += 0.1
        for seed in range(8):
            engine.show(str(seed), 0, "linear")

    jobs = [job_for(model, str(seed), seed=seed, guidance_scale=1.0, num_inference_steps=42) for seed in range(8)]
    run_jobs(
        model,
        jobs,
        load_settings(num_threads=1, encode_threads=1, preview_interval_s=0.02),
        on_tick=after_tick,
        on_preview=lambda _: None,
        clock=lambda: now_s,
    )
    assert {seed for step, seed in asked if step == 2} == set(range(8)), "nobody waits for the first"
    # 40 ticks of 0.1 s, of which a hundredth makes ten previews of 4 ms; and the burst at the start.
    later = [seed for step, seed in asked if step > 2]
    assert 8 <= len(later) <= 16
    assert len(set(later)) == 8, "all have their turn"


def test_a_preview_through_the_autoencoder_is_what_it_makes_of_the_denoised_latents(model: DiffusionModel) -> None:
    change, states = Change(), dict[int, Checkpoint]()
    _, shown = run_watched(
        model,
        "vae",
        from_tick=STEPS - 2,
        settings={"preview_interval_s": 0.02, "checkpoint_steps": 1},
        on_saved=lambda saved: states.update({saved.checkpoint.num_done: saved.checkpoint}),
    )
    assert change("previews_total", kind="vae") == 1
    assert change("previews_total", kind="linear") == 0
    (decoded,) = decode_latents(model, [states[STEPS - 1].previous[0]], [], None)
    assert decoded is not None
    assert [(preview.step, preview.image) for preview in shown] == [(STEPS - 1, encode_preview(decoded))]


@DEVICES
@pytest.mark.parametrize("sampler", ["euler", "euler_a", "dpmpp_2m"])
def test_a_job_that_is_cut_short_ends_with_what_its_images_look_like(
    model: DiffusionModel, device: type[TwinDevice] | None, sampler: str
) -> None:
    job = job_for(model, "one", num_inference_steps=STEPS, sampler=sampler, num_images_per_prompt=2)
    settings = load_settings(num_threads=1, encode_threads=1, batching="reproducible", checkpoint_steps=1)
    states = dict[tuple[int, int], Checkpoint]()

    def note(saved: Saved) -> None:
        states[saved.checkpoint.index, saved.checkpoint.num_done] = saved.checkpoint

    run_jobs(model, [job], settings, on_saved=note)

    def cut(engine: Engine, _: TickReport, ticks: int) -> None:
        if ticks == 2:
            engine.cut_short("one")

    ahead = None if device is None else device(has_graphs=False)
    outcome = run_jobs(model, [job], settings, on_tick=cut, device=ahead)
    steps = len(outcome.ticks)
    assert steps == (4 if device else 3)
    for index, image in enumerate(outcome.images("one")):
        (decoded,) = decode_latents(model, [states[index, steps].previous[0]], [], None)
        assert decoded is not None
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(image))), decoded)


def test_a_map_is_fitted_to_what_the_autoencoder_does() -> None:
    generator = torch.Generator().manual_seed(1)
    colours = 20 * torch.randn((3, 4), generator=generator)

    def decode(latents: torch.Tensor) -> list[Any]:
        pixels = torch.einsum("oc,bchw->bohw", colours, latents.clamp(-1, 1)) + 128
        large = torch.nn.functional.interpolate(pixels, scale_factor=8)
        return list(large.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())

    preview_map = fit_previews(4, 8, decode)
    latents = 0.5 * torch.randn((1, 4, 6, 10), generator=generator).clamp(-2, 2)
    drawn = preview_map.draw(latents[0]).astype(int)
    expected = decode(latents)[0].astype(int)[::2, ::2]
    assert drawn.shape == (24, 40, 3)
    assert np.corrcoef(drawn.ravel(), expected.ravel())[0, 1] > 0.98


def test_a_model_whose_autoencoder_makes_nothing_has_no_map() -> None:
    with pytest.raises(ValueError, match="none of the fields"):
        fit_previews(4, 8, lambda latents: [None] * len(latents))


def test_a_preview_is_never_large() -> None:
    picture = Image.open(io.BytesIO(encode_preview(np.zeros((1024, 2048, 3), np.uint8))))
    assert picture.size == (MAX_PX, MAX_PX // 2)


# Through the queue


async def test_a_watched_job_shows_previews_and_leaves_nothing_behind(
    settings: Settings, queue: JobQueue, model: DiffusionModel
) -> None:
    settings = settings.model_copy(update={"preview_interval_s": 0.02, "num_threads": 1})
    async with serving(settings, queue, model, slow_engine):
        job = await enqueue(queue, job_for(model, "", num_inference_steps=20, num_images_per_prompt=2))
        events = [event async for event in queue.events(job.id, previews="linear")]
    previews = [event for event in events if event.kind == "preview"]
    assert {event.index for event in previews} == {0, 1}
    for index in (0, 1):
        steps = [event.step for event in previews if event.index == index]
        assert steps == sorted(set(steps))
    assert all(opened(event.image).size for event in previews)
    assert events[-1].kind == "succeeded"
    assert await queue._connection.command("KEYS", queue._connection.keys.preview("*", 0).replace("*:0", "*")) == []


async def test_a_job_that_is_watched_before_it_starts_is_shown_from_its_first_step(
    settings: Settings, queue: JobQueue, model: DiffusionModel
) -> None:
    settings = settings.model_copy(update={"preview_interval_s": 60.0, "num_threads": 1})
    job = await enqueue(queue, job_for(model, "", num_inference_steps=500))

    async def first_preview() -> int:
        async with contextlib.aclosing(queue.events(job.id, previews="linear")) as events:  # type: ignore[type-var]
            async for event in events:
                if event.kind == "preview":
                    return event.step
        raise AssertionError("the job ended unseen")

    watching = asyncio.create_task(first_preview())
    key = queue._connection.keys.job(job.id)
    while not await queue._connection.command("HEXISTS", key, "look_linear"):  # noqa: ASYNC110 - nobody is told of it
        await asyncio.sleep(0.02)
    async with serving(settings, queue, model, slow_engine):
        assert await watching == 1
        await queue.cancel(job.id)
        assert (await queue.wait(job.id, 10)).state is JobState.CANCELLED


async def test_nothing_more_is_computed_once_nobody_watches_any_more(
    settings: Settings, queue: JobQueue, model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_events, "LOOK_MS", 300)
    settings = settings.model_copy(update={"preview_interval_s": 0.02, "num_threads": 1})
    async with serving(settings, queue, model, slow_engine) as worker:
        job = await enqueue(queue, job_for(model, "", num_inference_steps=500))
        async with contextlib.aclosing(queue.events(job.id, previews="linear")) as events:  # type: ignore[type-var]
            async for event in events:
                if event.kind == "preview":
                    break
        (active,) = worker._engine._roster._jobs.values()
        while active.previews != "off":  # noqa: ASYNC110 - a worker says nothing when it stops
            await asyncio.sleep(0.02)
        await queue.cancel(job.id)
        assert (await queue.wait(job.id, 10)).state is JobState.CANCELLED


async def test_previews_come_with_the_event_stream_and_by_themselves(settings: Settings, queue: JobQueue) -> None:
    image = encode_preview(np.full((8, 8, 3), 200, np.uint8))
    worker = InstantWorker(queue)
    worker.gate.clear()
    async with worker.running(), served(settings, queue) as site:
        client = site.client
        body = {"prompt": "a red fox", "mode": "async"}
        url = (await client.post("/generate", json=body)).headers["location"]
        job_id = url.rsplit("/", 1)[1]
        await worker.started.wait()
        missing = await client.get(f"{url}/previews/0")
        assert (missing.status_code, missing.json()["code"]) == (404, "image_not_found")
        assert (await client.get(f"/jobs/{'0' * 26}/previews/0")).json()["code"] == "job_not_found"
        assert (await client.get(f"{url}/events?previews=large")).json()["code"] == "invalid_request"
        async with client.stream("GET", f"{url}/events?previews=linear") as stream:
            lines = stream.aiter_lines()
            await queue.show(worker.worker_id, {(job_id, 1, 0): (2, image)})
            async for line in lines:
                if line == "event: preview":
                    break
            data = json.loads((await anext(lines)).removeprefix("data: "))
        assert (data["index"], data["step"], data["state"]) == (0, 2, "running")
        assert base64.b64decode(data["image"]) == image
        alone = await client.get(f"{url}/previews/0")
        assert (alone.content, alone.headers["content-type"]) == (image, "image/jpeg")
        await client.delete(url)
        await queue.wait(job_id, 10)
        assert (await client.get(f"{url}/previews/0")).json()["code"] == "image_not_found"


async def test_a_preview_of_a_lost_attempt_is_dropped(
    settings: Settings, queue: JobQueue, model: DiffusionModel
) -> None:
    job = await enqueue(queue, job_for(model, ""))
    (claimed,) = await queue.claim("w", [model.id], 1, 8)
    await queue.show("w", {(job.id, claimed.attempt + 1, 0): (1, b"stale")})
    await queue.show("other", {(job.id, claimed.attempt, 0): (1, b"stale")})
    assert await queue._connection.command("EXISTS", queue._connection.keys.preview(job.id, 0)) == 0
