"""Validate, then the fastest form of the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from darkroom_kernels.backend import uses_triton

# PyTorch's channels-last CPU kernel crawls when a group is few channels wide. Two reductions and one multiply-add are
# faster there, while the picture fits the cache and is not so small that the number of operators is what counts. The
# choice looks at one row, never at the batch: the two forms round differently, and a row must not notice the others.
NARROW_GROUP = 6
NARROW_GROUP_ROW_NUMEL = (1 << 12, 1 << 18)


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    silu: bool = False,
    shift: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Normalise groups of channels: group_norm(x + shift)·weight + bias, then SiLU if `silu`.

    `x` `[B, C, H, W]` any float dtype, C divisible by `num_groups`; `weight`, `bias` `[C]`; `shift` `[B, C]`, maybe an
    expanded `[C]`, or None. `implementation`: "triton", "torch", or "auto", which is triton on CUDA devices where it
    can run and torch was not measured to be faster. Statistics are fp32. Returns x's shape, dtype and memory format.
    Triton's kernels are for channels-last and copy what comes in another one. Raises `ValueError` on shapes or names
    that do not fit, `KernelUnavailable` on a named implementation that cannot run here. Source: Wu & He 2018, equation
    7.
    """
    if x.ndim != 4 or x.shape[1] % num_groups or x.numel() == 0:
        raise ValueError(f"expected x [B, C, H, W], not empty, C divisible by {num_groups}, got {list(x.shape)}")
    if weight.shape != x.shape[1:2] or bias.shape != x.shape[1:2]:
        raise ValueError(f"expected weight and bias [{x.shape[1]}], got {list(weight.shape)}, {list(bias.shape)}")
    if shift is not None and shift.shape != x.shape[:2]:
        raise ValueError(f"expected shift {list(x.shape[:2])}, got {list(shift.shape)}")
    if uses_triton(implementation, x.device, "group_norm", x.shape[1:].numel()):
        return _by_triton(x, num_groups, weight, bias, eps, silu, shift)
    if x.device.type == "cpu":
        return _on_cpu(x, num_groups, weight, bias, eps, silu, shift)
    if shift is not None:
        x = x + shift[:, :, None, None]
    y = F.group_norm(x, num_groups, weight, bias, eps)
    if x.is_contiguous(memory_format=torch.channels_last):
        # The CUDA kernel answers in NCHW; the convolution that follows wants what came in.
        y = y.contiguous(memory_format=torch.channels_last)
    return F.silu(y, inplace=True) if silu else y


def _by_triton(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool, shift: Tensor | None
) -> Tensor:
    from darkroom_kernels.group_norm import kernel

    is_last = kernel.is_places_by_channels(x)
    y: Tensor = kernel.group_norm(x, num_groups, weight, bias, eps, silu, shift)
    return y if is_last else y.contiguous()


def _on_cpu(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool, shift: Tensor | None
) -> Tensor:
    """In fp32 whatever the dtype: two casts cost less than PyTorch's channels-last kernel loses in half precision."""
    dtype = x.dtype
    if dtype is not torch.float32:
        x = x.float()
        shift = None if shift is None else shift.float()
    if weight.dtype is not torch.float32:
        weight, bias = weight.float(), bias.float()
    least, most = NARROW_GROUP_ROW_NUMEL
    if (
        x.shape[1] <= NARROW_GROUP * num_groups
        and least <= x.shape[1:].numel() <= most
        and x.is_contiguous(memory_format=torch.channels_last)
    ):
        y = _by_moments(x, num_groups, weight, bias, eps, shift)
    else:
        y = torch.group_norm(x if shift is None else x + shift[:, :, None, None], num_groups, weight, bias, eps)
    if silu:
        F.silu(y, inplace=True)
    return y if dtype is torch.float32 else y.to(dtype)


def _by_moments(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, shift: Tensor | None) -> Tensor:
    """Sums over places per channel, then over the channels of a group, then one multiply-add per value."""
    batch, channels, height, width = x.shape
    places, per_group = height * width, channels // num_groups
    total, squares = x.sum((2, 3)), (x * x).sum((2, 3))
    if shift is not None:
        squares = squares + shift * (2 * total + places * shift)
        total = total + places * shift
    moments = torch.cat((total, squares)).view(2, batch, num_groups, per_group).sum(-1).mul_(1 / (places * per_group))
    mean = moments[0]
    variance = torch.addcmul(moments[1], mean, mean, value=-1).clamp_min_(0.0)
    scale = variance.add_(eps).rsqrt_()[:, :, None] * weight.view(num_groups, per_group)
    offset = torch.addcmul(bias.view(num_groups, per_group), scale, mean[:, :, None], value=-1)
    scale, offset = scale.view(batch, channels, 1, 1), offset.view(batch, channels, 1, 1)
    if shift is not None:
        offset = torch.addcmul(offset, scale, shift[:, :, None, None])
    return torch.addcmul(offset, x, scale)
