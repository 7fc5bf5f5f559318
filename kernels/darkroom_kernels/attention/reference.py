"""Attention written to be read; the measure of every other implementation."""

from __future__ import annotations

import torch
from torch import Tensor


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Attention in fp32. Arguments and result as `attention`; the result has q's dtype."""
    scores = q.float() @ k.float().transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if key_lengths is not None:
        position = torch.arange(k.shape[2], device=k.device)
        scores = scores.masked_fill(position >= key_lengths[:, None, None, None], float("-inf"))
    # The maximum is kept finite, so that a row in which every key is masked gives zeros and not NaN.
    maximum = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    weights = (scores - maximum).exp()
    total = weights.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return (weights / total @ v.float()).to(q.dtype)
