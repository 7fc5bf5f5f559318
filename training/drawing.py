"""Pictures of many prompts at once, drawn by Darkroom's own networks, samplers and step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from darkroom.diffusion.loader import DiffusionModel, load_model
from darkroom.diffusion.samplers import compile_sampler
from darkroom.diffusion.vae import MAX_DECODE_PIXELS
from darkroom_kernels.step import scale_input, step_
from torch import Tensor

from training.painting import scene_pixels
from training.world import World, scene_at

# Scenes of this series are never trained on.
VAE_SEED = 1_000_003


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn: the request's fields of the same names."""

    sampler: str
    num_inference_steps: int
    guidance_scale: float
    sigma_schedule: str = "simple"

    @classmethod
    def of(cls, model: DiffusionModel) -> Sampling:
        """The model's own defaults."""
        card = model.card
        return cls(card.sampler, card.num_inference_steps, card.guidance_scale, card.sigma_schedule)

    def but(self, **changes: str | int | float) -> Sampling:
        """The same, with some fields changed; a sampler that has no such sigma schedule takes the checkpoint's."""
        changed = replace(self, **changes)
        return replace(changed, sigma_schedule="simple") if "sampler" in changes else changed


def load(path: Path, device: str = "auto", dtype: torch.dtype | None = None) -> DiffusionModel:
    """Load a diffusers folder. `dtype` None is the one that serves: fp16 on a GPU, fp32 on a CPU."""
    return load_model(path, device=device, dtype=dtype)


@torch.inference_mode()
def draw(
    model: DiffusionModel, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling, batch_size: int = 128
) -> np.ndarray:
    """One picture a prompt, `[N, H, W, 3]` uint8 at the model's own size, each from its own seed as a request's."""
    parts = [
        _draw_batch(model, prompts[start : start + batch_size], seeds[start : start + batch_size], sampling)
        for start in range(0, len(prompts), batch_size)
    ]
    return np.concatenate(parts)


def _draw_batch(model: DiffusionModel, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling) -> np.ndarray:
    device, num_rows = model.device, len(prompts)
    table = compile_sampler(sampling.sampler, model.schedule, sampling.num_inference_steps, sampling.sigma_schedule)
    is_guided = sampling.guidance_scale > 1 and not model.embeds_guidance
    texts = model.text.encode(prompts) + (model.text.encode([""], negative=True) if is_guided else [])
    text_kv = model.unet.text_kv(torch.stack([text.prompt_embeds for text in texts]))
    times = model.unet.time_projection(
        table.timesteps.to(device),
        guidance_embedding_scale=sampling.guidance_scale if model.embeds_guidance else None,
    )

    rows = torch.arange(num_rows, device=device)
    row_of = rows.repeat(2) if is_guided else rows
    # All unguided rows read the one empty text.
    text_slots = torch.cat([rows, torch.full_like(rows, num_rows)]) if is_guided else rows
    rows_uncond = rows + num_rows if is_guided else rows
    scale = torch.full((num_rows,), sampling.guidance_scale if is_guided else 1.0, device=device)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    shape = (
        model.latent_channels,
        model.card.height // model.vae_scale_factor,
        model.card.width // model.vae_scale_factor,
    )
    latents = _noise(generators, shape, device) * table.initial_scale
    previous = torch.zeros(num_rows, 2, *shape, device=device)
    is_finite = torch.ones(num_rows, dtype=torch.bool, device=device)
    for step in range(table.num_evaluations):
        coefficients = table.coefficients[step].to(device).expand(num_rows, -1).contiguous()
        noise = _noise(generators, shape, device) if table.needs_noise[step] else None
        scaled = scale_input(latents, coefficients, rows, row_of, model.dtype, implementation=model.kernels)
        line = times[step].expand(len(row_of), -1).contiguous()
        noise_pred = model.unet(scaled, line, text_kv, None, text_slots)
        step_(
            latents, previous, noise_pred, rows, rows, rows_uncond, scale, coefficients, noise, is_finite,
            implementation=model.kernels,
        )  # fmt: skip
    return _decode(model, latents)


def _noise(generators: Sequence[torch.Generator], shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)


def _decode(model: DiffusionModel, latents: Tensor) -> np.ndarray:
    """Latents `[N, C, h, w]` to pictures `[N, H, W, 3]` uint8."""
    pixels_each = latents.shape[2] * latents.shape[3] * model.vae_scale_factor**2
    pictures = [model.vae.decode(part) for part in latents.split(max(1, MAX_DECODE_PIXELS // pixels_each))]
    scaled = torch.cat(pictures).add(1).mul(127.5).round()
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


@torch.inference_mode()
def vae_psnr_db(model: DiffusionModel, world: World, num_scenes: int = 64) -> float:
    """Mean PSNR in dB of what the autoencoder makes of `num_scenes` scenes that it was not trained on."""
    scenes = [scene_at(VAE_SEED, index, "any", world) for index in range(num_scenes)]
    pixels = scene_pixels(scenes, world.image_px)
    at_once = MAX_DECODE_PIXELS // world.image_px**2 // 4
    values = []
    for start in range(0, num_scenes, at_once):
        part = torch.from_numpy(pixels[start : start + at_once])
        pictures = part.to(model.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        mean, _ = model.vae.encode(pictures)
        error = (model.vae.decode(mean) - pictures).square().mean((1, 2, 3))
        values.append(10 * torch.log10(4 / error))
    return float(torch.cat(values).mean())
