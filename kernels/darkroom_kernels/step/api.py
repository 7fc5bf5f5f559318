"""Validate, choose an implementation, run it. Validation looks at shapes, dtypes and devices only: no host sync."""

from __future__ import annotations

import torch
from torch import Tensor

from darkroom_kernels.backend import uses_triton
from darkroom_kernels.step import host, plain
from darkroom_kernels.step.columns import NUM_COLUMNS

OUTPUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def scale_input(
    latents: Tensor,
    coefficients: Tensor,
    slots: Tensor,
    row_of: Tensor,
    dtype: torch.dtype,
    *,
    implementation: str = "auto",
) -> Tensor:
    """Gather what the network sees: INPUT_SCALE · latents, for each of its B model rows.

    `latents` `[S, C, H, W]` fp32, contiguous: the pool. `coefficients` `[R, NUM_COLUMNS]` fp32, contiguous. `slots`
    `[R]` int64, each row's place in the pool, −1 for no row. `row_of` `[B]` int64, the row that each model row belongs
    to (0 ≤ row < R, not checked: that would be a host sync). `dtype`: fp32, fp16 or bf16. All on one device.
    Returns `[B, C, H, W]`, channels-last; zeros where a row has no slot, whatever the pool holds.
    Raises `ValueError` on a shape, dtype, device or name that does not fit, `KernelUnavailable` on a named
    implementation that cannot run here.
    """
    if latents.ndim != 4:
        raise ValueError(f"latents must be 4-D, got {latents.ndim}-D")
    device = latents.device
    _expect("latents", latents, tuple(latents.shape), torch.float32, device, is_contiguous=True)
    _expect("slots", slots, (slots.shape[0] if slots.ndim else 0,), torch.int64, device)
    _expect("row_of", row_of, (row_of.shape[0] if row_of.ndim else 0,), torch.int64, device)
    _expect("coefficients", coefficients, (slots.shape[0], NUM_COLUMNS), torch.float32, device, is_contiguous=True)
    if dtype not in OUTPUT_DTYPES:
        raise ValueError(f"dtype: expected one of {list(OUTPUT_DTYPES)}, got {dtype}")
    _expect_values(latents, slots, row_of)
    if uses_triton(implementation, device, "step", latents.shape[1:].numel()):
        from darkroom_kernels.step.kernel import scale_input as launch

        return launch(latents, coefficients, slots, row_of, dtype)  # type: ignore[no-any-return]
    if device.type == "cpu" and implementation == "auto":
        return host.scale_input(latents, coefficients, slots, row_of, dtype)
    return plain.scale_input(latents, coefficients, slots, row_of, dtype)


def step_(
    latents: Tensor,
    previous: Tensor,
    model_output: Tensor,
    slots: Tensor,
    rows_cond: Tensor,
    rows_uncond: Tensor,
    guidance_scale: Tensor,
    coefficients: Tensor,
    noise: Tensor | None,
    is_finite: Tensor,
    *,
    implementation: str = "auto",
) -> None:
    """Advance each of R rows by one evaluation, each by its own coefficients, where its state lies.

    `latents` `[S, C, H, W]` and `previous` `[S, 2, C, H, W]`, fp32 and contiguous, are pools of which row r holds slot
    `slots[r]` (`[R]` int64; −1: no row, nothing of it is written; no two rows share one). `model_output`
    `[B, C, H, W]`, any floating dtype and strides; channels-last is what it should be. `rows_cond`, `rows_uncond`
    `[R]` int64, each row's lines of `model_output` (0 ≤ index < B, not checked: that would be a host sync; valid also
    where there is no row); a row without guidance names the same line twice. `guidance_scale` `[R]` fp32, 1 without
    guidance. `coefficients` `[R, NUM_COLUMNS]` fp32, contiguous. `noise` `[R, C, H, W]` fp32, or None when no row
    draws any. `is_finite` `[R]` bool, contiguous. All on one device.

    In place: `latents` become the next ones, `previous` becomes (denoised, previous[0]), and `is_finite` says of each
    row whether its new latents and denoised are free of NaN and infinity (true where there is no row). What has a zero
    coefficient among A_D1, A_D2 and A_NOISE is not looked at, so a fresh slot's history and unused noise may hold
    anything. Raises `ValueError` on a shape, dtype, device or name that does not fit, `KernelUnavailable` on a named
    implementation that cannot run here.
    """
    if latents.ndim != 4 or model_output.ndim != 4:
        raise ValueError(f"latents and model_output must be 4-D, got {latents.ndim}-D and {model_output.ndim}-D")
    if not model_output.is_floating_point():
        raise ValueError(f"model_output must be floating point, got {model_output.dtype}")
    num_slots, *plane = latents.shape
    rows, device = (slots.shape[0] if slots.ndim else 0), latents.device
    _expect("model_output", model_output, (model_output.shape[0], *plane), model_output.dtype, device)
    _expect("latents", latents, (num_slots, *plane), torch.float32, device, is_contiguous=True)
    _expect("previous", previous, (num_slots, 2, *plane), torch.float32, device, is_contiguous=True)
    _expect("slots", slots, (rows,), torch.int64, device)
    _expect("rows_cond", rows_cond, (rows,), torch.int64, device)
    _expect("rows_uncond", rows_uncond, (rows,), torch.int64, device)
    _expect("guidance_scale", guidance_scale, (rows,), torch.float32, device)
    _expect("coefficients", coefficients, (rows, NUM_COLUMNS), torch.float32, device, is_contiguous=True)
    if noise is not None:
        _expect("noise", noise, (rows, *plane), torch.float32, device)
    _expect("is_finite", is_finite, (rows,), torch.bool, device, is_contiguous=True)
    _expect_values(latents, slots, model_output)
    arguments = (
        latents,
        previous,
        model_output,
        slots,
        rows_cond,
        rows_uncond,
        guidance_scale,
        coefficients,
        noise,
        is_finite,
    )
    if uses_triton(implementation, device, "step", latents.shape[1:].numel()):
        from darkroom_kernels.step.kernel import step_ as launch

        launch(*arguments)
    elif device.type == "cpu" and implementation == "auto":
        host.step_(*arguments)
    else:
        plain.step_(*arguments)


def _expect(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    is_contiguous: bool = False,
) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != device:
        raise ValueError(
            f"{name}: expected {list(shape)} {dtype} on {device}, "
            f"got {list(tensor.shape)} {tensor.dtype} on {tensor.device}"
        )
    if is_contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()} of {list(tensor.shape)}")


def _expect_values(*tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.numel() == 0:
            raise ValueError(f"expected at least one slot, row and value, got a tensor of shape {list(tensor.shape)}")
