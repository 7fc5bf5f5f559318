"""Validate, then the form asked for or the fastest one of the device."""

from __future__ import annotations

from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from darkroom_kernels.backend import decided_once, named, uses_triton
from darkroom_kernels.winners import winner_for


class Implementation(str, Enum):
    """Who computes the gated product. `auto` picks one; every other name is a demand."""

    AUTO = "auto"
    TORCH = "torch"
    GATE = "gate"
    TRITON = "triton"


@decided_once
def choose(implementation: str, device: torch.device, inner: int) -> str:
    """What a name means for `inner` columns of x: `auto` is the measured winner, unmeasured "gate", and "torch" where
    Triton cannot run. Raises as `uses_triton` does."""
    chosen = named(Implementation, implementation)
    if chosen is Implementation.AUTO:
        if not uses_triton("auto", device, "geglu", inner):
            return "torch"
        return winner_for("geglu", device, inner) or "gate"
    if chosen is not Implementation.TORCH:
        # Both forms with a kernel need Triton: named, neither gives way to torch.
        uses_triton("triton", device, "geglu")
    return str(chosen.value)


def geglu(x: Tensor, weight: Tensor, bias: Tensor, *, implementation: str = "auto") -> Tensor:
    """Return value · gelu(gate), where x·weightᵀ + bias is value and gate side by side.

    `x` `[..., K]`, `weight` `[2N, K]`, `bias` `[2N]`, one floating dtype. `implementation`: "torch"; "gate", torch's
    product without the bias and one Triton kernel for all the rest; "triton", one kernel for everything; or "auto",
    which on CUDA devices is the fastest measured, unmeasured gate, and torch where neither can run. Returns
    `[..., N]`. The exact (erf) GELU. Raises `ValueError` on shapes or names that do not fit, `KernelUnavailable` on a
    named implementation that cannot run here.
    Source: Shazeer 2020, equation 6.
    """
    if weight.ndim != 2 or weight.shape[0] % 2 or x.shape[-1] != weight.shape[1] or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"expected x [..., K], weight [2N, K], bias [2N], got {list(x.shape)}, {list(weight.shape)}, "
            f"{list(bias.shape)}"
        )
    if x.numel() == 0 or weight.numel() == 0:
        raise ValueError(f"expected at least one row and column, got x {list(x.shape)}, weight {list(weight.shape)}")
    chosen = choose(implementation, x.device, x.shape[-1])
    if chosen == "torch":
        value, gate = F.linear(x, weight, bias).chunk(2, dim=-1)
        return value * F.gelu(gate)
    from darkroom_kernels.geglu import kernel

    if chosen == "triton":
        return kernel.geglu(x, weight, bias)  # type: ignore[no-any-return]
    return kernel.geglu_gate(F.linear(x, weight), bias)  # type: ignore[no-any-return]
