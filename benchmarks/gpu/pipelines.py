"""diffusers on the same checkpoint: eager as it comes, or compiled as its own guide advises."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

COMPILE_MODES = ("reduce-overhead", "max-autotune")
# Larger batches are decoded picture by picture, as users of large pictures do; the convolutions overflow otherwise.
MAX_DECODE_BATCH = 4


class Pipeline:
    """A pipeline on `device` in `dtype`, compiled in `compile_mode` unless that is None.

    Compiled means channels-last, fused QKV projections, and UNet and decoder compiled whole. Raises `ImportError`
    where diffusers is missing.
    """

    def __init__(
        self, path: Path, device: torch.device, dtype: torch.dtype, *, compile_mode: str | None = None
    ) -> None:
        with warnings.catch_warnings():
            # Its releases deprecate names of each other's and of torch's; GPU machines have many of them.
            warnings.simplefilter("ignore")
            import diffusers

            diffusers.logging.set_verbosity_error()
            diffusers.logging.disable_progress_bar()
            pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(path, torch_dtype=dtype)
        self.version: str = diffusers.__version__
        pipeline.watermark = None
        pipeline.to(device)
        pipeline.set_progress_bar_config(disable=True)
        # Said here, so that it holds whatever ran before in this process.
        torch.backends.cudnn.benchmark = True
        if compile_mode is not None:
            pipeline.fuse_qkv_projections()
            pipeline.unet.to(memory_format=torch.channels_last)
            pipeline.vae.to(memory_format=torch.channels_last)
            pipeline.unet = torch.compile(pipeline.unet, mode=compile_mode, fullgraph=True, dynamic=False)
            decoder = pipeline.vae.decoder
            decode = torch.compile(decoder.forward, mode=compile_mode, fullgraph=True, dynamic=False)
            # A CUDA graph's output is overwritten by the next call, and slicing joins the outputs of several.
            decoder.forward = lambda *args, **kwargs: decode(*args, **kwargs).clone()
        self.pipeline, self.device = pipeline, device

    @torch.inference_mode()
    def draw(self, prompts: Sequence[str], *, side_px: int, num_steps: int, guidance_scale: float) -> float:
        """Draw one picture for each prompt in one batch, up to PIL images. Returns the seconds."""
        sliced = len(prompts) > MAX_DECODE_BATCH
        (self.pipeline.vae.enable_slicing if sliced else self.pipeline.vae.disable_slicing)()
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
        self._synchronise()
        began_s = time.perf_counter()
        pictures = self.pipeline(
            list(prompts),
            width=side_px,
            height=side_px,
            num_inference_steps=num_steps,
            guidance_scale=guidance_scale,
            generator=generators,
        ).images
        self._synchronise()
        assert len(pictures) == len(prompts)
        return time.perf_counter() - began_s

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
