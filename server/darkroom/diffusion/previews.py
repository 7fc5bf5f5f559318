"""What a running image looks like, without the autoencoder: a linear map from latents to a small picture.

Each latent pixel and its eight neighbours give a patch of up to 4 × 4 pixels. The map is fitted by least squares, once
for each model that is served, to what the model's own autoencoder makes of random fields: so it needs no table,
whatever the model, and it does not depend on what was drawn before.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

PATCH_PX = 4
# Random fields to fit to, their side in latent pixels, and the sides of what they are blended from, so that there are
# areas of one colour, edges and textures.
NUM_FIELDS = 8
FIELD_SIDE = 32
FIELD_SCALES = (1, 2, 4, 8, 16, 32)
# Keeps directions that the fields hardly vary in from being read into.
RIDGE = 1e-4
JPEG_QUALITY = 80
MAX_PX = 512

Pixels = NDArray[np.uint8]


class PreviewMap:
    """The map of one model. Pictures are `[H, W, 3]` uint8, latents `[C, H, W]` fp32 on the host."""

    def __init__(self, weight: Tensor, bias: Tensor, patch_px: int) -> None:
        self._weight, self._bias, self._patch_px = weight, bias, patch_px

    def draw(self, latents: Tensor) -> Pixels:
        """The picture that latents stand for, with up to `PATCH_PX` pixels per latent."""
        padded = F.pad(latents[None], (1, 1, 1, 1), mode="replicate")
        drawn = F.pixel_shuffle(F.conv2d(padded, self._weight, self._bias), self._patch_px)[0]
        return drawn.clamp_(0, 255).round_().to(torch.uint8).permute(1, 2, 0).numpy()


def fit_previews(channels: int, scale_factor: int, decode: Callable[[Tensor], Sequence[Pixels | None]]) -> PreviewMap:
    """Fit a map for latents of `channels` channels, `scale_factor` pixels each.

    `decode` makes pictures, or None where that fails, of latents `[B, C, H, W]`. Raises `ValueError` when it makes
    none.
    """
    pool = max(1, scale_factor // PATCH_PX)
    patch_px = scale_factor // pool
    fields = _random_fields(channels)
    questions, answers = [], []
    for field, pixels in zip(fields, decode(fields), strict=True):
        if pixels is None:
            continue
        target = torch.from_numpy(pixels).permute(2, 0, 1).float()[None]
        target = F.pixel_unshuffle(F.avg_pool2d(target, pool), patch_px)
        around = F.unfold(field[None], 3)[0].t()
        # What lies at the border has no neighbours.
        answers.append(target[0, :, 1:-1, 1:-1].flatten(1).t())
        questions.append(torch.cat([around, around.new_ones((len(around), 1))], 1))
    if not questions:
        raise ValueError("fit_previews: none of the fields could be decoded")
    asked, answered = torch.cat(questions).double(), torch.cat(answers).double()
    inner = asked.t() @ asked
    inner.diagonal().add_(RIDGE * inner.diagonal().mean())
    solved = torch.linalg.solve(inner, asked.t() @ answered).float()
    weight = solved[:-1].t().reshape(-1, channels, 3, 3).contiguous()
    return PreviewMap(weight, solved[-1].clone(), patch_px)


def encode_preview(pixels: Pixels) -> bytes:
    """A JPEG of a preview, `[H, W, 3]` uint8, with no side above `MAX_PX`."""
    image, out = Image.fromarray(np.ascontiguousarray(pixels)), io.BytesIO()
    image.thumbnail((MAX_PX, MAX_PX))
    image.save(out, "JPEG", quality=JPEG_QUALITY)
    return out.getvalue()


def _random_fields(channels: int) -> Tensor:
    """`[NUM_FIELDS, channels, FIELD_SIDE, FIELD_SIDE]`, with the mean square 1 that latents have."""
    generator = torch.Generator().manual_seed(0)
    fields = torch.zeros((NUM_FIELDS, channels, FIELD_SIDE, FIELD_SIDE))
    for side in FIELD_SCALES:
        coarse = torch.randn((NUM_FIELDS, channels, side, side), generator=generator) / side**0.5
        fields += F.interpolate(coarse, (FIELD_SIDE, FIELD_SIDE), mode="bilinear", align_corners=False)
    return fields / fields.square().mean().sqrt()
