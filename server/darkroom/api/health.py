"""Is this process alive, can it take work, and which models are there."""

from __future__ import annotations

from enum import Enum

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from darkroom import __version__, metrics
from darkroom.api.problems import documented, respond_to
from darkroom.api.schema import Live, Models, Ready
from darkroom.api.service import service_of
from darkroom.errors import Draining, NoModel, QueueUnavailable, Unavailable

router = APIRouter()
_NO_STORE = {"Cache-Control": "no-store"}


class Health(str, Enum):
    """`starting` has never been ready; `failed` was ready and is not any more; `busy` answers new work with 429."""

    STARTING = "starting"
    READY = "ready"
    BUSY = "busy"
    DRAINING = "draining"
    FAILED = "failed"


@router.head("/health/live", include_in_schema=False)
@router.get(
    "/health/live",
    summary="Is this process alive",
    response_class=Response,
    responses={
        200: {
            "description": "It is, whatever became of Redis.",
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Live"}}},
        }
    },
)
async def live(request: Request) -> Response:
    draining = service_of(request).is_draining
    reply = Live(health="draining" if draining else "live", version=__version__)
    return Response(msgspec.json.encode(reply), media_type="application/json", headers=_NO_STORE)


@router.head("/health/ready", include_in_schema=False)
@router.get(
    "/health/ready",
    summary="Can work be done",
    description="200 when Redis answers and at least one worker is alive, else a 503 problem whose `health` is "
    "`starting`, `draining` or `failed`.",
    response_class=Response,
    responses={
        200: {
            "description": "Ready, or busy: the queue is full.",
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Ready"}}},
        },
        **documented("no_model", "queue_unavailable", "draining"),
    },
)
async def ready(request: Request) -> Response:
    service = service_of(request)
    try:
        service.refuse_if_draining()
        stats = await service.queue.stats()
        if not stats.live_workers:
            raise NoModel("no worker is alive", retry_after_s=2.0)
    except (Draining, QueueUnavailable, NoModel) as error:
        return _not_ready(error, request.url.path, was_ready=service.was_ready)
    service.was_ready = True
    reply = Ready(
        health="busy" if stats.waiting >= service.settings.max_queue_jobs else "ready",
        workers=stats.live_workers,
        queue_depth=stats.waiting,
        in_flight=stats.in_flight,
    )
    return Response(msgspec.json.encode(reply), media_type="application/json", headers=_NO_STORE)


async def exposed_metrics(request: Request) -> Response:
    """This process's metrics on the API's own port; added to the routes where a setting asks for it."""
    content, media_type = metrics.exposition()
    return Response(content, headers={**_NO_STORE, "Content-Type": media_type})


def _not_ready(error: Unavailable, path: str, *, was_ready: bool) -> Response:
    health = Health.FAILED if was_ready else Health.STARTING
    if isinstance(error, Draining):
        health = Health.DRAINING
    return respond_to(error, path, health=health.value)


@router.get(
    "/models",
    summary="The models that are served",
    description="Each card says what a request may ask of the model and what stands in for what it leaves out.",
    response_class=Response,
    responses={
        200: {
            "description": "The cards of the models that have a live worker; while no worker is alive, of those that "
            "had one within the last minute.",
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Models"}}},
        },
        **documented("queue_unavailable"),
    },
)
async def models(request: Request) -> Response:
    offered = (await service_of(request).queue.cards()).offered
    reply = Models(models=[offered[name] for name in sorted(offered)])
    return Response(msgspec.json.encode(reply), media_type="application/json", headers=_NO_STORE)
