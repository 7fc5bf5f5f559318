"""One tick after another of the same rows: arguments written, one copy, one UNet call, one step of all rows.

A `Batch` lives as long as its membership: while nobody joins or leaves, slots and texts stay in place and a tick writes
only its coefficients, its time embeddings and its noise.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import structlog
import torch
import torch.nn.functional as F
from torch import Tensor

from darkroom.engine.checkpoint import Checkpoint, history_at
from darkroom.engine.device import TickDevice
from darkroom.engine.inputs import Frame
from darkroom.engine.lane import Lane
from darkroom.engine.row import Row

T = TypeVar("T")

log = structlog.get_logger("darkroom.engine")


@contextmanager
def or_left_out(event: str, row: Row, device: TickDevice) -> Iterator[None]:
    """Log what keeps a row's copy from being made, which is not the only one; raise only when the device is lost."""
    try:
        yield
    except Exception as error:
        if device.is_lost(error):
            raise
        log.warning(event, job_id=row.active.job.id, image=row.index, exc_info=error)


@dataclass(frozen=True)
class Tick:
    """A tick that was enqueued.

    `is_finite` `[R]` bool, on the host, says of each row whether its numbers are, once `done` is complete. `finished`
    holds the latents `[C, H, W]`, on the device, of rows whose last evaluation this was, denoised ones of those that
    were cut short; `saved` checkpoints, and `shown` denoised latents `[C, H, W]` on the host, which are complete with
    it.
    """

    rows: tuple[Row, ...]
    is_finite: Tensor
    done: torch.cuda.Event | None
    finished: dict[Row, Tensor]
    saved: dict[Row, Checkpoint]
    shown: dict[Row, Tensor]


class Batch:
    """Rows of one lane, each holding a slot of its pool, padded to `bucket` model rows.

    Model rows are laid out as: every row with its prompt, then the guided rows with their negative prompts, then
    padding that repeats the first row and is thrown away.
    """

    def __init__(self, lane: Lane, rows: Sequence[Row], bucket: int) -> None:
        self.lane, self.rows, self.bucket = lane, tuple(rows), bucket
        num_rows = len(rows)
        guided = [i for i, row in enumerate(rows) if len(row.conditionings) > 1]
        padding = bucket - num_rows - len(guided)
        self._row_of = [*range(num_rows), *guided, *[0] * padding]
        conditionings = [row.conditionings[0] for row in rows] + [rows[i].conditionings[1] for i in guided]
        self._conditionings = conditionings + [conditionings[0]] * padding
        rows_uncond = list(range(num_rows))
        for offset, i in enumerate(guided):
            rows_uncond[i] = num_rows + offset

        self._captured = lane.graphs.get(bucket)
        inputs = self._inputs = lane.inputs(num_rows, bucket) if self._captured is None else self._captured.inputs
        # Texts of several chunks are brought together for this batch.
        store = lane.prompts.store if lane.key.text_chunks == 1 else None
        self._text_slots = None if store is None else inputs.text_slots
        self._text_lengths: Tensor | None = None
        if store is None:
            texts = [conditioning.encoded.text_kv for conditioning in self._conditionings]
            if lane.key.text_chunks > 1:
                lengths = torch.tensor([len(text) for text in texts], dtype=torch.int32)
                self._text_lengths = lane.device.upload(lengths)
                longest = lane.key.text_chunks * lane.model.text.max_tokens
                texts = [F.pad(text, (0, 0, 0, longest - len(text))) for text in texts]
            self._text_kv = torch.stack(texts)
        else:
            self._text_kv = store
        self._fixed = inputs.pack(
            [_held(row.slot) for row in rows],
            range(num_rows),
            rows_uncond,
            self._row_of,
            [0 if store is None else c.encoded.slots[0] for c in self._conditionings],
            [row.guidance_scale for row in rows],
        )

    def enqueue(self, to_save: Collection[Row] = (), to_show: Collection[Row] = ()) -> Tick:
        """Let the device advance every row by one evaluation, and copy out the state of those `to_save` and the
        denoised latents of those `to_show`. On a CPU that has happened on return. A copy that cannot be had is logged
        and left out.

        When this raises, rows that are not `is_spoilt` are as they were, and their step may be tried again.
        """
        lane, rows, inputs, captured = self.lane, self.rows, self._inputs, self._captured
        at_end = {row for row in rows if row.step_index + 1 == row.table.num_evaluations}
        cut_short = {row for row in rows if row.active.is_cut_short} - at_end
        finished = {row: _held(row.last_latents) for row in rows if row in at_end or row in cut_short}
        frame = inputs.frames[lane.next_turn()]
        noisy_rows = self._write(frame)
        inputs.send(frame, noisy_rows=noisy_rows)
        kept = [
            (row, row.kept, row.kept.noised(row.table.levels[row.step_index + 1]))
            for row in rows
            if row.kept is not None
        ]
        lines = [
            conditioning.time_lines[rows[row].step_index]
            for conditioning, row in zip(self._conditionings, self._row_of, strict=True)
        ]
        torch.stack(lines, out=inputs.time_projection)
        if captured is None:
            noise = inputs.noise if noisy_rows else None
            lane.compute(inputs, noise, self._text_kv, self._text_slots, self._text_lengths)
        else:
            captured.replay()
        # The latents are the next ones from here on: a step writes nothing before all of it is computed.
        saved, shown = dict[Row, Checkpoint](), dict[Row, Tensor]()
        try:
            inputs.fetch(frame)
            for row, mask, noised in kept:
                mask.put_back(lane.pool.latents[_held(row.slot)], noised)
            for row, latents in finished.items():
                if row not in cut_short:
                    latents.copy_(lane.pool.latents[_held(row.slot)])
                    continue
                latents.copy_(lane.pool.previous[_held(row.slot), 0])
                if row.kept is not None:
                    row.kept.put_back(latents, row.kept.latents)
            # New pinned memory may make the host wait for the device, which is better done with the step under way.
            for row in to_save:
                if row not in finished:
                    with or_left_out("no_checkpoint", row, lane.device):
                        saved[row] = checkpoint_of(lane, row, row.step_index + 1)
            for row in to_show:
                with or_left_out("no_preview", row, lane.device):
                    shown[row] = lane.device.download(lane.pool.previous[_held(row.slot), 0])
            done = lane.end_turn()
        except Exception:
            for row in rows:
                row.is_spoilt = True
            raise
        for row in rows:
            row.step_index += 1
            row.is_cut_short = row in cut_short
        return Tick(rows, frame.is_finite, done, finished, saved, shown)

    def _write(self, frame: Frame) -> int:
        """Fill a frame for this step of every row. Returns how many rows hold all those that draw noise in it."""
        frame.fixed[:] = self._fixed
        noisy_rows = 0
        for i, row in enumerate(self.rows):
            frame.coefficients[i] = row.coefficients[row.step_index]
            if row.needs_noise:
                noisy_rows = i + 1
                if frame.noise is None:
                    self._inputs.add_noise(self.lane.shape)
                assert frame.noise is not None  # noqa: S101
                frame.noise[i].copy_(row.draw_noise())
        return noisy_rows


def checkpoint_of(lane: Lane, row: Row, num_done: int) -> Checkpoint:
    """The state of a row that holds a slot, `num_done` evaluations being enqueued; complete when they are."""
    slot, history = _held(row.slot), history_at(row.table, num_done)
    latents, previous = (lane.device.download(tensor[slot]) for tensor in (lane.pool.latents, lane.pool.previous))
    return Checkpoint(row.index, num_done, latents, previous, history, row.fingerprint)


def _held(thing: T | None) -> T:
    assert thing is not None, "a row in a tick holds a slot, and so does its text where there is a store"  # noqa: S101
    return thing
