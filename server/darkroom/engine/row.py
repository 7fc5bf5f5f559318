"""One image on its way: everything that belongs to its trajectory and nothing that is shared."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from darkroom.diffusion.loader import DiffusionModel
from darkroom.diffusion.samplers import SamplerTable
from darkroom.engine.batcher import BatchKey, Candidate
from darkroom.engine.checkpoint import Checkpoint, fingerprint_of
from darkroom.engine.prompts import EncodedPrompt
from darkroom.engine.start import EncodedInputs, Kept
from darkroom.jobs import Job, Previews

_row_ids = itertools.count()


class Interval(NamedTuple):
    """From when to when something was done, in seconds on the monotonic clock."""

    began_s: float
    ended_s: float

    @property
    def seconds(self) -> float:
        return self.ended_s - self.began_s

    def joined(self, other: Interval | None) -> Interval:
        """From the earlier beginning to the later end."""
        if other is None:
            return self
        return Interval(min(self.began_s, other.began_s), max(self.ended_s, other.ended_s))


@dataclass(eq=False)
class ActiveJob:
    """A job inside the engine and what its rows have produced so far. Times are on the engine's clock, in seconds.

    `on_end` gets the job's one terminal event. `checkpoints` has what an earlier attempt left, by image; `inputs` the
    pictures to begin from, by name, and `start` what became of them. `previews` is what is to be shown of it while it
    runs. `rows` are there from its joining to its end. With `is_cut_short` its images have one more evaluation each.
    `phases` are those that are over, by name; `decode_s` and `image_encode_s` are the slowest image's.
    """

    job: Job
    submitted_s: float
    deadline_s: float | None
    on_end: Callable[[Any], None]
    checkpoints: Mapping[int, bytes] = field(default_factory=dict)
    inputs: Mapping[str, bytes] = field(default_factory=dict)
    start: EncodedInputs | None = None
    is_encoding: bool = False
    previews: Previews = "off"
    rows: list[Row] = field(default_factory=list)
    images: dict[int, bytes] = field(default_factory=dict)
    phases: dict[str, Interval] = field(default_factory=dict)
    decode_s: float = 0.0
    image_encode_s: float = 0.0
    first_tick_s: float | None = None
    last_tick_s: float = 0.0
    max_batch_rows: int = 0
    is_cut_short: bool = False
    is_over: bool = False

    def __post_init__(self) -> None:
        self.previews = self.job.previews

    def note(self, phase: str, interval: Interval) -> None:
        """Note when a phase was done; for a phase of each image, from the first's beginning to the last's end."""
        self.phases[phase] = interval.joined(self.phases.get(phase))

    def is_late(self, now_s: float) -> bool:
        return self.deadline_s is not None and now_s > self.deadline_s


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is told in one model row: the text, and one line `[time_width]` per evaluation."""

    encoded: EncodedPrompt
    time_lines: tuple[Tensor, ...]


@dataclass(eq=False)
class Row:
    """One image's trajectory.

    `shape` is (C, H, W) of its latents. `first_latents` `[C, H, W]` and `first_previous` `[2, C, H, W]` (None at step
    0), fp32 on the host, are there until the row holds `slot` of its lane's pool; on the device, in the memory that
    brought them there, `last_latents` are what its last evaluation leaves. `kept` is what a mask keeps of an init
    image; `condition`, until it holds a slot, what the UNet reads beside the latents. `saved` is the last state that
    was made safe, None until there is one; `saved_s` and `saved_step` are when it was asked for, or when the row
    joined, and `shown_s` and `shown_step` when a preview was; `previewed_step` is that of the last preview that is
    there. `conditionings` holds the prompt's and, with guidance, the negative prompt's. `is_replaced` is set once its
    image was begun again, and another row has its place. One that `is_cut_short` has no more to come. One that
    `is_spoilt` cannot go on: a tick failed that had stepped it, so its latents are not those of `step_index`.
    `step_index` is the next evaluation to enqueue, `num_done` counts those known to be complete.
    """

    active: ActiveJob
    model: DiffusionModel
    key: BatchKey
    index: int
    seed: int
    table: SamplerTable
    generator: torch.Generator
    shape: tuple[int, int, int]
    first_latents: Tensor | None
    conditionings: tuple[Conditioning, ...]
    guidance_scale: float
    waiting_since_s: float
    saved_s: float
    first_previous: Tensor | None = None
    kept: Kept | None = None
    condition: Tensor | None = None
    slot: int | None = None
    last_latents: Tensor | None = None
    saved: Checkpoint | None = None
    saved_step: int = 0
    shown_s: float = -math.inf
    shown_step: int = 0
    previewed_step: int = 0
    is_replaced: bool = False
    step_index: int = 0
    num_done: int = 0
    id: int = field(default_factory=lambda: next(_row_ids))
    is_cut_short: bool = False
    is_spoilt: bool = False
    _drawn: tuple[int, Tensor] | None = None

    def __post_init__(self) -> None:
        self.coefficients: NDArray[np.float32] = self.table.coefficients.numpy()

    @property
    def is_denoised(self) -> bool:
        """Whether its last evaluation is done or under way."""
        return self.is_cut_short or self.step_index >= self.table.num_evaluations

    @property
    def needs_noise(self) -> bool:
        return self.table.needs_noise[self.step_index]

    @functools.cached_property
    def fingerprint(self) -> bytes:
        request = self.active.job.request
        inputs = (request.init_image, request.mask_image)
        return fingerprint_of(self.model.card.weights_hash, self.table, self.seed, *inputs)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on where another worker was. Only before the row holds a slot."""
        self.first_latents, self.first_previous = checkpoint.latents, checkpoint.previous
        self.step_index = self.num_done = self.saved_step = checkpoint.num_done
        # The generator goes where it was, one draw after the other.
        for _ in range(sum(self.table.needs_noise[: checkpoint.num_done])):
            torch.randn(self.shape, generator=self.generator, dtype=torch.float32)

    def candidate(self) -> Candidate:
        return Candidate(
            id=self.id,
            key=self.key,
            model_rows=len(self.conditionings),
            rank=self.active.job.priority.rank,
            remaining=self.table.num_evaluations - self.step_index,
            waiting_since_s=self.waiting_since_s,
            deadline_s=self.active.deadline_s,
            joined_s=self.active.submitted_s,
            is_redelivered=self.active.job.failures > 0,
            tenant=self.active.job.tenant,
        )

    def draw_noise(self) -> Tensor:
        """This step's noise, `[C, H, W]` fp32 on the CPU, from the row's own generator in diffusers' order of draws.

        A step that failed and is tried again gets the same noise.
        """
        if self._drawn is None or self._drawn[0] != self.step_index:
            noise = torch.randn(self.shape, generator=self.generator, dtype=torch.float32)
            self._drawn = self.step_index, noise
        return self._drawn[1]
