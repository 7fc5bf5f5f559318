"""What clients send and receive: the request as a pydantic model, the replies as msgspec structs.

Requests need every error at once, each with its field; replies carry images and must be cheap: msgspec writes bytes as
base64 straight into the reply. OpenAPI is generated from both.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta
from pydantic import BaseModel, ConfigDict, Field

from darkroom import __version__
from darkroom.jobs import (
    DEFAULT_OUTPUT_QUALITY,
    GenerationRequest,
    ImageInfo,
    Job,
    JobState,
    JobStatus,
    ModelCard,
    Result,
    Timings,
)
from darkroom.sampling import SAMPLERS, SIGMA_SCHEDULES

OutputFormat = Literal["png", "jpeg", "webp"]
PromptSyntax = Literal["plain", "weighted"]
OUTPUT_FORMATS: tuple[str, ...] = get_args(OutputFormat)
ResizeMode = Literal["stretch", "crop", "fill"]
RESIZE_MODES: tuple[str, ...] = get_args(ResizeMode)
MAX_SEED = 2**63 - 1
# Those of diffusers' pipelines for images and for inpainting.
DEFAULT_STRENGTH, DEFAULT_MASKED_STRENGTH = 0.8, 1.0
MAX_GUIDANCE_SCALE = 50.0
MAX_DEADLINE_S = 7 * 86400.0

_POSITION = "Jobs that go before it, while it waits; an estimate where several tenants share the queue."
_ETA = (
    "Estimated seconds until it is done, by what waits before it, what the workers were measured to do in a second and "
    "its own progress. Null while nobody knows, and once it has ended."
)

EXAMPLE_JOB_ID = "8f14e45fceea167a5a36dedd4b"
EXAMPLE_REQUEST: dict[str, Any] = {
    "prompt": "an astronaut riding a horse",
    "num_inference_steps": 20,
    "guidance_scale": 5.0,
    "seed": 7,
}


class GenerateRequest(BaseModel):
    """What to draw. Everything but `prompt` may be left out; the model's own card fills it in."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    prompt: str = Field(
        min_length=1, description="What the picture should show.", examples=["an astronaut riding a horse"]
    )
    negative_prompt: str = Field("", description="What it should not show. Used only when guidance is on.")
    model: str | None = Field(
        None, description="A model of `GET /models`; may be left out when there is only one, or for emoji-world."
    )
    width: int | None = Field(None, ge=1, description="Pixels; a multiple of the model's `size_multiple`.")
    height: int | None = Field(None, ge=1, description="Pixels; a multiple of the model's `size_multiple`.")
    num_inference_steps: int | None = Field(None, ge=1, description="Denoising steps; more is slower and finer.")
    guidance_scale: float | None = Field(
        None, ge=0, le=MAX_GUIDANCE_SCALE, allow_inf_nan=False, description="Guidance weight; 1 or less turns it off."
    )
    num_images_per_prompt: int = Field(1, ge=1, description="How many images; image i uses seed + i.")
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="Same seed, same picture. Left out: a random 32-bit one, given back."
    )
    sampler: str | None = Field(None, description="One of the model's `samplers`.", examples=["dpmpp_2m"])
    sigma_schedule: str | None = Field(
        None, description="Spacing of the noise levels; `simple` is the checkpoint's own.", examples=["karras"]
    )
    clip_skip: int = Field(0, ge=0, description="Text-encoder layers left out at the end.")
    prompt_syntax: PromptSyntax = Field(
        "plain",
        description="`plain` takes prompts as they are and cuts them at 77 tokens; `weighted` reads `(word:1.3)`, "
        "`(word)`, `[word]` and `BREAK` as AUTOMATIC1111 does, and prompts of any length by chunks of 75 tokens.",
    )
    output_format: OutputFormat | None = Field(None, description="Left out: what `Accept` asks for, else png.")
    output_quality: int = Field(
        DEFAULT_OUTPUT_QUALITY, ge=1, le=100, description="Of a JPEG or WebP; less is smaller. PNG is always lossless."
    )
    init_image: str | None = Field(
        None,
        description="A picture to begin with: PNG, JPEG or WebP in base64, or as a data URL. Nothing is fetched. Where "
        "`width` or `height` are left out they follow the picture's.",
        examples=["data:image/png;base64,iVBORw0KGgo..."],
    )
    mask_image: str | None = Field(
        None, description="What of `init_image` to draw anew: white is new, black and transparent are kept."
    )
    strength: float | None = Field(
        None,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="How much of `init_image` may change: the share of the steps that are run on it. Left out: 0.8, "
        "with a mask 1.",
    )
    resize_mode: ResizeMode = Field(
        "stretch",
        description="What happens to pictures of other proportions than `width` and `height`: `stretch` squeezes them, "
        "`crop` cuts off what does not fit, `fill` continues their edges.",
    )
    priority: Literal["low", "normal", "high"] = Field("normal", description="A head start in the queue.")
    deadline_s: float | None = Field(
        None,
        gt=0,
        le=MAX_DEADLINE_S,
        allow_inf_nan=False,
        description="Seconds from now after which the pictures are of no use. A job that would be late is refused, as "
        "far as that is known when it comes; one that is late after all ends as `expired`.",
    )
    mode: Literal["wait", "async"] = Field(
        "wait", description="`wait` answers with the images; `async` answers 202 with the job's URL at once."
    )
    on_disconnect: Literal["cancel", "continue"] = Field(
        "cancel",
        description="What becomes of the job when the call that waits for it breaks off: `cancel` ends it, with an "
        "`Idempotency-Key` only when the client does not come back soon; `continue` lets it go on.",
    )
    wait_timeout_s: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="How long `wait` waits before it answers 202; the server's own limit caps it.",
    )


class ImageView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One picture. `base64` is there only in the reply of a waiting call."""

    index: int
    seed: int
    format: str
    width: int
    height: int
    num_bytes: int
    url: Annotated[str, Meta(examples=[f"/jobs/{EXAMPLE_JOB_ID}/images/0"])]
    base64: bytes | None = None


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """All it takes to make the same pictures again, and where the time went."""

    job_id: str
    model: str
    weights_hash: str
    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    sampler: str
    sigma_schedule: str
    clip_skip: int
    prompt_syntax: str
    output_quality: int
    seed: int
    seeds: Annotated[list[int], Meta(description="One for each image.")]
    timings: Annotated[Timings, Meta(description="Seconds in the queue, in the text encoder, denoising, decoding.")]
    total_s: Annotated[float, Meta(description="Seconds from acceptance to the stored result.")]
    attempts: Annotated[int, Meta(description="1, or more when a worker was lost on the way.")]
    max_batch_rows: Annotated[int, Meta(description="Most model rows that shared a UNet call with this job.")]
    worker: str
    strength: Annotated[float | None, Meta(description="With an init image: the share of the steps that were run.")] = (
        None
    )
    init_image: Annotated[
        str | None, Meta(description="SHA-256 of the picture that was begun with, as the PNG that it was made into.")
    ] = None
    mask_image: Annotated[str | None, Meta(description="The same of the mask.")] = None


class Generated(msgspec.Struct, frozen=True, kw_only=True):
    """The reply of a waiting call."""

    job_id: str
    images: list[ImageView]
    manifest: Manifest


class Accepted(msgspec.Struct, frozen=True, kw_only=True):
    """The job was accepted and will be finished; `Location` and `url` say where to ask."""

    job_id: str
    state: JobState
    url: str
    events_url: str
    seed: int
    position: Annotated[int | None, Meta(description=_POSITION)] = None
    eta_s: Annotated[float | None, Meta(description=_ETA)] = None


class FailureView(msgspec.Struct, frozen=True, kw_only=True):
    """Why a job ended without pictures."""

    code: str
    message: str


class JobView(msgspec.Struct, frozen=True, kw_only=True):
    """A job. `step` of `num_steps` counts UNet evaluations of its slowest image."""

    job_id: str
    state: JobState
    url: str
    events_url: str
    model: str
    seed: int
    priority: str
    step: int
    num_steps: int
    position: Annotated[int | None, Meta(description=_POSITION)]
    eta_s: Annotated[float | None, Meta(description=_ETA)]
    attempts: int
    created_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    deadline_at: datetime | None
    timings: Timings | None
    images: list[ImageView]
    manifest: Manifest | None
    failure: FailureView | None


class Models(msgspec.Struct, frozen=True):
    """The models that workers serve."""

    models: list[ModelCard]


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """The state of the service; `ready` and `busy` (the queue is full) come with 200, all else with a 503 problem."""

    health: Literal["ready", "busy"]
    workers: int
    queue_depth: int
    in_flight: int


class Live(msgspec.Struct, frozen=True, kw_only=True):
    """This process answers."""

    health: Literal["live", "draining"]
    version: str


def image_views(status: JobStatus, contents: list[bytes] | None = None) -> list[ImageView]:
    """The pictures of a succeeded job, with their bytes when `contents` has them."""
    if status.result is None:
        return []
    return [
        ImageView(
            index=image.index,
            seed=image.seed,
            format=image.format,
            width=image.width,
            height=image.height,
            num_bytes=image.num_bytes,
            url=f"/jobs/{status.job.id}/images/{image.index}",
            base64=contents[image.index] if contents is not None else None,
        )
        for image in status.result.images
    ]


def manifest_of(status: JobStatus, result: Result) -> Manifest:
    """The manifest of a job that ended with `result`."""
    request = status.job.request
    total_ms = (status.finished_at_ms or status.job.created_at_ms) - status.job.created_at_ms
    return Manifest(
        job_id=status.job.id,
        model=request.model,
        weights_hash=result.weights_hash,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        width=request.width,
        height=request.height,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        sampler=request.sampler,
        sigma_schedule=request.sigma_schedule,
        clip_skip=request.clip_skip,
        prompt_syntax=request.prompt_syntax,
        output_quality=request.output_quality,
        seed=request.seed,
        seeds=[image.seed for image in result.images],
        timings=result.timings,
        total_s=total_ms / 1000,
        attempts=status.job.attempt,
        max_batch_rows=result.max_batch_rows,
        worker=result.worker,
        strength=request.strength if request.init_image else None,
        init_image=request.init_image or None,
        mask_image=request.mask_image or None,
    )


def job_view(status: JobStatus) -> JobView:
    job, failure = status.job, status.failure
    return JobView(
        job_id=job.id,
        state=status.state,
        url=f"/jobs/{job.id}",
        events_url=f"/jobs/{job.id}/events",
        model=job.request.model,
        seed=job.request.seed,
        priority=job.priority.value,
        step=status.step,
        num_steps=status.num_steps,
        position=status.position,
        eta_s=status.eta_s,
        attempts=job.attempt,
        created_at=_moment(job.created_at_ms or None),
        started_at=_moment(status.started_at_ms),
        finished_at=_moment(status.finished_at_ms),
        deadline_at=_moment(job.deadline_at_ms),
        timings=status.result.timings if status.result else None,
        images=image_views(status),
        manifest=manifest_of(status, status.result) if status.result else None,
        failure=FailureView(code=failure.code, message=failure.message) if failure else None,
    )


def _moment(milliseconds: int | None) -> datetime | None:
    return None if milliseconds is None else datetime.fromtimestamp(milliseconds / 1000, UTC)


def examples() -> dict[str, Any]:
    """One example of each reply by the name of its struct, for the OpenAPI document."""
    card = ModelCard(
        id="emoji-world",
        family="sd",
        weights_hash="9b2f6c1d0e7a4c35",
        width=64,
        height=64,
        num_inference_steps=20,
        guidance_scale=5.0,
        sampler="dpmpp_2m",
        sigma_schedule="simple",
        samplers=list(SAMPLERS),
        sigma_schedules=list(SIGMA_SCHEDULES),
        size_multiple=16,
        vae_scale_factor=4,
        max_width=128,
        max_height=128,
        example_prompts=["an astronaut riding a horse"],
    )
    request = GenerationRequest(
        prompt="an astronaut riding a horse",
        model=card.id,
        width=64,
        height=64,
        num_inference_steps=20,
        guidance_scale=5.0,
        seed=7,
        sampler="dpmpp_2m",
        sigma_schedule="simple",
    )
    result = Result(
        images=[ImageInfo(index=0, seed=7, format="png", width=64, height=64, num_bytes=6893)],
        timings=Timings(queue_s=0.002, encode_s=0.004, denoise_s=0.31, decode_s=0.01, image_encode_s=0.001),
        weights_hash=card.weights_hash,
        worker="gpu-0-4711",
        max_batch_rows=8,
    )
    status = JobStatus(
        job=Job(id=EXAMPLE_JOB_ID, request=request, created_at_ms=1795446000000, attempt=1),
        state=JobState.SUCCEEDED,
        step=20,
        num_steps=20,
        started_at_ms=1795446000002,
        finished_at_ms=1795446000331,
        result=result,
    )
    url = f"/jobs/{EXAMPLE_JOB_ID}"
    replies: list[msgspec.Struct] = [
        Generated(
            job_id=EXAMPLE_JOB_ID, images=image_views(status, [b"\x89PNG..."]), manifest=manifest_of(status, result)
        ),
        Accepted(
            job_id=EXAMPLE_JOB_ID,
            state=JobState.QUEUED,
            url=url,
            events_url=f"{url}/events",
            seed=7,
            position=3,
            eta_s=1.4,
        ),
        job_view(status),
        Models([card]),
        Ready(health="ready", workers=1, queue_depth=0, in_flight=1),
        Live(health="live", version=__version__),
    ]
    return {type(reply).__name__: msgspec.json.decode(msgspec.json.encode(reply)) for reply in replies}
