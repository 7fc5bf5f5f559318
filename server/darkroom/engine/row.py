"""One image on its way: everything that belongs to its trajectory and nothing that is shared."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch

from darkroom.diffusion.loader import DiffusionModel
from darkroom.diffusion.samplers import SamplerTable
from darkroom.engine.batcher import BatchKey, Candidate
from darkroom.jobs import Job

_row_ids = itertools.count()


@dataclass(eq=False)
class ActiveJob:
    """A job inside the engine and what its rows have produced so far. Times are on the engine's clock, in seconds."""

    job: Job
    submitted_s: float
    deadline_s: float | None
    rows: list[Row] = field(default_factory=list)
    images: dict[int, bytes] = field(default_factory=dict)
    encode_s: float = 0.0
    decode_s: float = 0.0
    image_encode_s: float = 0.0
    first_tick_s: float | None = None
    last_tick_s: float = 0.0
    max_batch_rows: int = 0
    is_over: bool = False

    def is_late(self, now_s: float) -> bool:
        return self.deadline_s is not None and now_s > self.deadline_s

    @property
    def step(self) -> int:
        """Evaluations done by the slowest image."""
        return min((row.step_index for row in self.rows), default=0)

    @property
    def num_steps(self) -> int:
        return max((row.table.num_evaluations for row in self.rows), default=0)


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is told in one model row.

    `text_kv` `[L, text_kv_width]`; `time_projection` `[E, time_width]`, one line per evaluation.
    """

    text_kv: torch.Tensor
    time_projection: torch.Tensor


@dataclass(eq=False)
class Row:
    """One image's trajectory.

    `latents` `[C, H, W]` fp32; `previous` `[2, C, H, W]` fp32, the last two denoised; `conditionings` holds the
    prompt's and, with guidance, the negative prompt's.
    """

    active: ActiveJob
    model: DiffusionModel
    index: int
    seed: int
    table: SamplerTable
    generator: torch.Generator
    latents: torch.Tensor
    previous: torch.Tensor
    conditionings: tuple[Conditioning, ...]
    guidance_scale: float
    waiting_since_s: float
    step_index: int = 0
    id: int = field(default_factory=lambda: next(_row_ids))
    _drawn: tuple[int, torch.Tensor] | None = None

    @property
    def is_denoised(self) -> bool:
        return self.step_index >= self.table.num_evaluations

    @property
    def key(self) -> BatchKey:
        return BatchKey(self.model.id, self.latents.shape[-2], self.latents.shape[-1])

    def candidate(self) -> Candidate:
        return Candidate(
            id=self.id,
            key=self.key,
            model_rows=len(self.conditionings),
            rank=self.active.job.priority.rank,
            remaining=self.table.num_evaluations - self.step_index,
            waiting_since_s=self.waiting_since_s,
            deadline_s=self.active.deadline_s,
        )

    def draw_noise(self) -> torch.Tensor:
        """This step's noise, `[C, H, W]` fp32 on the CPU, from the row's own generator in diffusers' order of draws.

        A step that failed and is tried again gets the same noise.
        """
        if self._drawn is None or self._drawn[0] != self.step_index:
            noise = torch.randn(self.latents.shape, generator=self.generator, dtype=torch.float32)
            self._drawn = self.step_index, noise
        return self._drawn[1]
