"""Validate, pick an implementation, launch."""

from __future__ import annotations

import functools
import logging
import math
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from darkroom_kernels.attention.launch import KERNEL, triton_attention
from darkroom_kernels.attention.reference import reference_attention
from darkroom_kernels.attention.tiles import MAX_FEW_KEYS, row_for
from darkroom_kernels.attention.xformers_form import xformers_attention, xformers_problem
from darkroom_kernels.backend import KernelUnavailable, decided_once, failure, triton_problem

logger = logging.getLogger(__name__)


class Implementation(str, Enum):
    """Who computes attention. `auto` picks one and logs the pick once; every other name is a demand."""

    AUTO = "auto"
    SDPA = "sdpa"
    TRITON = "triton"
    XFORMERS = "xformers"
    REFERENCE = "reference"


# Head sizes that the kernels of sdpa are made for. At the others they pad, and Triton's exact split wastes less.
WELL_SERVED_HEAD_DIMS = (64, 128)


@decided_once
def check_available(name: str) -> Implementation:
    """Return the named implementation.

    Raises `ValueError` on an unknown name and `KernelUnavailable`, with the reason, on one that cannot run here.
    """
    try:
        implementation = Implementation(name)
    except ValueError:
        raise ValueError(
            f"attention {name!r} is unknown, expected one of {[i.value for i in Implementation]}"
        ) from None
    problem = None
    if implementation is Implementation.TRITON:
        here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        problem = triton_problem(here) or failure(KERNEL, here)
    elif implementation is Implementation.XFORMERS:
        problem = xformers_problem()
    if problem is not None:
        raise KernelUnavailable(f"attention {name!r} is unavailable: {problem}")
    return implementation


@decided_once
def triton_refusal(
    device: torch.device, dtype: torch.dtype, head_dim: int, num_queries: int, num_keys: int
) -> str | None:
    """Why the Triton kernels cannot take tensors of this device, dtype and size; None when they can."""
    problem = triton_problem(device) or failure(KERNEL, device)
    if problem is None and dtype not in (torch.float16, torch.bfloat16, torch.float32):
        problem = f"it computes fp16, bf16 and fp32, not {dtype}"
    if problem is None:
        try:
            row_for(device, dtype.itemsize * 8, head_dim, num_queries, num_keys)
        except LookupError as error:
            problem = str(error)
    return problem


@decided_once
def choose(device: torch.device, dtype: torch.dtype, head_dim: int, num_queries: int, num_keys: int) -> Implementation:
    """What `auto` means for tensors of this device, dtype and size: the measured winner of the table's row.

    Without a measurement: sdpa on a CPU, in fp32 and at the head sizes that it is made for; Triton elsewhere and at few
    keys. Each choice is logged once for a kind of size.
    """
    chosen, reason = Implementation.SDPA, "unmeasured"
    if device.type == "cpu":
        _log_choice("cpu", chosen)
        return chosen
    refusal = triton_refusal(device, dtype, head_dim, num_queries, num_keys)
    if refusal is None:
        row = row_for(device, dtype.itemsize * 8, head_dim, num_queries, num_keys)
        if row.winner is not None and (row.winner != "xformers" or xformers_problem() is None):
            chosen, reason = Implementation(row.winner), "measured"
        elif dtype.itemsize == 2 and (head_dim not in WELL_SERVED_HEAD_DIMS or row.tile.kernel == "few_keys"):
            chosen = Implementation.TRITON
    else:
        reason = f"triton: {refusal}"
    keys = "few" if num_keys <= MAX_FEW_KEYS else "many"
    _log_choice(f"{device.type}, {dtype}, heads of {head_dim}, {keys} keys ({reason})", chosen)
    return chosen


@functools.cache
def _log_choice(what: str, implementation: Implementation) -> None:
    logger.info("attention on %s: %s", what, implementation.value)


def forget_choices() -> None:
    """Choose anew from now on: the table changed, or a kernel failed its check."""
    for function in (check_available, triton_refusal, choose, _log_choice):
        function.cache_clear()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_lengths: Tensor | None = None,
    key_slots: Tensor | None = None,
    scale: float | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Return softmax(q·kᵀ·scale)·v.

    `q` `[B, H, Lq, d]`; `k` and `v` `[S, H, Lk, d]`; one floating dtype, any strides with a dense last axis. S is B,
    unless `key_slots` `[B]` int64 is given: row `b` then reads `k[key_slots[b]]` and `v[key_slots[b]]`. `key_lengths`
    `[B]` int32: row `b` sees its first `key_lengths[b]` keys only; None: all. A row with no key gives zeros. `scale` is
    finite, above 0, and defaults to d^-1/2. Scores and softmax are held in fp32 whatever the dtype. Returns
    `[B, H, Lq, d]`, a view of `[B, Lq, H, d]` memory, so that heads are joined without a copy. Raises `ValueError` on
    shapes, scales or names that do not fit, `KernelUnavailable` when a named implementation cannot run here.
    """
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[1] != k.shape[1] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"expected q [B, H, Lq, d] and k, v [S, H, Lk, d], got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    batch, _, num_queries, dim = q.shape
    num_keys = k.shape[2]
    if num_queries == 0 or num_keys == 0:
        raise ValueError(f"expected a query and a key at least, got q {list(q.shape)} and k {list(k.shape)}")
    if k.dtype != q.dtype or v.dtype != q.dtype or not q.is_floating_point():
        raise ValueError(f"expected one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if dim > 1 and (q.stride(3) != 1 or k.stride(3) != 1 or v.stride(3) != 1):
        raise ValueError(f"expected a dense last axis, got strides {q.stride()}, {k.stride()}, {v.stride()}")
    if key_slots is None:
        if k.shape[0] != batch:
            raise ValueError(f"expected keys of {batch} rows, got {k.shape[0]}")
    elif key_slots.shape != q.shape[:1]:
        raise ValueError(f"expected key_slots [{batch}], got {list(key_slots.shape)}")
    if key_lengths is not None and key_lengths.shape != q.shape[:1]:
        raise ValueError(f"expected key_lengths [{batch}], got {list(key_lengths.shape)}")
    # The kernels scale the largest score instead of all scores, which a scale below 0 would make the smallest.
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"expected a finite scale above 0, got {scale}")
    chosen = check_available(implementation)
    if chosen is Implementation.AUTO:
        chosen = choose(q.device, q.dtype, dim, num_queries, num_keys)
    if chosen is Implementation.TRITON:
        if (refusal := triton_refusal(q.device, q.dtype, dim, num_queries, num_keys)) is not None:
            raise KernelUnavailable(f"attention 'triton' is unavailable: {refusal}")
        result: Tensor = triton_attention(q, k, v, key_lengths, key_slots, dim**-0.5 if scale is None else scale)
        return result
    if key_slots is not None:
        k, v = k.index_select(0, key_slots), v.index_select(0, key_slots)
    if chosen is Implementation.REFERENCE:
        out = reference_attention(q, k, v, key_lengths, scale)
    elif chosen is Implementation.XFORMERS:
        out = xformers_attention(q, k, v, None if key_lengths is None else key_mask(key_lengths, num_keys), scale)
    else:
        mask = None if key_lengths is None else key_mask(key_lengths, num_keys)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    if key_lengths is not None:
        # Backends differ in what a row without keys gives; the contract says zeros.
        out = out.masked_fill(key_lengths.eq(0)[:, None, None, None], 0.0)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def key_mask(key_lengths: Tensor, num_keys: int) -> Tensor:
    """`[B, 1, 1, num_keys]` bool, true where a key exists."""
    positions = torch.arange(num_keys, device=key_lengths.device, dtype=key_lengths.dtype)
    return (positions < key_lengths[:, None])[:, None, None, :]
