"""What a trajectory begins with: noise alone, or an init image noised to its first step; and what a mask keeps of it.

The order of draws from a row's generator is that of diffusers' `StableDiffusionImg2ImgPipeline` and
`StableDiffusionInpaintPipeline`, so a seed gives their picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from darkroom import metrics
from darkroom.diffusion.images import decode_input
from darkroom.diffusion.loader import DiffusionModel
from darkroom.diffusion.samplers import SamplerTable
from darkroom.engine.device import TickDevice, to_host
from darkroom.errors import JobError
from darkroom.jobs import GenerationRequest


@dataclass(frozen=True, eq=False)
class Gaussian:
    """What the autoencoder makes of a picture: `mean` and `std` `[C, H, W]` of its latents, fp32 on the host."""

    mean: Tensor
    std: Tensor

    def sample(self, generator: torch.Generator) -> Tensor:
        return torch.randn(self.mean.shape, generator=generator, dtype=torch.float32).mul_(self.std).add_(self.mean)


@dataclass(frozen=True, eq=False)
class EncodedInputs:
    """The pictures of a request as its rows need them.

    `init_image` is None where the trajectory begins with noise alone. `is_new` `[1, H, W]` bool on the host says which
    latents are drawn anew, None without a mask; `kept_image` is the part that stays, for a UNet that reads it.
    """

    init_image: Gaussian | None
    is_new: Tensor | None = None
    kept_image: Gaussian | None = None


@dataclass(frozen=True, eq=False)
class Kept:
    """What a mask keeps of a row, on the device: clean `latents` and the row's first `noise` `[C, H, W]` fp32, and
    `is_new` `[1, H, W]` bool."""

    latents: Tensor
    noise: Tensor
    is_new: Tensor

    def noised(self, level: tuple[float, float]) -> Tensor:
        """The latents at a level of noise: signal · latents + noise · noise."""
        signal, noise = level
        return torch.mul(self.latents, signal).add_(self.noise, alpha=noise)

    def put_back(self, state: Tensor, noised: Tensor) -> None:
        """Let the kept part of `state` `[C, H, W]` be `noised`. Allocates nothing, so a tick that got here is done."""
        torch.where(self.is_new, state, noised, out=state)


@dataclass(frozen=True, eq=False)
class Start:
    """Of one row: first `latents` `[C, H, W]` fp32 on the host, what a mask keeps, and on the host what the UNet reads
    beside the latents, `[condition_channels, H, W]`."""

    latents: Tensor
    kept: Kept | None = None
    condition: Tensor | None = None


@torch.inference_mode()
def encode_inputs(model: DiffusionModel, request: GenerationRequest, inputs: Mapping[str, bytes]) -> EncodedInputs:
    """Decode and encode the pictures of a request; on CUDA on the current stream, and the host waits.

    Raises `JobError` on a picture that is not there or not as the request says, or that the autoencoder cannot encode.
    """
    size = request.height, request.width
    pixels = _pixels(inputs, "init_image", size).mul_(2.0).sub_(1.0)
    if not request.mask_image:
        return EncodedInputs(_encode(model, pixels))
    is_new = _pixels(inputs, "mask_image", size) >= 0.5
    side = model.vae_scale_factor
    latent_mask = F.interpolate(is_new[None].float(), size=(size[0] // side, size[1] // side))[0] >= 0.5
    if not model.condition_channels:
        return EncodedInputs(_encode(model, pixels), latent_mask)
    kept = _encode(model, pixels * ~is_new)
    return EncodedInputs(_encode(model, pixels) if request.strength < 1 else None, latent_mask, kept)


def start_of(
    device: TickDevice,
    inputs: EncodedInputs | None,
    table: SamplerTable,
    shape: tuple[int, int, int],
    generator: torch.Generator,
    strength: float,
) -> Start:
    """Draw the beginning of one row with latents of `shape`."""
    clean = None if inputs is None or inputs.init_image is None else inputs.init_image.sample(generator)
    noise = torch.randn(shape, generator=generator, dtype=torch.float32)
    if inputs is None or clean is None or (inputs.is_new is not None and strength >= 1):
        latents = noise * table.initial_scale
    else:
        signal, level = table.levels[0]
        latents = signal * clean + level * noise
    if inputs is None or inputs.is_new is None:
        return Start(latents)
    if inputs.kept_image is not None:
        kept = inputs.kept_image.sample(generator)
        return Start(latents, condition=torch.cat((inputs.is_new.float(), kept)))
    # diffusers encodes what is kept here too, and does nothing with it.
    torch.randn(shape, generator=generator, dtype=torch.float32)
    assert clean is not None  # noqa: S101
    return Start(latents, kept=Kept(device.upload(clean), device.upload(noise), device.upload(inputs.is_new)))


def _pixels(inputs: Mapping[str, bytes], name: str, size: tuple[int, int]) -> Tensor:
    """A picture as `[3, H, W]`, a mask as `[1, H, W]`, fp32 in [0, 1]."""
    if name not in inputs:
        raise JobError(f"the job's {name} is not stored any more", code="bad_message")
    try:
        pixels = decode_input(inputs[name])
    except ValueError as error:
        raise JobError(f"the job's {name} cannot be read", code="bad_message") from error
    if pixels.shape != (*size, 1 if name == "mask_image" else 3):
        raise JobError(f"the job's {name} is not of its size", code="bad_message")
    return torch.from_numpy(pixels).permute(2, 0, 1).float().div_(255.0)


def _encode(model: DiffusionModel, pixels: Tensor) -> Gaussian:
    on_device = pixels[None].to(model.device)
    mean, std = to_host(*model.vae.encode(on_device))
    if model.vae.dtype is torch.float16 and not _is_finite(mean, std):
        model.upcast_vae()
        metrics.VAE_UPCASTS.inc()
        mean, std = to_host(*model.vae.encode(on_device))
    if not _is_finite(mean, std):
        metrics.NON_FINITE.labels("encode").inc()
        raise JobError("the autoencoder made NaN or infinity of the picture", code="non_finite")
    return Gaussian(mean[0], std[0])


def _is_finite(*tensors: Tensor) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
