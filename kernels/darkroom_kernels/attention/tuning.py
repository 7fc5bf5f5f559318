"""Measure tiles and implementations at given sizes, and write what won into the table."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from darkroom_kernels.attention import tiles
from darkroom_kernels.attention.api import OTHERS, attention, check_available, forget_choices
from darkroom_kernels.attention.check import TOLERANCE
from darkroom_kernels.attention.launch import launch, run
from darkroom_kernels.attention.reference import reference_attention
from darkroom_kernels.attention.tiles import Row, Tile
from darkroom_kernels.devices import device_kinds

logger = logging.getLogger(__name__)
SecondsOf = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Size:
    """One attention of a network: `batch` rows of `heads` heads. `has_slots`: keys are read where prompts are stored,
    by `key_slots`, which other implementations than triton pay two copies for."""

    batch: int
    heads: int
    head_dim: int
    num_queries: int
    num_keys: int
    has_slots: bool = False


@torch.inference_mode()
def tune(
    sizes: Iterable[Size], device: torch.device, dtype: torch.dtype, seconds_of: SecondsOf, path: Path = tiles.TABLE
) -> list[Row]:
    """Measure every candidate tile and every other implementation at each size, and replace this device's rows of the
    head sizes measured. They are saved after each size.

    `seconds_of` times one call on the device. A tile that does not build, does not fit, spills registers or is not
    right is left out, and so is an implementation that cannot run; a size where no tile is left is logged and has no
    row. Returns the rows. Raises `RuntimeError` when there is none.
    """
    rows: list[Row] = []
    for size in sizes:
        try:
            rows.append(_measure(size, device, dtype, seconds_of))
        except Exception as error:  # out of memory, or nothing that works: the other sizes still count
            logger.warning("%s is not tuned: %s: %s", size, type(error).__name__, error)
            continue
        tiles.save_table(device_kinds(device)[0], rows, path)
    if not rows:
        raise RuntimeError(f"no size could be tuned on {device}")
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
    slots = torch.arange(size.batch, device=device).flip(0) if size.has_slots else None
    bits = dtype.itemsize * 8
    seconds: dict[Tile, float] = {}
    # One row and one head are enough to see a wrong tile, and their scores fit any device.
    row = -1 if size.has_slots else 0
    expected = reference_attention(q[:1, :1].float(), k[row, :1][None].float(), v[row, :1][None].float())
    for tile in tiles.candidate_tiles(bits, size.head_dim, size.num_queries, size.num_keys):
        try:
            got = _by_tile(tile, q, k, v, slots)[:1, :1].float()
            error = float((got - expected).abs().max() / expected.square().mean().sqrt())
            if error <= TOLERANCE[dtype]:
                seconds[tile] = seconds_of(lambda tile=tile: _by_tile(tile, q, k, v, slots))  # type: ignore[misc]
        except Exception as error:  # too much shared memory, or a compiler that gives up: not this tile
            logger.info("tile %s at %s: %s: %s", tile, size, type(error).__name__, error)
    fastest_first = sorted(seconds, key=lambda tile: seconds[tile])
    best = next((tile for tile in fastest_first if not _spills(tile, q, k, v, slots)), None)
    if best is None:
        raise RuntimeError(f"no tile of the Triton attention works at {size} on {device}")
    times_us = {"triton": seconds[best] * 1e6}
    for implementation in OTHERS:
        try:
            name = check_available(implementation.value, device).value
            times_us[name] = 1e6 * seconds_of(
                lambda name=name: attention(q, k, v, key_slots=slots, implementation=name)  # type: ignore[misc]
            )
        except RuntimeError as error:
            logger.info("%s at %s: %s", implementation.value, size, error)
    return tiles.measured_row(bits, size.head_dim, size.num_queries, size.num_keys, best, times_us)


def _by_tile(tile: Tile, q: Tensor, k: Tensor, v: Tensor, slots: Tensor | None) -> Tensor:
    return run(tile, q, k, v, None, slots, q.shape[3] ** -0.5)


def _spills(tile: Tile, q: Tensor, k: Tensor, v: Tensor, slots: Tensor | None) -> bool:
    """Whether a build of this tile keeps registers in memory, in the form measured or with odd sizes, lengths and
    slots, which a table's row must serve too."""
    batch = q.shape[0]
    lengths = torch.full((batch,), k.shape[2], dtype=torch.int32, device=q.device)
    any_slots = torch.arange(batch, device=q.device) if slots is None else slots
    forms = ((q, None, slots), (q[:, :, : max(q.shape[2] - 1, 1)], lengths, any_slots))
    try:
        handles = [launch(tile, some_q, k, v, some, places, q.shape[3] ** -0.5)[1] for some_q, some, places in forms]
    except Exception as error:  # the odd form may not fit where the measured one does
        logger.info("tile %s with odd sizes: %s: %s", tile, type(error).__name__, error)
        return True
    return any(getattr(handle, "n_spills", 0) for handle in handles)
