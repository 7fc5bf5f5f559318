"""The arguments of a tick at addresses that do not change, and the host's side of them.

All indices and coefficients of a tick lie in one packed buffer, so that one copy brings them to the device. The host's
side is a ring: while a tick's copies are still to come, the next tick is written elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from darkroom_kernels.step import NUM_COLUMNS
from numpy.typing import NDArray
from torch import Tensor

from darkroom.engine.device import TickDevice


class Frame:
    """The host's side of one tick: what `TickInputs` reads, and the flags it writes.

    `fixed` is what only a change of membership changes, as bytes; `coefficients` `[R, NUM_COLUMNS]` fp32; `noise`
    `[R, C, H, W]` fp32 or None while no row has drawn any; `is_finite` `[R]` bool.
    """

    def __init__(self, device: TickDevice, num_bytes: int, num_fixed: int, num_rows: int, noise: Tensor | None) -> None:
        self.packed = device.host_buffer((num_bytes,), torch.uint8)
        self.is_finite = device.host_buffer((num_rows,), torch.bool)
        self.noise = noise
        packed = self.packed.numpy()
        self.fixed = packed[:num_fixed]
        self.coefficients: NDArray[np.float32] = packed[num_fixed:].view(np.float32).reshape(num_rows, NUM_COLUMNS)


class TickInputs:
    """Arguments of a tick of R rows and B model rows.

    On the device: `slots`, `rows_cond`, `rows_uncond` `[R]` int64, `row_of`, `text_slots` `[B]` int64, `guidance_scale`
    `[R]` fp32, `coefficients` `[R, NUM_COLUMNS]` fp32, `time_projection` `[B, time_width]`, `noise` `[R, C, H, W]` fp32
    or None, `is_finite` `[R]` bool. `time_projection` and `noise` (a host ring and its counterpart) may be the first
    part of larger buffers that several share. `ring` is the number of host sides.
    """

    noise: Tensor | None = None

    def __init__(
        self,
        device: TickDevice,
        num_rows: int,
        num_model_rows: int,
        time_projection: Tensor,
        ring: int,
        noise: tuple[Sequence[Tensor], Tensor] | None = None,
    ) -> None:
        self._device = device
        self.num_rows, self.num_model_rows = num_rows, num_model_rows
        num_indices = 3 * num_rows + 2 * num_model_rows
        num_fixed = 8 * num_indices + 4 * num_rows
        num_bytes = num_fixed + 4 * num_rows * NUM_COLUMNS
        hosts = [None] * ring if noise is None else [host[:num_rows] for host in noise[0]]
        self.frames = [Frame(device, num_bytes, num_fixed, num_rows, host) for host in hosts]
        self._packed = device.buffer_like(self.frames[0].packed)
        indices = self._packed[: 8 * num_indices].view(torch.int64)
        self.slots, self.rows_cond, self.rows_uncond, self.row_of, self.text_slots = torch.split(
            indices, [num_rows] * 3 + [num_model_rows] * 2
        )
        floats = self._packed[8 * num_indices :].view(torch.float32)
        self.guidance_scale = floats[:num_rows]
        self.coefficients = floats[num_rows:].view(num_rows, NUM_COLUMNS)
        self.is_finite = device.buffer_like(self.frames[0].is_finite)
        self.time_projection = time_projection[:num_model_rows]
        if noise is not None:
            self.noise = noise[1][:num_rows]

    def pack(
        self,
        slots: Sequence[int],
        rows_cond: Sequence[int],
        rows_uncond: Sequence[int],
        row_of: Sequence[int],
        text_slots: Sequence[int],
        guidance_scale: Sequence[float],
    ) -> NDArray[np.uint8]:
        """What a frame's `fixed` should hold. Rows beyond those given have no slot."""
        spare = self.num_rows - len(slots)
        indices = [*slots, *[-1] * spare, *rows_cond, *[0] * spare, *rows_uncond, *[0] * spare, *row_of, *text_slots]
        scales = [*guidance_scale, *[1.0] * spare]
        return np.concatenate(
            (np.array(indices, dtype=np.int64).view(np.uint8), np.array(scales, dtype=np.float32).view(np.uint8))
        )

    def add_noise(self, shape: tuple[int, int, int]) -> Tensor:
        """Room for noise in inputs that were made without. Returns the device's side."""
        for frame in self.frames:
            frame.noise = self._device.host_buffer((self.num_rows, *shape), torch.float32)
        assert self.frames[0].noise is not None  # noqa: S101
        self.noise = self._device.buffer_like(self.frames[0].noise)
        return self.noise

    def send(self, frame: Frame, *, noisy_rows: int) -> None:
        """Bring a frame to the device, with the noise of its first `noisy_rows` rows."""
        self._device.copy(self._packed, frame.packed)
        if noisy_rows:
            assert self.noise is not None  # noqa: S101
            assert frame.noise is not None  # noqa: S101
            self._device.copy(self.noise[:noisy_rows], frame.noise[:noisy_rows])

    def fetch(self, frame: Frame) -> None:
        """Bring the flags back; they may be read when the tick is complete."""
        self._device.copy(frame.is_finite, self.is_finite)
