"""Runs jobs through an engine to their end, with hooks at each tick."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from darkroom.config import Settings
from darkroom.diffusion.loader import DiffusionModel
from darkroom.engine.engine import Engine
from darkroom.engine.events import Event, Finished, TickReport
from darkroom.jobs import GenerationRequest, Job, Priority
from numpy.typing import NDArray
from PIL import Image


def request_for(model: DiffusionModel, **fields: Any) -> GenerationRequest:
    """A small request that `model` can serve; `fields` replace the defaults."""
    defaults: dict[str, Any] = {
        "prompt": "the red cat",
        "model": model.id,
        "width": 64,
        "height": 64,
        "num_inference_steps": 4,
        "guidance_scale": 5.0,
        "seed": 7,
        "sampler": "euler",
        "sigma_schedule": "simple",
    }
    return GenerationRequest(**{**defaults, **fields})


def job_for(model: DiffusionModel, id_: str, priority: Priority = Priority.NORMAL, **fields: Any) -> Job:
    return Job(id=id_, request=request_for(model, **fields), priority=priority)


def pixels(data: bytes) -> NDArray[np.int16]:
    """Decoded image bytes, `[H, W, 3]`, wide enough to subtract."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(np.int16)


@dataclass
class Outcome:
    """What happened: events by job id in order of arrival, and every tick."""

    events: dict[str, Event] = field(default_factory=dict)
    ticks: list[TickReport] = field(default_factory=list)

    def images(self, job_id: str) -> list[bytes]:
        event = self.events[job_id]
        assert isinstance(event, Finished), event
        return event.images

    def pixels(self, job_id: str, index: int = 0) -> NDArray[np.int16]:
        return pixels(self.images(job_id)[index])


def run_jobs(
    model: DiffusionModel,
    jobs: Sequence[Job],
    settings: Settings,
    *,
    expected: int | None = None,
    deadline_in_s: float | None = None,
    timeout_s: float = 60.0,
    on_start: Callable[[Engine], None] | None = None,
    on_tick: Callable[[Engine, TickReport, int], None] | None = None,
    checkpoints: Mapping[str, Mapping[int, bytes]] | None = None,
    inputs: Mapping[str, Mapping[str, bytes]] | None = None,
    **options: Any,
) -> Outcome:
    """Submit `jobs` before the first tick and run until `expected` (default: all of them) have ended.

    `on_start(engine)` comes before the first tick. `on_tick(engine, report, ticks so far)` runs on the tick thread, so
    what it submits or cancels is in time for the next tick. `checkpoints` are by job id and image, `inputs` by job id
    and name. `options` are the engine's own.
    """
    outcome, expected = Outcome(), len(jobs) if expected is None else expected

    def ended(event: Event) -> None:
        assert event.job.id not in outcome.events, f"{event.job.id} ended twice"
        outcome.events[event.job.id] = event
        if len(outcome.events) == expected:
            engine.stop()

    def ticked(report: TickReport) -> None:
        outcome.ticks.append(report)
        if on_tick is not None:
            on_tick(engine, report, len(outcome.ticks))

    engine = Engine({model.id: model}, settings, on_event=ended, on_tick=ticked, **options)
    for job in jobs:
        engine.submit(
            job,
            deadline_in_s=deadline_in_s,
            checkpoints=(checkpoints or {}).get(job.id),
            inputs=(inputs or {}).get(job.id),
        )
    if on_start is not None:
        on_start(engine)
    thread = threading.Thread(target=engine.run, daemon=True)
    thread.start()
    thread.join(timeout_s)
    assert not thread.is_alive(), f"only {sorted(outcome.events)} of {expected} jobs ended"
    return outcome
