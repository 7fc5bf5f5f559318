"""Validate, then the fastest form of the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    silu: bool = False,
    shift: Tensor | None = None,
) -> Tensor:
    """Normalise groups of channels: group_norm(x + shift)·weight + bias, then SiLU if `silu`.

    `x` `[B, C, H, W]` any float dtype, C divisible by `num_groups`; `weight`, `bias` `[C]`; `shift` `[B, C]` or None.
    Statistics are fp32. Returns x's shape, dtype and memory format. Raises `ValueError` on shapes that do not fit.
    Source: Wu & He 2018, equation 7.
    """
    if x.ndim != 4 or x.shape[1] % num_groups:
        raise ValueError(f"expected x [B, C, H, W] with C divisible by {num_groups}, got {list(x.shape)}")
    if shift is not None and shift.shape != x.shape[:2]:
        raise ValueError(f"expected shift {list(x.shape[:2])}, got {list(shift.shape)}")
    if x.device.type == "cpu" and x.dtype is not torch.float32:
        # PyTorch's channels-last kernel is several times slower in half precision than the two casts around fp32.
        return group_norm(
            x.float(),
            num_groups,
            weight.float(),
            bias.float(),
            eps,
            silu=silu,
            shift=None if shift is None else shift.float(),
        ).to(x.dtype)
    if shift is not None:
        x = x + shift[:, :, None, None]
    y = F.group_norm(x, num_groups, weight, bias, eps)
    if x.is_contiguous(memory_format=torch.channels_last):
        # The CUDA kernel answers in NCHW; the convolution that follows wants what came in.
        y = y.contiguous(memory_format=torch.channels_last)
    return F.silu(y, inplace=True) if silu else y
