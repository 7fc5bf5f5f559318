"""Rows that begin with a picture: in a crowd, captured, resumed, cancelled, and when the picture is no good."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from darkroom.config import BUILTIN_MODEL, Settings, load_settings
from darkroom.diffusion.loader import DiffusionModel, load_model
from darkroom.diffusion.vae import VAE
from darkroom.engine.engine import Cancelled, Engine, Failed, Saved, TickReport
from darkroom.jobs import Failure, Job, JobState
from darkroom.queue import JobQueue
from PIL import Image

from tests.support.engines import Outcome, job_for, run_jobs
from tests.support.metrics import Change
from tests.support.tiny_models import write_tiny_model
from tests.support.twin_device import TwinDevice
from tests.test_worker import enqueue, serving, slow_engine

REPRODUCIBLE = {"batching": "reproducible", "reproducible_rows": 6}
STEPS = 6


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> DiffusionModel:
    # The form of the kernels that a graph can hold.
    return load_model(write_tiny_model(tmp_path_factory.mktemp("model"), "sd1", seed=3), kernels="torch")


@pytest.fixture(scope="module")
def inpainting_model(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> DiffusionModel:
    directory = write_tiny_model(tmp_path_factory.mktemp("inpainting"), "sd2", seed=4, unet={"in_channels": 9})
    return load_model(directory, kernels="torch")


def settings_with(**fields: object) -> Settings:
    return load_settings(num_threads=1, encode_threads=1, **fields)


def png(pixels: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def inputs_for(job: Job, seed: int = 0) -> dict[str, bytes]:
    """Coloured noise, and a mask that is white on the left."""
    height, width = job.request.height, job.request.width
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
    mask = np.zeros((height, width))
    mask[:, : width // 2] = 255
    contents = {"init_image": png(noise), "mask_image": png(mask)}
    return {name: contents[name] for name in job.request.input_names}


def anew(model: DiffusionModel, id_: str, **fields: Any) -> Job:
    return job_for(model, id_, **{"init_image": "a", "strength": 0.7, "num_inference_steps": STEPS, **fields})


def masked(model: DiffusionModel, id_: str, **fields: Any) -> Job:
    return anew(model, id_, mask_image="b", **fields)


def crowd(model: DiffusionModel) -> list[Job]:
    """Every kind of row that may share a tick."""
    jobs = [
        masked(model, "masked", sampler="euler_a"),
        masked(model, "masked, two images", sampler="heun", num_images_per_prompt=2, strength=1.0, guidance_scale=1.0),
        masked(model, "one step", sampler="dpmpp_2m_sde", strength=0.2),
    ]
    if not model.card.needs_mask:
        jobs += [
            job_for(model, "from noise", sampler="unipc"),
            anew(model, "from an image", sampler="dpmpp_2m", num_images_per_prompt=2),
        ]
    return jobs


def run(model: DiffusionModel, jobs: list[Job], settings: Settings, **options: Any) -> Outcome:
    return run_jobs(model, jobs, settings, inputs={job.id: inputs_for(job) for job in jobs}, **options)


@pytest.mark.parametrize("kind", ["model", "inpainting_model"])
def test_every_picture_is_the_same_alone_in_a_crowd_and_in_captured_ticks(
    kind: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(kind)
    settings = settings_with(**REPRODUCIBLE)
    jobs = crowd(model)
    together = run(model, jobs, settings)
    assert max(tick.num_rows for tick in together.ticks) > 2
    alone = {job.id: run(model, [job], settings).images(job.id) for job in jobs}
    # A worker that draws a picture for nobody first, which an inpainting network takes without a mask.
    captured = run(model, jobs, settings, device=TwinDevice(), warm_up=True)
    for job in jobs:
        assert together.images(job.id) == alone[job.id]
        assert captured.images(job.id) == alone[job.id]
    assert len({data for images in alone.values() for data in images}) == sum(map(len, alone.values()))


def test_what_the_mask_keeps_stays_and_the_rest_is_drawn_anew(one_thread: None) -> None:
    """With the built-in model, since only a trained one gives back what it was given."""
    model = load_model(BUILTIN_MODEL)
    width = model.card.width
    options = {"num_inference_steps": 12, "width": width, "height": model.card.height}
    fox = job_for(model, "a", prompt="a red fox in the snow", **options)
    before = run(model, [fox], settings_with()).pixels("a")
    tree = masked(model, "a", prompt="a green tree", strength=1.0, **options)
    inputs = {"a": {**inputs_for(tree), "init_image": png(before)}}
    difference = np.abs(run_jobs(model, [tree], settings_with(), inputs=inputs).pixels("a") - before)
    # The decoder reaches a little over the edge.
    kept = slice(width // 2 + width // 8, None)
    assert difference[:, kept].mean() < 8
    assert difference[:, : width // 2].mean() > 20

    def cut(engine: Engine, _: TickReport, ticks: int) -> None:
        if ticks == 4:
            engine.cut_short("a")

    cut_short = run_jobs(model, [tree], settings_with(), inputs=inputs, on_tick=cut)
    assert len(cut_short.ticks) == 5
    assert np.abs(cut_short.pixels("a") - before)[:, kept].mean() < 8


def test_strength_is_the_share_of_the_steps_that_are_run(model: DiffusionModel) -> None:
    for strength, steps in ((1.0, 6), (0.7, 4), (0.5, 3), (0.2, 1)):
        outcome = run(model, [anew(model, "a", strength=strength)], settings_with())
        assert len(outcome.ticks) == steps
        assert outcome.ticks[-1].progress[0][1:] == (steps, steps)


@pytest.mark.parametrize("kind", ["model", "inpainting_model"])
@pytest.mark.parametrize("sampler", ["euler_a", "unipc"])
def test_a_masked_picture_is_resumed_bit_equal(kind: str, sampler: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(kind)
    settings = settings_with(**REPRODUCIBLE)
    job = masked(model, "one", sampler=sampler, strength=0.9)
    whole = run(model, [job], settings)
    states: dict[int, bytes] = {}

    def saved(one: Saved) -> None:
        states[one.checkpoint.index] = one.checkpoint.pack()

    def stop(report: TickReport) -> None:
        if report.progress[0][1] == 2:
            engine.stop()

    engine = Engine({model.id: model}, settings, on_event=lambda _: None, on_saved=saved, on_tick=stop)
    engine.submit(job, inputs=inputs_for(job))
    engine.run()
    rest = run(model, [job], settings, checkpoints={"one": states})
    assert rest.images("one") == whole.images("one")
    assert len(rest.ticks) == len(whole.ticks) - 2
    # The state of another picture's trajectory is none of this one's.
    other = masked(model, "one", sampler=sampler, strength=0.9, init_image="another")
    assert len(run(model, [other], settings, checkpoints={"one": states}).ticks) == len(whole.ticks)


def test_a_picture_that_is_no_good_fails_its_own_job_alone(model: DiffusionModel) -> None:
    jobs = [anew(model, name) for name in ("missing", "broken", "small", "grey")] + [job_for(model, "well")]
    inputs = {
        "broken": {"init_image": inputs_for(jobs[1])["init_image"][:-50]},
        "small": {"init_image": png(np.zeros((32, 32, 3)))},
        "grey": {"init_image": png(np.zeros((64, 64)))},
    }
    outcome = run_jobs(model, jobs, settings_with(), inputs=inputs)
    assert len(outcome.images("well")) == 1
    told = {}
    for job in jobs[:4]:
        event = outcome.events[job.id]
        assert isinstance(event, Failed)
        assert event.failure.code == "bad_message"
        told[job.id] = event.failure.message
    assert told == {
        "missing": "the job's init_image is not stored any more",
        "broken": "the job's init_image cannot be read",
        "small": "the job's init_image is not of its size",
        "grey": "the job's init_image is not of its size",
    }


def test_an_image_that_the_autoencoder_cannot_encode_fails_its_job(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = torch.full((1, 4, 8, 8), torch.nan)
    monkeypatch.setattr(VAE, "encode", lambda self, pixels: (nothing, nothing))
    event = run(model, [anew(model, "a")], settings_with()).events["a"]
    assert isinstance(event, Failed)
    assert event.failure.code == "non_finite"


def test_a_masked_row_whose_numbers_overflow_is_begun_again_from_the_same_pictures(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_with(**REPRODUCIBLE)
    job = masked(model, "a", sampler="euler_a")
    whole = run(model, [job], settings)
    forward, calls = model.unet.forward, 0

    def overflows_once(*inputs: Any) -> Any:
        nonlocal calls
        calls += 1
        output = forward(*inputs)
        return torch.full_like(output, torch.inf) if calls == 2 else output

    monkeypatch.setattr(model.unet, "forward", overflows_once)
    assert run(model, [job], settings).images("a") == whole.images("a")
    assert calls > len(whole.ticks)


def test_a_job_cancelled_while_its_image_is_encoded_costs_no_tick_and_others_go_on_meanwhile(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, encode = threading.Event(), threading.Event(), VAE.encode

    def slow(self: VAE, pixels: torch.Tensor) -> Any:
        begun.set()
        assert go_on.wait(30)
        return encode(self, pixels)

    monkeypatch.setattr(VAE, "encode", slow)

    def on_tick(engine: Engine, report: TickReport, ticks: int) -> None:
        if ticks == 1:
            assert begun.wait(30)
            engine.cancel("slow")
        elif ticks == 3:
            go_on.set()

    jobs = [anew(model, "slow"), job_for(model, "other", num_inference_steps=8)]
    outcome = run(model, jobs, settings_with(), on_tick=on_tick)
    assert isinstance(outcome.events["slow"], Cancelled)
    assert len(outcome.images("other")) == 1
    assert len(outcome.ticks) == 8


async def test_a_drained_worker_hands_a_masked_picture_and_its_steps_to_the_next_one(
    settings: Settings, queue: JobQueue, model: DiffusionModel
) -> None:
    settings = settings.model_copy(update={**REPRODUCIBLE, "num_threads": 1})
    asked = masked(model, "one", num_inference_steps=60, sampler="euler_a", strength=0.5)
    whole = run(model, [asked], settings)
    change = Change()
    async with serving(settings, queue, model, slow_engine):
        job = await enqueue(queue, asked, inputs=inputs_for(asked))
        async for event in queue.events(job.id):
            if event.step >= 5:
                break
    ticks_before = change("ticks_total")
    assert 5 <= ticks_before < 30
    async with serving(settings, queue, model):
        assert (await queue.wait(job.id, 30)).state is JobState.SUCCEEDED
    assert await queue.images(job.id) == whole.images("one")
    assert change("ticks_total") == 30
    assert change("steps_saved_total") == ticks_before


async def test_a_job_whose_picture_the_server_has_lost_fails_and_says_so(
    settings: Settings, queue: JobQueue, model: DiffusionModel
) -> None:
    job = await enqueue(queue, anew(model, "one"))
    async with serving(settings.model_copy(update={"num_threads": 1}), queue, model):
        status = await queue.wait(job.id, 30)
    assert status.failure == Failure(code="bad_message", message="the job's init_image is not stored any more")
