"""Large pictures decoded in overlapping tiles, so that memory does not grow with the picture.

Each tile's norms and attention see that tile alone, so its tint and contrast differ from those of the picture decoded
whole, the more the less it looks like the rest: with the built-in model's autoencoder by 35 dB where all parts are
alike, by 24 dB for one slope of colour across the picture. Neighbours are faded into each other over the overlap, which
hides the step but not the drift, so pictures are decoded whole as long as memory allows. Source of the idea: diffusers
`AutoencoderKL.tiled_decode`; here tiles are of one size and evenly spread, so none is a sliver.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# The share of a tile that fades into its neighbour, as in diffusers.
OVERLAP = 0.25


def spread(length: int, limit: int) -> tuple[int, list[int]]:
    """Size and starts of the fewest equal tiles of at most `limit` that cover `length` and overlap by `OVERLAP`."""
    if length <= limit:
        return length, [0]
    overlap = max(1, int(limit * OVERLAP))
    count = -(-(length - overlap) // (limit - overlap))
    size = -(-(length + (count - 1) * overlap) // count)
    return size, [round(index * (length - size) / (count - 1)) for index in range(count)]


def decode_in_tiles(decode: Callable[[Tensor], Tensor], latents: Tensor, limit: int, scale: int) -> Tensor:
    """Decode latents `[B, C, h, w]`, at most `limit` a side at a time, into `[B, 3, h·scale, w·scale]` fp32.

    `decode` turns latents of any size into pictures `scale` times as large; its results are averaged where tiles
    overlap, each weighing less towards its edge.
    """
    batch, _, height, width = latents.shape
    (tile_height, tops), (tile_width, lefts) = spread(height, limit), spread(width, limit)
    weight = _fade(tile_height * scale, limit * scale, latents) * _fade(tile_width * scale, limit * scale, latents).T
    total = torch.zeros(height * scale, width * scale, device=latents.device)
    pixels = torch.zeros(batch, 3, *total.shape, device=latents.device).to(memory_format=torch.channels_last)
    for top in tops:
        for left in lefts:
            tile = decode(latents[:, :, top : top + tile_height, left : left + tile_width])
            rows = slice(top * scale, (top + tile_height) * scale)
            columns = slice(left * scale, (left + tile_width) * scale)
            pixels[:, :, rows, columns].add_(tile.float().mul_(weight))
            total[rows, columns].add_(weight)
    return pixels.div_(total)


def _fade(length: int, limit: int, like: Tensor) -> Tensor:
    """`[length, 1]`: 1 in the middle, falling towards both ends. At a picture's edge nothing else has a share."""
    position = torch.arange(length, device=like.device) + 0.5
    return (torch.minimum(position, length - position) / max(1, limit * OVERLAP)).clamp_(max=1.0)[:, None]
