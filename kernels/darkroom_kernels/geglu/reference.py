"""GEGLU written to be read; the measure of every other form."""

from __future__ import annotations

import torch
from torch import Tensor


def reference_geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GEGLU in fp32. Arguments and result as `geglu`; the result has x's dtype."""
    value, gate = (x.float() @ weight.float().T + bias.float()).chunk(2, dim=-1)
    return (value * (0.5 * gate * (1.0 + torch.erf(gate * 0.5**0.5)))).to(x.dtype)
