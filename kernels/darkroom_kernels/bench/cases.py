"""The shapes that SD 1.5, SD 2.1 and SDXL bring to the kernels: random inputs, counts of work, all ways to compute.

Counts are of the least work: a multiply-add is two FLOPs, and every input and output crosses the memory once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import darkroom_kernels as kernels
from darkroom_kernels.attention.reference import reference_attention
from darkroom_kernels.geglu.reference import reference_geglu
from darkroom_kernels.group_norm.reference import reference_group_norm
from darkroom_kernels.layer_norm.reference import reference_layer_norm
from darkroom_kernels.residual.reference import reference_add_residual
from darkroom_kernels.step import (
    A_D,
    A_NOISE,
    A_X,
    C_OUT,
    C_SKIP,
    NUM_COLUMNS,
    step_,
)

Inputs = dict[str, Any]
Draw = Callable[..., Tensor]
Way = Callable[[Inputs], Tensor]
NUM_GROUPS = 32
EPS = 1e-5
OPS = ("attention self", "attention cross", "attention vae", "group_norm", "layer_norm", "geglu", "residual", "step")
SDPA_BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Network:
    """What of a UNet decides its shapes: `side` latent pixels, `channels` by level, the levels with attention and their
    heads; `vae_tokens` are those of the decoder's one attention.
    """

    name: str
    side: int
    channels: tuple[int, ...]
    heads: Mapping[int, int]
    layers: int = 2
    num_keys: int = 77
    vae_channels: int = 512

    def level_side(self, level: int) -> int:
        return self.side >> level

    def norm_widths(self, level: int) -> list[int]:
        """Channels of a level's group norms: its own, what comes from above, and the joined skips of the way up."""
        skips, width = [self.channels[0]], self.channels[0]
        widths: dict[int, set[int]] = {index: set() for index in range(len(self.channels))}
        for index, channels in enumerate(self.channels):
            for _ in range(self.layers):
                widths[index] |= {width, channels}
                width = channels
                skips.append(width)
            if index < len(self.channels) - 1:
                skips.append(width)
        for index, channels in reversed(list(enumerate(self.channels))):
            for _ in range(self.layers + 1):
                widths[index].add(width + skips.pop())
                width = channels
        return sorted(widths[level])


SD15 = Network("SD1.5 512", 64, (320, 640, 1280, 1280), {0: 8, 1: 8, 2: 8, 3: 8})
SD21 = Network("SD2.1 768", 96, (320, 640, 1280, 1280), {0: 5, 1: 10, 2: 20, 3: 20})
SDXL = Network("SDXL 1024", 128, (320, 640, 1280), {1: 10, 2: 20})
TOY = Network("toy", 8, (64, 128), {1: 2}, layers=1, num_keys=7, vae_channels=32)
NETWORKS = (SD15, SDXL, SD21)


@dataclass(frozen=True)
class Case:
    """One kernel at one shape. `make` draws inputs; the first is what rotates. `ways` compute the same by name, `ours`
    the names among them that are Darkroom's; `expected` is the reference in fp32. `size` is what the table of winners
    knows the shape by; 0: attention, which has a table of its own.
    """

    op: str
    network: str
    shape: str
    rows: int
    flops: float
    num_bytes: float
    make: Callable[[Draw], Inputs]
    ways: Mapping[str, Way]
    expected: Way
    is_compiled: bool
    size: int = 0

    @property
    def name(self) -> str:
        return f"{self.op}, {self.network}, {self.shape}, {self.rows} rows"

    def ours(self) -> list[str]:
        return [name for name in self.ways if name.startswith("darkroom")]


def cases(
    networks: tuple[Network, ...] = NETWORKS, rows: tuple[int, ...] = (2, 16), *, itemsize: int = 2
) -> Iterator[Case]:
    """Every kernel at every shape, attention first; `itemsize` is the bytes of a value. Compiled references are asked
    for at one count of rows only, because each takes seconds.
    """
    for kind in ("self", "cross", "vae"):
        for network in networks:
            for count in rows:
                yield from _attention_cases(kind, network, count, itemsize, is_compiled=count == rows[0])
    for make in (_group_norm_cases, _layer_norm_cases, _geglu_cases, _residual_cases, _step_cases):
        for network in networks:
            for count in rows:
                yield from make(network, count, itemsize, is_compiled=count == rows[-1])


def _attention_cases(kind: str, network: Network, rows: int, itemsize: int, *, is_compiled: bool) -> Iterator[Case]:
    if kind == "vae":
        # A decoder call has a few pictures, not model rows.
        yield _attention(
            "attention vae", network, max(1, rows // 4), 1, network.vae_channels, network.side**2, 0, itemsize, False
        )
        return
    for level, heads in network.heads.items():
        tokens, width = network.level_side(level) ** 2, network.channels[level]
        keys = network.num_keys if kind == "cross" else 0
        yield _attention(f"attention {kind}", network, rows, heads, width // heads, tokens, keys, itemsize, is_compiled)


def _attention(
    op: str,
    network: Network,
    rows: int,
    heads: int,
    dim: int,
    tokens: int,
    keys: int,
    itemsize: int,
    is_compiled: bool,
) -> Case:
    """Self-attention where `keys` is 0: q, k and v are then views of one fused projection, as in the network."""

    def make(draw: Draw) -> Inputs:
        if not keys:
            q, k, v = draw(rows, tokens, 3, heads, dim).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q = draw(rows, tokens, heads, dim).transpose(1, 2)
            k, v = draw(rows, keys, 2, heads, dim).permute(2, 0, 3, 1, 4).unbind(0)
        return {"q": q, "k": k, "v": v}

    num_keys = keys or tokens
    ways: dict[str, Way] = {
        f"darkroom {name}": lambda i, n=name: kernels.attention(i["q"], i["k"], i["v"], implementation=n)  # type: ignore[misc]
        for name in ("auto", "triton")
    }
    ways |= {name: lambda i, b=backend: _sdpa(i, b) for name, backend in SDPA_BACKENDS.items()}  # type: ignore[misc]
    ways["xformers"] = lambda i: kernels.attention(i["q"], i["k"], i["v"], implementation="xformers")
    ways["flash-attn"] = _flash_attn
    return Case(
        op=op,
        network=network.name,
        shape=f"{heads}x{dim}, {tokens} queries, {num_keys} keys",
        rows=rows,
        flops=4.0 * rows * heads * tokens * num_keys * dim,
        num_bytes=2.0 * rows * heads * dim * (tokens + num_keys) * itemsize,
        make=make,
        ways=ways,
        expected=lambda i: reference_attention(i["q"].float(), i["k"].float(), i["v"].float()),
        is_compiled=is_compiled,
    )


def _sdpa(inputs: Inputs, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(inputs["q"], inputs["k"], inputs["v"])


def _flash_attn(inputs: Inputs) -> Tensor:
    """FlashAttention-3 where its module is there, else FlashAttention-2."""
    import importlib

    try:
        module = importlib.import_module("flash_attn_interface")
    except ImportError:
        module = importlib.import_module("flash_attn")
    out = module.flash_attn_func(*(inputs[name].transpose(1, 2) for name in "qkv"))
    out = out[0] if isinstance(out, tuple) else out
    return out.transpose(1, 2)  # type: ignore[no-any-return]


def _implementations(call: Callable[[Inputs, str], Tensor], *names: str) -> dict[str, Way]:
    ways: dict[str, Way] = {f"darkroom {name}": lambda i, n=name: call(i, n) for name in names}  # type: ignore[misc]
    return ways | {"torch": lambda i: call(i, "torch")}


def _picture(draw: Draw, rows: int, channels: int, side: int) -> Tensor:
    """Channels-last, as all pictures inside the networks are."""
    return draw(rows, side, side, channels).permute(0, 3, 1, 2)


def _group_norm_cases(network: Network, rows: int, itemsize: int, *, is_compiled: bool) -> Iterator[Case]:
    for level, own in enumerate(network.channels):
        side = network.level_side(level)
        for width in network.norm_widths(level):
            # The second norm of a residual block has the level's own width, and adds the time embedding.
            has_shift = width == own

            def make(draw: Draw, width: int = width, side: int = side, has_shift: bool = has_shift) -> Inputs:
                shift = draw(rows, width) if has_shift else None
                return {
                    "x": _picture(draw, rows, width, side),
                    "weight": draw(width),
                    "bias": draw(width),
                    "shift": shift,
                }

            def call(i: Inputs, name: str) -> Tensor:
                return kernels.group_norm(
                    i["x"], NUM_GROUPS, i["weight"], i["bias"], EPS, silu=True, shift=i["shift"], implementation=name
                )

            numel = rows * width * side * side
            yield Case(
                op="group_norm",
                network=network.name,
                shape=f"{width}x{side}x{side}, SiLU{', shift' if has_shift else ''}",
                rows=rows,
                flops=0.0,
                num_bytes=2.0 * numel * itemsize,
                make=make,
                ways=_implementations(call, "auto", "triton"),
                expected=lambda i: reference_group_norm(
                    i["x"].float(), NUM_GROUPS, i["weight"], i["bias"], EPS, silu=True, shift=i["shift"]
                ),
                is_compiled=is_compiled and has_shift,
                size=width * side * side,
            )


def _token_levels(network: Network) -> Iterator[tuple[int, int]]:
    """(channels, tokens) of the levels that have transformers."""
    for level in network.heads:
        yield network.channels[level], network.level_side(level) ** 2


def _layer_norm_cases(network: Network, rows: int, itemsize: int, *, is_compiled: bool) -> Iterator[Case]:
    for width, tokens in _token_levels(network):

        def make(draw: Draw, width: int = width, tokens: int = tokens) -> Inputs:
            return {"x": draw(rows, tokens, width), "weight": draw(width), "bias": draw(width), "shift": draw(width)}

        def call(i: Inputs, name: str) -> Tensor:
            return kernels.layer_norm(i["x"], i["weight"], i["bias"], EPS, shift=i["shift"], implementation=name)

        yield Case(
            op="layer_norm",
            network=network.name,
            shape=f"{tokens}x{width}, shift",
            rows=rows,
            flops=0.0,
            num_bytes=2.0 * rows * tokens * width * itemsize,
            make=make,
            ways=_implementations(call, "auto", "triton"),
            expected=lambda i: reference_layer_norm(i["x"].float(), i["weight"], i["bias"], EPS, shift=i["shift"]),
            is_compiled=is_compiled,
            size=width,
        )


def _geglu_cases(network: Network, rows: int, itemsize: int, *, is_compiled: bool) -> Iterator[Case]:
    for width, tokens in _token_levels(network):

        def make(draw: Draw, width: int = width, tokens: int = tokens) -> Inputs:
            weight = draw(8 * width, width).mul_(width**-0.5)
            return {"x": draw(rows, tokens, width), "weight": weight, "bias": draw(8 * width)}

        def call(i: Inputs, name: str) -> Tensor:
            return kernels.geglu(i["x"], i["weight"], i["bias"], implementation=name)

        yield Case(
            op="geglu",
            network=network.name,
            shape=f"{tokens}x{width} to {4 * width}",
            rows=rows,
            flops=16.0 * rows * tokens * width * width,
            num_bytes=(rows * tokens * 5.0 * width + 8.0 * width * width) * itemsize,
            make=make,
            ways=_implementations(call, "auto", "gate", "triton"),
            expected=lambda i: reference_geglu(i["x"].float(), i["weight"], i["bias"]),
            is_compiled=is_compiled,
            size=width,
        )


def _residual_cases(network: Network, rows: int, itemsize: int, *, is_compiled: bool) -> Iterator[Case]:
    for level, width in enumerate(network.channels):
        side = network.level_side(level)

        def make(draw: Draw, width: int = width, side: int = side) -> Inputs:
            return {
                "y": _picture(draw, rows, width, side),
                "residual": _picture(draw, rows, width, side),
                "bias": draw(width),
            }

        def call(i: Inputs, name: str) -> Tensor:
            return kernels.add_residual_(i["y"], i["residual"], i["bias"], implementation=name)

        yield Case(
            op="residual",
            network=network.name,
            shape=f"{width}x{side}x{side}",
            rows=rows,
            flops=0.0,
            num_bytes=3.0 * rows * width * side * side * itemsize,
            make=make,
            ways=_implementations(call, "auto", "triton"),
            expected=lambda i: reference_add_residual(i["y"].float(), i["residual"], i["bias"]),
            is_compiled=is_compiled,
            size=width * side * side,
        )


def _step_cases(network: Network, rows: int, itemsize: int, *, is_compiled: bool) -> Iterator[Case]:
    images, side = max(1, rows // 2), network.side

    def make(draw: Draw) -> Inputs:
        # The table of a sampler that stays bounded however often it is applied.
        table = torch.zeros(images, NUM_COLUMNS)
        for column, value in ((C_SKIP, 0.5), (C_OUT, -0.5), (A_X, 0.5), (A_D, 0.4), (A_NOISE, 0.1)):
            table[:, column] = value
        model_output = _picture(draw, 2 * images, 4, side)
        device = model_output.device
        index = torch.arange(images, device=device)
        return {
            "latents": draw(images, 4, side, side).float(),
            "previous": draw(images, 2, 4, side, side).float(),
            "model_output": model_output,
            "slots": index,
            "rows_cond": index,
            "rows_uncond": index + images,
            "guidance_scale": torch.full((images,), 5.0, device=device),
            "coefficients": table.to(device),
            "noise": draw(images, 4, side, side).float(),
            "is_finite": torch.ones(images, dtype=torch.bool, device=device),
        }

    def call(i: Inputs, name: str) -> Tensor:
        step_(**i, implementation=name)
        return i["latents"]  # type: ignore[no-any-return]

    # Latents read and written, the last denoised read and two of history written (this table has no third order),
    # noise, and two outputs of the network.
    per_value = 2 * 4 + 3 * 4 + 4 + 2 * itemsize
    yield Case(
        op="step",
        network=network.name,
        shape=f"{images} images, 4x{side}x{side}",
        rows=rows,
        flops=0.0,
        num_bytes=float(images * 4 * side * side * per_value),
        make=make,
        ways=_implementations(call, "auto", "triton"),
        expected=_expected_step,
        is_compiled=is_compiled,
        size=4 * side * side,
    )


def _expected_step(i: Inputs) -> Tensor:
    from darkroom_kernels.step.reference import step_reference

    names = (
        "latents",
        "model_output",
        "rows_cond",
        "rows_uncond",
        "guidance_scale",
        "coefficients",
        "previous",
        "noise",
    )
    return step_reference(*(i[name] for name in names))[0]
