"""Layer normalisation written to be read; the measure of every other form."""

from __future__ import annotations

from torch import Tensor


def reference_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, shift: Tensor | None = None) -> Tensor:
    """Layer norm in fp32. Arguments and result as `layer_norm`; the result has x's dtype."""
    values = x.float()
    if shift is not None:
        values = values + shift.float()
    variance = values.var(-1, correction=0, keepdim=True)
    values = (values - values.mean(-1, keepdim=True)) * (variance + eps).rsqrt()
    return (values * weight.float() + bias.float()).to(x.dtype)
