"""What travels between processes: requests, jobs, model cards and results.

Plain values only: no torch, no redis, no fastapi. Every message is a frozen msgspec struct with a version, encoded as
msgpack; unknown fields of a newer writer are ignored, an unknown version is refused by `decode`.
"""

from __future__ import annotations

import secrets
from enum import Enum
from typing import Any, Literal, TypeVar

import msgspec

from darkroom.errors import JobError

MESSAGE_VERSION = 1
# Of JPEG and WebP, from 1 to 100.
DEFAULT_OUTPUT_QUALITY = 95

# The fields of a request that stand for a picture beside it.
INPUT_NAMES = ("init_image", "mask_image")


class JobState(str, Enum):
    """A job's life: queued → running → one of the four terminal states."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def is_terminal(self) -> bool:
        return self not in (JobState.QUEUED, JobState.RUNNING)


class Priority(str, Enum):
    """How urgent a job is. A class is a head start in the queue, so a lower one is never starved."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"

    @property
    def rank(self) -> int:
        """0 for low, 1 for normal, 2 for high."""
        return list(Priority).index(self)


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What to draw, with every default already filled in from the model's card.

    `width`, `height` in pixels; image `i` of `num_images_per_prompt` uses seed `seed + i`; `guidance_scale` at or below
    1 turns guidance off; `clip_skip` counts text-encoder layers left out at the end; `prompt_syntax` is `plain`, or
    `weighted` for prompts with weights and of any length.

    `init_image` and `mask_image` are '' or the SHA-256 of a picture of the request's size that travels beside the job;
    white of the mask is drawn anew, black is kept. Of the steps only the last `strength` (0 to 1) are run on an init
    image.
    """

    prompt: str
    model: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    sampler: str
    sigma_schedule: str
    negative_prompt: str = ""
    num_images_per_prompt: int = 1
    clip_skip: int = 0
    prompt_syntax: str = "plain"
    output_format: str = "png"
    output_quality: int = DEFAULT_OUTPUT_QUALITY
    init_image: str = ""
    mask_image: str = ""
    strength: float = 1.0

    @property
    def input_names(self) -> tuple[str, ...]:
        """The pictures that travel beside the job."""
        return tuple(name for name in INPUT_NAMES if getattr(self, name))

    @property
    def uses_guidance(self) -> bool:
        return self.guidance_scale > 1.0

    @property
    def num_model_rows(self) -> int:
        """Rows of a UNet call that this request takes: its images, twice with guidance."""
        return self.num_images_per_prompt * (2 if self.uses_guidance else 1)


# What those who watch a job want to see of its running images: nothing, what a linear map makes of their latents, or
# what the autoencoder does.
Previews = Literal["off", "linear", "vae"]


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A queue record as its worker sees it.

    `created_at_ms`, `claimed_at_ms` and `deadline_at_ms` are Redis server time; `cost` is model rows × evaluations ×
    latent pixels; `attempt` is the fencing token that every write of the worker must present; `failures` counts the
    workers that were lost while they ran it; images below `num_checkpoints` may have a checkpoint of an earlier
    attempt; `previews` is what somebody wanted to see of it when it was claimed; `traceparent` is the W3C trace context
    of the request that made it, if that is sampled.
    """

    id: str
    request: GenerationRequest
    priority: Priority = Priority.NORMAL
    created_at_ms: int = 0
    claimed_at_ms: int = 0
    deadline_at_ms: int | None = None
    cost: float = 0.0
    tenant: str = "default"
    attempt: int = 0
    failures: int = 0
    num_checkpoints: int = 0
    previews: Previews = "off"
    # Left out of the message when unset.
    traceparent: str | msgspec.UnsetType = msgspec.UNSET
    version: int = MESSAGE_VERSION


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """What the API must know of a model to fill in and check a request, published by the workers that serve it.

    `size_multiple` is what width and height must be divisible by; `vae_scale_factor` is pixels per latent pixel, which
    has `latent_channels`. `needs_mask` says that the model was made for inpainting: it draws only with an init image
    and a mask.
    """

    id: str
    family: str
    weights_hash: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    sampler: str
    sigma_schedule: str
    samplers: list[str]
    sigma_schedules: list[str]
    size_multiple: int
    vae_scale_factor: int
    max_width: int
    max_height: int
    max_clip_skip: int = 0
    latent_channels: int = 4
    needs_mask: bool = False
    description: str = ""
    license: str = ""
    example_prompts: list[str] = []
    version: int = MESSAGE_VERSION


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Where a job's time went, in seconds: waiting, text encoder and conditioning, ticks, VAE, image compression."""

    queue_s: float = 0.0
    encode_s: float = 0.0
    denoise_s: float = 0.0
    decode_s: float = 0.0
    image_encode_s: float = 0.0


class ImageInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One finished picture of a job, without its bytes."""

    index: int
    seed: int
    format: str
    width: int
    height: int
    num_bytes: int


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """The manifest of a succeeded job.

    In the result store picture i lies at `<location>-<i>.<format>`; '' means that the pictures are in Redis.
    """

    images: list[ImageInfo]
    timings: Timings
    weights_hash: str
    worker: str
    max_batch_rows: int
    location: str = ""
    version: int = MESSAGE_VERSION


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a job failed: a code of `errors.HTTP_STATUS` and a sentence that is safe to show."""

    code: str
    message: str
    version: int = MESSAGE_VERSION


class BatchRow(msgspec.Struct, frozen=True, kw_only=True):
    """One image that a worker has in hand, for those who look on.

    `id` is unique within the worker; `step` of `num_steps` counts UNet evaluations. `state` is waiting (for a tick),
    in_tick (of the latest one) or developed (denoised, not a picture yet).
    """

    id: int
    job_id: str
    state: Literal["waiting", "in_tick", "developed"]
    step: int
    num_steps: int


class BatchView(msgspec.Struct, frozen=True, kw_only=True):
    """All images that one worker has in hand at one moment; a tick takes at most `max_model_rows` model rows."""

    rows: list[BatchRow]
    max_model_rows: int
    version: int = MESSAGE_VERSION


class JobStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A job as a client may see it. `step` of `num_steps` counts UNet evaluations of the slowest image; `position` and
    `eta_s`, seconds until it is done, are estimates."""

    job: Job
    state: JobState
    step: int = 0
    num_steps: int = 0
    started_at_ms: int | None = None
    finished_at_ms: int | None = None
    position: int | None = None
    eta_s: float | None = None
    result: Result | None = None
    failure: Failure | None = None


Message = TypeVar("Message", bound=msgspec.Struct)


def encode(message: msgspec.Struct) -> bytes:
    """Encode a message as msgpack."""
    return msgspec.msgpack.encode(message)


def decode(data: bytes, kind: type[Message]) -> Message:
    """Decode and validate a message. Raises `JobError` (code `bad_message`) on garbage or an unknown version."""
    try:
        message: Any = msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise JobError(f"a stored {kind.__name__} cannot be read", code="bad_message") from error
    if message.version != MESSAGE_VERSION:
        raise JobError(
            f"a stored {kind.__name__} has version {message.version}, this release reads {MESSAGE_VERSION}",
            code="bad_message",
        )
    return message  # type: ignore[no-any-return]


def new_job_id() -> str:
    """A fresh, unguessable job id: 26 lower-case hexadecimal characters."""
    return secrets.token_hex(13)
