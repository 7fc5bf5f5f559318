"""What all ticks of one model and one latent shape share: the rows' state, and on a GPU the captured graphs.

A captured tick is one launch for what is otherwise hundreds: gather and scale the latents, call the UNet, combine
guidance, step every row by its own table. It reads and writes only what lies at fixed addresses: the row pool, the
store of prompts, and its `TickInputs`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import structlog
import torch
from darkroom_kernels.step import scale_input, step_
from torch import Tensor

from darkroom.diffusion.loader import DiffusionModel
from darkroom.engine.batcher import BatchKey
from darkroom.engine.device import WARM_UP_CALLS, TickDevice
from darkroom.engine.inputs import TickInputs
from darkroom.engine.pool import RowPool
from darkroom.engine.prompts import PromptCache

log = structlog.get_logger("darkroom.engine")


@dataclass(frozen=True)
class CapturedTick:
    """A graph of the tick of one bucket, and the arguments that it reads."""

    inputs: TickInputs
    replay: Callable[[], None]


class Lane:
    """Ticks of `model` at the latent shape of `key`.

    `num_slots` fixes the number of rows that it can hold; None lets it grow, and then nothing can be captured.
    """

    def __init__(
        self,
        device: TickDevice,
        model: DiffusionModel,
        key: BatchKey,
        prompts: PromptCache,
        *,
        num_slots: int | None = None,
    ) -> None:
        self.device, self.model, self.key, self.prompts = device, model, key, prompts
        self.shape = (model.latent_channels, key.height, key.width)
        self.pool = RowPool(
            device, self.shape, num_slots, condition_channels=model.condition_channels, dtype=model.dtype
        )
        self.ring = device.ticks_ahead + 1
        self.graphs: dict[int, CapturedTick] = {}
        self._turn, self._is_turn_open = 0, False
        self._done: list[torch.cuda.Event | None] = [None] * self.ring

    @property
    def is_idle(self) -> bool:
        return self.pool.num_used == 0

    def next_turn(self) -> int:
        """The frame of the ring to write the next tick in, once the device is through with what it held."""
        if self._is_turn_open:
            # A tick failed half way, and no event says when the device is through with what it sent.
            self.device.wait(self.device.record())
        self._is_turn_open = True
        self._turn = (self._turn + 1) % self.ring
        self.device.wait(self._done[self._turn])
        return self._turn

    def end_turn(self) -> torch.cuda.Event | None:
        """Mark the end of the tick's work on the device."""
        done = self._done[self._turn] = self.device.record()
        self._is_turn_open = False
        return done

    def inputs(self, num_rows: int, num_model_rows: int) -> TickInputs:
        """New inputs for ticks that are launched call by call."""
        time_projection = torch.empty(
            (num_model_rows, self.model.unet.time_width), dtype=self.model.dtype, device=self.model.device
        )
        return TickInputs(self.device, num_rows, num_model_rows, time_projection, self.ring)

    def compute(
        self,
        inputs: TickInputs,
        noise: Tensor | None,
        text_kv: Tensor,
        text_slots: Tensor | None,
        text_lengths: Tensor | None = None,
    ) -> None:
        """The tick itself: advance the rows of `inputs`, whose texts are `text_kv` `[S, L, text_kv_width]` by slot,
        or one for each model row where there are no slots; `text_lengths` `[B]` int32 are theirs where they are padded.
        """
        model, pool = self.model, self.pool
        scaled = scale_input(
            pool.latents, inputs.coefficients, inputs.slots, inputs.row_of, model.dtype, implementation=model.kernels
        )
        if pool.condition is not None:
            # What padding reads is thrown away.
            slots = inputs.slots.index_select(0, inputs.row_of).clamp_(min=0)
            scaled = torch.cat((scaled, pool.condition.index_select(0, slots)), 1)
            scaled = scaled.contiguous(memory_format=torch.channels_last)
        texts = (text_kv, text_lengths) if text_slots is None else (text_kv, text_lengths, text_slots)
        step_(
            pool.latents,
            pool.previous,
            model.unet(scaled, inputs.time_projection, *texts),
            inputs.slots,
            inputs.rows_cond,
            inputs.rows_uncond,
            inputs.guidance_scale,
            inputs.coefficients,
            noise,
            inputs.is_finite,
            implementation=model.kernels,
        )

    def capture(self, buckets: Sequence[int], should_stop: Callable[[], bool]) -> None:
        """Capture the tick of every bucket, largest first, so that smaller ones reuse its memory.

        A bucket that cannot be captured is logged, and its ticks are launched call by call. Raises when the device is
        lost.
        """
        device, model, store = self.device, self.model, self.prompts.store
        if store is None:
            raise ValueError("capture: expected a store of prompts at a fixed address")
        started_s, reserved = time.monotonic(), device.graph_bytes()
        largest = max(buckets)
        hosts = [device.host_buffer((largest, *self.shape), torch.float32) for _ in range(self.ring)]
        noise = hosts, device.buffer_like(hosts[0])
        time_projection = torch.zeros((largest, model.unet.time_width), dtype=model.dtype, device=model.device)
        warm: list[tuple[int, TickInputs, Callable[[], None]]] = []
        for bucket in sorted(buckets, reverse=True):
            if should_stop():
                return
            inputs = TickInputs(device, bucket, bucket, time_projection, self.ring, noise)
            # No row has a slot, so nothing of the pool changes.
            nobody: list[int] = []
            fixed = inputs.pack(nobody, nobody, nobody, [0] * bucket, [0] * bucket, [])
            inputs.frames[0].fixed[:] = fixed
            inputs.send(inputs.frames[0], noisy_rows=0)
            device.wait(device.record())

            def work(inputs: TickInputs = inputs) -> None:
                self.compute(inputs, inputs.noise, store, inputs.text_slots)

            with self._or_call_by_call(bucket):
                for _ in range(WARM_UP_CALLS):
                    work()
                warm.append((bucket, inputs, work))
        # A capture begins by freeing what the allocator holds unused, so the activations of these calls and those of
        # the graphs, which have memory of their own, are never there together.
        for bucket, inputs, tick in warm:
            if should_stop():
                return
            with self._or_call_by_call(bucket):
                self.graphs[bucket] = CapturedTick(inputs, device.capture(tick))
        log.info(
            "graphs_captured",
            model=model.id,
            width=self.key.width * model.vae_scale_factor,
            height=self.key.height * model.vae_scale_factor,
            graphs=len(self.graphs),
            buckets=sorted(self.graphs),
            seconds=round(time.monotonic() - started_s, 1),
            pool_bytes=device.graph_bytes() - reserved,
        )

    @contextmanager
    def _or_call_by_call(self, bucket: int) -> Iterator[None]:
        """Log what keeps a bucket from being captured; raise only when the device is lost."""
        try:
            yield
        except Exception as error:
            if self.device.is_lost(error):
                raise
            log.error("graph_not_captured", model=self.model.id, bucket=bucket, exc_info=error)
