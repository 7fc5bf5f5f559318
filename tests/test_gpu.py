"""What only a device can show. Run by `make test-gpu`; every other run leaves these out by their marker."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from darkroom.config import load_settings
from darkroom.diffusion.compiled import CompiledGraphs, seconds_of
from darkroom.diffusion.loader import DiffusionModel, load_model
from darkroom.diffusion.memory import unet_activation_bytes
from darkroom.diffusion.unet import UNet
from darkroom.engine.engine import Engine
from darkroom.engine.local import generate_images
from darkroom_kernels import attention
from darkroom_kernels.attention.reference import reference_attention
from darkroom_kernels.backend import KernelUnavailable

from tests.support.engines import job_for, pixels, request_for, run_jobs
from tests.support.tiny_models import FAMILIES, UNET_CONFIGS, Family, write_tiny_model
from tests.test_engine import CROWD

# The first warm-up of a machine compiles every kernel.
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]
START_S = 600.0


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


def test_a_product_added_in_place_takes_no_memory_besides() -> None:
    x, a, b = (
        torch.randn(shape, device="cuda", dtype=torch.float16) for shape in ((4096, 640), (4096, 512), (512, 640))
    )
    with torch.inference_mode():
        x.addmm_(a, b)
        # Once more: the first call of a shape may fetch cuBLAS' workspace.
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        x.addmm_(a, b)
    assert torch.cuda.max_memory_allocated() == before


def test_the_memory_of_a_forward_is_what_was_computed_for_it() -> None:
    """At most a quarter off, without the workspaces that cuDNN takes for the time of a convolution."""
    config = {**UNET_CONFIGS["sdxl"], "block_out_channels": (320, 640), "norm_num_groups": 32}
    config |= {"attention_head_dim": (5, 10), "layers_per_block": 2}
    with torch.device("meta"):
        planned = UNet(config).to(torch.float16).fuse()
    unet = UNet(config).to("cuda", torch.float16)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.fill_(0.01)
    unet.fuse()
    x = torch.randn(4, 4, 64, 64, device="cuda", dtype=torch.float16)
    time = torch.zeros(4, unet.time_width, device="cuda", dtype=torch.float16)
    text = torch.zeros(4, 77, unet.text_kv_width, device="cuda", dtype=torch.float16)
    slots = torch.arange(4, device="cuda")
    unet(x, time, text, None, slots)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    unet(x, time, text, None, slots)
    measured = torch.cuda.max_memory_allocated() - before
    assert measured == pytest.approx(unet_activation_bytes(planned, 4, 64, 64), rel=0.25)


@pytest.fixture
def exact_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DiffusionModel:
    """In fp32 without TF32, so that other algorithms do not show in a picture."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return load_model(write_tiny_model(tmp_path, "sd1", seed=2), device="cuda", dtype=torch.float32)


def test_captured_ticks_on_the_device_draw_what_ticks_call_by_call_draw(exact_model: DiffusionModel) -> None:
    """As a worker runs them: a warm-up first, then rows of all samplers that join and leave buckets of many sizes."""
    jobs = [job_for(exact_model, str(i), **fields) for i, fields in enumerate(CROWD)]
    plain = run_jobs(exact_model, jobs, load_settings(graphs="off", max_rows=16), timeout_s=START_S)
    engines: list[Engine] = []
    captured = run_jobs(
        exact_model,
        jobs,
        load_settings(max_rows=16),
        warm_up=True,
        timeout_s=START_S,
        on_tick=lambda engine, *_: engines.append(engine),
    )
    (lane,) = engines[0]._lanes.values()
    assert sorted(lane.graphs) == [1, 2, 4, 8, 16]
    assert len({tick.choice.bucket for tick in captured.ticks}) > 2
    for job in jobs:
        assert np.abs(captured.pixels(job.id) - plain.pixels(job.id)).max() <= 2


def test_captured_ticks_of_the_compiled_network_draw_what_the_hand_made_one_draws(exact_model: DiffusionModel) -> None:
    jobs = [job_for(exact_model, "a"), job_for(exact_model, "b", sampler="euler_a", guidance_scale=1.0)]
    hand_made = run_jobs(exact_model, jobs, load_settings(max_rows=2), warm_up=True, timeout_s=START_S)
    # Said to be faster, so that it is used whatever the clock says of so small a network.
    times = itertools.cycle((2.0, 1.0))
    graphs = exact_model.unet.compiled = CompiledGraphs(
        exact_model.unet, seconds_of=lambda call, device: (seconds_of(call, device), next(times))[1]
    )
    compiled = run_jobs(
        exact_model, jobs, load_settings(max_rows=2), warm_up=True, timeout_s=START_S, on_ready=graphs.close
    )
    assert [(trial.rows, trial.is_used) for trial in graphs.trials] == [(2, True), (1, True)]
    for job in jobs:
        assert np.abs(compiled.pixels(job.id) - hand_made.pixels(job.id)).max() <= 2


@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient"])
@pytest.mark.parametrize(("queries", "keys"), [(256, 256), (1024, 77)])
def test_a_named_backend_agrees_with_the_reference_or_refuses(name: str, queries: int, keys: int) -> None:
    q, k, v = (
        torch.randn(2, length, 5, 64, device="cuda", dtype=torch.float16).transpose(1, 2)
        for length in (queries, keys, keys)
    )
    exact = reference_attention(q.float(), k.float(), v.float())
    try:
        got = attention(q, k, v, implementation=name)
    except KernelUnavailable as refusal:
        pytest.skip(str(refusal))
    assert (got.float() - exact).abs().max() <= 2e-2 * exact.square().mean().sqrt()


def test_auto_on_the_device_computes_attention_whatever_it_chose() -> None:
    for dim, queries, keys in ((64, 4096, 4096), (64, 4096, 77), (40, 1024, 1024), (160, 64, 64), (512, 1024, 1024)):
        q, k, v = (
            torch.randn(2, length, 2, dim, device="cuda", dtype=torch.float16).transpose(1, 2)
            for length in (queries, keys, keys)
        )
        exact = reference_attention(q.float(), k.float(), v.float())
        assert (attention(q, k, v).float() - exact).abs().max() <= 2e-2 * exact.square().mean().sqrt()
