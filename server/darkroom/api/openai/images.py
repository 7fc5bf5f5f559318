"""`/v1/images`: jobs like any other, whose replies are written as OpenAI's clients read them."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from darkroom.api.auth import take_call
from darkroom.api.body import FORM, is_form, read_form, read_json
from darkroom.api.intake import Pictures
from darkroom.api.openai.retries import Retries
from darkroom.api.openai.shapes import (
    ImageData,
    Images,
    ImagesEdit,
    ImagesEditForm,
    ImagesGenerate,
    ImagesVariationForm,
    documented_here,
    one_of_each,
    parse,
)
from darkroom.api.openai.stream import Stream
from darkroom.api.openai.translate import Call, edit, generation, usage_of, variation
from darkroom.api.resolve import choose_card, fingerprint
from darkroom.api.service import Service, service_of
from darkroom.api.submit import answer, result_of, submit
from darkroom.errors import DarkroomError, Draining, Unavailable
from darkroom.jobs import JobStatus, ModelCard

router = APIRouter()

# These clients know no other way to their pictures than to wait.
_PATIENCE_S = 86400.0
_CLIENT_LEFT = 499

_EXAMPLE = {
    "created": 1795446000,
    "data": [{"b64_json": "iVBORw0KGgoAAAANSUhEUgAA"}],
    "size": "64x64",
    "quality": "medium",
    "output_format": "png",
    "background": "opaque",
    "usage": {
        "input_tokens": 6,
        "input_tokens_details": {"text_tokens": 6, "image_tokens": 0},
        "output_tokens": 16,
        "output_tokens_details": {"text_tokens": 0, "image_tokens": 16},
        "total_tokens": 22,
    },
}
_EVENTS = ("PartialImage", "CompletedImage", "OpenAIError")
_REPLIES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The pictures; with `stream` they come as events, each with the name of its data's `type`.",
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/Images"}, "example": _EXAMPLE},
            "text/event-stream": {
                "itemSchema": {
                    "type": "object",
                    "properties": {
                        "event": {"type": "string"},
                        "data": {
                            "type": "string",
                            "contentMediaType": "application/json",
                            "contentSchema": {"anyOf": [{"$ref": f"#/components/schemas/{name}"} for name in _EVENTS]},
                        },
                    },
                },
                "example": "event: image_generation.completed\n"
                'data: {"type":"image_generation.completed","b64_json":"iVBORw0KGgoAAAANSUhEUgAA",...}\n\n',
            },
        },
    },
    **documented_here(
        "malformed_json", "unknown_model", "request_timeout", "cancelled", "body_too_large", "unsupported_media_type",
        "invalid_request", "prompt_refused", "idempotency_mismatch", "rate_limited", "budget_exceeded", "queue_full",
        "tenant_queue_full", "internal", "job_failed", "bad_message", "dead_letter", "prompt_too_long", "non_finite",
        "storage_full", "no_model", "queue_unavailable", "not_replicated", "storage_unavailable", "draining", "expired",
        "out_of_memory",
    ),
}  # fmt: skip


def _documented(summary: str, description: str, content: dict[str, Any]) -> dict[str, Any]:
    return {
        "summary": summary,
        "description": description,
        "response_class": Response,
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
        "responses": _REPLIES,
    }


def _body(name: str, **more: Any) -> dict[str, Any]:
    return {"schema": {"$ref": f"#/components/schemas/{name}"}, **more}


@router.post(
    "/v1/images/generations",
    **_documented(
        "Make pictures (OpenAI)",
        "Waits for the pictures. A client that goes away cancels its job; OpenAI's SDK, which calls again by itself, "
        "finds it running if it is back within 30 seconds, or as many as the server grants.",
        {
            "application/json": _body(
                "ImagesGenerate", example={"prompt": "an astronaut riding a horse", "size": "64x64", "quality": "high"}
            )
        },
    ),
)
async def generations(request: Request) -> Response:
    service = service_of(request)
    service.refuse_if_draining()
    await take_call(request)
    body = parse(ImagesGenerate, await read_json(request, service.settings.max_body_bytes))
    card = await _card(service, body.model)
    return await draw(request, generation(body, card, max_steps=service.settings.max_num_inference_steps))


@router.post(
    "/v1/images/edits",
    **_documented(
        "Make pictures of a picture (OpenAI)",
        "As a form with files, or as JSON with data URLs. Otherwise like `POST /v1/images/generations`.",
        {FORM: _body("ImagesEditForm"), "application/json": _body("ImagesEdit")},
    ),
)
async def edits(request: Request) -> Response:
    service = service_of(request)
    settings = service.settings
    service.refuse_if_draining()
    await take_call(request)
    body: ImagesEditForm | ImagesEdit
    image: str | bytes
    mask: str | bytes | None
    if is_form(request):
        body = parse(ImagesEditForm, one_of_each(await read_form(request, settings.max_image_bytes)), is_form=True)
        image, mask = body.image, body.mask
    else:
        body = parse(ImagesEdit, await read_json(request, settings.max_image_bytes))
        image, mask = body.images[0].image_url, body.mask.image_url if body.mask else None
    card = await _card(service, body.model)
    call = edit(body, card, max_steps=settings.max_num_inference_steps)
    return await draw(request, call, await service.intake.read(image, mask, mask_is_alpha=True))


@router.post(
    "/v1/images/variations",
    **_documented(
        "Draw a picture again, a little differently (OpenAI)",
        "Like `POST /v1/images/edits`, without a prompt.",
        {FORM: _body("ImagesVariationForm")},
    ),
)
async def variations(request: Request) -> Response:
    service = service_of(request)
    service.refuse_if_draining()
    await take_call(request)
    form = await read_form(request, service.settings.max_image_bytes)
    body = parse(ImagesVariationForm, one_of_each(form), is_form=True)
    card = await _card(service, body.model)
    return await draw(request, variation(body, card), await service.intake.read(body.image))


async def _card(service: Service, model: str | None) -> ModelCard:
    """The card of a model or alias. Raises as `choose_card`."""
    if model is not None:
        model = service.settings.models_by_alias.get(model, model)
    return choose_card(model, await service.queue.cards())


async def draw(request: Request, call: Call, pictures: Pictures | None = None) -> Response:
    """Submit the job of a call, and write the reply: at its end, or as a stream of events. Raises whatever else becomes
    of it."""
    service = service_of(request)
    if call.partial_images is not None:
        submitted = await submit(request, call.body, call.output_format, pictures=pictures)
        return Stream(service, submitted.job, call)
    retries = Retries(request, fingerprint(call.body, call.output_format, pictures))
    try:
        key = await retries.key()
        submitted = await submit(request, call.body, call.output_format, idempotency_key=key, pictures=pictures)
    except Unavailable as error:
        # It may have become a job all the same, or have been promised a place.
        await retries.leave(error.retry_after_s)
        raise
    job_id = submitted.enqueued.job_id
    try:
        status = await answer(request, job_id, _PATIENCE_S, submitted.when_left)
        if status is None:
            await retries.leave()
            return Response(status_code=_CLIENT_LEFT)
        if not status.state.is_terminal:
            if not await retries.leave():
                # Nobody could ever ask for its pictures.
                await service.queue.cancel(job_id)
            raise Draining("this server is shutting down; another one will answer", retry_after_s=1.0)
        return await _reply(request, call, status)
    except DarkroomError as error:
        error.job_id = job_id
        raise


async def _reply(request: Request, call: Call, status: JobStatus) -> Response:
    job, num_images = status.job, len(result_of(status).images)
    if call.as_url:
        urls = [f"{request.base_url}jobs/{job.id}/images/{index}" for index in range(num_images)]
        data = [ImageData(url=url) for url in urls]
    else:
        data = [ImageData(b64_json=content) for content in await service_of(request).queue.images(job.id)]
    reply = Images(
        created=(status.finished_at_ms or job.created_at_ms) // 1000,
        data=data,
        size=f"{job.request.width}x{job.request.height}",
        quality=call.quality,
        output_format=call.output_format,
        background="opaque",
        usage=usage_of(job.request, num_images),
        safety_identifier=call.end_user,
    )
    headers = {"Cache-Control": "no-store", "Darkroom-Job-Id": job.id, "Darkroom-Seed": str(job.request.seed)}
    return Response(msgspec.json.encode(reply), headers=headers, media_type="application/json")
