"""The Triton kernels for channels-last pictures: one that reads a group once, or statistics first and then the rest.

Channels of a group are rarely a power of two in number (10, 20, 30, 40, 60, 80), and a block's must be. Statistics are
taken in blocks of whole groups, padded; where all the time goes, into the result, blocks are 64 channels, which divide
every network's channels, and the few groups that a block touches are spread over its channels.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from darkroom_kernels import backend
from darkroom_kernels.backend import Build

# A group is held whole by one program up to this many values, padding included.
WHOLE_VALUES = 1 << 15
# What one read of a thread should take in, and how many channels a block needs lest it waste parts of 32-byte sectors.
READ_BYTES, LEAST_CHANNELS = 16, 32
# Statistics: places per block, channels per block, and blocks of a row's places that a result has to combine.
STATISTICS_PLACES, STATISTICS_CHANNELS = 64, 128
# Two running sums are held besides a block: with half the places they leave room for twice the programs.
REPEATED_PLACES = 32
FEW_CHUNKS, MANY_CHUNKS, MANY_PLACES = 64, 256, 1 << 14
# A row this large is an autoencoder's: 128 channels, and often alone. Half the channels make twice the programs of it,
# and twice the places keep as many reads under way in each.
LARGE_PLACES, LARGE_CHANNELS = 1 << 18, 64
# Results: places and channels per block, blocks per program at most, and programs that surely fill a device.
RESULT_PLACES, RESULT_CHANNELS = 64, 64
MOST_PLACES, ENOUGH_PROGRAMS = 512, 1024


@triton.jit
def _to_groups(b_values, m_member):
    """Sums of [BLOCK_C] per group: [GROUPS]. Selected, not multiplied: a NaN stays with its group."""
    return tl.sum(tl.where(m_member, b_values[None, :], 0.0), 1)


@triton.jit
def _to_channels(b_values, m_member):
    """Each group's value for its channels: [GROUPS] to [BLOCK_C]."""
    return tl.sum(tl.where(m_member, b_values[:, None], 0.0), 0)


@triton.jit
def _normalise_whole(
    p_x,
    p_shift,
    p_weight,
    p_bias,
    p_y,
    stride_row,
    stride_place,
    stride_shift,
    places,
    eps,
    C: tl.constexpr,
    PER_GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    SILU: tl.constexpr,
):
    """`GROUPS` groups of one row, all places at once."""
    row = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * (GROUPS * PER_GROUP)
    o_c = tl.arange(0, BLOCK_C)
    o_p = tl.arange(0, BLOCK_P)
    m_c = o_c < GROUPS * PER_GROUP
    m = (o_p[:, None] < places) & m_c[None, :]  # [BLOCK_P, BLOCK_C]
    m_member = (o_c // PER_GROUP)[None, :] == tl.arange(0, BLOCK_G)[:, None]  # [BLOCK_G, BLOCK_C]
    p_x += row * stride_row + first
    b_x = tl.load(p_x + o_p[:, None] * stride_place + o_c[None, :], mask=m, other=0.0).to(tl.float32)
    if HAS_SHIFT:
        b_shift = tl.load(p_shift + row * stride_shift + first + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_x = tl.where(m, b_x + b_shift[None, :], 0.0)
    count = places * PER_GROUP
    b_mean = _to_channels(_to_groups(tl.sum(b_x, 0), m_member) / count, m_member)
    b_x = tl.where(m, b_x - b_mean[None, :], 0.0)
    b_variance = _to_groups(tl.sum(b_x * b_x, 0), m_member) / count
    b_scale = _to_channels(tl.rsqrt(b_variance + eps), m_member)
    b_scale *= tl.load(p_weight + first + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_bias = tl.load(p_bias + first + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_y = b_x * b_scale[None, :] + b_bias[None, :]
    if SILU:
        b_y = b_y / (1.0 + tl.exp(-b_y))
    p_y += row * places * C + first
    tl.store(p_y + o_p[:, None] * C + o_c[None, :], b_y.to(p_y.dtype.element_ty), mask=m)


@triton.jit
def _statistics(
    p_x,
    p_shift,
    p_partials,
    stride_row,
    stride_place,
    stride_shift,
    places,
    PER_GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
):
    """Mean and sum of squared deviations of `GROUPS` groups over a chunk of one row's places."""
    chunk = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * (GROUPS * PER_GROUP)
    o_c = tl.arange(0, BLOCK_C)
    o_p = tl.arange(0, BLOCK_P)
    m_c = o_c < GROUPS * PER_GROUP
    num_places = tl.minimum(places - chunk * CHUNK, CHUNK)
    p_x += row * stride_row + (chunk * CHUNK).to(tl.int64) * stride_place + first
    p_block = p_x + o_p[:, None] * stride_place + o_c[None, :]

    # Sums are of differences from the mean of the first places: those of the values themselves and of their squares
    # would drown the variance of a channel whose mean is far from zero.
    m = (o_p[:, None] < num_places) & m_c[None, :]  # [BLOCK_P, BLOCK_C]
    b_x = tl.load(p_block, mask=m, other=0.0).to(tl.float32)
    b_pivot = tl.sum(b_x, 0) / tl.minimum(num_places, BLOCK_P).to(tl.float32)
    b_x = tl.where(m, b_x - b_pivot[None, :], 0.0)
    b_sum = b_x
    b_squares = b_x * b_x
    for start in range(BLOCK_P, CHUNK, BLOCK_P):
        m = (o_p[:, None] < num_places - start) & m_c[None, :]
        p_block += BLOCK_P * stride_place
        b_x = tl.load(p_block, mask=m, other=0.0).to(tl.float32)
        b_x = tl.where(m, b_x - b_pivot[None, :], 0.0)
        b_sum += b_x
        b_squares += b_x * b_x

    count = num_places.to(tl.float32)
    b_total = tl.sum(b_sum, 0)
    b_deviations = tl.maximum(tl.sum(b_squares, 0) - b_total * b_total / count, 0.0, tl.PropagateNan.ALL)
    b_means = b_pivot + b_total / count
    if HAS_SHIFT:
        b_means += tl.load(p_shift + row * stride_shift + first + o_c, mask=m_c, other=0.0).to(tl.float32)
    # From channels to groups by Chan, Golub & LeVeque's rule for sets of equal size.
    o_g = tl.arange(0, BLOCK_G)
    m_member = (o_c // PER_GROUP)[None, :] == o_g[:, None]  # [BLOCK_G, BLOCK_C]
    b_mean = _to_groups(b_means, m_member) / PER_GROUP
    b_means -= _to_channels(b_mean, m_member)
    b_deviation = _to_groups(b_deviations + count * b_means * b_means, m_member)
    chunks = tl.num_programs(1)
    o_partial = (row * NUM_GROUPS + tl.program_id(0) * GROUPS + o_g) * 2 * chunks + chunk
    tl.store(p_partials + o_partial, b_mean, mask=o_g < GROUPS)
    tl.store(p_partials + o_partial + chunks, b_deviation, mask=o_g < GROUPS)


@triton.jit
def _normalise(
    p_x,
    p_partials,
    p_shift,
    p_weight,
    p_bias,
    p_y,
    stride_row,
    stride_place,
    stride_shift,
    places,
    chunks,
    span,
    eps,
    C: tl.constexpr,
    PER_GROUP: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    SILU: tl.constexpr,
):
    """The result for `span` places of one row and `BLOCK_C` channels, which touch at most `BLOCK_G` groups."""
    # Last places and rows first: those the statistics have just read are still in the L2 cache.
    row = (tl.num_programs(2) - 1 - tl.program_id(2)).to(tl.int64)
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * span
    first = tl.program_id(0) * BLOCK_C
    o_c = tl.arange(0, BLOCK_C)
    m_c = first + o_c < C
    o_g = first // PER_GROUP + tl.arange(0, BLOCK_G)
    o_k = tl.arange(0, BLOCK_CHUNKS)
    m_partial = (o_g[:, None] < NUM_GROUPS) & (o_k[None, :] < chunks)  # [BLOCK_G, BLOCK_CHUNKS]
    p_partial = p_partials + (row * NUM_GROUPS + o_g[:, None]) * 2 * chunks + o_k[None, :]
    b_means = tl.load(p_partial, mask=m_partial, other=0.0)
    b_deviations = tl.load(p_partial + chunks, mask=m_partial, other=0.0)
    b_counts = tl.minimum(tl.maximum(places - o_k * CHUNK, 0), CHUNK).to(tl.float32)[None, :]
    b_mean = tl.sum(b_means * b_counts, 1) / places
    b_means -= b_mean[:, None]
    b_deviation = tl.sum(b_deviations + b_counts * PER_GROUP * b_means * b_means, 1)
    b_scale = tl.rsqrt(b_deviation / (places * PER_GROUP) + eps)

    m_member = ((first + o_c) // PER_GROUP)[None, :] == o_g[:, None]  # [BLOCK_G, BLOCK_C]
    b_mean = _to_channels(b_mean, m_member)
    b_scale = _to_channels(b_scale, m_member) * tl.load(p_weight + first + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_bias = tl.load(p_bias + first + o_c, mask=m_c, other=0.0).to(tl.float32)
    if HAS_SHIFT:
        b_mean -= tl.load(p_shift + row * stride_shift + first + o_c, mask=m_c, other=0.0).to(tl.float32)

    o_p = tl.arange(0, BLOCK_P)
    p_x += row * stride_row + start.to(tl.int64) * stride_place + first
    p_y += row * places * C + start.to(tl.int64) * C + first
    for done in range(0, span, BLOCK_P):
        m = (o_p[:, None] < places - start - done) & m_c[None, :]  # [BLOCK_P, BLOCK_C]
        b_x = tl.load(p_x + o_p[:, None] * stride_place + o_c[None, :], mask=m, other=0.0).to(tl.float32)
        b_y = (b_x - b_mean[None, :]) * b_scale[None, :] + b_bias[None, :]
        if SILU:
            b_y = b_y / (1.0 + tl.exp(-b_y))
        tl.store(p_y + o_p[:, None] * C + o_c[None, :], b_y.to(p_y.dtype.element_ty), mask=m)
        p_x += BLOCK_P * stride_place
        p_y += BLOCK_P * C


@dataclass(frozen=True)
class Plan:
    """How a row is divided. It knows one row's shape and never the batch: a row must not notice the others."""

    groups: int
    """Whole groups in a block of channels, where statistics are taken."""
    block_p: int
    block_c: int
    chunk: int
    """Places that one program takes statistics of; 0: one program holds all places, and nothing is read twice."""

    @property
    def num_warps(self) -> int:
        if self.chunk:
            return 4
        return min(16, max(1, self.block_p * self.block_c >> 11))


@functools.cache
def plan(places: int, channels: int, num_groups: int, itemsize: int) -> Plan:
    """The division of a row of `places` × `channels` values of `itemsize` bytes."""
    per_group = channels // num_groups
    divisors = [groups for groups in range(1, num_groups + 1) if num_groups % groups == 0]
    wide = [groups for groups in divisors if groups * per_group >= LEAST_CHANNELS] or divisors[-1:]
    aligned = [groups for groups in divisors if groups * per_group * itemsize % READ_BYTES == 0] or divisors
    block_p = triton.next_power_of_2(places)
    for groups in (*(groups for groups in wide if groups in aligned), *wide):
        block_c = triton.next_power_of_2(groups * per_group)
        if block_p * block_c <= WHOLE_VALUES:
            return Plan(groups, block_p, block_c, chunk=0)
    most_channels = STATISTICS_CHANNELS if places <= LARGE_PLACES else LARGE_CHANNELS
    groups = max((g for g in aligned if g * per_group <= most_channels), default=1)
    block_c = triton.next_power_of_2(groups * per_group)
    chunks = FEW_CHUNKS if places <= MANY_PLACES else MANY_CHUNKS
    chunk = max(STATISTICS_PLACES, triton.next_power_of_2(triton.cdiv(places, chunks)))
    block_p = STATISTICS_PLACES if chunk == STATISTICS_PLACES else REPEATED_PLACES
    if places > LARGE_PLACES and block_c <= LARGE_CHANNELS:
        block_p *= 2
    return Plan(groups, block_p, block_c, chunk)


def span_of(places: int, programs: int) -> int:
    """Places that one program computes the result of, if `programs` share one place: many, once the device is full.

    It may look at the whole batch, since a value's result does not depend on the others of its program.
    """
    span = RESULT_PLACES
    while span < MOST_PLACES and programs * triton.cdiv(places, 2 * span) >= ENOUGH_PROGRAMS:
        span *= 2
    return span


def touched_groups(block_c: int, per_group: int) -> int:
    """The most groups that `block_c` channels, starting at a multiple of `block_c`, can touch."""
    if block_c % per_group == 0:
        return block_c // per_group
    return 1 if per_group % block_c == 0 else (block_c + per_group - 2) // per_group + 1


def is_places_by_channels(x: Tensor) -> bool:
    """Whether channels lie side by side and one stride leads from place to place; they may be part of more channels."""
    _, channels, height, width = x.shape
    _, stride_channel, stride_high, stride_place = x.stride()
    return (stride_channel == 1 or channels == 1) and (height == 1 or width == 1 or stride_high == width * stride_place)


def _group_norm_on_device(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool, shift: Tensor | None
) -> Tensor:
    # Here and not before the op: torch's compiler may hand over other strides than those it traced.
    if not is_places_by_channels(x):
        x = x.contiguous(memory_format=torch.channels_last)
    if shift is not None and shift.stride(1) != 1:
        shift = shift.contiguous()
    y = _fake(x, num_groups, weight, bias, eps, silu, shift)
    batch, channels, height, width = x.shape
    places, per_group = height * width, channels // num_groups
    stride_row, _, stride_high, stride_place = x.stride()
    if width == 1:
        stride_place = stride_high
    stride_shift = 0 if shift is None else shift.stride(0)
    weight, bias = weight.contiguous(), bias.contiguous()
    chosen = plan(places, channels, num_groups, x.element_size())
    if not chosen.chunk:
        _normalise_whole[(num_groups // chosen.groups, batch)](
            x, shift, weight, bias, y, stride_row, stride_place, stride_shift, places, eps,
            C=channels, PER_GROUP=per_group, GROUPS=chosen.groups, BLOCK_G=triton.next_power_of_2(chosen.groups),
            BLOCK_P=chosen.block_p, BLOCK_C=chosen.block_c, HAS_SHIFT=shift is not None, SILU=silu,
            **backend.launch_options(chosen.num_warps),
        )  # fmt: skip
        return y
    chunks = triton.cdiv(places, chosen.chunk)
    partials = torch.empty((batch, num_groups, 2, chunks), dtype=torch.float32, device=x.device)
    _statistics[(num_groups // chosen.groups, chunks, batch)](
        x, shift, partials, stride_row, stride_place, stride_shift, places,
        PER_GROUP=per_group, GROUPS=chosen.groups, NUM_GROUPS=num_groups, CHUNK=chosen.chunk,
        BLOCK_G=triton.next_power_of_2(chosen.groups), BLOCK_P=chosen.block_p, BLOCK_C=chosen.block_c,
        HAS_SHIFT=shift is not None, **backend.launch_options(chosen.num_warps),
    )  # fmt: skip
    block_c = min(RESULT_CHANNELS, triton.next_power_of_2(channels))
    blocks = triton.cdiv(channels, block_c)
    span = span_of(places, blocks * batch)
    _normalise[(blocks, triton.cdiv(places, span), batch)](
        x, partials, shift, weight, bias, y, stride_row, stride_place, stride_shift, places, chunks, span, eps,
        C=channels, PER_GROUP=per_group, NUM_GROUPS=num_groups, CHUNK=chosen.chunk,
        BLOCK_G=triton.next_power_of_2(touched_groups(block_c, per_group)),
        BLOCK_CHUNKS=triton.next_power_of_2(chunks), BLOCK_P=RESULT_PLACES, BLOCK_C=block_c,
        HAS_SHIFT=shift is not None, SILU=silu, **backend.launch_options(chosen.num_warps),
    )  # fmt: skip
    return y


def _fake(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool, shift: Tensor | None
) -> Tensor:
    if x.is_contiguous(memory_format=torch.channels_last):
        return torch.empty_like(x)
    return torch.empty_like(x, memory_format=torch.channels_last)


group_norm = backend.register(
    "group_norm(Tensor x, int num_groups, Tensor weight, Tensor bias, float eps, bool silu, Tensor? shift) -> Tensor",
    _group_norm_on_device,
    _fake,
)


def builds() -> list[Build]:
    """Specialisations for rows of the Stable Diffusion UNets and autoencoders: every way of dividing one."""
    rows = [
        (64, 1280, "bf16"), (256, 1920, "fp16"), (1024, 2560, "fp16"), (4096, 320, "fp16"), (16384, 320, "fp16"),
        (1048576, 128, "fp32"), (1048576, 256, "bf16"),
    ]  # fmt: skip
    return [build for row in rows for build in _builds(*row)]


def _builds(places: int, channels: int, dtype: str) -> list[Build]:
    num_groups = 32
    per_group = channels // num_groups
    chosen = plan(places, channels, num_groups, 4 if dtype == "fp32" else 2)
    options = backend.launch_options(chosen.num_warps)
    pointers = dict.fromkeys(("p_x", "p_shift", "p_weight", "p_bias", "p_y"), f"*{dtype}") | {"p_partials": "*fp32"}
    types = pointers | dict.fromkeys(("stride_row", "stride_place", "stride_shift", "places", "chunks", "span"), "i32")
    types["eps"] = "fp32"
    sizes = {
        "C": channels, "PER_GROUP": per_group, "GROUPS": chosen.groups, "NUM_GROUPS": num_groups,
        "CHUNK": chosen.chunk, "BLOCK_G": triton.next_power_of_2(chosen.groups),
        "BLOCK_P": chosen.block_p, "BLOCK_C": chosen.block_c, "HAS_SHIFT": True, "SILU": True,
    }  # fmt: skip

    def build(kernel: Any, label: str, constants: dict[str, Any]) -> Build:
        names = kernel.arg_names
        return Build(
            name=f"group_norm {label} {places}×{channels} {dtype}",
            kernel=kernel,
            signature={name: types.get(name, "constexpr") for name in names},
            constants={name: constants[name] for name in names if name not in types},
            options=options,
        )

    if not chosen.chunk:
        return [build(_normalise_whole, "whole", sizes)]
    block_c = min(RESULT_CHANNELS, triton.next_power_of_2(channels))
    result = sizes | {
        "BLOCK_G": triton.next_power_of_2(touched_groups(block_c, per_group)),
        "BLOCK_CHUNKS": triton.next_power_of_2(triton.cdiv(places, chosen.chunk)),
        "BLOCK_P": RESULT_PLACES,
        "BLOCK_C": block_c,
    }
    return [build(_statistics, "statistics", sizes), build(_normalise, "result", result)]
