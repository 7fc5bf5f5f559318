"""The Triton kernels: bias, GELU and gate after a product, and the product with all of it."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula
from triton.tools.tensor_descriptor import TensorDescriptor

from darkroom_kernels import backend
from darkroom_kernels.backend import Build
from darkroom_kernels.geglu.tiles import GROUP_M, TILES, Tile, tile_for

# The gate alone: rows and columns of a program's block.
GATE_ROWS, GATE_COLUMNS, GATE_WARPS = 16, 256, 4


@triton.jit
def _gated(b_value, b_gate):
    """value · gate · Φ(gate), fp32."""
    return b_value * (0.5 * b_gate * (1.0 + tl.erf(b_gate * 0.7071067811865476)))


@triton.jit
def _geglu_gate(p_product, p_bias, p_y, rows, N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    m = (o_r < rows)[:, None] & m_n[None, :]  # [BLOCK_R, BLOCK_N]
    p_value = p_product + o_r[:, None] * (2 * N) + o_n[None, :]
    b_value = tl.load(p_value, mask=m, other=0.0).to(tl.float32)
    b_gate = tl.load(p_value + N, mask=m, other=0.0).to(tl.float32)
    b_value += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    b_gate += tl.load(p_bias + N + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    b_y = _gated(b_value, b_gate)
    tl.store(p_y + o_r[:, None] * N + o_n[None, :], b_y.to(p_y.dtype.element_ty), mask=m)


@triton.jit
def _tile_of(program, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Programs run in groups of GROUP_M tiles of rows by all tiles of columns."""
    group = program // (GROUP_M * tiles_n)
    group_m = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    within = program % (GROUP_M * tiles_n)
    return group * GROUP_M + within % group_m, within // group_m


@triton.jit
def _store_gated(
    p_bias,
    p_y,
    acc_value,
    acc_gate,
    tile_m,
    tile_n,
    rows,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    o_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    acc_value += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    acc_gate += tl.load(p_bias + N + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    b_y = _gated(acc_value, acc_gate)
    p_y += o_m[:, None].to(tl.int64) * N + o_n[None, :]
    tl.store(p_y, b_y.to(p_y.dtype.element_ty), mask=(o_m < rows)[:, None] & m_n[None, :])


@triton.jit
def _geglu(
    p_x,
    p_weight,
    p_bias,
    p_y,
    rows,
    stride_row,
    K,
    N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tile_m, tile_n = _tile_of(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    # Rows and columns past the end are read as the first ones and never written, so that only K needs a mask.
    o_m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)) % rows
    o_n = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)) % N
    o_k = tl.arange(0, BLOCK_K)
    p_a = p_x + o_m[:, None].to(tl.int64) * stride_row + o_k[None, :]
    p_b = p_weight + o_n[None, :].to(tl.int64) * K + o_k[:, None]
    to_gate = tl.cast(K, tl.int64) * N
    acc_value = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            b_a = tl.load(p_a)  # [BLOCK_M, BLOCK_K]
            b_value = tl.load(p_b)  # [BLOCK_K, BLOCK_N]
            b_gate = tl.load(p_b + to_gate)
        else:
            m_k = o_k < K - start
            b_a = tl.load(p_a, mask=m_k[None, :], other=0.0)
            b_value = tl.load(p_b, mask=m_k[:, None], other=0.0)
            b_gate = tl.load(p_b + to_gate, mask=m_k[:, None], other=0.0)
        acc_value = tl.dot(b_a, b_value, acc_value, input_precision="ieee")
        acc_gate = tl.dot(b_a, b_gate, acc_gate, input_precision="ieee")
        p_a += BLOCK_K
        p_b += BLOCK_K

    _store_gated(p_bias, p_y, acc_value, acc_gate, tile_m, tile_n, rows, N, BLOCK_M, BLOCK_N)


@triton.jit
def _geglu_described(
    desc_x,
    desc_weight,
    p_bias,
    p_y,
    rows,
    K,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """As `_geglu`, with tiles fetched by descriptor; what lies past the edges comes as zeros."""
    tile_m, tile_n = _tile_of(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    acc_value = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        b_a = desc_x.load([tile_m * BLOCK_M, start])  # [BLOCK_M, BLOCK_K]
        b_value = desc_weight.load([tile_n * BLOCK_N, start])  # [BLOCK_N, BLOCK_K]
        b_gate = desc_weight.load([N + tile_n * BLOCK_N, start])
        acc_value = tl.dot(b_a, b_value.T, acc_value)
        acc_gate = tl.dot(b_a, b_gate.T, acc_gate)
    _store_gated(p_bias, p_y, acc_value, acc_gate, tile_m, tile_n, rows, N, BLOCK_M, BLOCK_N)


def _gate_on_device(product: Tensor, bias: Tensor) -> Tensor:
    y = _fake_gate(product, bias)
    product = product.contiguous()
    width = y.shape[-1]
    rows = y.numel() // width
    block_n = min(GATE_COLUMNS, triton.next_power_of_2(width))
    _geglu_gate[(triton.cdiv(rows, GATE_ROWS), triton.cdiv(width, block_n))](
        product, bias.contiguous(), y, rows,
        N=width, BLOCK_R=GATE_ROWS, BLOCK_N=block_n, **backend.launch_options(GATE_WARPS),
    )  # fmt: skip
    return y


def _fake_gate(product: Tensor, bias: Tensor) -> Tensor:
    return torch.empty((*product.shape[:-1], product.shape[-1] // 2), dtype=product.dtype, device=product.device)


@functools.cache
def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return min(TILES)
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def _geglu_on_device(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = _fake_geglu(x, weight, bias)
    lines = x.reshape(-1, x.shape[-1])
    if lines.stride(1) != 1:
        lines = lines.contiguous()
    rows, inner = lines.shape
    width = y.shape[-1]
    weight, bias = weight.contiguous(), bias.contiguous()
    tile = tile_for(_capability(x.device), x.element_size())
    grid = (triton.cdiv(rows, tile.block_m) * triton.cdiv(width, tile.block_n),)
    options = _sizes(tile) | backend.launch_options(tile.num_warps, tile.num_stages)
    if tile.has_descriptors and _can_be_described(lines) and _can_be_described(weight):
        _geglu_described[grid](
            TensorDescriptor.from_tensor(lines, [tile.block_m, tile.block_k]),
            TensorDescriptor.from_tensor(weight, [tile.block_n, tile.block_k]),
            bias, y, rows, inner, N=width, **options,
        )  # fmt: skip
    else:
        _geglu[grid](
            lines, weight, bias, y, rows, lines.stride(0), inner,
            N=width, EVEN_K=inner % tile.block_k == 0, **options,
        )  # fmt: skip
    return y


def _can_be_described(matrix: Tensor) -> bool:
    """The copy engine wants every row to start at a multiple of 16 bytes."""
    return matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0


def _fake_geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.empty((*x.shape[:-1], weight.shape[0] // 2), dtype=x.dtype, device=x.device)


def _sizes(tile: Tile) -> dict[str, int]:
    return {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP_M": GROUP_M}


geglu_gate = backend.register("geglu_gate(Tensor product, Tensor bias) -> Tensor", _gate_on_device, _fake_gate)
geglu = backend.register("geglu(Tensor x, Tensor weight, Tensor bias) -> Tensor", _geglu_on_device, _fake_geglu)


@register_flop_formula(torch.ops.darkroom.geglu)
def geglu_flops(x_shape: Any, weight_shape: Any, bias_shape: Any, *_: Any, **__: Any) -> int:
    """A multiply-add is two; the gate is not counted, as torch counts no pointwise operation."""
    rows = 1
    for size in x_shape[:-1]:
        rows *= size
    return 2 * rows * int(weight_shape[0]) * int(weight_shape[1])


def builds() -> list[Build]:
    """Specialisations for the feed-forward layers of the Stable Diffusion UNets."""
    found = []
    for dtype, inner in (("fp16", 320), ("bf16", 1280)):
        width = 4 * inner
        gate = {"N": width, "BLOCK_R": GATE_ROWS, "BLOCK_N": GATE_COLUMNS}
        found.append(
            Build(
                name=f"geglu gate {width} {dtype}",
                kernel=_geglu_gate,
                signature=dict.fromkeys(("p_product", "p_bias", "p_y"), f"*{dtype}")
                | {"rows": "i32"}
                | dict.fromkeys(gate, "constexpr"),
                constants=gate,
                options=backend.launch_options(GATE_WARPS),
            )
        )
        found += [_build(capability, dtype, inner, width) for capability in (80, 90, 100)]
    return found


def _build(capability: int, dtype: str, inner: int, width: int) -> Build:
    tile = tile_for(capability, 2)
    sizes = {"N": width} | _sizes(tile)
    kernel = _geglu_described if tile.has_descriptors else _geglu
    if not tile.has_descriptors:
        sizes["EVEN_K"] = inner % tile.block_k == 0
    types = {
        "desc_x": f"tensordesc<{dtype}[{tile.block_m},{tile.block_k}]>",
        "desc_weight": f"tensordesc<{dtype}[{tile.block_n},{tile.block_k}]>",
    }
    types |= dict.fromkeys(("p_x", "p_weight", "p_bias", "p_y"), f"*{dtype}")
    types |= dict.fromkeys(("rows", "stride_row", "K"), "i32")
    return Build(
        name=f"geglu {inner}→{width} {dtype} for sm_{capability}",
        kernel=kernel,
        signature={name: types.get(name, "constexpr") for name in kernel.arg_names},
        constants={name: sizes[name] for name in kernel.arg_names if name in sizes},
        options=backend.launch_options(tile.num_warps, tile.num_stages),
        has_products=True,
        capabilities=(capability,),
    )
