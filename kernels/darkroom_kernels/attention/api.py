"""Validate, pick an implementation, launch."""

from __future__ import annotations

import functools
import logging
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from darkroom_kernels.attention.reference import reference_attention
from darkroom_kernels.attention.xformers_form import xformers_attention, xformers_problem
from darkroom_kernels.backend import KernelUnavailable

logger = logging.getLogger(__name__)


class Implementation(str, Enum):
    """Who computes attention. `auto` picks one and logs the pick once; every other name is a demand."""

    AUTO = "auto"
    SDPA = "sdpa"
    TRITON = "triton"
    XFORMERS = "xformers"
    REFERENCE = "reference"


@functools.cache
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
    if implementation is Implementation.TRITON:
        raise KernelUnavailable("attention 'triton' is unavailable: this release has no Triton attention kernel")
    if implementation is Implementation.XFORMERS and (problem := xformers_problem()) is not None:
        raise KernelUnavailable(f"attention 'xformers' is unavailable: {problem}")
    return implementation


@functools.lru_cache(maxsize=4096)
def choose(device: torch.device, dtype: torch.dtype, head_dim: int, num_queries: int, num_keys: int) -> Implementation:
    """What `auto` means for tensors of this device, dtype and size. Each choice is logged once."""
    _log_choice(device.type, Implementation.SDPA)
    return Implementation.SDPA


@functools.cache
def _log_choice(what: str, implementation: Implementation) -> None:
    logger.info("attention on %s: %s", what, implementation.value)


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
    above 0 and defaults to d^-1/2. Scores and softmax are held in fp32 whatever the dtype. Returns `[B, H, Lq, d]`,
    a view of `[B, Lq, H, d]` memory, so that heads are joined without a copy. Raises `ValueError` on shapes or names
    that do not fit, `KernelUnavailable` when a named implementation cannot run here.
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
    if scale is not None and not scale > 0:
        raise ValueError(f"expected a scale above 0, got {scale}")
    chosen = check_available(implementation)
    if chosen is Implementation.AUTO:
        chosen = choose(q.device, q.dtype, dim, num_queries, num_keys)
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
