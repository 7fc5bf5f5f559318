"""What only a device can show. Run by `make test-gpu`; every other run leaves these out by their marker."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from darkroom.config import load_settings
from darkroom.diffusion.loader import load_model
from darkroom.engine.local import generate_images

from tests.support.engines import job_for, pixels, request_for, run_jobs
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
