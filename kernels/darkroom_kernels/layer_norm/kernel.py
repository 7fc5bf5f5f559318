"""The Triton kernel: a program holds a few whole rows, so that each is read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from darkroom_kernels import backend
from darkroom_kernels.backend import Build

# Values that a program holds, padding included: several narrow rows or one wide one.
BLOCK_VALUES = 4096
WIDEST = 1 << 15


@triton.jit
def _layer_norm(
    p_x,
    p_shift,
    p_weight,
    p_bias,
    p_y,
    stride_row,
    rows,
    eps,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
):
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    m = (o_r < rows)[:, None] & m_c[None, :]  # [BLOCK_R, BLOCK_C]
    b_x = tl.load(p_x + o_r[:, None] * stride_row + o_c[None, :], mask=m, other=0.0).to(tl.float32)
    if HAS_SHIFT:
        b_x += tl.load(p_shift + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_mean = tl.sum(b_x, 1) / C
    b_x = tl.where(m, b_x - b_mean[:, None], 0.0)
    b_scale = tl.rsqrt(tl.sum(b_x * b_x, 1) / C + eps)
    b_weight = tl.load(p_weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_bias = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_y = b_x * b_scale[:, None] * b_weight[None, :] + b_bias[None, :]
    tl.store(p_y + o_r[:, None] * C + o_c[None, :], b_y.to(p_y.dtype.element_ty), mask=m)


def blocks(width: int) -> tuple[int, int, int]:
    """Rows, channels and warps of a program. They depend on the width alone: a row must not notice the others."""
    block_c = triton.next_power_of_2(width)
    if block_c > WIDEST:
        raise ValueError(f"layer_norm 'triton' holds a row at once, at most {WIDEST} values, got {width}")
    block_r = max(1, BLOCK_VALUES // block_c)
    return block_r, block_c, min(16, max(4, block_c >> 10))


def _layer_norm_on_device(x: Tensor, weight: Tensor, bias: Tensor, eps: float, shift: Tensor | None) -> Tensor:
    y = _fake(x, weight, bias, eps, shift)
    width = x.shape[-1]
    lines = x.reshape(-1, width)
    if lines.stride(1) != 1:
        lines = lines.contiguous()
    rows = lines.shape[0]
    block_r, block_c, num_warps = blocks(width)
    _layer_norm[(triton.cdiv(rows, block_r),)](
        lines, None if shift is None else shift.contiguous(), weight.contiguous(), bias.contiguous(), y,
        lines.stride(0), rows, eps,
        C=width, BLOCK_R=block_r, BLOCK_C=block_c, HAS_SHIFT=shift is not None, **backend.launch_options(num_warps),
    )  # fmt: skip
    return y


def _fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float, shift: Tensor | None) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


layer_norm = backend.register(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, Tensor? shift) -> Tensor", _layer_norm_on_device, _fake
)


def builds() -> list[Build]:
    """Specialisations for the widths of the Stable Diffusion UNets."""
    found = []
    for width, dtype in ((320, "fp16"), (1280, "bf16"), (2560, "fp32")):
        block_r, block_c, num_warps = blocks(width)
        sizes = {"C": width, "BLOCK_R": block_r, "BLOCK_C": block_c, "HAS_SHIFT": True}
        found.append(
            Build(
                name=f"layer_norm {width} {dtype}",
                kernel=_layer_norm,
                signature=dict.fromkeys(("p_x", "p_shift", "p_weight", "p_bias", "p_y"), f"*{dtype}")
                | {"stride_row": "i32", "rows": "i32", "eps": "fp32"}
                | dict.fromkeys(sizes, "constexpr"),
                constants=sizes,
                options=backend.launch_options(num_warps),
            )
        )
    return found
