"""The step in plain fp32 PyTorch, written to be read. README.md has the mathematics."""

from __future__ import annotations

import torch
from torch import Tensor

from darkroom_kernels.step.columns import A_D, A_D1, A_D2, A_NOISE, A_X, C_OUT, C_SKIP, CLAMP


def step_reference(
    latents: Tensor,
    model_output: Tensor,
    rows_cond: Tensor,
    rows_uncond: Tensor,
    guidance_scale: Tensor,
    coefficients: Tensor,
    previous: Tensor,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Advance R rows that lie side by side; the measure of `step_`, which does this where the rows lie in their pools.

    `latents` `[R, C, H, W]` and `previous` `[R, 2, C, H, W]` fp32; the rest as `step_` takes it. Returns new
    `(latents_next, denoised)`; inputs are untouched, nothing is validated and nothing folded.
    """
    column = [c[:, None, None, None] for c in coefficients.unbind(dim=1)]
    cond = model_output[rows_cond].float()
    uncond = model_output[rows_uncond].float()
    noise_pred = uncond + guidance_scale[:, None, None, None] * (cond - uncond)
    denoised = column[C_SKIP] * latents + column[C_OUT] * noise_pred
    limit = column[CLAMP]
    denoised = torch.where(limit > 0, denoised.clamp(-limit, limit), denoised)
    latents_next = (
        column[A_X] * latents + column[A_D] * denoised + column[A_D1] * previous[:, 0] + column[A_D2] * previous[:, 1]
    )
    if noise is not None:
        latents_next = latents_next + column[A_NOISE] * noise
    return latents_next, denoised
