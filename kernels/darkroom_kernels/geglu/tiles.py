"""Tiles of the one-kernel GEGLU, by compute capability. None is measured on a device yet.

One tile holds two accumulators, value and gate, of `block_m` × `block_n` each. A capability
without a line takes the next older one's. A tile never depends on the number of rows: a row must not notice the others.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    has_descriptors: bool = False
    """Whether tiles are fetched by the hardware's copy engine (Hopper and newer), where the inputs' strides allow."""


GROUP_M = 8
"""Tiles of rows that are worked on before the next tile of columns, so that both inputs stay in the L2 cache."""

TILES = {
    80: Tile(128, 64, 32, 4, 4),
    90: Tile(128, 128, 64, 8, 4, has_descriptors=True),
    100: Tile(128, 128, 64, 8, 4, has_descriptors=True),
    # Again less than 100 KiB of shared memory, and 80's kind of tensor cores.
    120: Tile(128, 64, 32, 4, 4),
}
FP32_TILE = Tile(64, 32, 32, 4, 2)
"""For checks in fp32, whose products take no tensor cores."""


def tile_for(capability: int, itemsize: int) -> Tile:
    """The tile of a device of `capability` (major · 10 + minor) for values of `itemsize` bytes."""
    if itemsize == 4:
        return FP32_TILE
    return TILES[max((known for known in TILES if known <= capability), default=80)]
