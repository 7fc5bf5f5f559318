"""The state of all rows of one model and latent shape, side by side, so that one launch can step them all.

A row holds a slot: an index into both tensors. Slots are handed out in the order of the device's work, see `device`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from darkroom.engine.device import TickDevice

FIRST_SLOTS = 4


class RowPool:
    """`latents` `[S, C, H, W]` and `previous` `[S, 2, C, H, W]` (the last two denoised), fp32.

    With `num_slots` there are exactly that many, at addresses that never change, as graphs need it; without, the pool
    grows with its rows.
    """

    def __init__(self, device: TickDevice, shape: tuple[int, int, int], num_slots: int | None = None) -> None:
        self._device = device
        self._shape = shape
        self._is_fixed = num_slots is not None
        self.latents, self.previous = self._allocate(num_slots or FIRST_SLOTS)
        self._free = list(range(len(self.latents)))[::-1]

    @property
    def num_used(self) -> int:
        return len(self.latents) - len(self._free)

    def take(self, latents: Tensor, previous: Tensor | None = None) -> tuple[int, Tensor] | None:
        """A slot that holds `latents` `[C, H, W]` fp32 from the host and its history `previous` `[2, C, H, W]`, empty
        without; None when all are in use.

        With it the device's own copy of the latents, or on a CPU `latents` itself, which nobody reads any more.
        """
        if not self._free:
            if self._is_fixed:
                return None
            self._grow()
        uploaded, *history = [self._device.upload(tensor) for tensor in (latents, previous) if tensor is not None]
        slot = self._free.pop()
        self.latents[slot].copy_(uploaded)
        if history:
            self.previous[slot].copy_(history[0])
        else:
            self.previous[slot].zero_()
        return slot, uploaded

    def release(self, slot: int) -> None:
        self._free.append(slot)

    def _grow(self) -> None:
        size = len(self.latents)
        latents, previous = self._allocate(2 * size)
        latents[:size].copy_(self.latents)
        previous[:size].copy_(self.previous)
        self.latents, self.previous = latents, previous
        self._free = list(range(size, 2 * size))[::-1]

    def _allocate(self, size: int) -> tuple[Tensor, Tensor]:
        device = self._device.device
        return torch.zeros((size, *self._shape), device=device), torch.zeros((size, 2, *self._shape), device=device)
