"""What only a device can show. Run by `make test-gpu`; every other run leaves these out by their marker."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from darkroom.config import load_settings
from darkroom.diffusion.loader import load_model
from darkroom.diffusion.memory import unet_activation_bytes
from darkroom.diffusion.unet import UNet
from darkroom.engine.local import generate_images

from tests.support.engines import job_for, pixels, request_for, run_jobs
from tests.support.tiny_models import FAMILIES, UNET_CONFIGS, Family, write_tiny_model

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
