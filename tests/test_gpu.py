"""What only a device can show. Run by `make test-gpu`; every other run leaves these out by their marker."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from darkroom.config import Settings, load_settings
from darkroom.diffusion.loader import DiffusionModel, load_model
from darkroom.engine.batch import Batch
from darkroom.engine.device import CudaDevice
from darkroom.engine.engine import Engine, Failed, TickReport
from darkroom.engine.joining import key_of, make_rows, prompts_of
from darkroom.engine.lane import Lane
from darkroom.engine.local import generate_images
from darkroom.engine.prompts import PromptCache
from darkroom.engine.row import ActiveJob
from darkroom.jobs import Job

from tests.support.engines import Outcome, job_for, pixels, request_for, run_jobs
from tests.support.tiny_models import FAMILIES, Family, write_tiny_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", FAMILIES)
def test_a_picture_in_fp16_on_the_device_is_close_to_the_one_in_fp32_on_the_cpu(family: Family, tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path, family, seed=2)
    settings = load_settings()
    on_device = load_model(directory, device="cuda", dtype=torch.float16)
    on_cpu = load_model(directory)
    request = request_for(on_cpu, num_inference_steps=8)
    device_image, cpu_image = (pixels(generate_images(m, request, settings)[0][0]) for m in (on_device, on_cpu))
    assert np.abs(device_image - cpu_image).mean() <= 2


def test_a_mixed_crowd_on_the_device_draws_what_each_request_gets_alone(tmp_path: Path) -> None:
    model = load_model(write_tiny_model(tmp_path, "sd1", seed=2), device="cuda", dtype=torch.float32)
    jobs = [
        job_for(model, str(i), sampler=sampler, seed=i, guidance_scale=1.0 + i)
        for i, sampler in enumerate(("ddim", "euler_a", "heun", "dpmpp_2m_sde"))
    ]
    crowd = run_jobs(model, jobs, load_settings())
    for job in jobs:
        alone = run_jobs(model, [job], load_settings())
        assert np.abs(alone.pixels(job.id) - crowd.pixels(job.id)).max() <= 1


REPRODUCIBLE = {"batching": "reproducible", "reproducible_rows": 6}
CROWD = [
    {"sampler": "ddim", "num_inference_steps": 3, "guidance_scale": 1.0, "seed": 1},
    {"sampler": "heun", "num_inference_steps": 3, "seed": 2, "negative_prompt": "a cat"},
    {"sampler": "euler_a", "num_inference_steps": 6, "seed": 3, "guidance_scale": 9.0},
    {"sampler": "dpmpp_2m_sde", "num_inference_steps": 5, "seed": 4, "prompt": "on the red"},
]


@pytest.fixture(params=["fp16", "fp32"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> DiffusionModel:
    dtype = {"fp16": torch.float16, "fp32": torch.float32}[request.param]
    return load_model(write_tiny_model(tmp_path, "sd1", seed=2), device="cuda", dtype=dtype)


def captured(model: DiffusionModel, jobs: list[Job], settings: Settings, **options: Any) -> Outcome:
    """As a worker runs them: graphs captured first."""
    return run_jobs(model, jobs, settings, warm_up=True, **options)


def test_captured_ticks_draw_what_launched_ones_draw_bit_for_bit(model: DiffusionModel) -> None:
    jobs = [job_for(model, str(i), **fields) for i, fields in enumerate(CROWD)]
    launched = run_jobs(model, jobs, load_settings(graphs="off", **REPRODUCIBLE))
    replayed = captured(model, jobs, load_settings(**REPRODUCIBLE))
    for job in jobs:
        assert replayed.images(job.id) == launched.images(job.id)


def test_graphs_of_all_buckets_share_their_memory_without_disturbing_each_other(model: DiffusionModel) -> None:
    jobs = [job_for(model, str(i), **fields) for i, fields in enumerate(CROWD * 3)]
    launched = run_jobs(model, jobs, load_settings(graphs="off"))
    replayed = captured(model, jobs, load_settings())
    assert len({tick.choice.bucket for tick in replayed.ticks}) > 2
    for job in jobs:
        assert np.abs(replayed.pixels(job.id) - launched.pixels(job.id)).mean() <= 1


@pytest.mark.parametrize("joining_step", range(1, 6))
def test_a_row_may_join_and_leave_captured_ticks_at_any_step_of_another(
    model: DiffusionModel, joining_step: int
) -> None:
    settings = load_settings(**REPRODUCIBLE)
    host, guest = job_for(model, "host", num_inference_steps=8, seed=1), job_for(model, "guest", **CROWD[1])

    def join(engine: Engine, _: TickReport, ticks: int) -> None:
        if ticks == joining_step:
            engine.submit(guest)

    together = captured(model, [host], settings, expected=2, on_tick=join)
    for job in (host, guest):
        assert together.images(job.id) == captured(model, [job], settings).images(job.id)


def test_a_steady_captured_tick_allocates_nothing_and_makes_the_host_wait_for_nothing(model: DiffusionModel) -> None:
    device = CudaDevice(model.device, has_graphs=True)
    with torch.inference_mode(), device.activated(is_reproducible=False):
        cache = PromptCache(model, 1 << 20, batch_alone=False, num_in_use=4)
        lane = Lane(device, model, key_of(model, 64, 64), cache, num_slots=4)
        lane.capture([2, 4], lambda: False)
        assert sorted(lane.graphs) == [2, 4]
        job = job_for(model, "a", num_images_per_prompt=2, sampler="euler_a", num_inference_steps=30)
        active = ActiveJob(job, 0.0, None, lambda _: None)
        rows = make_rows(device, model, active, cache.encode(prompts_of(model, job)), 0.0)
        for row in rows:
            assert row.first_latents is not None
            row.slot = lane.pool.take(row.first_latents)
        batch = Batch(lane, rows, 4)
        for _ in range(3):
            device.wait(batch.enqueue().done)
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        for _ in range(20):
            torch.cuda.set_sync_debug_mode("error")
            try:
                tick = batch.enqueue()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            device.wait(tick.done)
            assert tick.is_finite[:2].all()
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_a_new_row_joins_without_making_the_host_wait(model: DiffusionModel) -> None:
    """A copy from memory that is not pinned would wait for the tick under way, and the device would then stand idle."""
    device = CudaDevice(model.device, has_graphs=False)
    with torch.inference_mode(), device.activated(is_reproducible=False):
        cache = PromptCache(model, 1 << 20, batch_alone=False, num_in_use=4)
        lane = Lane(device, model, key_of(model, 64, 64), cache)
        for seed, name in enumerate(("a", "b")):
            job = job_for(model, name, prompt=name, seed=seed)
            active = ActiveJob(job, 0.0, None, lambda _: None)
            # The first row meets first calls, the second one nothing new.
            torch.cuda.set_sync_debug_mode("error" if seed else "default")
            try:
                (row,) = make_rows(device, model, active, cache.encode(prompts_of(model, job)), 0.0)
                assert row.first_latents is not None
                row.slot = lane.pool.take(row.first_latents)
                Batch(lane, [row], 2).enqueue()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


def test_a_captured_row_that_overflows_fails_alone(model: DiffusionModel) -> None:
    jobs = [
        job_for(model, "good", num_inference_steps=12, seed=2),
        job_for(model, "bad", guidance_scale=1e36, num_inference_steps=12),
    ]
    settings = load_settings(**REPRODUCIBLE)
    together = captured(model, jobs, settings)
    bad = together.events["bad"]
    assert isinstance(bad, Failed)
    assert bad.failure.code == "non_finite"
    assert together.images("good") == captured(model, jobs[:1], settings).images("good")


def test_pictures_are_decoded_on_another_stream_than_the_ticks(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, step, streams = model.vae.decode, model.unet.forward, {}

    def noting(name: str, work: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def noted(*arguments: object) -> torch.Tensor:
            streams[name] = torch.cuda.current_stream()
            return work(*arguments)

        return noted

    monkeypatch.setattr(model.vae, "decode", noting("decode", decode))
    monkeypatch.setattr(model.unet, "forward", noting("tick", step))
    run_jobs(model, [job_for(model, "a")], load_settings(graphs="off"))
    default = torch.cuda.default_stream()
    assert streams["tick"] != default
    assert streams["decode"] not in (default, streams["tick"])


def test_a_tick_is_enqueued_before_the_one_before_it_is_complete(model: DiffusionModel) -> None:
    """The host comes back from enqueueing at once, however long the device takes."""
    device = CudaDevice(model.device, has_graphs=False)
    with torch.inference_mode(), device.activated(is_reproducible=False):
        torch.cuda._sleep(200_000_000)
        done = device.record()
        assert done is not None
        assert not done.query()
        device.wait(done)
        assert done.query()
