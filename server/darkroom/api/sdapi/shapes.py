"""What AUTOMATIC1111's clients send and read."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import Response

from darkroom import __version__
from darkroom.api.body import describe
from darkroom.api.problems import InvalidFields, Problem, documented
from darkroom.api.schema import MAX_GUIDANCE_SCALE, MAX_SEED
from darkroom.errors import InvalidRequest
from darkroom.infotext import SAMPLER_LABELS, SIGMA_SCHEDULE_LABELS, infotext, short_hash
from darkroom.jobs import JobStatus

PREFIX = "/sdapi/"
# Fields of ours by the names that these clients use.
THEIR_NAMES = {
    "num_inference_steps": "steps",
    "guidance_scale": "cfg_scale",
    "num_images_per_prompt": "batch_size * n_iter",
    "sampler": "sampler_name",
    "sigma_schedule": "scheduler",
    "model": "sd_model_checkpoint",
    "clip_skip": "CLIP_stop_at_last_layers",
    "init_image": "init_images",
    "mask_image": "mask",
    "strength": "denoising_strength",
}
SAMPLES_FORMATS = {"png": "png", "jpg": "jpeg", "jpeg": "jpeg", "webp": "webp"}
_NEUTRAL = "Darkroom does not do this; only the value that asks for nothing is taken."

Zero = Annotated[float, Field(ge=0, le=0, description=_NEUTRAL)]
Never = Annotated[Literal[False], Field(description=_NEUTRAL)]
Nothing = Annotated[str, Field(max_length=0, description=_NEUTRAL)]


class Options(BaseModel):
    """The options that have a meaning here; others are taken and left alone."""

    model_config = ConfigDict(extra="allow", frozen=True)

    sd_model_checkpoint: str | None = Field(
        default=None, max_length=1000, description="A title of `GET /sdapi/v1/sd-models`, or that model's name or hash."
    )
    CLIP_stop_at_last_layers: int | None = Field(
        default=None, ge=1, le=64, description="1 leaves no layer of the text encoder out."
    )
    samples_format: Literal["png", "jpg", "jpeg", "webp"] | None = Field(default=None, description="Of the images.")


class TextToImage(BaseModel):
    """What to draw. Left out: as the model's own card says. Fields that are not named here are ignored."""

    model_config = ConfigDict(extra="allow", frozen=True)

    prompt: str = Field(description="With weights: `(word:1.3)`, `[word]`, `BREAK`; of any length.", min_length=1)
    negative_prompt: str = ""
    seed: int = Field(-1, ge=-1, le=MAX_SEED, description="-1 is a random one; image i has seed + i.")
    sampler_name: str | None = Field(None, max_length=100, description="A name of `GET /sdapi/v1/samplers`.")
    sampler_index: str | None = Field(None, max_length=100, description="The older name of `sampler_name`.")
    scheduler: str | None = Field(None, max_length=100, description="A name of `GET /sdapi/v1/schedulers`.")
    batch_size: int = Field(1, ge=1)
    n_iter: int = Field(1, ge=1, description="There are `batch_size * n_iter` images.")
    steps: int | None = Field(None, ge=1)
    cfg_scale: float | None = Field(None, ge=0, le=MAX_GUIDANCE_SCALE, allow_inf_nan=False)
    width: int | None = Field(None, ge=1)
    height: int | None = Field(None, ge=1)
    override_settings: Options = Field(default_factory=Options)
    override_settings_restore_afterwards: bool = Field(True, description="False: the override becomes an option.")
    send_images: bool = True
    save_images: bool = Field(False, description="Finished images are kept for a while either way.")
    force_task_id: str | None = Field(None, max_length=200, description="The caller's own name for this job.")
    alwayson_scripts: dict[str, Any] = Field({}, description="There are no scripts; entries without `args` are taken.")
    script_name: str | None = None
    script_args: list[Any] = []
    styles: list[str] = Field([], max_length=0, description=_NEUTRAL)
    subseed: int = Field(-1, description="Without `subseed_strength` it has no effect.")
    subseed_strength: Zero = 0
    seed_resize_from_w: int = Field(-1, le=0, description=_NEUTRAL)
    seed_resize_from_h: int = Field(-1, le=0, description=_NEUTRAL)
    restore_faces: Never = False
    tiling: Never = False
    enable_hr: Never = False
    firstphase_width: int = Field(0, le=0, description=_NEUTRAL)
    firstphase_height: int = Field(0, le=0, description=_NEUTRAL)
    refiner_checkpoint: Literal["", "None"] = Field("", description=_NEUTRAL)
    eta: Literal[0, 1] = Field(1, description="Taken and left alone: each sampler has its own.")
    s_churn: Zero = 0
    s_tmin: Zero = 0
    s_noise: float = Field(1, ge=1, le=1, description=_NEUTRAL)
    infotext: Nothing = ""


class ImageToImage(TextToImage):
    """What to make of a picture. Width and height that are left out follow it."""

    init_images: list[str] = Field(
        min_length=1, max_length=1, description="One PNG, JPEG or WebP, in base64 or as a data URL. Nothing is fetched."
    )
    mask: str | None = Field(None, description="What is white is drawn anew.")
    denoising_strength: float = Field(0.75, gt=0, le=1, description="How much may change.")
    resize_mode: Literal[0, 1, 2] = Field(0, description="Just resize, crop and resize, resize and fill.")
    inpainting_mask_invert: Literal[0, 1] = Field(0, description="1: what is black is drawn anew.")
    inpainting_fill: Literal[0, 1] = Field(1, description="What is masked begins as it is, whatever is said here.")
    inpaint_full_res: bool = Field(True, description="Taken and left alone: the whole picture is drawn.")
    inpaint_full_res_padding: int = Field(0, ge=0, description="Taken and left alone.")
    mask_blur: float = Field(4, ge=0, le=64, description="Taken and left alone: a mask has hard edges.")
    initial_noise_multiplier: float = Field(1, ge=1, le=1, description=_NEUTRAL)
    include_init_images: bool = Field(False, description="Whether `parameters` of the reply has them.")


class Progress(msgspec.Struct, frozen=True):
    """Of the caller's own jobs; `current_image` is a preview of the first image, a JPEG in base64."""

    progress: float
    eta_relative: float
    state: dict[str, Any]
    current_image: bytes | None = None
    textinfo: str | None = None


class Pictures(msgspec.Struct, frozen=True):
    """`info` is JSON in a string."""

    images: list[bytes]
    parameters: dict[str, Any]
    info: str


Body = TypeVar("Body", bound=BaseModel)


def parse_lenient(kind: type[Body], fields: dict[str, Any]) -> Body:
    """Read what a client sends, in which null stands for nothing. Raises `InvalidFields` with each wrong field."""
    try:
        # Much of it is sent back, and some of it kept.
        msgspec.json.encode(fields)
    except (UnicodeEncodeError, RecursionError):
        raise InvalidRequest("body", describe(fields), "text that is valid Unicode, nested a few levels deep") from None
    try:
        return kind.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        raise InvalidFields(
            [
                InvalidRequest(
                    ".".join(map(str, item["loc"]))[:100],
                    describe(item.get("input")),
                    item["msg"].removeprefix("Input should be "),
                )
                for item in error.errors(include_url=False, include_context=False)[:16]
            ]
        ) from None


def error_reply(problem: Problem) -> Response:
    """An error as those clients read it."""
    return Response(error_body(problem), problem.status, media_type="application/json")


def error_body(problem: Problem) -> bytes:
    detail = problem.detail
    if problem.errors:
        detail = "; ".join(
            f"{THEIR_NAMES.get(error.field, error.field)}: got {error.value}, expected {error.accepted}"
            for error in problem.errors
        )
    body = {"error": problem.code, "detail": detail, "body": "", "errors": detail}
    return msgspec.json.encode(body)


def documented_here(*codes: str) -> dict[int | str, dict[str, Any]]:
    """As `documented`, in this surface's form."""
    responses = documented(*codes)
    for reply in responses.values():
        examples = {}
        for content in reply["content"].values():
            for code, example in content["examples"].items():
                problem = msgspec.convert(example["value"], Problem)
                examples[code] = {"value": json.loads(error_body(problem))}
        reply["content"] = {"application/json": {"schema": component(WebUIError), "examples": examples}}
    return responses


def json_content(example: Any, schema: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a route's document says of the JSON that it reads or writes; without a schema it is any object."""
    schema = {"type": "object"} if schema is None else schema
    return {"content": {"application/json": {"schema": schema, "example": example}}}


def json_body(kind: type[BaseModel], example: dict[str, Any]) -> dict[str, Any]:
    """The same of a request's body, whose schema is that of `kind`."""
    return {"requestBody": {"required": True, **json_content(example, component(kind))}}


def component(kind: type[BaseModel] | type[msgspec.Struct]) -> dict[str, Any]:
    """A reference to the schema of `kind` in the document."""
    return {"$ref": f"#/components/schemas/{kind.__name__}"}


def json_reply(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json", headers={"Cache-Control": "no-store"})


class WebUIError(msgspec.Struct, frozen=True):
    """`error` is a stable code, `detail` and `errors` are for people."""

    error: str
    detail: str
    body: str
    errors: str


def info_of(status: JobStatus, images: int, *, batch_size: int, timestamp: str) -> str:
    """The `info` of a reply with so many images."""
    request = status.job.request
    seeds = [request.seed + index for index in range(request.num_images_per_prompt)]
    weights_hash = status.result.weights_hash if status.result else ""
    values: dict[str, Any] = {
        "prompt": request.prompt,
        "all_prompts": [request.prompt] * len(seeds),
        "negative_prompt": request.negative_prompt,
        "all_negative_prompts": [request.negative_prompt] * len(seeds),
        "seed": request.seed,
        "all_seeds": seeds,
        # There are none; it stands for what a client sees where the strength is 0.
        "subseed": request.seed,
        "all_subseeds": seeds,
        "subseed_strength": 0,
        "width": request.width,
        "height": request.height,
        "sampler_name": SAMPLER_LABELS.get(request.sampler, request.sampler),
        "cfg_scale": request.guidance_scale,
        "steps": request.num_inference_steps,
        "batch_size": batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": request.model,
        "sd_model_hash": short_hash(weights_hash),
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": request.strength if request.init_image else None,
        "extra_generation_params": {"Schedule type": SIGMA_SCHEDULE_LABELS.get(request.sigma_schedule, "")},
        "index_of_first_image": 0,
        "infotexts": [
            infotext(request, index, model_hash=weights_hash, version=__version__) for index in range(images)
        ],
        "styles": [],
        "job_timestamp": timestamp,
        "clip_skip": request.clip_skip + 1,
        "is_using_inpainting_conditioning": False,
        "version": f"darkroom {__version__}",
        "job_id": status.job.id,
    }
    return json.dumps(values)
