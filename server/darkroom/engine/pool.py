"""The state of all rows of one model and latent shape, side by side, so that one launch can step them all.

A row holds a slot: an index into both tensors. Slots are handed out in the order of the device's work, see `device`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from darkroom.engine.device import TickDevice

FIRST_SLOTS = 4


class RowPool:
    """`latents` `[S, C, H, W]` and `previous` `[S, 2, C, H, W]` (the last two denoised), fp32; where the UNet reads
    `condition_channels` besides, `condition` `[S, condition_channels, H, W]` in its dtype, else None.

    With `num_slots` there are exactly that many, at addresses that never change, as graphs need it; without, the pool
    grows with its rows.
    """

    def __init__(
        self,
        device: TickDevice,
        shape: tuple[int, int, int],
        num_slots: int | None = None,
        *,
        condition_channels: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._device = device
        self._shape = shape
        self._is_fixed = num_slots is not None
        self._condition_channels, self._dtype = condition_channels, dtype
        self.latents, self.previous, self.condition = self._allocate(num_slots or FIRST_SLOTS)
        self._free = list(range(len(self.latents)))[::-1]

    @property
    def num_used(self) -> int:
        return len(self.latents) - len(self._free)

    def take(
        self, latents: Tensor, previous: Tensor | None = None, condition: Tensor | None = None
    ) -> tuple[int, Tensor] | None:
        """A slot that holds `latents` `[C, H, W]` fp32 from the host, its history `previous` `[2, C, H, W]`, empty
        without, and `condition` `[condition_channels, H, W]`; None when all are in use.

        With it the device's own copy of the latents, or on a CPU `latents` itself, which nobody reads any more.
        """
        if not self._free:
            if self._is_fixed:
                return None
            self._grow()
        uploaded, history, further = (
            None if tensor is None else self._device.upload(tensor) for tensor in (latents, previous, condition)
        )
        assert uploaded is not None  # noqa: S101
        slot = self._free.pop()
        self.latents[slot].copy_(uploaded)
        if history is not None:
            self.previous[slot].copy_(history)
        else:
            self.previous[slot].zero_()
        if self.condition is not None and further is not None:
            self.condition[slot].copy_(further)
        return slot, uploaded

    def release(self, slot: int) -> None:
        self._free.append(slot)

    def _grow(self) -> None:
        size = len(self.latents)
        latents, previous, condition = self._allocate(2 * size)
        latents[:size].copy_(self.latents)
        previous[:size].copy_(self.previous)
        if condition is not None and self.condition is not None:
            condition[:size].copy_(self.condition)
        self.latents, self.previous, self.condition = latents, previous, condition
        self._free = list(range(size, 2 * size))[::-1]

    def _allocate(self, size: int) -> tuple[Tensor, Tensor, Tensor | None]:
        device, further = self._device.device, (size, self._condition_channels, *self._shape[1:])
        return (
            torch.zeros((size, *self._shape), device=device),
            torch.zeros((size, 2, *self._shape), device=device),
            torch.zeros(further, dtype=self._dtype, device=device) if self._condition_channels else None,
        )
