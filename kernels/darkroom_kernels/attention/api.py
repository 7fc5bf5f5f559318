"""Validate, pick an implementation, launch."""

from __future__ import annotations

import functools
import importlib.util
import logging
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from darkroom_kernels.attention.reference import reference_attention

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

    Raises `ValueError` on an unknown name and `RuntimeError`, with the reason, on one that cannot run here.
    """
    try:
        implementation = Implementation(name)
    except ValueError:
        raise ValueError(
            f"attention {name!r} is unknown, expected one of {[i.value for i in Implementation]}"
        ) from None
    if implementation is Implementation.TRITON:
        raise RuntimeError("attention 'triton' is unavailable: this release has no Triton attention kernel")
    if implementation is Implementation.XFORMERS:
        if importlib.util.find_spec("xformers") is None:
            raise RuntimeError("attention 'xformers' is unavailable: the package xformers is not installed")
        if not torch.cuda.is_available():
            raise RuntimeError("attention 'xformers' is unavailable: it needs a CUDA device")
    return implementation


@functools.cache
def choose(device_type: str) -> Implementation:
    """What `auto` means on a kind of device."""
    logger.info("attention on %s: sdpa", device_type)
    return Implementation.SDPA


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Return softmax(q·kᵀ·scale)·v.

    `q` `[B, H, Lq, d]`, `k` and `v` `[B, H, Lk, d]`, one floating dtype, any strides with a dense last axis.
    `key_lengths` `[B]` int32: row `b` sees its first `key_lengths[b]` keys only; None: all. A row with no key gives
    zeros. `scale` defaults to d^-1/2. Scores and softmax are held in fp32 whatever the dtype. Returns `[B, H, Lq, d]`.
    Raises `ValueError` on shapes or names that do not fit, `RuntimeError` when a named implementation cannot run here.
    """
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"expected q [B, H, Lq, d] and k, v [B, H, Lk, d], got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if key_lengths is not None and key_lengths.shape != q.shape[:1]:
        raise ValueError(f"expected key_lengths [{q.shape[0]}], got {list(key_lengths.shape)}")
    chosen = check_available(implementation)
    if chosen is Implementation.AUTO:
        chosen = choose(q.device.type)
    if chosen is Implementation.REFERENCE:
        return reference_attention(q, k, v, key_lengths, scale)
    if chosen is Implementation.XFORMERS:
        return _xformers_attention(q, k, v, key_lengths, scale)
    mask = None if key_lengths is None else key_mask(key_lengths, k.shape[2])
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    # Backends differ in what a row without keys gives; the contract says zeros.
    return out if mask is None else out.masked_fill_(key_lengths.eq(0)[:, None, None, None], 0.0)  # type: ignore[union-attr]


def key_mask(key_lengths: Tensor, num_keys: int) -> Tensor:
    """`[B, 1, 1, num_keys]` bool, true where a key exists."""
    positions = torch.arange(num_keys, device=key_lengths.device, dtype=key_lengths.dtype)
    return (positions < key_lengths[:, None])[:, None, None, :]


def _xformers_attention(q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, scale: float | None) -> Tensor:
    from xformers.ops import memory_efficient_attention  # type: ignore[import-not-found, unused-ignore]

    bias = None
    if key_lengths is not None:
        batch, heads, num_queries, _ = q.shape
        num_keys = k.shape[2]
        # The kernels read the bias in vectors of 8, so its rows are padded in memory and sliced back to size.
        seen = key_mask(key_lengths, (num_keys + 7) // 8 * 8)
        bias = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, float("-inf"))
        bias = bias.expand(batch, heads, num_queries, -1)[..., :num_keys]
    out: Tensor = memory_efficient_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_bias=bias, scale=scale
    ).transpose(1, 2)
    return out if key_lengths is None else out.masked_fill(key_lengths.eq(0)[:, None, None, None], 0.0)
