"""Validate, then the form asked for or the fastest one of the device."""

from __future__ import annotations

import torch
from torch import Tensor

from darkroom_kernels.backend import uses_triton


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    shift: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Normalise the last axis: layer_norm(x + shift)·weight + bias.

    `x` `[..., C]` any float dtype and strides; `weight`, `bias` `[C]`; `shift` `[C]` or None: the bias of the product
    before, left for here. `implementation`: "triton", "torch", or "auto", which is triton on CUDA devices where it can
    run and torch was not measured to be faster. Statistics are fp32. Returns a contiguous tensor of x's shape and
    dtype. Raises `ValueError` on shapes or names that do not fit, `KernelUnavailable` on a named implementation that
    cannot run here.
    Source: Ba, Kiros & Hinton 2016, equation 3.
    """
    width = x.shape[-1:]
    if x.numel() == 0 or weight.shape != width or bias.shape != width or (shift is not None and shift.shape != width):
        raise ValueError(
            f"expected x [..., C], not empty, and weight, bias, shift [C], got {list(x.shape)}, {list(weight.shape)}, "
            f"{list(bias.shape)}, {None if shift is None else list(shift.shape)}"
        )
    if uses_triton(implementation, x.device, "layer_norm", x.shape[-1]):
        from darkroom_kernels.layer_norm.kernel import layer_norm as launch

        return launch(x, weight, bias, eps, shift)  # type: ignore[no-any-return]
    return torch.layer_norm(x if shift is None else x + shift, width, weight, bias, eps)
