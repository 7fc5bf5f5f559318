"""The Triton kernel. Channels lie side by side and nothing lies between, so places and channels are one long line."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from darkroom_kernels import backend
from darkroom_kernels.backend import Build

BLOCK = 4096
NUM_WARPS = 4


@triton.jit
def _add_residual(p_y, p_residual, p_bias, numel, C: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    o = tl.arange(0, BLOCK)
    m = o < numel - start
    o_c = ((start % C).to(tl.int32) + o) % C
    if C % 8 == 0:
        # So it is, and older compilers do not find it out: without this they read the bias one by one.
        o_c = tl.max_contiguous(tl.multiple_of(o_c, 8), 8)
    b_y = tl.load(p_y + start + o, mask=m, other=0.0).to(tl.float32)
    b_y += tl.load(p_residual + start + o, mask=m, other=0.0).to(tl.float32)
    b_y += tl.load(p_bias + o_c).to(tl.float32)
    tl.store(p_y + start + o, b_y.to(p_y.dtype.element_ty), mask=m)


def layout_of(y: Tensor) -> torch.memory_format:
    """How `y` must lie for its channels to be side by side: four dimensions are a picture, others end in channels."""
    return torch.channels_last if y.ndim == 4 else torch.contiguous_format


def _add_residual_on_device(y: Tensor, residual: Tensor, bias: Tensor) -> None:
    # torch's compiler may hand over other strides than those it traced, so the layout is seen to here.
    layout, numel = layout_of(y), y.numel()
    total = y.contiguous(memory_format=layout)
    _add_residual[(triton.cdiv(numel, BLOCK),)](
        total, residual.contiguous(memory_format=layout), bias.contiguous(), numel,
        C=bias.shape[0], BLOCK=BLOCK, **backend.launch_options(NUM_WARPS),
    )  # fmt: skip
    if total is not y:
        y.copy_(total)


def _fake(y: Tensor, residual: Tensor, bias: Tensor) -> None:
    """In place, so there is nothing to make."""


add_residual_ = backend.register(
    "add_residual_(Tensor(a!) y, Tensor residual, Tensor bias) -> ()", _add_residual_on_device, _fake
)


def builds() -> list[Build]:
    """Specialisations for the channels of the Stable Diffusion UNets and autoencoders."""
    return [
        Build(
            name=f"add_residual {channels} {dtype}",
            kernel=_add_residual,
            signature=dict.fromkeys(("p_y", "p_residual", "p_bias"), f"*{dtype}")
            | {"numel": "i32", "C": "constexpr", "BLOCK": "constexpr"},
            constants={"C": channels, "BLOCK": BLOCK},
            options=backend.launch_options(NUM_WARPS),
        )
        for channels, dtype in ((320, "fp16"), (128, "fp32"))
    ]
