"""What an engine tells those who gave it jobs: the one end of each, states made safe on the way, and every tick."""

from __future__ import annotations

from dataclasses import dataclass

import structlog
import torch

from darkroom.diffusion.loader import DiffusionModel
from darkroom.engine.batcher import Choice
from darkroom.engine.checkpoint import Checkpoint
from darkroom.engine.row import ActiveJob, Interval
from darkroom.errors import DarkroomError, JobError
from darkroom.jobs import Failure, ImageInfo, Job, Result, Timings

log = structlog.get_logger("darkroom.engine")


@dataclass(frozen=True)
class Finished:
    """`phases` says by name when the job was in encode, denoise, decode and image_encode."""

    job: Job
    images: list[bytes]
    result: Result
    phases: dict[str, Interval]


@dataclass(frozen=True)
class Failed:
    job: Job
    failure: Failure


@dataclass(frozen=True)
class Cancelled:
    job: Job


@dataclass(frozen=True)
class Expired:
    """The job's deadline passed while it was here."""

    job: Job


Event = Finished | Failed | Cancelled | Expired


@dataclass(frozen=True)
class Saved:
    """An image's state that another worker can go on from; not an end."""

    job: Job
    checkpoint: Checkpoint


@dataclass(frozen=True)
class Preview:
    """What image `index` of a job looked like after `step` of `num_steps` evaluations: a small JPEG. Not an end."""

    job: Job
    index: int
    step: int
    num_steps: int
    image: bytes


@dataclass(frozen=True)
class TickReport:
    """What one tick did, in the `seconds` before `ended_s` on the engine's clock.

    `joined` images are in a batch for the first time, `left` had their last evaluation. `not_taken` counts the images
    that it left waiting, by reason. `progress` is (job, evaluations done by its slowest image, evaluations in all);
    both are 0 of a job that ended before its tick did.
    """

    choice: Choice
    seconds: float
    ended_s: float
    num_rows: int
    joined: int
    left: int
    not_taken: dict[str, int]
    progress: list[tuple[Job, int, int]]


def finished(active: ActiveJob, model: DiffusionModel, worker: str) -> Finished:
    """The end of a job whose images are all there, with the manifest of what `worker` did."""
    request = active.job.request
    images = [active.images[i] for i in range(request.num_images_per_prompt)]
    if active.first_tick_s is not None:
        active.note("denoise", Interval(active.first_tick_s, active.last_tick_s))
    result = Result(
        images=[
            ImageInfo(
                index=i,
                seed=request.seed + i,
                format=request.output_format,
                width=request.width,
                height=request.height,
                num_bytes=len(data),
            )
            for i, data in enumerate(images)
        ],
        timings=Timings(
            encode_s=active.phases["encode"].seconds,
            denoise_s=active.last_tick_s - (active.first_tick_s or active.last_tick_s),
            decode_s=active.decode_s,
            image_encode_s=active.image_encode_s,
        ),
        weights_hash=model.card.weights_hash,
        worker=worker,
        max_batch_rows=active.max_batch_rows,
    )
    return Finished(active.job, images, result, active.phases)


def failed(active: ActiveJob, error: Exception) -> Failed:
    """The end of a job that `error` stopped."""
    return Failed(active.job, failure_of(error))


def failure_of(error: Exception) -> Failure:
    """What a client may be told: our own errors by their text, everything else as an internal error."""
    if isinstance(error, DarkroomError):
        return Failure(code=error.code if isinstance(error, JobError) else "job_failed", message=str(error))
    if isinstance(error, torch.OutOfMemoryError):
        return Failure(code="out_of_memory", message="the device ran out of memory for this request")
    log.error("job_failed", error=type(error).__name__, exc_info=error)
    return Failure(code="job_failed", message="the picture could not be made because of an internal error")
