"""Validate, then the form asked for or the fastest one of the device."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from darkroom_kernels.backend import uses_triton

IMPLEMENTATIONS = ("auto", "torch", "gate", "triton")


def geglu(x: Tensor, weight: Tensor, bias: Tensor, *, implementation: str = "auto") -> Tensor:
    """Return value · gelu(gate), where x·weightᵀ + bias is value and gate side by side.

    `x` `[..., K]`, `weight` `[2N, K]`, `bias` `[2N]`, one floating dtype. `implementation`: "torch"; "gate", torch's
    product without the bias and one Triton kernel for all the rest; "triton", one kernel for everything; or "auto",
    which is gate on CUDA devices where it can run. Returns `[..., N]`. The exact (erf) GELU. Raises `ValueError` on
    shapes or names that do not fit, `KernelUnavailable` on a named implementation that cannot run here.
    Source: Shazeer 2020, equation 6.
    """
    if weight.ndim != 2 or weight.shape[0] % 2 or x.shape[-1] != weight.shape[1] or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"expected x [..., K], weight [2N, K], bias [2N], got {list(x.shape)}, {list(weight.shape)}, "
            f"{list(bias.shape)}"
        )
    if x.numel() == 0 or weight.numel() == 0:
        raise ValueError(f"expected at least one row and column, got x {list(x.shape)}, weight {list(weight.shape)}")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {implementation!r} is unknown, expected one of {list(IMPLEMENTATIONS)}")
    # Both forms with a kernel need Triton: named, neither gives way to torch.
    needed = "triton" if implementation == "gate" else implementation
    if uses_triton(needed, x.device, "geglu"):
        from darkroom_kernels.geglu import kernel

        if implementation == "triton":
            return kernel.geglu(x, weight, bias)  # type: ignore[no-any-return]
        return kernel.geglu_gate(F.linear(x, weight), bias)  # type: ignore[no-any-return]
    value, gate = F.linear(x, weight, bias).chunk(2, dim=-1)
    return value * F.gelu(gate)
