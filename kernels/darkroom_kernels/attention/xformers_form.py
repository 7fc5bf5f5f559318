"""Attention by xformers, where it is installed and loads."""

from __future__ import annotations

import functools
import importlib
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from darkroom_kernels.backend import KernelUnavailable


@functools.cache
def xformers_problem() -> str | None:
    """Why xformers cannot be used here; None when it can. An installed xformers may still fail to load: its extension
    is built for one version of PyTorch."""
    if importlib.util.find_spec("xformers") is None:
        return "the package xformers is not installed"
    try:
        importlib.import_module("xformers.ops")
    except Exception as error:  # an extension built for another torch fails in many ways, and each is an answer
        return f"xformers does not load ({type(error).__name__}: {error})"
    if not torch.cuda.is_available():
        return "it needs a CUDA device"
    return None


def xformers_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """`memory_efficient_attention`. `mask` `[B, 1, 1, Lk]` bool, true where a key exists, or None.

    Raises `KernelUnavailable` with xformers' own reasons when none of its kernels takes these inputs.
    """
    from xformers.ops import memory_efficient_attention  # type: ignore[import-not-found, unused-ignore]

    bias = None
    if mask is not None:
        batch, heads, num_queries, _ = q.shape
        num_keys = k.shape[2]
        # The kernels read the bias in vectors of 8, so its rows are padded in memory and sliced back to size.
        seen = F.pad(mask, (0, -num_keys % 8))
        bias = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, float("-inf"))
        bias = bias.expand(batch, heads, num_queries, -1)[..., :num_keys]
    try:
        out: Tensor = memory_efficient_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_bias=bias, scale=scale
        )
    except NotImplementedError as error:
        raise KernelUnavailable(f"attention 'xformers' takes none of these inputs: {error}") from error
    return out.transpose(1, 2)
