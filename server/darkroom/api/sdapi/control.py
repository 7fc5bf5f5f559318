"""Progress, interruptions and options: of the caller alone."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import UTC, datetime

import msgspec
import structlog
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from darkroom.api.body import read_json
from darkroom.api.sdapi.callers import card_of, choose, options_of, unfinished
from darkroom.api.sdapi.names import sha256_of, title_of
from darkroom.api.sdapi.shapes import (
    Options,
    Progress,
    component,
    documented_here,
    json_body,
    json_content,
    json_reply,
    parse_lenient,
)
from darkroom.api.service import service_of
from darkroom.errors import ImageNotFound, JobNotFound

log = structlog.get_logger("darkroom.api")
router = APIRouter()

_TASK = {
    "name": "id_task",
    "in": "query",
    "required": False,
    "description": "Only of the caller's jobs with this `force_task_id`.",
    "schema": {"type": "string"},
}
_SKIP_IMAGE = {
    "name": "skip_current_image",
    "in": "query",
    "required": False,
    "description": "Without it, and from the second call on, `current_image` is what the job's first image looks like.",
    "schema": {"type": "string"},
}
_ERRORS = documented_here("queue_unavailable", "internal")

_IDLE = Progress(
    progress=0.0,
    eta_relative=0.0,
    state={
        "skipped": False,
        "interrupted": False,
        "stopping_generation": False,
        "job": "",
        "job_count": 0,
        "job_timestamp": "0",
        "job_no": 0,
        "sampling_step": 0,
        "sampling_steps": 0,
    },
)


@router.get(
    "/sdapi/v1/progress",
    summary="How far the caller's own jobs are (AUTOMATIC1111)",
    description="Of the job that runs, else of the one that has waited longest; idle is 0 with `job_count` 0. With "
    "keys on a caller is a tenant, else an address.",
    response_class=Response,
    openapi_extra={"parameters": [_TASK, _SKIP_IMAGE]},
    responses={
        200: {
            "description": "Of the caller's own jobs.",
            **json_content(msgspec.to_builtins(_IDLE), component(Progress)),
        },
        **_ERRORS,
    },
)
async def progress(request: Request) -> Response:
    statuses = await unfinished(request)
    if not statuses:
        return json_reply(_IDLE)
    status = next((one for one in statuses if one.started_at_ms is not None), statuses[0])
    done = status.step / status.num_steps if status.num_steps else 0.0
    created = datetime.fromtimestamp(status.job.created_at_ms / 1000, UTC)
    state = {
        **_IDLE.state,
        "job": status.job.id,
        "job_count": len(statuses),
        "job_timestamp": f"{created:%Y%m%d%H%M%S}",
        "sampling_step": status.step,
        "sampling_steps": status.num_steps or status.job.request.num_inference_steps,
    }
    image = None
    if request.query_params.get("skip_current_image", "").lower() not in ("true", "1"):
        # To ask is to watch: there is one from the next step on.
        with contextlib.suppress(ImageNotFound, JobNotFound):
            image = await service_of(request).queue.preview(status.job.id, 0)
    return json_reply(Progress(progress=done, eta_relative=status.eta_s or 0.0, state=state, current_image=image))


async def _stop(request: Request) -> None:
    queue = service_of(request).queue
    statuses = await unfinished(request)
    await asyncio.gather(*(queue.cancel(status.job.id, keep=True) for status in statuses))
    for status in statuses:
        log.info("job_cancel_asked", job_id=status.job.id, state=status.state.value)


@router.post(
    "/sdapi/v1/interrupt",
    summary="Stop the caller's own jobs (AUTOMATIC1111)",
    description="Those that run answer with what they have drawn so far, those that wait with no images.",
    response_class=Response,
    openapi_extra={"parameters": [_TASK]},
    responses={200: {"description": "They are stopped, or about to be.", **json_content({})}, **_ERRORS},
)
async def interrupt(request: Request) -> Response:
    await _stop(request)
    return json_reply({})


@router.post(
    "/sdapi/v1/skip",
    summary="Stop the caller's own jobs (AUTOMATIC1111)",
    description="All images of a job are drawn together, so to skip one is to stop them, as `interrupt` does.",
    response_class=Response,
    openapi_extra={"parameters": [_TASK]},
    responses={
        200: {"description": "They are stopped, or about to be.", **json_content(None, {"type": "null"})},
        **_ERRORS,
    },
)
async def skip(request: Request) -> Response:
    await _stop(request)
    return json_reply(None)


@router.get(
    "/sdapi/v1/options",
    summary="The caller's own options (AUTOMATIC1111)",
    response_class=Response,
    responses={
        200: {
            "description": "Those that have a meaning here.",
            **json_content(
                {
                    "sd_model_checkpoint": "emoji-world [9b2f6c1d0e]",
                    "sd_checkpoint_hash": "9b2f6c1d0e7a4c35",
                    "CLIP_stop_at_last_layers": 1,
                    "samples_format": "png",
                    "sd_vae": "Automatic",
                }
            ),
        },
        **documented_here("unknown_model", "no_model", "queue_unavailable", "internal"),
    },
)
async def options(request: Request) -> Response:
    chosen = await options_of(request)
    card = await card_of(request, chosen)
    return json_reply(
        {
            "sd_model_checkpoint": title_of(card),
            "sd_checkpoint_hash": sha256_of(card),
            "CLIP_stop_at_last_layers": chosen.CLIP_stop_at_last_layers or 1,
            "samples_format": chosen.samples_format or "png",
            "sd_vae": "Automatic",
        }
    )


@router.post(
    "/sdapi/v1/options",
    summary="Set options for the caller's later calls (AUTOMATIC1111)",
    description="Some of them or the whole object; what has no meaning here is left alone. They are kept for 30 days "
    "after the last change, and are nobody else's.",
    response_class=Response,
    openapi_extra=json_body(Options, {"sd_model_checkpoint": "emoji-world"}),
    responses={
        200: {"description": "They are set.", **json_content(None, {"type": "null"})},
        **documented_here(
            "malformed_json", "unknown_model", "request_timeout", "body_too_large", "unsupported_media_type",
            "invalid_request", "queue_unavailable", "internal",
        ),
    },
)  # fmt: skip
async def set_options(request: Request) -> Response:
    fields = await read_json(request, service_of(request).settings.max_body_bytes)
    await choose(request, parse_lenient(Options, fields))
    return json_reply(None)
