"""From a call of OpenAI's API to a `GenerateRequest`, and from a finished job to what is told of it."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any, Literal, cast

from darkroom.api.openai.shapes import (
    Asked,
    ImagesEdit,
    ImagesEditForm,
    ImagesGenerate,
    ImagesVariationForm,
    Prompted,
    TokenDetails,
    Usage,
)
from darkroom.api.schema import GenerateRequest
from darkroom.errors import InvalidRequest
from darkroom.jobs import GenerationRequest, ModelCard

ToldQuality = Literal["low", "medium", "high", "xhigh", "max"]
# Words that stand for another.
_QUALITIES: dict[str, ToldQuality] = {"auto": "medium", "standard": "medium", "hd": "high"}
# Of the steps that the model's card says.
_SHARE_OF_STEPS: dict[ToldQuality, float] = {"low": 0.5, "medium": 1.0, "high": 1.5, "xhigh": 2.0, "max": 3.0}
_FAITHFUL_STRENGTH, _VARIATION_STRENGTH = 0.5, 0.6
_TOKEN_PX = 16
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Call:
    """A call that was understood: the job it asks for, and how its reply is to be written."""

    body: GenerateRequest
    output_format: str
    quality: ToldQuality
    as_url: bool
    end_user: str | None
    # None for a reply in one piece.
    partial_images: int | None
    kind: Literal["image_generation", "image_edit"] = "image_generation"


def generation(body: ImagesGenerate, card: ModelCard, *, max_steps: int) -> Call:
    """What a call means with the model of `card`. Raises `InvalidRequest`."""
    return _prompted(body, card, _drawn(body, card), max_steps=max_steps)


def edit(body: ImagesEdit | ImagesEditForm, card: ModelCard, *, max_steps: int) -> Call:
    """As `generation`."""
    asked = _drawn(body, card)
    if body.strength is not None:
        asked["strength"] = body.strength
    elif body.input_fidelity == "high" and body.mask is None:
        asked["strength"] = _FAITHFUL_STRENGTH
    return dataclasses.replace(_prompted(body, card, asked, max_steps=max_steps), kind="image_edit")


def variation(body: ImagesVariationForm, card: ModelCard) -> Call:
    """As `generation`. Nobody says what the picture shows, so nothing but the picture guides."""
    asked = _drawn(body, card)
    asked |= {"prompt": " ", "strength": body.strength or _VARIATION_STRENGTH}
    if body.guidance_scale is None:
        asked["guidance_scale"] = 1.0
    return Call(
        body=GenerateRequest(**asked),
        output_format="png",
        quality="medium",
        as_url=body.response_format == "url",
        end_user=body.user,
        partial_images=None,
    )


def _drawn(body: Asked, card: ModelCard) -> dict[str, Any]:
    """The fields of a `GenerateRequest` that every call has."""
    asked: dict[str, Any] = {
        "negative_prompt": body.negative_prompt,
        "model": card.id,
        "num_inference_steps": body.steps,
        "guidance_scale": body.guidance_scale,
        "num_images_per_prompt": body.n,
        "seed": body.seed,
        "sampler": body.sampler,
        "sigma_schedule": body.sigma_schedule or body.scheduler,
    }
    if body.size != "auto":
        asked["width"], asked["height"] = map(int, body.size.split("x"))
    return asked


def _prompted(body: Prompted, card: ModelCard, asked: dict[str, Any], *, max_steps: int) -> Call:
    quality = _QUALITIES.get(body.quality) or cast("ToldQuality", body.quality)
    asked |= {"prompt": body.prompt, "output_format": body.output_format}
    if body.steps is None:
        asked["num_inference_steps"] = min(math.ceil(card.num_inference_steps * _SHARE_OF_STEPS[quality]), max_steps)
    if body.output_compression is not None:
        if body.output_format == "png" and body.output_compression != 100:
            raise InvalidRequest("output_compression", body.output_compression, "nothing with output_format png")
        asked["output_quality"] = max(1, body.output_compression)
    if body.stream and body.response_format == "url":
        raise InvalidRequest("response_format", "url", "b64_json with stream")
    if body.partial_images and not body.stream:
        raise InvalidRequest("partial_images", body.partial_images, "0 without stream")
    return Call(
        body=GenerateRequest(**asked),
        output_format=body.output_format,
        quality=quality,
        as_url=body.response_format == "url",
        end_user=body.safety_identifier or body.user or None,
        partial_images=body.partial_images if body.stream else None,
    )


def usage_of(request: GenerationRequest, num_images: int) -> Usage:
    """The numbers that are told of so many of a job's images."""
    text = len(_WORD.findall(request.prompt)) + len(_WORD.findall(request.negative_prompt))
    image = math.ceil(request.width / _TOKEN_PX) * math.ceil(request.height / _TOKEN_PX)
    before, after = image * len(request.input_names), image * num_images
    return Usage(
        input_tokens=text + before,
        input_tokens_details=TokenDetails(text_tokens=text, image_tokens=before),
        output_tokens=after,
        output_tokens_details=TokenDetails(text_tokens=0, image_tokens=after),
        total_tokens=text + before + after,
    )
