"""The self-check of a worker's start: every Triton kernel on small random inputs, on the device that will be used."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from darkroom_kernels.attention.check import TOLERANCE, check_attention
from darkroom_kernels.backend import failure, mark_failed, triton_problem
from darkroom_kernels.geglu import geglu
from darkroom_kernels.group_norm import group_norm
from darkroom_kernels.layer_norm import layer_norm
from darkroom_kernels.residual import add_residual_
from darkroom_kernels.step import NUM_COLUMNS, scale_input, step_
from darkroom_kernels.winners import winners_of

CHANNELS = 64


def check_kernels(device: torch.device, dtype: torch.dtype, head_dims: Iterable[int], *, kernels: str = "auto") -> bool:
    """Compare each Triton kernel with PyTorch in fp32, attention at the given head sizes; True when all are right.

    `kernels` is the implementation that a model asks for: "triton" by name takes the one-kernel GEGLU, "auto" only
    where it was measured to be the fastest. A kernel that is wrong, or does not compile or launch, is not used for the
    life of the process: `auto` takes another implementation, "triton" by name raises `KernelUnavailable`, and the error
    is logged. Where Triton cannot run at all there is nothing to check. Takes seconds on a new device, because it
    compiles.
    """
    if triton_problem(device) is not None or device.type == "meta":
        return True
    checks: dict[str, Callable[[torch.device, torch.dtype], tuple[Tensor, Tensor]]] = {
        "group_norm": _group_norm,
        "layer_norm": _layer_norm,
        "residual": _residual,
        "geglu": functools.partial(_geglu, forms=_geglu_forms(device, kernels)),
        "step": _step,
    }
    results = [check_attention(device, dtype, head_dims)]
    for kernel, check in checks.items():
        if failure(kernel, device) is None and (problem := _problem(check, device, dtype)) is not None:
            mark_failed(kernel, device, f"self-check in {dtype}: {problem}")
        results.append(failure(kernel, device) is None)
    return all(results)


@torch.inference_mode()
def _problem(
    check: Callable[[torch.device, torch.dtype], tuple[Tensor, Tensor]], device: torch.device, dtype: torch.dtype
) -> str | None:
    try:
        got, expected = check(device, dtype)
    except Exception as broken:  # a compiler or launch error, whatever its class, means: do not use it
        return f"{type(broken).__name__}: {broken}"
    error = float((got.float() - expected).abs().max() / expected.square().mean().sqrt())
    return None if error <= TOLERANCE[dtype] else f"off by {error:.3g} of the result, {TOLERANCE[dtype]:.3g} accepted"


def _random(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


def _group_norm(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows small enough for the kernel that reads them once, and rows for the two that share the work."""
    weight, bias = _random(device, dtype, CHANNELS), _random(device, dtype, CHANNELS)
    shift = _random(device, dtype, 2, CHANNELS)
    found = []
    for side in (7, 50):
        x = _random(device, dtype, 2, CHANNELS, side, side).contiguous(memory_format=torch.channels_last)
        got = group_norm(x, 8, weight, bias, 1e-5, silu=True, shift=shift, implementation="triton")
        z = x.float() + shift.float()[:, :, None, None]
        expected = torch.nn.functional.silu(torch.group_norm(z, 8, weight.float(), bias.float(), 1e-5))
        found.append((got.flatten(), expected.flatten()))
    gots, expecteds = zip(*found, strict=True)
    return torch.cat(gots), torch.cat(expecteds)


def _layer_norm(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, weight, bias = (_random(device, dtype, *shape) for shape in ((35, CHANNELS), (CHANNELS,), (CHANNELS,)))
    expected = torch.layer_norm(x.float(), (CHANNELS,), weight.float(), bias.float(), 1e-5)
    return layer_norm(x, weight, bias, 1e-5, implementation="triton"), expected


def _residual(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    y, residual, bias = (_random(device, dtype, *shape) for shape in ((35, CHANNELS), (35, CHANNELS), (CHANNELS,)))
    expected = y.float() + residual.float() + bias.float()
    return add_residual_(y, residual, bias, implementation="triton"), expected


def _geglu_forms(device: torch.device, kernels: str) -> list[str]:
    """The forms with a kernel of Triton's that a network of these `kernels` may come to."""
    return ["triton"] if kernels == "triton" else sorted({"gate", *winners_of("geglu", device)} - {"torch"})


def _geglu(device: torch.device, dtype: torch.dtype, *, forms: list[str]) -> tuple[Tensor, Tensor]:
    x, weight = _random(device, dtype, 35, CHANNELS), _random(device, dtype, 2 * CHANNELS, CHANNELS)
    bias = _random(device, dtype, 2 * CHANNELS)
    value, gate = torch.nn.functional.linear(x.float(), weight.float(), bias.float()).chunk(2, dim=-1)
    expected = value * torch.nn.functional.gelu(gate)
    got = torch.stack([geglu(x, weight, bias, implementation=form) for form in forms])
    return got, expected.expand_as(got)


def _step(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows that several programs share, one of them without a slot and one with a NaN, and what is said of each."""
    plane = (4, 30, 21)
    model_output = _random(device, dtype, 4, *plane).contiguous(memory_format=torch.channels_last)
    model_output[2, 3, 29, 20] = torch.nan
    slots, row_of = torch.tensor([4, -1, 1], device=device), torch.tensor([0, 1, 2, 2], device=device)
    lines = torch.tensor([[0, 1, 2], [3, 1, 2]], device=device)
    coefficients = _random(device, torch.float32, 3, NUM_COLUMNS)

    def both(implementation: str) -> Tensor:
        latents, previous = (_random(device, torch.float32, 5, *shape, *plane) for shape in ((), (2,)))
        scaled = scale_input(latents, coefficients, slots, row_of, dtype, implementation=implementation)
        is_finite = torch.empty(3, dtype=torch.bool, device=device)
        step_(
            latents,
            previous,
            model_output,
            slots,
            lines[0],
            lines[1],
            torch.full((3,), 5.0, device=device),
            coefficients,
            _random(device, torch.float32, 3, *plane),
            is_finite,
            implementation=implementation,
        )
        parts = [part.float().flatten() for part in (scaled, latents, previous, is_finite)]
        return torch.cat(parts).nan_to_num()

    return both("triton"), both("torch")
