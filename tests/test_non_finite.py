"""An image whose numbers turn to NaN or infinity is tried once more, in fp32 and apart; then only its job fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from darkroom.config import Settings, load_settings
from darkroom.diffusion.loader import DiffusionModel, load_model
from darkroom.engine.engine import Engine
from darkroom.engine.events import Failed, TickReport
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.engines import job_for, run_jobs
from tests.support.metrics import Change
from tests.support.tiny_models import write_tiny_model
from tests.support.twin_device import TwinDevice

STEPS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiffusionModel]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_model(write_tiny_model(tmp_path_factory.mktemp("model"), "sd1", seed=3))
    torch.set_num_threads(threads)


@pytest.fixture
def settings() -> Settings:
    return load_settings(num_threads=1, encode_threads=1, batching="reproducible", reproducible_rows=4)


def spoil(model: DiffusionModel, monkeypatch: pytest.MonkeyPatch, is_bad: Callable[[int], bool]) -> None:
    """Let the network give NaN for its second row in the calls, counted from 1, that `is_bad`."""
    forward, calls = model.unet.forward, 0

    def spoilt(x: Tensor, *rest: Any) -> Tensor:
        nonlocal calls
        calls += 1
        output = forward(x, *rest)
        if is_bad(calls):
            output[1] = torch.nan
        return output

    monkeypatch.setattr(model.unet, "forward", spoilt)


def jobs_of(model: DiffusionModel, **fields: Any) -> list[Any]:
    shared = {"guidance_scale": 1.0, "num_inference_steps": STEPS, "sampler": "euler_a", **fields}
    return [job_for(model, name, seed=seed, **shared) for seed, name in enumerate(("good", "bad"))]


@pytest.mark.parametrize("at_call", range(1, STEPS + 1))
@pytest.mark.parametrize("device", [None, TwinDevice], ids=["cpu", "ticks ahead"])
def test_an_image_that_was_nan_once_is_drawn_again_and_nobody_sees_it(
    model: DiffusionModel,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    at_call: int,
    device: type[TwinDevice] | None,
) -> None:
    jobs = jobs_of(model)
    undisturbed = run_jobs(model, jobs, settings)
    spoil(model, monkeypatch, lambda call: call == at_call)
    change = Change()
    outcome = run_jobs(model, jobs, settings, device=None if device is None else device(has_graphs=False))
    assert [outcome.images(job.id) for job in jobs] == [undisturbed.images(job.id) for job in jobs]
    assert change("non_finite_total", where="tick") == 1
    assert change("non_finite_recovered_total", where="tick") == 1
    assert change("rows_joined_total") == change("rows_left_total") == 3


def test_an_image_of_a_prompt_of_several_chunks_is_drawn_again_too(
    model: DiffusionModel, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_of(model, prompt="a (cat:1.2) BREAK on a mat", prompt_syntax="weighted")
    undisturbed = run_jobs(model, jobs, settings)
    spoil(model, monkeypatch, lambda call: call == 3)
    outcome = run_jobs(model, jobs, settings, device=TwinDevice(has_graphs=False))
    assert [outcome.images(job.id) for job in jobs] == [undisturbed.images(job.id) for job in jobs]


def test_it_goes_on_from_the_last_state_that_was_saved(
    model: DiffusionModel, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings.model_copy(update={"checkpoint_interval_s": 1e-6})
    jobs = jobs_of(model, sampler="dpmpp_2m_sde")
    undisturbed = run_jobs(model, jobs, settings)
    spoil(model, monkeypatch, lambda call: call == 4)
    outcome = run_jobs(model, jobs, settings, on_saved=lambda _: None)
    assert outcome.images("bad") == undisturbed.images("bad")
    steps_done = sum(tick.num_rows for tick in outcome.ticks)
    assert steps_done == 2 * STEPS + 1


def test_an_image_that_is_nan_again_fails_its_job_and_its_neighbour_does_not_notice(
    model: DiffusionModel, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_of(model)
    undisturbed = run_jobs(model, jobs, settings)
    # Guidance as large as this overflows fp32 too, however the row is placed in its ticks.
    jobs[1] = job_for(model, "bad", seed=1, guidance_scale=1e38, num_inference_steps=STEPS)
    change = Change()
    outcome = run_jobs(model, jobs, settings)
    assert outcome.images("good") == undisturbed.images("good")
    bad = outcome.events["bad"]
    assert isinstance(bad, Failed)
    assert bad.failure.code == "non_finite"
    assert change("non_finite_total", where="tick") == 2
    assert change("non_finite_recovered_total", where="tick") == 0
    assert change("rows_joined_total") == change("rows_left_total") == 3


@pytest.fixture
def overflowing(tmp_path: Path) -> Path:
    """A checkpoint whose denoiser's first convolution gives values beyond 65504, which the norms behind take back to
    size; its weights are those of fp16."""
    directory = write_tiny_model(tmp_path / "model", "sd1", seed=3)
    file = directory / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_in.weight"] *= 30_000 / weights["conv_in.weight"].abs().max()
    save_file({name: weight.half().float() for name, weight in weights.items()}, file)
    return directory


def test_what_overflows_in_fp16_is_drawn_in_fp32(overflowing: Path, settings: Settings) -> None:
    exact, narrow = load_model(overflowing), load_model(overflowing, dtype=torch.float16, vae_dtype=torch.float32)
    jobs = [job_for(narrow, "two", num_images_per_prompt=2, num_inference_steps=4)]
    expected = run_jobs(exact, jobs, settings)
    change, engines = Change(), list[Engine]()

    def keep(engine: Engine, _report: TickReport, _ticks: int) -> None:
        engines.append(engine)

    outcome = run_jobs(narrow, jobs, settings, on_tick=keep)
    for index in range(2):
        difference = np.abs(outcome.pixels("two", index) - expected.pixels("two", index))
        assert difference.max() <= 2
    assert change("non_finite_recovered_total", where="tick") == 2
    assert narrow.unet.dtype is torch.float16
    assert not engines[0]._lanes, "the model in fp32 is gone with the rows that needed it"


def test_an_image_fails_where_there_is_no_memory_for_fp32(
    overflowing: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(_: DiffusionModel) -> DiffusionModel:
        raise torch.OutOfMemoryError("no")

    narrow = load_model(overflowing, dtype=torch.float16)
    monkeypatch.setattr(DiffusionModel, "widened", no_memory)
    bad = run_jobs(narrow, [job_for(narrow, "bad")], settings).events["bad"]
    assert isinstance(bad, Failed)
    assert bad.failure.code == "non_finite"


def test_infinite_latents_are_a_failure_not_a_white_picture(
    model: DiffusionModel, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = model.unet.forward
    monkeypatch.setattr(model.unet, "forward", lambda *arguments: torch.full_like(step(*arguments), torch.inf))
    bad = run_jobs(model, [job_for(model, "bad", guidance_scale=1.0)], settings).events["bad"]
    assert isinstance(bad, Failed)
    assert bad.failure.code == "non_finite"


def test_a_picture_that_is_decoded_to_nan_is_a_failure_not_a_black_picture(
    model: DiffusionModel, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, calls = model.vae.decode, 0

    def spoilt(latents: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return decode(latents) * (torch.nan if calls == 1 else 1.0)

    monkeypatch.setattr(model.vae, "decode", spoilt)
    change = Change()
    jobs = [job_for(model, "bad", num_inference_steps=2), job_for(model, "good", num_inference_steps=4)]
    outcome = run_jobs(model, jobs, settings)
    assert outcome.images("good")
    bad = outcome.events["bad"]
    assert isinstance(bad, Failed)
    assert bad.failure.code == "non_finite"
    assert change("non_finite_total", where="decode") == 1
