"""Validate, then the fastest form of the device."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return value · gelu(gate), where x·weightᵀ + bias is value and gate side by side.

    `x` `[..., K]`, `weight` `[2N, K]`, `bias` `[2N]`, one floating dtype. Returns `[..., N]`. The exact (erf) GELU.
    Raises `ValueError` on shapes that do not fit. Source: Shazeer 2020, equation 6.
    """
    if weight.ndim != 2 or weight.shape[0] % 2 or x.shape[-1] != weight.shape[1] or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"expected x [..., K], weight [2N, K], bias [2N], got {list(x.shape)}, {list(weight.shape)}, "
            f"{list(bias.shape)}"
        )
    value, gate = F.linear(x, weight, bias).chunk(2, dim=-1)
    return value * F.gelu(gate)
