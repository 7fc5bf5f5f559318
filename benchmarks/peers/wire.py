"""What the peers' servers share: the body of a call, which requests may share a call of the pipeline, and PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from darkroom.config import BUILTIN_MODEL
from darkroom.jobs import GenerationRequest

GroupKey = tuple[int, float, int, int, str]


def request_of(body: dict[str, Any]) -> GenerationRequest:
    """The body of Darkroom's `POST /generate`, with the built-in model's defaults. Raises `KeyError` with no prompt."""
    return GenerationRequest(
        prompt=body["prompt"],
        negative_prompt=body.get("negative_prompt", ""),
        model=BUILTIN_MODEL.name,
        width=body.get("width", 64),
        height=body.get("height", 64),
        num_inference_steps=body.get("num_inference_steps", 20),
        guidance_scale=body.get("guidance_scale", 3.0),
        seed=body.get("seed", 0),
        sampler=body.get("sampler", "dpmpp_2m"),
        sigma_schedule="simple",
    )


def group_key(request: GenerationRequest) -> GroupKey:
    """What must be equal for one call of a diffusers pipeline; without guidance its scale does not matter."""
    guidance_scale = request.guidance_scale if request.uses_guidance else 1.0
    return request.num_inference_steps, guidance_scale, request.width, request.height, request.sampler


def groups_of(requests: Sequence[GenerationRequest]) -> list[list[int]]:
    """Places in `requests` of those that may be drawn together, in the order in which each group's first came."""
    groups: dict[GroupKey, list[int]] = {}
    for place, request in enumerate(requests):
        groups.setdefault(group_key(request), []).append(place)
    return list(groups.values())


def png_of(image: Any) -> bytes:
    """A PIL image as PNG."""
    content = io.BytesIO()
    image.save(content, "png")
    return content.getvalue()
