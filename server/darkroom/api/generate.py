"""POST /generate: from a prompt to pictures, or to the URL of the job that makes them."""

from __future__ import annotations

import re

import msgspec
import structlog
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from darkroom.api.accept import negotiate
from darkroom.api.auth import take_call
from darkroom.api.body import describe, parse_fields, read_json
from darkroom.api.problems import documented
from darkroom.api.schema import (
    EXAMPLE_REQUEST,
    Accepted,
    Generated,
    GenerateRequest,
    image_views,
    manifest_of,
)
from darkroom.api.service import Service, service_of
from darkroom.api.submit import answer, result_of, submit
from darkroom.errors import DarkroomError, InvalidRequest
from darkroom.jobs import Job, JobState, JobStatus, Result

log = structlog.get_logger("darkroom.api")
router = APIRouter()

DESCRIPTION = """\
`POST /generate` takes a prompt and answers with pictures. Every accepted job ends in exactly one of `succeeded`,
`failed`, `cancelled` or `expired`, and `GET /jobs/{job_id}` says which. Errors are RFC 9457 problem documents with a
stable `code`."""

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
_KEY = re.compile(r"[\x21-\x7e]{1,200}")
_CLIENT_LEFT = 499  # nginx's number; nobody reads it but the metrics

_IMAGE_HEADERS = {
    "Darkroom-Job-Id": {"description": "The job's id.", "schema": {"type": "string"}},
    "Darkroom-Seed": {"description": "The seed of this image.", "schema": {"type": "string"}},
    "Content-Location": {"description": "The URL of this image.", "schema": {"type": "string"}},
}


@router.post(
    "/generate",
    summary="Make pictures",
    description=(
        "Answers with JSON (base64 images and a manifest) or, with `Accept: image/png` and the like, with the bytes of "
        "the first image. A waiting client that goes away cancels its job, unless it asked for `on_disconnect`: "
        "`continue`. If it sent an `Idempotency-Key`, it has 30 seconds, or as many as the server grants, to come back "
        "with the same key or by looking at the job, its events or its images. Where several calls share a key, the "
        "last to leave counts. The key of a job that was cancelled like that makes a new one."
    ),
    response_class=Response,
    openapi_extra={
        "parameters": [
            {
                "name": "Idempotency-Key",
                "in": "header",
                "required": False,
                "description": "1 to 200 visible ASCII characters. The same key and body give the same job, also after "
                "it has ended; another body under the same key is refused.",
                "schema": {"type": "string", "maxLength": 200},
            },
            {
                "name": "Accept",
                "in": "header",
                "required": False,
                "description": "application/json, image/png, image/jpeg, image/webp or image/*.",
                "schema": {"type": "string"},
            },
        ],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {"$ref": "#/components/schemas/GenerateRequest"},
                    "examples": {
                        "prompt only": {"value": {"prompt": "an astronaut riding a horse"}},
                        "more": {"value": EXAMPLE_REQUEST},
                    },
                }
            },
        },
    },
    responses={
        200: {
            "description": "The pictures.",
            "headers": _IMAGE_HEADERS,
            "content": {
                "application/json": {"schema": {"$ref": "#/components/schemas/Generated"}},
                **{name: {"schema": {"type": "string", "format": "binary"}} for name in MEDIA_TYPES.values()},
            },
        },
        202: {
            "description": "The job was accepted and is not finished yet.",
            "headers": {"Location": {"description": "The job's URL.", "schema": {"type": "string"}}},
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Accepted"}}},
        },
        **documented(
            "malformed_json", "unknown_model", "not_acceptable", "request_timeout", "cancelled", "body_too_large",
            "unsupported_media_type", "invalid_request", "prompt_refused", "idempotency_mismatch", "rate_limited",
            "budget_exceeded", "queue_full", "tenant_queue_full", "deadline_unmet", "internal", "job_failed",
            "bad_message", "dead_letter", "prompt_too_long", "non_finite", "storage_full", "no_model",
            "queue_unavailable", "not_replicated", "storage_unavailable", "draining", "expired", "out_of_memory",
        ),
    },
)  # fmt: skip
async def generate(request: Request) -> Response:
    service = service_of(request)
    settings = service.settings
    service.refuse_if_draining()
    await take_call(request)
    fields = await read_json(request, settings.max_body_bytes, max_image_bytes=settings.max_image_bytes)
    body = parse_fields(GenerateRequest, fields, service.accepted)
    key = idempotency_key(request)
    wants_image, output_format = negotiate(request.headers.get("accept"), body.output_format)

    submitted = await submit(request, body, output_format, idempotency_key=key)
    enqueued, job_id = submitted.enqueued, submitted.enqueued.job_id
    if body.mode == "async":
        # The seed in the reply is the stored job's: a replay may have been given a random one.
        seed = submitted.job.request.seed if enqueued.is_new else (await service.queue.status(job_id)).job.request.seed
        return accepted_reply(job_id, enqueued.state, seed, enqueued.position, enqueued.eta_s)
    limit = settings.wait_timeout_s
    timeout_s = limit if body.wait_timeout_s is None else min(body.wait_timeout_s, limit)
    try:
        status = await answer(request, job_id, timeout_s, submitted.when_left)
        if status is None:
            return Response(status_code=_CLIENT_LEFT)
        if not status.state.is_terminal:
            return accepted_reply(job_id, status.state, status.job.request.seed, status.position, status.eta_s)
        result = result_of(status)
        if wants_image:
            return await image_reply(service, status.job)
        return await json_reply(service, status, result)
    except DarkroomError as error:
        # The job exists: whatever went wrong afterwards, its id is what the client can ask with.
        error.job_id = job_id
        raise


def idempotency_key(request: Request) -> str | None:
    """The request's Idempotency-Key, checked. Raises `InvalidRequest`."""
    key = request.headers.get("idempotency-key")
    if key is not None and _KEY.fullmatch(key) is None:
        raise InvalidRequest("Idempotency-Key", describe(key), "1 to 200 visible ASCII characters")
    return key


async def json_reply(service: Service, status: JobStatus, result: Result) -> Response:
    queue, job_id = service.queue, status.job.id
    # One picture is the usual case, and one round trip.
    contents = [await queue.image(job_id, 0)] if len(result.images) == 1 else await queue.images(job_id)
    manifest = manifest_of(status, result)
    reply = Generated(job_id=job_id, images=image_views(status, contents), manifest=manifest)
    return Response(msgspec.json.encode(reply), media_type="application/json", headers={"Cache-Control": "no-store"})


async def image_reply(service: Service, job: Job) -> Response:
    content = await service.queue.image(job.id, 0)
    headers = {
        "Darkroom-Job-Id": job.id,
        "Darkroom-Seed": str(job.request.seed),
        "Content-Location": f"/jobs/{job.id}/images/0",
        "Cache-Control": "no-store",
    }
    return Response(content, media_type=MEDIA_TYPES[job.request.output_format], headers=headers)


def accepted_reply(job_id: str, state: JobState, seed: int, position: int | None, eta_s: float | None) -> Response:
    """202: the job's URL, in `Location` and in the body."""
    url = f"/jobs/{job_id}"
    reply = Accepted(
        job_id=job_id,
        state=state,
        url=url,
        events_url=f"{url}/events",
        seed=seed,
        position=position,
        eta_s=eta_s,
    )
    headers = {"Location": url, "Cache-Control": "no-store"}
    return Response(msgspec.json.encode(reply), 202, headers, media_type="application/json")
