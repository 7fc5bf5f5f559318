"""Training: the noise arithmetic of the student, and a run that is stopped and goes on."""

from __future__ import annotations

import csv
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler

from training import common, train_vae
from training.distill import STUDENT_STEPS, ddim_step, signal_and_spread, step_times, velocity_between
from training.train_unet import NOISE_CONFIG


@pytest.fixture
def sigterm() -> Iterator[None]:
    """A run takes SIGTERM for itself; afterwards it is as it was."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_the_student_takes_the_steps_of_the_sampler_that_serves_it() -> None:
    noise_scheduler = DDIMScheduler.from_config(NOISE_CONFIG, timestep_spacing="trailing")
    noise_scheduler.set_timesteps(STUDENT_STEPS)
    times = step_times(STUDENT_STEPS)
    assert torch.equal(times[:-1], noise_scheduler.timesteps)
    generator = torch.Generator().manual_seed(0)
    latents, velocity = torch.randn(2, STUDENT_STEPS, 4, 2, 2, generator=generator).unbind()
    now, then = (signal_and_spread(noise_scheduler.alphas_cumprod, part) for part in (times[:-1], times[1:]))
    ends = ddim_step(latents, velocity, now, then)
    for index, timestep in enumerate(noise_scheduler.timesteps):
        row = slice(index, index + 1)
        expected = noise_scheduler.step(velocity[row], timestep, latents[row]).prev_sample
        torch.testing.assert_close(ends[row], expected)


def test_the_velocity_between_two_points_leads_from_the_one_to_the_other() -> None:
    alphas_cumprod = DDIMScheduler.from_config(NOISE_CONFIG).alphas_cumprod
    times = step_times(STUDENT_STEPS)
    now, then = (signal_and_spread(alphas_cumprod, part) for part in (times[:-1], times[1:]))
    start, end = torch.randn(2, STUDENT_STEPS, 4, 2, 2, generator=torch.Generator().manual_seed(1)).unbind()
    velocity = velocity_between(start, end, now, then)
    torch.testing.assert_close(ddim_step(start, velocity, now, then), end, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("sigterm")
def test_a_run_goes_on_where_it_was_stopped_and_says_when_it_is_finished(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--scenes", "8", "--batch-size", "1", "--held-out", "1"]
    train_vae.main([*arguments, "--updates", "1"])
    assert common.is_finished(tmp_path)
    train_vae.main([*arguments, "--updates", "2"])
    with (tmp_path / "log.csv").open(newline="") as file:
        assert [row["updates"] for row in csv.DictReader(file)] == ["1", "2"]
    assert json.loads((tmp_path / "progress.json").read_text())["updates"] == 2
    assert (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").exists()
    assert (tmp_path / "log.png").exists()


@pytest.mark.usefixtures("sigterm")
def test_a_run_that_is_told_to_stop_ends_after_its_update_and_saves() -> None:
    progress = common.Progress(minutes=None, updates=1000)
    assert not progress.stopping
    assert not progress.is_save_due(every_minutes=1.0)
    signal.raise_signal(signal.SIGTERM)
    assert progress.stopping
    assert progress.is_save_due(every_minutes=1.0)
    assert not progress.finished
