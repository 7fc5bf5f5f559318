"""A view of the bath: which images the workers have in hand, and which of them are in the latest tick."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Annotated, Any

import structlog
from fastapi import APIRouter, Depends, Query
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.requests import Request

from darkroom.api.auth import caller_of
from darkroom.api.jobs import checked
from darkroom.api.problems import documented
from darkroom.api.service import Service, service_of
from darkroom.errors import JobNotFound, QueueUnavailable
from darkroom.jobs import BatchView

log = structlog.get_logger("darkroom.api")
router = APIRouter()

_INTERVAL_S = 0.25
_EXAMPLE = (
    'event: batch\ndata: {"workers":[{"max_model_rows":32,"rows":'
    '[{"row":41,"job_id":null,"state":"in_tick","step":12,"num_steps":20}]}]}\n\n'
)


async def first_look(
    request: Request,
    job_id: Annotated[Sequence[str], Query(description="Jobs whose rows are to be recognised.")] = (),
) -> frozenset[str]:
    """The jobs asked for that the caller may see. Runs before the stream begins, so that a 503 can still be a 503."""
    queue, tenant = service_of(request).queue, caller_of(request).sees
    await queue.batches()
    if tenant is None:
        return frozenset(job_id)
    own = set()
    for one in job_id:
        with suppress(JobNotFound):
            own.add((await queue.status(checked(one), tenant=tenant)).job.id)
    return frozenset(own)


@router.get(
    "/batch",
    summary="What is in the bath",
    description=(
        "Server-sent events `batch`, up to four in a second, as things change: for each worker the images it has in "
        "hand, with `state` `waiting`, `in_tick` (of the latest tick) or `developed` (about to be a picture). `row` "
        "names an image for as long as it is there. `job_id` is shown only of the jobs asked for."
    ),
    response_class=EventSourceResponse,
    responses={
        200: {
            "description": "A stream of events, each with JSON data.",
            "content": {"text/event-stream": {"example": _EXAMPLE}},
        },
        **documented("queue_unavailable"),
    },
)
async def batch(
    request: Request, own: Annotated[frozenset[str], Depends(first_look)]
) -> AsyncIterator[ServerSentEvent]:
    service: Service = service_of(request)
    queue, shown = service.queue, None
    while not service.handing_over.is_set():
        try:
            batches = await queue.batches()
        except QueueUnavailable as error:
            # The reply has begun; the client comes back by itself.
            log.info("batch_view_broke_off", reason=error.code)
            return
        workers = [_shown(view, own) for view in batches]
        if workers != shown:
            shown = workers
            yield ServerSentEvent(event="batch", data={"workers": workers})
        await asyncio.sleep(_INTERVAL_S)


def _shown(view: BatchView, own: frozenset[str]) -> dict[str, Any]:
    rows = [
        {
            "row": row.id,
            "job_id": row.job_id if row.job_id in own else None,
            "state": row.state,
            "step": row.step,
            "num_steps": row.num_steps,
        }
        for row in view.rows
    ]
    return {"max_model_rows": view.max_model_rows, "rows": rows}
