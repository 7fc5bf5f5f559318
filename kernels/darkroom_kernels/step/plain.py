"""The step in PyTorch operators: what a GPU runs when Triton is not to be used.

Nothing here depends on values on the host, so a CUDA graph can hold it: a row without a slot is computed like the
others and its result is replaced by that of a row which has one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from darkroom_kernels.step.columns import A_D, A_D1, A_D2, A_NOISE, A_X, C_OUT, C_SKIP, CLAMP, INPUT_SCALE


def scale_input(latents: Tensor, coefficients: Tensor, slots: Tensor, row_of: Tensor, dtype: torch.dtype) -> Tensor:
    """Arguments and result as `darkroom_kernels.step.scale_input`."""
    slot = slots.index_select(0, row_of)
    scale = coefficients[:, INPUT_SCALE].index_select(0, row_of)
    scaled = latents.index_select(0, slot.clamp(min=0)).mul_(_per_row(scale))
    scaled.masked_fill_(_per_row(slot < 0), 0.0)
    return scaled.to(dtype, memory_format=torch.channels_last)


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
) -> None:
    """Arguments and effect as `darkroom_kernels.step.step_`."""
    is_row = slots >= 0
    # The row whose result goes to this row's slot: its own, or, where there is no slot, that of the first row with one.
    # Equal values written twice to one slot are harmless; without any row, slot 0 is given what it holds.
    source = torch.where(is_row, torch.arange(slots.shape[0], device=slots.device), is_row.to(torch.uint8).argmax())
    slot = slots.index_select(0, source).clamp_(min=0)
    x, last = latents.index_select(0, slot), previous.index_select(0, slot)
    coefficients = coefficients.index_select(0, source)
    column = coefficients.t()[:, :, None, None, None].unbind()

    noise_pred = model_output.index_select(0, rows_uncond.index_select(0, source)).float()
    cond = model_output.index_select(0, rows_cond.index_select(0, source)).float()
    noise_pred.lerp_(cond, _per_row(guidance_scale.index_select(0, source)))
    denoised = (x * column[C_SKIP]).addcmul_(noise_pred, column[C_OUT])
    limit = torch.where(column[CLAMP] > 0, column[CLAMP], torch.inf)
    denoised.clamp_(-limit, limit)
    following = (x * column[A_X]).addcmul_(denoised, column[A_D])
    terms = [(A_D1, last[:, 0]), (A_D2, last[:, 1])]
    if noise is not None:
        terms.append((A_NOISE, noise.index_select(0, source)))
    for index, values in terms:
        # 0 · NaN is NaN, and what a zero coefficient leaves out may be the remains of another row.
        following.addcmul_(values.masked_fill(column[index] == 0, 0.0), column[index])

    finite = (following.isfinite() & denoised.isfinite()).flatten(1).all(1)
    is_finite.copy_(finite.logical_or_(is_row.logical_not()))
    is_any = is_row.any()
    following = torch.where(is_any, following, x)
    history = torch.where(is_any, torch.stack((denoised, last[:, 0]), 1), last)
    # Nothing is written before all is computed: a step that ran out of memory can be tried again.
    latents.index_copy_(0, slot, following)
    previous.index_copy_(0, slot, history)


def _per_row(values: Tensor) -> Tensor:
    return values[:, None, None, None]
