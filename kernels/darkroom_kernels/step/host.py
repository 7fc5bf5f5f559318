"""The step on a CPU: the arithmetic of `plain`, with what the host may do there and a graph may not.

Slots and coefficients are looked at, so rows that lie side by side are read where they are, and terms that no row
uses are left out. For a small picture that is a third of the time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from darkroom_kernels.step import plain
from darkroom_kernels.step.columns import A_D, A_D1, A_D2, A_NOISE, A_X, C_OUT, C_SKIP, CLAMP, INPUT_SCALE, NUM_COLUMNS


def scale_input(latents: Tensor, coefficients: Tensor, slots: Tensor, row_of: Tensor, dtype: torch.dtype) -> Tensor:
    """Arguments and result as `darkroom_kernels.step.scale_input`."""
    held, rows = slots.tolist(), row_of.tolist()
    if -1 in held:
        return plain.scale_input(latents, coefficients, slots, row_of, dtype)
    x = _neighbours(latents, held)
    x = latents.index_select(0, slots) if x is None else x
    scaled = (x * coefficients[:, INPUT_SCALE].view(-1, 1, 1, 1)).to(dtype)
    if rows != list(range(len(held))):
        scaled = scaled.index_select(0, row_of)
    return scaled.contiguous(memory_format=torch.channels_last)


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
    held = slots.tolist()
    if -1 in held:
        plain.step_(
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
        return
    x, last = _neighbours(latents, held), _neighbours(previous, held)
    is_scattered = x is None or last is None
    if x is None or last is None:
        x, last = latents.index_select(0, slots), previous.index_select(0, slots)
    column = coefficients.view(len(held), NUM_COLUMNS, 1, 1, 1).unbind(1)
    values = list(zip(*coefficients.tolist(), strict=True))

    noise_pred = model_output.index_select(0, rows_uncond).float()
    if rows_uncond.tolist() != rows_cond.tolist():
        cond = model_output.index_select(0, rows_cond).float()
        noise_pred.lerp_(cond, guidance_scale.view(-1, 1, 1, 1))
    denoised = (x * column[C_SKIP]).addcmul_(noise_pred, column[C_OUT])
    if any(values[CLAMP]):
        limit = column[CLAMP] if all(values[CLAMP]) else torch.where(column[CLAMP] > 0, column[CLAMP], torch.inf)
        denoised.clamp_(-limit, limit)
    # In the memory of what was predicted, which nobody reads any more.
    following = torch.mul(x, column[A_X], out=noise_pred).addcmul_(denoised, column[A_D])
    newest, oldest = last.unbind(1)
    for index, term in ((A_D1, newest), (A_D2, oldest), (A_NOISE, noise)):
        if term is not None and any(values[index]):
            if not all(values[index]):
                # 0 · NaN is NaN, and what a zero coefficient leaves out may be the remains of another row.
                term = term.masked_fill(column[index] == 0, 0.0)
            following.addcmul_(term, column[index])
    # A sum is finite only if all its terms are, and cheaper than asking each of them.
    if math.isfinite(float(following.sum()) + float(denoised.sum())):
        is_finite.fill_(True)
    else:
        is_finite.copy_((following.isfinite() & denoised.isfinite()).flatten(1).all(1))
    # Nothing is written before all is computed, as in `plain`.
    oldest.copy_(newest)
    newest.copy_(denoised)
    if is_scattered:
        latents.index_copy_(0, slots, following)
        previous.index_copy_(0, slots, last)
    else:
        x.copy_(following)


def _neighbours(pool: Tensor, slots: list[int]) -> Tensor | None:
    """The slots as one slice of a pool, if they follow each other."""
    first, count = slots[0], len(slots)
    return pool[first : first + count] if count == 1 or slots == list(range(first, first + count)) else None
