"""What became of a job: its state, its pictures, its events; and how to call it off."""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated, Any, cast, get_args

import msgspec
import structlog
from fastapi import APIRouter, Depends, Path, Query
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.requests import Request
from starlette.responses import Response

from darkroom.api.auth import caller_of
from darkroom.api.body import describe
from darkroom.api.problems import documented
from darkroom.api.schema import EXAMPLE_JOB_ID, job_view
from darkroom.api.service import Service, service_of
from darkroom.errors import DarkroomError, ImageNotFound, InvalidRequest, JobNotFinished, JobNotFound
from darkroom.jobs import JobState, JobStatus, Previews
from darkroom.queue import JobEvent, is_event_id

log = structlog.get_logger("darkroom.api")
router = APIRouter()

_JOB_ID = re.compile(r"[0-9a-f]{26}")
JobId = Annotated[str, Path(description="The job's id.", examples=[EXAMPLE_JOB_ID])]

_VIEW: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The job.",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/JobView"}}},
    }
}


def checked(job_id: str) -> str:
    """A well-formed job id, so that nothing else ever reaches a key. Raises `JobNotFound`."""
    if _JOB_ID.fullmatch(job_id) is None:
        raise JobNotFound("there is no such job, or its record has expired")
    return job_id


@router.get(
    "/jobs/{job_id}",
    summary="State, progress and result of a job",
    response_class=Response,
    responses={**_VIEW, **documented("job_not_found", "queue_unavailable")},
)
async def job(request: Request, job_id: JobId) -> Response:
    tenant = caller_of(request).sees
    return _view(await service_of(request).queue.status(checked(job_id), tenant=tenant, is_back=True))


@router.delete(
    "/jobs/{job_id}",
    summary="Cancel a job",
    description="Answers with the job as it is now. A job that has ended stays as it is; asking twice does no harm.",
    response_class=Response,
    responses={**_VIEW, **documented("job_not_found", "queue_unavailable")},
)
async def cancel(request: Request, job_id: JobId) -> Response:
    status = await service_of(request).queue.cancel(checked(job_id), tenant=caller_of(request).sees)
    log.info("job_cancel_asked", job_id=job_id, state=status.state.value)
    return _view(status)


def _view(status: JobStatus) -> Response:
    content = msgspec.json.encode(job_view(status))
    return Response(content, media_type="application/json", headers={"Cache-Control": "no-store"})


@router.get(
    "/jobs/{job_id}/images/{index}",
    summary="One picture",
    response_class=Response,
    responses={
        200: {
            "description": "The bytes of the picture. They never change, so they may be cached for good.",
            "content": {
                name: {"schema": {"type": "string", "format": "binary"}}
                for name in ("image/png", "image/jpeg", "image/webp")
            },
        },
        304: {"description": "The copy named by `If-None-Match` is still good."},
        307: {
            "description": "Where the server is told to redirect to its bucket: the picture is at this signed URL for "
            "as long as it is kept.",
            "headers": {"Location": {"description": "The signed URL.", "schema": {"type": "string"}}},
        },
        **documented(
            "invalid_request", "job_not_found", "image_not_found", "job_not_finished", "queue_unavailable",
            "storage_unavailable",
        ),
    },
)  # fmt: skip
async def image(
    request: Request,
    job_id: JobId,
    index: Annotated[str, Path(description="0 for the first.", examples=["0"])],
    redirect: Annotated[
        str,
        Query(
            description="false: the bytes themselves, also where the server is told to redirect to its bucket.",
            json_schema_extra={"enum": ["true", "false"]},
        ),
    ] = "true",
) -> Response:
    if not (index.isascii() and index.isdecimal() and len(index) < 4):
        raise ImageNotFound("images are numbered from 0")
    if redirect not in ("true", "false"):
        raise InvalidRequest("redirect", describe(redirect), "true or false")
    queue, tenant = service_of(request).queue, caller_of(request).sees
    url = await queue.image_url(checked(job_id), int(index), tenant=tenant) if redirect == "true" else None
    if url is not None:
        return Response(status_code=307, headers={"Location": url, "Cache-Control": "no-store"})
    try:
        content = await queue.image(checked(job_id), int(index), tenant=tenant)
    except JobNotFinished:
        await queue.status(job_id, tenant=tenant, is_back=True)
        raise
    etag = f'"{job_id}-{int(index)}"'
    headers = {"ETag": etag, "Cache-Control": "private, max-age=31536000, immutable"}
    if etag in (tag.strip() for tag in request.headers.get("if-none-match", "").split(",")):
        return Response(status_code=304, headers=headers)
    # Opened by itself, a picture may run nothing and load nothing, whatever a browser takes it for.
    headers["Content-Security-Policy"] = "default-src 'none'; sandbox"
    media_type, suffix = _kind(content)
    headers["Content-Disposition"] = f'inline; filename="darkroom-{job_id}-{int(index)}.{suffix}"'
    return Response(content, media_type=media_type, headers=headers)


def _kind(content: bytes) -> tuple[str, str]:
    """Media type and file suffix, from the first bytes: the image is stored without its job beside it."""
    if content.startswith(b"\x89PNG"):
        return "image/png", "png"
    if content.startswith(b"\xff\xd8"):
        return "image/jpeg", "jpg"
    if content[8:12] == b"WEBP":
        return "image/webp", "webp"
    return "application/octet-stream", "bin"


@router.get(
    "/jobs/{job_id}/previews/{index}",
    summary="What a running picture looks like",
    description=(
        "Asking makes the job watched for three seconds, so the first time there may be none yet. `GET "
        "/jobs/{job_id}/events?previews=linear` sends each as it is made."
    ),
    response_class=Response,
    responses={
        200: {
            "description": "A JPEG, smaller than the picture will be.",
            "content": {"image/jpeg": {"schema": {"type": "string", "format": "binary"}}},
        },
        **documented("job_not_found", "image_not_found", "queue_unavailable"),
    },
)
async def preview(
    request: Request, job_id: JobId, index: Annotated[str, Path(description="0 for the first.", examples=["0"])]
) -> Response:
    if not (index.isascii() and index.isdecimal() and len(index) < 4):
        raise ImageNotFound("images are numbered from 0")
    tenant = caller_of(request).sees
    content = await service_of(request).queue.preview(checked(job_id), int(index), tenant=tenant)
    headers = {"Cache-Control": "no-store", "Content-Security-Policy": "default-src 'none'; sandbox"}
    return Response(content, media_type="image/jpeg", headers=headers)


async def events_to_follow(
    request: Request,
    job_id: JobId,
    previews: Annotated[
        str,
        Query(
            description="Previews to send: none, from a linear map, or through the autoencoder, which is slower.",
            json_schema_extra={"enum": list(get_args(Previews))},
        ),
    ] = "off",
) -> AsyncIterator[JobEvent]:
    """The job's events after `Last-Event-ID`. Runs before the stream begins, so that a 404 can still be a 404."""
    service = service_of(request)
    last = request.headers.get("last-event-id")
    if last is not None and not is_event_id(last):
        raise InvalidRequest(
            "Last-Event-ID", describe(last), "an id that this stream has sent, such as 1700000000000-0"
        )
    if previews not in get_args(Previews):
        raise InvalidRequest("previews", describe(previews), f"one of {', '.join(get_args(Previews))}")
    await service.queue.status(checked(job_id), tenant=caller_of(request).sees, is_back=True)
    return until_handed_over(service, job_id, last, cast("Previews", previews))


@router.get(
    "/jobs/{job_id}/events",
    summary="Follow a job",
    description=(
        "Server-sent events: `queued`, `running`, `progress`, then one of `succeeded`, `failed`, `cancelled`, "
        "`expired`, which ends the stream. `Last-Event-ID` takes it up again where it broke off. With `previews` there "
        "are `preview` events besides, without an id: `image` is a JPEG in base64 of what image `index` looked like at "
        "`step`. Nothing is computed for a job that nobody watches."
    ),
    response_class=EventSourceResponse,
    openapi_extra={
        "parameters": [
            {"name": "Last-Event-ID", "in": "header", "required": False, "schema": {"type": "string"}},
        ]
    },
    responses={
        200: {
            "description": "A stream of events, each with JSON data.",
            "content": {
                "text/event-stream": {
                    "example": 'event: progress\ndata: {"step":12,"num_steps":20,"eta_s":0.8}\nid: 1700000000000-0\n\n',
                }
            },
        },
        **documented("invalid_request", "job_not_found", "queue_unavailable"),
    },
)
async def events(
    job_id: JobId, following: Annotated[AsyncIterator[JobEvent], Depends(events_to_follow)]
) -> AsyncIterator[ServerSentEvent]:
    try:
        async for event in following:
            data: dict[str, Any] = {
                "job_id": job_id,
                "state": event.kind,
                "step": event.step,
                "num_steps": event.num_steps,
            }
            if event.kind in ("progress", "preview"):
                data["state"] = JobState.RUNNING.value
            if event.kind == "progress":
                data["eta_s"] = event.eta_s
            if event.kind == "preview":
                data["index"] = event.index
                data["image"] = base64.b64encode(event.image).decode()
            yield ServerSentEvent(event=event.kind, id=event.id or None, data=data)
    except DarkroomError as error:
        # The reply has begun; the client comes back by itself with Last-Event-ID and learns the reason then.
        log.info("events_broke_off", job_id=job_id, reason=error.code)


async def until_handed_over(
    service: Service, job_id: str, last: str | None, previews: Previews
) -> AsyncIterator[JobEvent]:
    """The job's events, ended early when this process drains: another one will take the stream up."""
    source = cast("AsyncGenerator[JobEvent]", service.queue.events(job_id, last, previews=previews))
    draining = asyncio.ensure_future(service.handing_over.wait())
    coming: asyncio.Future[JobEvent] | None = None
    try:
        while True:
            coming = asyncio.ensure_future(anext(source))
            await asyncio.wait((coming, draining), return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                return
            yield coming.result()
    except StopAsyncIteration:
        return
    finally:
        draining.cancel()
        if coming is None or coming.done():
            await source.aclose()
        else:
            coming.cancel()
