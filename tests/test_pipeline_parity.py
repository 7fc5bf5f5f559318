"""Whole pictures against diffusers: the same checkpoint, request and seed give the same image."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from darkroom.config import load_settings
from darkroom.diffusion.loader import load_model
from darkroom.engine.local import generate_images
from numpy.typing import NDArray

from tests.support.engines import pixels, request_for
from tests.support.tiny_models import FAMILIES, write_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
REQUESTS = [
    pytest.param({"sampler": "ddim", "negative_prompt": "a cat"}, id="ddim with a negative prompt"),
    pytest.param({"sampler": "euler_a", "clip_skip": 1, "seed": 2**40}, id="euler_a with clip_skip and a large seed"),
    pytest.param({"sampler": "heun", "guidance_scale": 1.0}, id="heun without guidance"),
    pytest.param({"sampler": "dpmpp_2m", "sigma_schedule": "karras", "width": 80, "height": 48}, id="dpmpp_2m, wide"),
    pytest.param({"sampler": "unipc", "num_inference_steps": 7}, id="unipc"),
]


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    directory = write_tiny_model(tmp_path_factory.mktemp(request.param), request.param, seed=11)
    # As in the published checkpoints of all three families; left out, ddim would clip.
    config = directory / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "clip_sample": False}))
    yield directory
    torch.set_num_threads(threads)


def picture_of_diffusers(directory: Path, fields: dict[str, Any]) -> NDArray[np.int16]:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(directory, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    # diffusers 0.42 looks for the encoder's layers where transformers 4 kept them.
    if not hasattr(pipeline.text_encoder, "text_model"):
        layers = SimpleNamespace(final_layer_norm=pipeline.text_encoder.final_layer_norm)
        object.__setattr__(pipeline.text_encoder, "text_model", layers)
    name, arguments = SCHEDULERS[fields["sampler"]]
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, **arguments)
    image = pipeline(
        fields["prompt"],
        negative_prompt=fields["negative_prompt"] or None,
        width=fields["width"],
        height=fields["height"],
        num_inference_steps=fields["num_inference_steps"],
        guidance_scale=fields["guidance_scale"],
        clip_skip=fields["clip_skip"] or None,
        generator=torch.Generator().manual_seed(fields["seed"]),
    ).images[0]
    return np.asarray(image).astype(np.int16)


@pytest.mark.parametrize("fields", REQUESTS)
def test_a_picture_equals_the_one_of_diffusers(checkpoint: Path, fields: dict[str, Any]) -> None:
    model = load_model(checkpoint)
    request = request_for(model, **fields)
    images, _ = generate_images(model, request, load_settings(num_threads=1, dtype="fp32"))
    ours = pixels(images[0])
    theirs = picture_of_diffusers(checkpoint, {name: getattr(request, name) for name in request.__struct_fields__})
    assert ours.shape == theirs.shape
    assert ours.std() > 1, "a flat picture would prove nothing"
    assert np.quantile(np.abs(ours - theirs), 0.999) <= 1
