"""Group normalisation written to be read; the measure of every other form."""

from __future__ import annotations

from torch import Tensor


def reference_group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    silu: bool = False,
    shift: Tensor | None = None,
) -> Tensor:
    """Group norm in fp32. Arguments and result as `group_norm`; the result has x's dtype."""
    values = x.float()
    if shift is not None:
        values = values + shift.float()[:, :, None, None]
    groups = values.reshape(x.shape[0], num_groups, -1)
    variance = groups.var(-1, correction=0, keepdim=True)
    groups = (groups - groups.mean(-1, keepdim=True)) * (variance + eps).rsqrt()
    values = groups.reshape(x.shape) * weight.float()[:, None, None] + bias.float()[:, None, None]
    if silu:
        values = values * values.sigmoid()
    return values.to(x.dtype)
