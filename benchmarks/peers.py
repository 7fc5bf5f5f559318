"""diffusers as its users run it: the other side of every comparison."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from darkroom.config import BUILTIN_MODEL
from darkroom.jobs import GenerationRequest

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
            BUILTIN_MODEL, torch_dtype=dtype, safety_checker=None, feature_extractor=None
        )
        self.pipeline.to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        if is_channels_last:
            self.pipeline.unet.to(memory_format=torch.channels_last)
            self.pipeline.vae.to(memory_format=torch.channels_last)
        self._config = self.pipeline.scheduler.config

    def draw(self, request: GenerationRequest) -> Any:
        """One request, alone, as PIL image."""
        name, arguments = SCHEDULERS[request.sampler]
        self.pipeline.scheduler = getattr(diffusers, name).from_config(self._config, **arguments)
        return self.pipeline(
            request.prompt,
            negative_prompt=request.negative_prompt or None,
            width=request.width,
            height=request.height,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator().manual_seed(request.seed),
        ).images[0]
