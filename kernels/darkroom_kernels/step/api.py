"""Validate, choose an implementation, run it. Validation looks at shapes, dtypes and devices only: no host sync."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from darkroom_kernels.step.columns import (
    A_D,
    A_D1,
    A_D2,
    A_NOISE,
    A_X,
    C_OUT,
    C_SKIP,
    CLAMP,
    NUM_COLUMNS,
)


class StepImplementation(str, Enum):
    AUTO = "auto"
    TORCH = "torch"
    TRITON = "triton"


class StepUnavailable(RuntimeError):
    """The named implementation cannot run here; the message says why."""


def step(
    latents: Tensor,
    model_output: Tensor,
    rows_cond: Tensor,
    rows_uncond: Tensor,
    guidance_scale: Tensor,
    coefficients: Tensor,
    previous: Tensor,
    noise: Tensor | None = None,
    *,
    implementation: StepImplementation | str = StepImplementation.AUTO,
) -> tuple[Tensor, Tensor]:
    """Advance each of R rows by one evaluation, each row by its own coefficients.

    `latents` `[R, C, H, W]` fp32. `model_output` `[M, C, H, W]`, any floating dtype. `rows_cond`, `rows_uncond` `[R]`
    int64, each row's lines of `model_output` (0 ≤ index < M, not checked: that would be a host sync); a row without
    guidance names the same line twice. `guidance_scale` `[R]` fp32, 1 without guidance. `coefficients`
    `[R, NUM_COLUMNS]` fp32. `previous` `[R, 2, C, H, W]` fp32, denoised of the last evaluation and the one before.
    `noise` `[R, C, H, W]` fp32, or None when no row draws noise. A zero coefficient does not hide a NaN: fill unused
    history and noise with zeros.

    Returns new `(latents_next, denoised)`, both `[R, C, H, W]` fp32; inputs are untouched. All on one device.
    Raises `ValueError` on a shape, dtype or device mismatch, `StepUnavailable` on a named choice that cannot run here.
    """
    _validate(latents, model_output, rows_cond, rows_uncond, guidance_scale, coefficients, previous, noise)
    if StepImplementation(implementation) is StepImplementation.TRITON:
        raise StepUnavailable("step has no Triton kernel in this release; use auto or torch")
    return _step_torch(latents, model_output, rows_cond, rows_uncond, guidance_scale, coefficients, previous, noise)


def _step_torch(
    latents: Tensor,
    model_output: Tensor,
    rows_cond: Tensor,
    rows_uncond: Tensor,
    guidance_scale: Tensor,
    coefficients: Tensor,
    previous: Tensor,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The reference in fewer passes: lerp for guidance, one fused multiply-add per further term, in place."""
    column = coefficients.t()[:, :, None, None, None].unbind()
    noise_pred = model_output.index_select(0, rows_uncond).float()
    noise_pred.lerp_(model_output.index_select(0, rows_cond).float(), guidance_scale[:, None, None, None])
    denoised = (latents * column[C_SKIP]).addcmul_(noise_pred, column[C_OUT])
    limit = column[CLAMP]
    limit = torch.where(limit > 0, limit, torch.inf)
    denoised.clamp_(-limit, limit)
    latents_next = (latents * column[A_X]).addcmul_(denoised, column[A_D])
    latents_next.addcmul_(previous[:, 0], column[A_D1]).addcmul_(previous[:, 1], column[A_D2])
    if noise is not None:
        latents_next.addcmul_(noise, column[A_NOISE])
    return latents_next, denoised


def _validate(
    latents: Tensor,
    model_output: Tensor,
    rows_cond: Tensor,
    rows_uncond: Tensor,
    guidance_scale: Tensor,
    coefficients: Tensor,
    previous: Tensor,
    noise: Tensor | None,
) -> None:
    if latents.ndim != 4 or model_output.ndim != 4:
        raise ValueError(f"latents and model_output must be 4-D, got {latents.ndim}-D and {model_output.ndim}-D")
    if not model_output.is_floating_point():
        raise ValueError(f"model_output must be floating point, got {model_output.dtype}")
    rows, *plane = latents.shape
    _expect("model_output", model_output, (model_output.shape[0], *plane), model_output.dtype, latents.device)
    _expect("latents", latents, (rows, *plane), torch.float32, latents.device)
    _expect("rows_cond", rows_cond, (rows,), torch.int64, latents.device)
    _expect("rows_uncond", rows_uncond, (rows,), torch.int64, latents.device)
    _expect("guidance_scale", guidance_scale, (rows,), torch.float32, latents.device)
    _expect("coefficients", coefficients, (rows, NUM_COLUMNS), torch.float32, latents.device)
    _expect("previous", previous, (rows, 2, *plane), torch.float32, latents.device)
    if noise is not None:
        _expect("noise", noise, (rows, *plane), torch.float32, latents.device)


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != device:
        raise ValueError(
            f"{name}: expected {list(shape)} {dtype} on {device}, "
            f"got {list(tensor.shape)} {tensor.dtype} on {tensor.device}"
        )
