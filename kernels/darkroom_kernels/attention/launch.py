"""The op `darkroom::attention`: from tensors to a launch of one of the two kernels."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from darkroom_kernels import backend
from darkroom_kernels.attention.tiles import Tile, row_for, split

# The name that a failed self-check is recorded under.
KERNEL = "attention"
# exp2 is what the device computes; folding log2(e) into the scale makes it the natural exponential.
LOG2_E = math.log2(math.e)
# Multiprocessors to fill at the end of a launch, before programs of few_keys are given more than one tile.
PROGRAMS_PER_MULTIPROCESSOR = 4
# Elements: a stride that is a multiple of it keeps rows of every dtype at multiples of 16 bytes.
UNIT = 8


def run(
    tile: Tile, q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, key_slots: Tensor | None, scale: float
) -> Tensor:
    """Attention by one kernel and tile. Arguments as `attention`'s, checked there."""
    return launch(tile, q, k, v, key_lengths, key_slots, scale)[0]


def launch(
    tile: Tile, q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, key_slots: Tensor | None, scale: float
) -> tuple[Tensor, Any]:
    """What `run` gives, and the compiled kernel; the interpreter has none and gives None."""
    from darkroom_kernels.attention import kernel

    batch, heads, num_queries, dim = q.shape
    num_keys = k.shape[2]
    out = torch.empty((batch, num_queries, heads, dim), dtype=q.dtype, device=q.device)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    unit = 1 if any(stride % UNIT for stride in strides) else UNIT
    if unit > 1:
        strides = tuple(stride // unit for stride in strides)
    d1, d2 = split(dim)
    constants: dict[str, Any] = {
        "UNIT": unit,
        "D": dim,
        "D1": d1,
        "D2": d2,
        "BLOCK_M": tile.block_m,
        "EVEN_M": num_queries % tile.block_m == 0,
        "HAS_LENGTHS": key_lengths is not None,
        "HAS_SLOTS": key_slots is not None,
        "PRECISION": precision(q.dtype),
    }
    options = backend.launch_options(tile.num_warps, tile.num_stages)
    # A kernel without lengths or slots is given a pointer that it never reads.
    pointers = (q, k, v, out, q if key_lengths is None else key_lengths, q if key_slots is None else key_slots)
    num_tiles = -(-num_queries // tile.block_m)
    sizes = (scale * LOG2_E, heads, num_queries, num_keys)
    if tile.kernel == "flash":
        constants["BLOCK_N"] = tile.block_n
        constants["EVEN_N"] = key_lengths is None and num_keys % tile.block_n == 0
        grid = (num_tiles * heads * batch,)
        built = kernel.flash_kernel[grid](*pointers, *sizes, num_tiles, *strides, **constants, **options)
    else:
        constants["N1"], constants["N2"] = split(num_keys)
        constants["EVEN_N"] = key_lengths is None and num_keys == constants["N1"] + constants["N2"]
        enough = PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors(q.device)
        each = max(1, min(tile.tiles_per_program, num_tiles * heads * batch // enough))
        num_programs = -(-num_tiles // each)
        grid = (num_programs * heads * batch,)
        built = kernel.few_keys_kernel[grid](*pointers, *sizes, num_programs, *strides, each, **constants, **options)
    return out.transpose(1, 2), built


def precision(dtype: torch.dtype) -> str:
    """fp32 products as three of tf32, which loses no more than a sum of fp32 products does; halves are exact anyway."""
    return "tf32x3" if dtype is torch.float32 else "ieee"


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _attention(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, key_slots: Tensor | None, scale: float
) -> Tensor:
    row = row_for(q.device, q.dtype.itemsize * 8, q.shape[3], q.shape[2], k.shape[2])
    # torch's compiler may hand over other strides than those it traced.
    q, k, v = (part if part.stride(3) == 1 else part.contiguous() for part in (q, k, v))
    return run(row.tile, q, k, v, key_lengths, key_slots, scale)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, key_slots: Tensor | None, scale: float
) -> Tensor:
    batch, heads, num_queries, dim = q.shape
    return q.new_empty((batch, num_queries, heads, dim)).transpose(1, 2)


triton_attention = backend.register(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? key_lengths, Tensor? key_slots, float scale) -> Tensor",
    _attention,
    _fake,
)


@register_flop_formula(torch.ops.darkroom.attention)
def _flops(q_shape: list[int], k_shape: list[int], *_: Any, **__: Any) -> int:
    """Two products; rows with fewer keys than `k` holds are counted as if they had all."""
    batch, heads, num_queries, dim = q_shape
    return 4 * batch * heads * num_queries * k_shape[2] * dim
