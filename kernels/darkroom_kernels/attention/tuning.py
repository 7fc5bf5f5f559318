"""Measure tiles and implementations at given sizes, and write what won into the table."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from darkroom_kernels.attention import tiles
from darkroom_kernels.attention.api import Implementation, attention, check_available, forget_choices
from darkroom_kernels.attention.check import TOLERANCE
from darkroom_kernels.attention.launch import run
from darkroom_kernels.attention.reference import reference_attention
from darkroom_kernels.attention.tiles import Row, Tile

logger = logging.getLogger(__name__)
SecondsOf = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Size:
    """One attention of a network: `batch` rows of `heads` heads."""

    batch: int
    heads: int
    head_dim: int
    num_queries: int
    num_keys: int


@torch.inference_mode()
def tune(
    sizes: Iterable[Size], device: torch.device, dtype: torch.dtype, seconds_of: SecondsOf, path: Path = tiles.TABLE
) -> list[Row]:
    """Measure every candidate tile and every other implementation at each size, and replace this device's rows.

    `seconds_of` times one call on the device. A tile that does not build, does not fit or is not right is left out, and
    so is an implementation that cannot run. Returns the rows. Raises `RuntimeError` when no tile works at a size.
    """
    rows = [_measure(size, device, dtype, seconds_of) for size in sizes]
    tiles.save_table(tiles.device_kinds(device)[0], rows, path)
    forget_choices()
    return rows


def _measure(size: Size, device: torch.device, dtype: torch.dtype, seconds_of: SecondsOf) -> Row:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(size.batch, length, size.heads, size.head_dim, generator=generator)
        .to(device, dtype)
        .transpose(1, 2)
        for length in (size.num_queries, size.num_keys, size.num_keys)
    )
    bits = dtype.itemsize * 8
    seconds: dict[Tile, float] = {}
    # One row and one head are enough to see a wrong tile, and their scores fit any device.
    expected = reference_attention(q[:1, :1].float(), k[:1, :1].float(), v[:1, :1].float())
    for tile in tiles.candidate_tiles(bits, size.head_dim, size.num_queries, size.num_keys):
        try:
            got = _by_tile(tile, q, k, v)[:1, :1].float()
            error = float((got - expected).abs().max() / expected.square().mean().sqrt())
            if error <= TOLERANCE[dtype]:
                seconds[tile] = seconds_of(lambda tile=tile: _by_tile(tile, q, k, v))  # type: ignore[misc]
        except Exception as error:  # too much shared memory, or a compiler that gives up: not this tile
            logger.info("tile %s at %s: %s: %s", tile, size, type(error).__name__, error)
    if not seconds:
        raise RuntimeError(f"no tile of the Triton attention works at {size} on {device}")
    best = min(seconds, key=lambda tile: seconds[tile])
    times_us = {"triton": seconds[best] * 1e6}
    for implementation in (Implementation.SDPA, Implementation.XFORMERS):
        try:
            name = check_available(implementation.value).value
            times_us[name] = 1e6 * seconds_of(lambda name=name: attention(q, k, v, implementation=name))  # type: ignore[misc]
        except RuntimeError as error:
            logger.info("%s at %s: %s", implementation.value, size, error)
    return tiles.measured_row(bits, size.head_dim, size.num_queries, size.num_keys, best, times_us)


def _by_tile(tile: Tile, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return run(tile, q, k, v, None, None, q.shape[3] ** -0.5)
