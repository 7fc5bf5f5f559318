"""From a checked body to a job in the queue, and on to its end: what all surfaces that make pictures share."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal

import structlog
from starlette.requests import Request

from darkroom import metrics
from darkroom.api.auth import caller_of, check_caller, take_call
from darkroom.api.intake import Pictures
from darkroom.api.resolve import (
    check_cost,
    check_limits,
    checkpoint_bytes_of,
    choose_card,
    complete,
    cost_of,
    fingerprint,
    result_bytes_of,
    with_inputs,
)
from darkroom.api.schema import GenerateRequest
from darkroom.api.service import Service, service_of
from darkroom.errors import HTTP_STATUS, JobError, QueueUnavailable, ResultStoreUnavailable
from darkroom.jobs import Job, JobState, JobStatus, Priority, Result, new_job_id
from darkroom.queue import Enqueued

log = structlog.get_logger("darkroom.api")


# What becomes of a job whose waiting call breaks off: it is cancelled, at once or when nobody comes back in time, or it
# goes on.
WhenLeft = Literal["cancel", "cancel_later", "continue"]


@dataclass(frozen=True)
class Submitted:
    """The job that was asked for, and what the queue made of it: an idempotency key may have led to an earlier job."""

    job: Job
    enqueued: Enqueued
    when_left: WhenLeft


async def submit(
    request: Request,
    body: GenerateRequest,
    output_format: str,
    *,
    idempotency_key: str | None = None,
    pictures: Pictures | None = None,
) -> Submitted:
    """Check `body` against the limits of the server, the caller's key and the model's card, and enqueue it as a job.

    `pictures` are what it begins with where the caller has read them itself (`Service.intake`); without, the body's
    own. Raises `InvalidFields`, `UnknownModel`, `InvalidRequest` and `PromptRefused` on what cannot be drawn,
    `Unavailable` on what cannot be taken now.
    """
    service, caller = service_of(request), caller_of(request)
    settings = service.settings
    await take_call(request)
    check_limits(body, settings, service.accepted, has_init_image=pictures is not None)
    await service.prompt_rules.check(body.prompt)
    card = choose_card(body.model, await service.queue.cards())
    if pictures is None and body.init_image is not None:
        pictures = await service.intake.read(body.init_image, body.mask_image)
    wanted = complete(body, card, output_format, pictures)
    inputs: dict[str, bytes] = {}
    if pictures is not None:
        inputs = await service.intake.fit(pictures, wanted.width, wanted.height, body.resize_mode)
        wanted = with_inputs(wanted, inputs)
    cost = cost_of(wanted, card)
    check_cost(cost, settings)
    priority = Priority(body.priority)
    check_caller(caller, priority=priority, cost=cost)
    when_left: WhenLeft = "continue"
    if body.mode == "wait" and body.on_disconnect == "cancel":
        when_left = "cancel" if idempotency_key is None else "cancel_later"
    job = Job(id=new_job_id(), request=wanted, priority=priority, cost=cost, tenant=caller.tenant)
    enqueued = await service.queue.enqueue(
        job,
        deadline_s=body.deadline_s,
        idempotency_key=idempotency_key,
        body_hash=fingerprint(body, output_format, pictures, tenant=caller.tenant),
        inputs=inputs,
        result_bytes=result_bytes_of(wanted, settings),
        checkpoint_bytes=checkpoint_bytes_of(wanted, card),
        caller=f"{request.client.host}:{request.client.port}" if request.client else "",
        weight=caller.weight,
        payer=caller.key_id,
        max_cost=caller.max_cost,
        cancel_when_left=when_left == "cancel_later",
    )
    if enqueued.is_new:
        metrics.JOBS_ACCEPTED.labels(job.priority.value).inc()
        asked = {"prompt": body.prompt, "negative_prompt": body.negative_prompt} if settings.log_prompts else {}
        log.info(
            "job_accepted",
            job_id=job.id,
            tenant=job.tenant,
            model=card.id,
            priority=job.priority.value,
            cost=cost,
            **asked,
        )
    return Submitted(job, enqueued, when_left)


async def answer(request: Request, job_id: str, timeout_s: float, when_left: WhenLeft = "cancel") -> JobStatus | None:
    """The job's status at its end, at the timeout or when this process drains.

    None if the client left first; `when_left` says what becomes of its job then.
    """
    service = service_of(request)
    async with _staying(service, job_id) if when_left == "cancel_later" else contextlib.nullcontext():
        status = await _wait_for_end(request, service, job_id, timeout_s)
    if status is not None and not status.state.is_terminal:
        # From now on the client has the job's URL, and need not stay.
        status = await service.queue.status(job_id, is_back=True)
    if status is None:
        if when_left == "cancel":
            await service.queue.cancel(job_id)
            log.info("job_cancelled", job_id=job_id, reason="the client left")
        elif when_left == "cancel_later":
            await service.queue.stay(job_id)
        metrics.JOBS_ANSWERED.labels("abandoned").inc()
    elif status.state.is_terminal:
        metrics.JOBS_ANSWERED.labels(status.state.value).inc()
        log.info("job_answered", job_id=job_id, state=status.state.value)
    else:
        metrics.JOBS_ANSWERED.labels("handed_over").inc()
    return status


def result_of(status: JobStatus) -> Result:
    """The result of a job that has ended. Raises any other end as the error that a waiting client gets."""
    if status.result is not None:
        return status.result
    if status.failure is not None:
        if status.failure.code == ResultStoreUnavailable.code:
            raise ResultStoreUnavailable(status.failure.message)
        code = status.failure.code if status.failure.code in HTTP_STATUS else "job_failed"
        raise JobError(status.failure.message, code=code)
    if status.state is JobState.CANCELLED:
        raise JobError("the job was cancelled before it was finished", code="cancelled")
    if status.state is JobState.EXPIRED:
        raise JobError("the deadline passed before the job was finished", code="expired")
    raise JobError("the job failed")


@contextlib.asynccontextmanager
async def _staying(service: Service, job_id: str) -> AsyncIterator[None]:
    """Tell the queue time and again that somebody waits. Should this process die, another cancels the job."""

    async def stay() -> None:
        while True:
            await asyncio.sleep(service.settings.disconnect_grace_s / 3)
            with contextlib.suppress(QueueUnavailable):
                await service.queue.stay(job_id)

    staying = asyncio.ensure_future(stay())
    try:
        yield
    finally:
        staying.cancel()


async def _wait_for_end(request: Request, service: Service, job_id: str, timeout_s: float) -> JobStatus | None:
    ending = asyncio.ensure_future(service.queue.wait(job_id, timeout_s))
    leaving = asyncio.ensure_future(_client_leaves(request))
    draining = asyncio.ensure_future(service.handing_over.wait())
    try:
        with service.waiting_call():
            await asyncio.wait((ending, leaving, draining), return_when=asyncio.FIRST_COMPLETED)
        if ending.done():
            return ending.result()
        if leaving.done():
            return None
        return await service.queue.status(job_id)
    finally:
        for task in (ending, leaving, draining):
            task.cancel()


async def _client_leaves(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
