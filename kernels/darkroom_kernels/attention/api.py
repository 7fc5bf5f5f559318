"""Validate, pick an implementation, launch."""

from __future__ import annotations

import functools
import logging
import math
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from darkroom_kernels.attention import sdpa_backends
from darkroom_kernels.attention.launch import KERNEL, triton_attention
from darkroom_kernels.attention.reference import reference_attention
from darkroom_kernels.attention.tiles import MAX_FEW_KEYS, row_for
from darkroom_kernels.attention.xformers_form import xformers_attention, xformers_problem
from darkroom_kernels.backend import KernelUnavailable, decided_once, failure, forget_decisions, triton_problem
from darkroom_kernels.devices import device_kinds

logger = logging.getLogger(__name__)


class Implementation(str, Enum):
    """Who computes attention. `auto` picks one and logs the pick once; every other name is a demand."""

    AUTO = "auto"
    SDPA = "sdpa"
    CUDNN = "cudnn"
    FLASH = "flash"
    EFFICIENT = "efficient"
    TRITON = "triton"
    XFORMERS = "xformers"
    REFERENCE = "reference"


# What an automatic choice is made among, and tuning measures beside the tiles of Triton.
OTHERS = (
    Implementation.SDPA,
    Implementation.CUDNN,
    Implementation.FLASH,
    Implementation.EFFICIENT,
    Implementation.XFORMERS,
)
# Head sizes that PyTorch's backends pad nothing of. At the others Triton's exact split wastes less.
UNPADDED_HEAD_DIMS = (64, 128)


@decided_once
def check_available(name: str, device: torch.device) -> Implementation:
    """Return the named implementation, for tensors of `device`.

    Raises `ValueError` on an unknown name and `KernelUnavailable`, with the reason, on one that cannot run there.
    """
    try:
        implementation = Implementation(name)
    except ValueError:
        raise ValueError(
            f"attention {name!r} is unknown, expected one of {[i.value for i in Implementation]}"
        ) from None
    if (problem := _problem(implementation, device)) is not None:
        raise KernelUnavailable(f"attention {name!r} is unavailable: {problem}")
    return implementation


def _problem(implementation: Implementation, device: torch.device) -> str | None:
    if implementation is Implementation.TRITON:
        return triton_problem(device) or failure(KERNEL, device)
    problem = xformers_problem() if implementation is Implementation.XFORMERS else None
    if problem is None and implementation.value in (*sdpa_backends.NAMES, "xformers") and device.type != "cuda":
        problem = f"it needs a CUDA device, not {device.type}"
    return problem


@decided_once
def head_refusal(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a named implementation takes no heads of this size and dtype, whatever their number and length; None when it
    may."""
    if name == Implementation.TRITON.value:
        return triton_refusal(device, dtype, head_dim, MAX_FEW_KEYS + 1, MAX_FEW_KEYS + 1)
    return sdpa_backends.head_refusal(name, dtype, head_dim) if name in sdpa_backends.NAMES else None


def takes_key_lengths(name: str) -> bool:
    """Whether rows of an implementation may see different numbers of keys."""
    return name not in sdpa_backends.NAMES


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


# What `auto` chose and found to refuse, by implementation and the arguments of `choose`.
_refused: set[tuple[str, torch.device, torch.dtype, int, int, int]] = set()


@decided_once
def choose(device: torch.device, dtype: torch.dtype, head_dim: int, num_queries: int, num_keys: int) -> Implementation:
    """What `auto` means for tensors of this device, dtype and size: the fastest of the table's row that runs here.

    Without a measurement: sdpa on a CPU and in fp32; Triton at few keys and at head sizes that others pad; at head
    sizes of 64 and 128 cuDNN on Hopper, sdpa elsewhere. Each choice is logged once for a kind of size.
    """
    chosen, reason = Implementation.SDPA, "unmeasured"
    if device.type == "cpu":
        _log_choice("cpu", chosen)
        return chosen
    refusal = triton_refusal(device, dtype, head_dim, num_queries, num_keys)
    wanted: list[Implementation] = []
    if refusal is None:
        row = row_for(device, dtype.itemsize * 8, head_dim, num_queries, num_keys)
        if row.winner is not None:
            reason = "measured"
            wanted = [Implementation(name) for name in sorted(row.times_us, key=lambda name: row.times_us[name])]
        elif dtype.itemsize == 2 and (head_dim not in UNPADDED_HEAD_DIMS or row.tile.kernel == "few_keys"):
            wanted = [Implementation.TRITON]
        elif dtype.itemsize == 2 and device.type == "cuda" and device_kinds(device)[-1] == "sm_90":
            # torch's own order, which depends on its release, may have it last; 1.7 to 2.3 times slower are reported.
            wanted = [Implementation.CUDNN]
    else:
        reason = f"triton: {refusal}"
    size = device, dtype, head_dim, num_queries, num_keys
    can_run = (one for one in wanted if _problem(one, device) is None and (one.value, *size) not in _refused)
    chosen = next(can_run, chosen)
    keys = "few" if num_keys <= MAX_FEW_KEYS else "many"
    _log_choice(f"{device.type}, {dtype}, heads of {head_dim}, {keys} keys ({reason})", chosen)
    return chosen


@functools.cache
def _log_choice(what: str, implementation: Implementation) -> None:
    logger.info("attention on %s: %s", what, implementation.value)


def forget_choices() -> None:
    """Choose anew from now on: the table changed, or a kernel failed its check."""
    _refused.clear()
    _log_choice.cache_clear()
    forget_decisions()


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
    name = _checked(implementation, q.device)
    if name != "auto":
        return _computed(name, q, k, v, key_lengths, key_slots, scale)
    size = q.device, q.dtype, dim, num_queries, num_keys
    while True:
        name = _chosen(*size)
        if key_lengths is not None and not takes_key_lengths(name):
            name = "sdpa"
        try:
            return _computed(name, q, k, v, key_lengths, key_slots, scale)
        except KernelUnavailable as refusal:
            if name == "sdpa":
                raise
            logger.warning("attention on %s: not %s, because %s", q.device, name, refusal)
            _refused.add((name, *size))
            choose.cache_clear()
            _chosen.cache_clear()


# By name: torch's compiler takes a decision as a constant, and an enum's member is none to it.
@decided_once
def _checked(implementation: str, device: torch.device) -> str:
    return check_available(implementation, device).value


@decided_once
def _chosen(device: torch.device, dtype: torch.dtype, head_dim: int, num_queries: int, num_keys: int) -> str:
    return choose(device, dtype, head_dim, num_queries, num_keys).value


def _computed(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_lengths: Tensor | None,
    key_slots: Tensor | None,
    scale: float | None,
) -> Tensor:
    """`attention` by one implementation. Raises `KernelUnavailable` when it does not take these inputs."""
    dim, num_queries, num_keys = q.shape[3], q.shape[2], k.shape[2]
    if name == "triton":
        if (refusal := triton_refusal(q.device, q.dtype, dim, num_queries, num_keys)) is not None:
            raise KernelUnavailable(f"attention 'triton' is unavailable: {refusal}")
        result: Tensor = triton_attention(q, k, v, key_lengths, key_slots, dim**-0.5 if scale is None else scale)
        return result
    if key_lengths is not None and not takes_key_lengths(name):
        raise KernelUnavailable(f"attention {name!r} takes no key lengths")
    if key_slots is not None:
        k, v = k.index_select(0, key_slots), v.index_select(0, key_slots)
    if name == "reference":
        out = reference_attention(q, k, v, key_lengths, scale)
    elif name == "xformers":
        out = xformers_attention(q, k, v, None if key_lengths is None else key_mask(key_lengths, num_keys), scale)
    elif name in sdpa_backends.NAMES:
        out = sdpa_backends.attention_by(name, q, k, v, scale)
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
