"""`txt2img` and `img2img`: jobs like any other, whose reply is written as those clients read it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from darkroom.api.body import describe, read_json
from darkroom.api.intake import Pictures as BeginWith
from darkroom.api.schema import GenerateRequest
from darkroom.api.sdapi.callers import card_of, choose, name_of, options_of
from darkroom.api.sdapi.names import sampling_of
from darkroom.api.sdapi.shapes import (
    SAMPLES_FORMATS,
    ImageToImage,
    Pictures,
    TextToImage,
    component,
    documented_here,
    info_of,
    json_body,
    json_content,
    json_reply,
    parse_lenient,
)
from darkroom.api.service import service_of
from darkroom.api.submit import answer, result_of, submit
from darkroom.errors import Draining, RequestError
from darkroom.jobs import JobState, JobStatus

router = APIRouter()

# These clients know no other way to their pictures than to wait.
_PATIENCE_S = 86400.0
_CLIENT_LEFT = 499

PICTURE_ERRORS = documented_here(
    "malformed_json", "not_found", "unknown_model", "request_timeout", "body_too_large", "unsupported_media_type",
    "invalid_request", "prompt_refused", "prompt_too_long", "rate_limited", "budget_exceeded", "queue_full",
    "tenant_queue_full", "internal", "job_failed", "bad_message", "dead_letter", "non_finite", "storage_full",
    "no_model", "queue_unavailable", "not_replicated", "storage_unavailable", "draining", "expired", "out_of_memory",
)  # fmt: skip


RESIZE_MODES = ("stretch", "crop", "fill")


def _documented(kind: type[TextToImage], example: dict[str, Any]) -> dict[str, Any]:
    """What the two routes say of themselves alike."""
    reply = {
        "images": ["iVBORw0KGgoAAAANSUhEUgAA"],
        "parameters": example,
        "info": '{"seed": 7, "all_seeds": [7], "infotexts": ["..."]}',
    }
    return {
        "description": "Waits for the pictures; a client that goes away cancels its job. A call that is interrupted "
        "answers with what was drawn by then, or no images if nothing was.",
        "response_class": Response,
        "openapi_extra": json_body(kind, example),
        "responses": {
            200: {"description": "The pictures.", **json_content(reply, component(Pictures))},
            **PICTURE_ERRORS,
        },
    }


@router.post(
    "/sdapi/v1/txt2img",
    summary="Make pictures (AUTOMATIC1111)",
    **_documented(
        TextToImage, {"prompt": "an astronaut riding a (horse:1.2)", "steps": 20, "sampler_name": "DPM++ 2M"}
    ),
)
async def txt2img(request: Request) -> Response:
    service = service_of(request)
    service.refuse_if_draining()
    fields = await read_json(request, service.settings.max_body_bytes)
    body = parse_lenient(TextToImage, fields)
    check_scripts(body)
    asked, output_format = await translate(request, body)
    return await draw(request, body, asked, output_format)


@router.post(
    "/sdapi/v1/img2img",
    summary="Make pictures of a picture (AUTOMATIC1111)",
    **_documented(
        ImageToImage,
        {
            "prompt": "an astronaut riding a horse",
            "init_images": ["data:image/png;base64,iVBORw0KGgo..."],
            "denoising_strength": 0.6,
        },
    ),
)
async def img2img(request: Request) -> Response:
    service = service_of(request)
    service.refuse_if_draining()
    fields = await read_json(request, service.settings.max_image_bytes)
    body = parse_lenient(ImageToImage, fields)
    check_scripts(body)
    asked, output_format = await translate(request, body)
    pictures = await service.intake.read(
        body.init_images[0], body.mask, mask_is_inverted=bool(body.inpainting_mask_invert)
    )
    asked |= {"strength": body.denoising_strength, "resize_mode": RESIZE_MODES[body.resize_mode]}
    return await draw(request, body, asked, output_format, pictures)


def check_scripts(body: TextToImage) -> None:
    """Refuse what a script would do. Raises `RequestError` as AUTOMATIC1111 words it."""
    if body.script_name and body.script_name != "None":
        raise RequestError(f"Script '{describe(body.script_name)}' not found")
    for name, script in body.alwayson_scripts.items():
        arguments = script.get("args") if isinstance(script, dict) else script
        if any(arguments) if isinstance(arguments, list) else arguments:
            raise RequestError(f"always on script {describe(name)} not found")


async def translate(request: Request, body: TextToImage) -> tuple[dict[str, Any], str]:
    """The fields of the `GenerateRequest` that is meant, and the images' format.

    An override of the call comes before the caller's options. Raises `UnknownModel`, `RequestError` on unknown names.
    """
    options, override = await options_of(request), body.override_settings
    chosen = options.model_copy(update={name: value for name, value in override if value is not None})
    card = await card_of(request, chosen)
    if not body.override_settings_restore_afterwards:
        await choose(request, override)
    sampler, sigma_schedule = sampling_of(card, body.sampler_name or body.sampler_index, body.scheduler)
    # There, too, clip skip means nothing to SDXL.
    clip_skip = 0 if card.family == "sdxl" else (chosen.CLIP_stop_at_last_layers or 1) - 1
    output_format = SAMPLES_FORMATS[chosen.samples_format or "png"]
    return {
        "prompt": body.prompt,
        "negative_prompt": body.negative_prompt,
        "prompt_syntax": "weighted",
        "model": card.id,
        "width": body.width,
        "height": body.height,
        "num_inference_steps": body.steps,
        "guidance_scale": body.cfg_scale,
        "num_images_per_prompt": body.batch_size * body.n_iter,
        "seed": None if body.seed < 0 else body.seed,
        "sampler": sampler,
        "sigma_schedule": sigma_schedule,
        "clip_skip": clip_skip,
        "output_format": output_format,
    }, output_format


async def draw(
    request: Request,
    body: TextToImage,
    asked: dict[str, Any],
    output_format: str,
    pictures: BeginWith | None = None,
) -> Response:
    """Submit a job, wait for it, and write the reply. Raises whatever else becomes of it."""
    queue = service_of(request).queue
    submitted = await submit(request, GenerateRequest(**asked), output_format, pictures=pictures)
    job_id = submitted.enqueued.job_id
    async with _noted(request, job_id, body.force_task_id or ""):
        status = await answer(request, job_id, _PATIENCE_S)
    if status is None:
        return Response(status_code=_CLIENT_LEFT)
    if not status.state.is_terminal:
        # Nobody could ever ask for its pictures.
        await queue.cancel(job_id)
        raise Draining("this server is shutting down; another one will answer", retry_after_s=1.0)
    images: list[bytes] = []
    if status.state is not JobState.CANCELLED:
        result_of(status)
        images = await queue.images(job_id)
    return _reply(body, status, images)


@contextlib.asynccontextmanager
async def _noted(request: Request, job_id: str, task: str) -> AsyncIterator[None]:
    """While it is under way, a job is among its caller's."""
    callers, caller = service_of(request).queue.callers, name_of(request)
    await callers.begin(caller, job_id, task)
    try:
        yield
    finally:
        await callers.end(caller, job_id)


def _reply(body: TextToImage, status: JobStatus, images: list[bytes]) -> Response:
    created = datetime.fromtimestamp(status.job.created_at_ms / 1000, UTC)
    info = info_of(status, len(images), batch_size=body.batch_size, timestamp=f"{created:%Y%m%d%H%M%S}")
    parameters = body.model_dump(mode="json")
    if not parameters.get("include_init_images"):
        parameters |= dict.fromkeys(parameters.keys() & {"init_images", "mask"})
    return json_reply(Pictures(images if body.send_images else [], parameters, info))
