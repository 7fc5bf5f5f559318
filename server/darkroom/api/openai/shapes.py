"""What OpenAI's clients send and read."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails
from starlette.responses import Response

from darkroom.api.body import Described, describe, safe_name
from darkroom.api.problems import InvalidFields, Problem, documented
from darkroom.api.schema import MAX_GUIDANCE_SCALE, MAX_SEED, OutputFormat
from darkroom.errors import InvalidRequest

PREFIX = "/v1/"

# Fields of ours by the names that these clients use.
_THEIR_NAMES = {
    "num_images_per_prompt": "n",
    "num_inference_steps": "steps",
    "width": "size",
    "height": "size",
    "init_image": "image",
    "mask_image": "mask",
}
_THEIR_CODES = {
    "unauthorized": "invalid_api_key",
    "unknown_model": "model_not_found",
    "prompt_refused": "moderation_blocked",
    "rate_limited": "rate_limit_exceeded",
}
# What may go well a little later; everything else would come out the same.
WORTH_A_RETRY = frozenset(
    {
        "request_timeout", "rate_limited", "budget_exceeded", "queue_full", "tenant_queue_full", "deadline_unmet",
        "storage_full", "no_model", "queue_unavailable", "not_replicated", "storage_unavailable", "unavailable",
        "draining", "internal",
    }
)  # fmt: skip
_MAX_ERRORS = 16
_ONE_PICTURE = "one picture; Darkroom does not compose several"

Quality = Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"]
_LEFT_ALONE = "Taken and left alone: it has no meaning here."
_NOT_DONE = "Darkroom does not do this; only the values that ask for nothing are taken."


class Asked(BaseModel):
    """What all calls that make pictures share. null stands for nothing. The last fields are Darkroom's own, which the
    SDK sends as `extra_body`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = Field(None, max_length=1000, description="A model of `GET /v1/models`.")
    n: int = Field(1, ge=1, le=10, description="How many images; image i has seed + i.")
    size: str = Field(
        "auto",
        pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$",
        description="Width and height in pixels, as `512x768`; `auto` is the model's own.",
    )
    response_format: Literal["b64_json", "url"] = "b64_json"
    user: str | None = Field(None, max_length=1000, description="The older name of `safety_identifier`.")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Same seed, same picture.")
    steps: int | None = Field(None, ge=1, description="Denoising steps; comes before `quality`.")
    guidance_scale: float | None = Field(None, ge=0, le=MAX_GUIDANCE_SCALE, allow_inf_nan=False)
    negative_prompt: str = ""
    sampler: str | None = Field(None, max_length=100)
    sigma_schedule: str | None = Field(None, max_length=100)
    scheduler: str | None = Field(None, max_length=100, description="Another name of `sigma_schedule`.")


class Prompted(Asked):
    """What calls with a prompt share."""

    prompt: str = Field(min_length=1, max_length=32000, examples=["an astronaut riding a horse"])
    quality: Quality = Field("auto", description="Steps, from half of the model's own (`low`) to three times (`max`).")
    output_format: OutputFormat = "png"
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of a JPEG or WebP.")
    stream: bool = False
    partial_images: int = Field(0, ge=0, le=3, description="With `stream`: previews of the first image.")
    background: Literal["auto", "opaque"] = Field("auto", description=_NOT_DONE)
    moderation: Literal["auto", "low"] = Field("auto", description=_LEFT_ALONE)
    complexity: Literal["low", "medium", "high"] | None = Field(None, description=_LEFT_ALONE)
    safety_identifier: str | None = Field(None, max_length=1000, description="Given back.")


class ImagesGenerate(Prompted):
    """What to draw."""

    style: Literal["vivid", "natural"] | None = Field(None, description=_LEFT_ALONE)


class _Edited(Prompted):
    input_fidelity: Literal["low", "high"] | None = Field(
        None, description="Without a mask: `high` is a `strength` of 0.5, `low` what `strength` is anyway."
    )
    strength: float | None = Field(
        None, gt=0, le=1, allow_inf_nan=False, description="How much may change. Left out: 0.8, with a mask 1."
    )


class ImageRef(BaseModel):
    """A picture."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image_url: str = Field(
        description="A PNG, JPEG or WebP as a data URL. Nothing is fetched.",
        examples=["data:image/png;base64,iVBORw0KGgo..."],
    )


class ImagesEdit(_Edited):
    """What to make of a picture, in JSON. A size of `auto` follows the picture."""

    images: list[ImageRef] = Field(min_length=1, max_length=1)
    mask: ImageRef | None = Field(None, description="What is transparent is drawn anew.")


class ImagesEditForm(_Edited):
    """The same as a form. `image[]` is another name of `image`."""

    image: bytes = Field(description="A PNG, JPEG or WebP.")
    mask: bytes | None = Field(None, description="What is transparent is drawn anew.")


class ImagesVariationForm(Asked):
    """A picture to draw again, a little differently."""

    image: bytes = Field(description="A PNG, JPEG or WebP.")
    strength: float | None = Field(
        None, gt=0, le=1, allow_inf_nan=False, description="How much may change. Left out: 0.6."
    )


class TokenDetails(msgspec.Struct, frozen=True):
    text_tokens: int
    image_tokens: int


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """An image counts as one token for each 16 × 16 pixels, a prompt as one for each word or mark."""

    input_tokens: int
    input_tokens_details: TokenDetails
    output_tokens: int
    output_tokens_details: TokenDetails
    total_tokens: int


class ImageData(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One picture."""

    b64_json: bytes | None = None
    url: Annotated[str | None, Meta(description="Wants the same Authorization as the call did.")] = None


class Images(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The pictures of a call."""

    created: int
    data: list[ImageData]
    size: str
    quality: Literal["low", "medium", "high", "xhigh", "max"]
    output_format: str
    usage: Usage
    background: str | None = None
    safety_identifier: str | None = None


class PartialImage(msgspec.Struct, frozen=True, kw_only=True):
    """An event of a stream: what the first image looks like so far, as a JPEG that is smaller than it will be."""

    type: str
    b64_json: bytes
    partial_image_index: int
    created_at: int
    size: str
    quality: str
    background: str
    output_format: str


class CompletedImage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An event of a stream: an image. There is one for each."""

    type: str
    b64_json: bytes
    created_at: int
    size: str
    quality: str
    background: str
    output_format: str
    usage: Usage
    safety_identifier: str | None = None


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """A model that workers serve. Nobody knows when it was made: `created` is 0."""

    id: str
    object: str = "model"
    created: int = 0
    owned_by: str = "darkroom"


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """All models that workers serve."""

    data: list[Model]
    object: str = "list"


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    """`param` is the field that is wrong, `code` is stable."""

    message: str
    type: str
    param: str | None = None
    code: str


class OpenAIError(msgspec.Struct, frozen=True):
    """An error."""

    error: ErrorDetail


# What the messages of the validator do not say as well.
_IN_WORDS = {"extra_forbidden": "no such field", "missing": "a value", "string_too_short": "a text"}

Body = TypeVar("Body", bound=BaseModel)


def one_of_each(form: list[tuple[str, str | bytes]]) -> dict[str, Any]:
    """The fields of a form, without the brackets that clients add to names. Raises `InvalidRequest`."""
    fields: dict[str, Any] = {}
    for sent, value in form:
        name = sent.removesuffix("[]")
        if name in fields:
            raise InvalidRequest(
                safe_name(name), Described("more than one"), _ONE_PICTURE if name == "image" else "one"
            )
        fields[name] = value
    return fields


def parse(kind: type[Body], fields: dict[str, Any], *, is_form: bool = False) -> Body:
    """Check what a client sent, in which null stands for nothing. Everything in a form is text. Raises `InvalidFields`
    with each wrong field."""
    sent = {safe_name(name): value for name, value in fields.items() if value is not None}
    try:
        return kind.model_validate(sent, strict=not is_form)
    except ValidationError as error:
        raise InvalidFields(
            [
                InvalidRequest(
                    ".".join(map(str, item["loc"]))[:100],
                    "nothing" if item["type"] == "missing" else describe(item.get("input")),
                    _expected(item),
                )
                for item in error.errors(include_url=False, include_context=False)[:_MAX_ERRORS]
            ]
        ) from None


def _expected(error: ErrorDetails) -> str:
    kind, field = error["type"], error["loc"][-1]
    if kind == "too_long" and field == "images":
        return _ONE_PICTURE
    if kind == "string_pattern_mismatch" and field == "size":
        return "auto, or width and height such as 512x768"
    return _IN_WORDS.get(kind) or error["msg"].removeprefix("Input should be ")


def error_reply(problem: Problem) -> Response:
    """An error as those clients read it, and whether they should try again."""
    headers = {"X-Should-Retry": "true" if problem.code in WORTH_A_RETRY else "false"}
    content = msgspec.json.encode(error_body(problem))
    return Response(content, _status(problem.status), headers, media_type="application/json")


def error_body(problem: Problem) -> OpenAIError:
    """As `error_reply`, without the reply."""
    message, param = problem.detail, None
    if problem.errors:
        names = [_THEIR_NAMES.get(error.field, error.field) for error in problem.errors]
        param = names[0]
        # Width and height may be told of in the same words.
        told = {
            f"{name}: got {error.value}, expected {error.accepted}": None
            for name, error in zip(names, problem.errors, strict=True)
        }
        message = "; ".join(told)
    kind = "invalid_request_error"
    if problem.code == "prompt_refused":
        kind, param = "image_generation_user_error", "prompt"
    elif problem.status == 429:
        kind = "rate_limit_error"
    elif problem.status >= 500:
        kind = "server_error"
    return OpenAIError(
        ErrorDetail(message=message, type=kind, param=param, code=_THEIR_CODES.get(problem.code, problem.code))
    )


def _status(ours: int) -> int:
    """Their servers know no 422."""
    return 400 if ours == 422 else ours


def documented_here(*codes: str) -> dict[int | str, dict[str, Any]]:
    """As `documented`, in this surface's form."""
    replies: dict[int | str, dict[str, Any]] = {}
    for ours, reply in documented(*codes).items():
        examples = {}
        for content in reply["content"].values():
            for code, example in content["examples"].items():
                problem = msgspec.convert(example["value"], Problem)
                examples[code] = {"value": json.loads(msgspec.json.encode(error_body(problem)))}
        known = replies.setdefault(_status(int(ours)), {**reply, "description": "", "content": {}})
        known["description"] = "; ".join(filter(None, [known["description"], reply["description"]]))
        content = known["content"].setdefault(
            "application/json", {"schema": {"$ref": "#/components/schemas/OpenAIError"}, "examples": {}}
        )
        content["examples"].update(examples)
    return replies
