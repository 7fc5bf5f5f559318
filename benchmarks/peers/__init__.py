"""diffusers as its users run it: the other side of every comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import diffusers
import torch
from darkroom.config import BUILTIN_MODEL
from darkroom.jobs import GenerationRequest
from darkroom.worker.main import choose_dtype

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 2}),
}


class Peer:
    """A StableDiffusionPipeline with the built-in weights on `device` in `dtype`, optionally channels-last."""

    def __init__(self, device: torch.device, dtype: torch.dtype, *, is_channels_last: bool) -> None:
        diffusers.logging.set_verbosity_error()
        self.pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
            BUILTIN_MODEL, dtype=dtype, safety_checker=None, feature_extractor=None
        )
        self.pipeline.to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        if is_channels_last:
            self.pipeline.unet.to(memory_format=torch.channels_last)
            self.pipeline.vae.to(memory_format=torch.channels_last)
        self._config = self.pipeline.scheduler.config

    @classmethod
    def as_served(cls) -> Peer:
        """In the dtype that Darkroom picks on this machine, channels-last: what the servers in this folder run."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return cls(device, choose_dtype("auto", device), is_channels_last=True)

    def draw(self, request: GenerationRequest) -> Any:
        """One request, alone, as PIL image."""
        return self.draw_group([request])[0]

    def draw_group(self, requests: Sequence[GenerationRequest]) -> list[Any]:
        """Requests that differ in prompts and seeds only, by one call of the pipeline, as PIL images."""
        first = requests[0]
        name, arguments = SCHEDULERS[first.sampler]
        self.pipeline.scheduler = getattr(diffusers, name).from_config(self._config, **arguments)
        negative_prompts = [request.negative_prompt for request in requests]
        images: list[Any] = self.pipeline(
            [request.prompt for request in requests],
            negative_prompt=negative_prompts if any(negative_prompts) else None,
            width=first.width,
            height=first.height,
            num_inference_steps=first.num_inference_steps,
            guidance_scale=first.guidance_scale,
            generator=[torch.Generator().manual_seed(request.seed) for request in requests],
        ).images
        return images
