"""The Triton kernels: one launch for all rows, a program for a few hundred places of one row."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from darkroom_kernels import backend
from darkroom_kernels.backend import Build
from darkroom_kernels.step import columns

# Values per program. Small, because one row of 512 px is 16384 values and alone must still fill the device.
BLOCK_VALUES = 1024
NUM_WARPS = 4
# A row's programs count themselves in the low half of a 32-bit word and those that saw a NaN in the high half.
ONE_FAILED = 1 << 16

INPUT_SCALE = tl.constexpr(columns.INPUT_SCALE)
C_SKIP = tl.constexpr(columns.C_SKIP)
C_OUT = tl.constexpr(columns.C_OUT)
CLAMP = tl.constexpr(columns.CLAMP)
A_X = tl.constexpr(columns.A_X)
A_D = tl.constexpr(columns.A_D)
A_D1 = tl.constexpr(columns.A_D1)
A_D2 = tl.constexpr(columns.A_D2)
A_NOISE = tl.constexpr(columns.A_NOISE)
NUM_COLUMNS = tl.constexpr(columns.NUM_COLUMNS)
FAILED = tl.constexpr(ONE_FAILED)


@triton.jit
def _scale_input(
    p_latents,
    p_coefficients,
    p_slots,
    p_row_of,
    p_out,
    places,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    model_row = tl.program_id(1)
    row = tl.load(p_row_of + model_row)
    slot = tl.load(p_slots + row)
    scale = tl.load(p_coefficients + row * NUM_COLUMNS + INPUT_SCALE)
    o_c = tl.arange(0, BLOCK_C)[None, :]
    o_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    m = (o_p < places) & (o_c < C)  # [BLOCK_P, BLOCK_C]
    m_held = (o_p < tl.where(slot >= 0, places, 0)) & (o_c < C)
    b_x = tl.load(p_latents + slot * C * places + o_c * places + o_p, mask=m_held, other=0.0)
    p_out += model_row.to(tl.int64) * C * places
    # Coefficients of a row without a slot may be anything, and 0 · NaN is NaN.
    scale = tl.where(slot >= 0, scale, 0.0)
    tl.store(p_out + o_p * C + o_c, (b_x * scale).to(p_out.dtype.element_ty), mask=m)


@triton.jit
def _step(
    p_latents,
    p_previous,
    p_output,
    p_slots,
    p_cond,
    p_uncond,
    p_guidance,
    p_coefficients,
    p_noise,
    p_is_finite,
    p_progress,
    places,
    stride_row,
    stride_channel,
    stride_place,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    IS_CHANNELS_LAST: tl.constexpr,
    HAS_NOISE: tl.constexpr,
):
    row = tl.program_id(1)
    slot = tl.load(p_slots + row)
    o_c = tl.arange(0, BLOCK_C)[None, :]
    o_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    m = (o_p < places) & (o_c < C)  # [BLOCK_P, BLOCK_C]
    numel = C * places
    o_plane = o_c * places + o_p
    num_failed = 0
    if slot >= 0:
        p_line = p_coefficients + row * NUM_COLUMNS
        p_row = p_latents + slot * numel + o_plane
        p_last = p_previous + slot * 2 * numel + o_plane
        # Written out for the usual layout, so that the compiler sees how far it may widen its reads.
        o_output = o_p * C + o_c if IS_CHANNELS_LAST else o_c * stride_channel + o_p * stride_place
        line = tl.load(p_cond + row)
        line_uncond = tl.load(p_uncond + row)
        b_pred = tl.load(p_output + line * stride_row + o_output, mask=m, other=0.0).to(tl.float32)
        if line_uncond != line:
            b_uncond = tl.load(p_output + line_uncond * stride_row + o_output, mask=m, other=0.0).to(tl.float32)
            b_pred = b_uncond + tl.load(p_guidance + row) * (b_pred - b_uncond)
        b_x = tl.load(p_row, mask=m, other=0.0)
        b_last = tl.load(p_last, mask=m, other=0.0)

        b_denoised = tl.load(p_line + C_SKIP) * b_x + tl.load(p_line + C_OUT) * b_pred
        limit = tl.load(p_line + CLAMP)
        limit = tl.where(limit > 0, limit, float("inf"))
        # Comparisons with a NaN are false, so it is passed on; the hardware's minimum would hide it.
        b_denoised = tl.where(b_denoised > limit, limit, b_denoised)
        b_denoised = tl.where(b_denoised < -limit, -limit, b_denoised)

        b_next = tl.load(p_line + A_X) * b_x + tl.load(p_line + A_D) * b_denoised
        factor = tl.load(p_line + A_D1)
        if factor != 0:
            b_next += factor * b_last
        factor = tl.load(p_line + A_D2)
        if factor != 0:
            b_next += factor * tl.load(p_last + numel, mask=m, other=0.0)
        if HAS_NOISE:
            factor = tl.load(p_line + A_NOISE)
            if factor != 0:
                b_next += factor * tl.load(p_noise + row.to(tl.int64) * numel + o_plane, mask=m, other=0.0)

        tl.store(p_row, b_next, mask=m)
        tl.store(p_last, b_denoised, mask=m)
        tl.store(p_last + numel, b_last, mask=m)
        # What lies outside the plane was computed from zeros and is finite if any of the row is.
        m_finite = (tl.abs(b_next) < float("inf")) & (tl.abs(b_denoised) < float("inf"))
        num_failed = tl.max(tl.max(tl.where(m_finite, 0, 1), 1), 0)

    # The last of a row's programs to come by knows of all, writes the flag and leaves the counter as it was found.
    mine = 1 + num_failed * FAILED
    seen = tl.atomic_add(p_progress + row, mine, sem="relaxed") + mine
    if seen % FAILED == tl.num_programs(0):
        tl.store(p_is_finite + row, seen < FAILED)
        tl.store(p_progress + row, 0)


def _scale_input_on_device(
    latents: Tensor, coefficients: Tensor, slots: Tensor, row_of: Tensor, dtype: torch.dtype
) -> Tensor:
    out = _fake_scale_input(latents, coefficients, slots, row_of, dtype)
    batch, channels, height, width = out.shape
    places = height * width
    block_c, block_p = _blocks(channels)
    _scale_input[(triton.cdiv(places, block_p), batch)](
        latents, coefficients, slots, row_of, out, places,
        C=channels, BLOCK_C=block_c, BLOCK_P=block_p, **backend.launch_options(NUM_WARPS),
    )  # fmt: skip
    return out


def _fake_scale_input(
    latents: Tensor, coefficients: Tensor, slots: Tensor, row_of: Tensor, dtype: torch.dtype
) -> Tensor:
    return torch.empty(
        (row_of.shape[0], *latents.shape[1:]), dtype=dtype, device=latents.device, memory_format=torch.channels_last
    )


def _step_on_device(
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
    rows = slots.shape[0]
    _, channels, height, width = latents.shape
    places = height * width
    stride_row, stride_channel, stride_high, stride_place = model_output.stride()
    if width == 1:
        stride_place = stride_high
    elif height > 1 and stride_high != width * stride_place:
        model_output = model_output.contiguous(memory_format=torch.channels_last)
        stride_row, stride_channel, _, stride_place = model_output.stride()
    if noise is not None:
        noise = noise.contiguous()
    block_c, block_p = _blocks(channels)
    _step[(triton.cdiv(places, block_p), rows)](
        latents, previous, model_output, slots.contiguous(), rows_cond.contiguous(), rows_uncond.contiguous(),
        guidance_scale.contiguous(), coefficients, noise, is_finite, _progress(latents.device, rows),
        places, stride_row, stride_channel, stride_place,
        C=channels, BLOCK_C=block_c, BLOCK_P=block_p,
        IS_CHANNELS_LAST=stride_channel == 1 and stride_place == channels, HAS_NOISE=noise is not None,
        **backend.launch_options(NUM_WARPS),
    )  # fmt: skip


def _fake_step(*_: Tensor | None) -> None:
    """In place, so there is nothing to make."""


_progress_of: dict[tuple[torch.device, int], Tensor] = {}


def _progress(device: torch.device, rows: int) -> Tensor:
    """Counters for `rows` rows at least, zero between launches. Two streams, whose launches may overlap, share none."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    counters = _progress_of.get((device, stream))
    if counters is None or counters.shape[0] < rows:
        counters = torch.zeros(max(rows, 256), dtype=torch.int32, device=device)
        _progress_of[device, stream] = counters
    return counters


def _blocks(channels: int) -> tuple[int, int]:
    block_c = triton.next_power_of_2(channels)
    return block_c, max(16, BLOCK_VALUES // block_c)


scale_input = backend.register(
    "scale_input(Tensor latents, Tensor coefficients, Tensor slots, Tensor row_of, ScalarType dtype) -> Tensor",
    _scale_input_on_device,
    _fake_scale_input,
)
step_ = backend.register(
    "step_(Tensor(a!) latents, Tensor(b!) previous, Tensor model_output, Tensor slots, Tensor rows_cond, "
    "Tensor rows_uncond, Tensor guidance_scale, Tensor coefficients, Tensor? noise, Tensor(c!) is_finite) -> ()",
    _step_on_device,
    _fake_step,
)


def builds() -> list[Build]:
    """Specialisations for 4-channel latents whose places are a multiple of 16, as launches find them."""
    block_c, block_p = _blocks(4)
    types = dict.fromkeys(("p_slots", "p_row_of", "p_cond", "p_uncond"), "*i64") | {
        "p_is_finite": "*i1",
        "p_progress": "*i32",
        "places": "i32",
        "stride_row": "i32",
        "stride_place": "i32",
    }
    # A channel stride of 1 becomes a constant when a kernel is launched.
    constants = {
        "C": 4,
        "BLOCK_C": block_c,
        "BLOCK_P": block_p,
        "stride_channel": 1,
        "IS_CHANNELS_LAST": True,
        "HAS_NOISE": True,
    }

    def build(name: str, kernel: Any, dtype: str) -> Build:
        network = dict.fromkeys(("p_out", "p_output"), f"*{dtype}")
        signature = {argument: (types | network).get(argument, "*fp32") for argument in kernel.arg_names}
        held = {argument: value for argument, value in constants.items() if argument in signature}
        return Build(
            name=f"{name} {dtype}",
            kernel=kernel,
            signature=signature | dict.fromkeys(held, "constexpr"),
            constants=held,
            options=backend.launch_options(NUM_WARPS),
            uneven=frozenset({"stride_place"} & signature.keys()),
        )

    return [
        build("scale_input", _scale_input, "fp16"),
        build("step", _step, "fp16"),
        build("step", _step, "fp32"),
    ]
