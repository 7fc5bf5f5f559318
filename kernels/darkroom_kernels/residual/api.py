"""Validate, then the form asked for or the fastest one of the device."""

from __future__ import annotations

import torch
from torch import Tensor

from darkroom_kernels.backend import uses_triton


def add_residual_(y: Tensor, residual: Tensor, bias: Tensor, *, implementation: str = "auto") -> Tensor:
    """Add `residual` and each channel's `bias` to `y` in place, and return `y`.

    `y`: a picture `[B, C, H, W]`, channels-last, or tokens `[..., C]`, contiguous, in any other number of dimensions
    than four; any float dtype. `residual`: of y's shape and dtype, copied first if it lies in memory otherwise. `bias`
    `[C]`. `implementation`: "triton" (fp32 sums, rounded once), "torch" (two passes, each rounded), or "auto", which is
    triton on CUDA devices where it can run and torch was not measured to be faster. Raises `ValueError` on shapes,
    layouts or names that do not fit, `KernelUnavailable` on a named implementation that cannot run here.
    """
    is_picture = y.ndim == 4
    layout = torch.channels_last if is_picture else torch.contiguous_format
    if y.numel() == 0 or residual.shape != y.shape or bias.shape != (y.shape[1 if is_picture else -1],):
        raise ValueError(
            f"expected y and residual [B, C, H, W] or [..., C], not empty, and bias [C], got {list(y.shape)}, "
            f"{list(residual.shape)}, {list(bias.shape)}"
        )
    if residual.dtype != y.dtype or not y.is_contiguous(memory_format=layout):
        raise ValueError(f"expected y {layout} and one dtype, got strides {y.stride()}, {y.dtype} and {residual.dtype}")
    if not uses_triton(implementation, y.device, "residual", y.shape[1:].numel()):
        return y.add_(residual).add_(bias[:, None, None] if is_picture else bias)
    from darkroom_kernels.residual.kernel import add_residual_ as launch

    launch(y, residual, bias)
    return y
