"""Whose options, progress and interruptions a call is about.

With keys on, a caller is a tenant. Without, it is an address: whoever shares one, behind a proxy for instance, is one
caller. `force_task_id` tells a caller's own jobs apart, and `id_task` in the query of later calls names one of them.
"""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from darkroom.api.auth import caller_of
from darkroom.api.sdapi.names import default_card, find_card, title_of
from darkroom.api.sdapi.shapes import Options
from darkroom.api.service import service_of
from darkroom.errors import JobNotFound, NoModel
from darkroom.jobs import JobStatus, ModelCard


def name_of(request: Request) -> str:
    """The caller, as `Callers` keeps it."""
    caller = caller_of(request)
    if caller.key_id:
        return f"tenant {caller.tenant}"
    return f"address {request.client.host if request.client else ''}"


async def unfinished(request: Request) -> list[JobStatus]:
    """The caller's jobs that have not ended, oldest first; with `id_task` in the query, those of that name."""
    queue, caller = service_of(request).queue, name_of(request)
    job_ids = await queue.callers.jobs(caller, request.query_params.get("id_task"))
    found = await asyncio.gather(*map(queue.status, job_ids), return_exceptions=True)
    statuses, ended = list[JobStatus](), list[str]()
    for job_id, status in zip(job_ids, found, strict=True):
        if isinstance(status, JobStatus) and not status.state.is_terminal:
            statuses.append(status)
        elif isinstance(status, (JobStatus, JobNotFound)):
            # The call that would have said so was lost with its process.
            ended.append(job_id)
        else:
            raise status
    await queue.callers.end(caller, *ended)
    return sorted(statuses, key=lambda status: (status.job.created_at_ms, status.job.id))


async def options_of(request: Request) -> Options:
    """What the caller set; the checkpoint is always there. Raises `NoModel` when no model is offered."""
    queue = service_of(request).queue
    choices = Options.model_validate(await queue.callers.choices(name_of(request)))
    if choices.sd_model_checkpoint is None:
        card = default_card(await queue.cards())
        if card is None:
            raise NoModel("no worker serves a model", retry_after_s=2.0)
        choices = choices.model_copy(update={"sd_model_checkpoint": title_of(card)})
    return choices


async def choose(request: Request, chosen: Options) -> None:
    """Keep a caller's options. Raises `UnknownModel` on a checkpoint that is not served."""
    queue = service_of(request).queue
    values = {name: value for name in Options.model_fields if (value := getattr(chosen, name)) is not None}
    if "sd_model_checkpoint" in values:
        values["sd_model_checkpoint"] = title_of(await card_of(request, chosen))
    await queue.callers.choose(name_of(request), {name: str(value) for name, value in values.items()})


async def card_of(request: Request, chosen: Options) -> ModelCard:
    """The card of the chosen checkpoint. Raises `UnknownModel`."""
    return find_card(await service_of(request).queue.cards(), chosen.sd_model_checkpoint or "")
