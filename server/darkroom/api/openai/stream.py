"""A reply that comes as events: previews of the first image while it is drawn, then each image."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, cast

import msgspec
import structlog
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from starlette.types import Receive, Scope, Send

from darkroom import metrics
from darkroom.api.jobs import until_handed_over
from darkroom.api.openai.shapes import CompletedImage, PartialImage, error_body
from darkroom.api.openai.translate import Call, usage_of
from darkroom.api.problems import problem_of
from darkroom.api.service import Service
from darkroom.api.submit import result_of
from darkroom.errors import DarkroomError, Draining
from darkroom.jobs import Job, JobStatus
from darkroom.queue import JobEvent

log = structlog.get_logger("darkroom.api")

_PING_INTERVAL_S = 15.0
_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class Stream(EventSourceResponse):
    """The reply of a call whose job has been accepted. If the client leaves first the job is cancelled."""

    def __init__(self, service: Service, job: Job, call: Call) -> None:
        super().__init__(self._events(), headers={**_HEADERS, "Darkroom-Job-Id": job.id})
        self._service = service
        self._job_id = job.id
        self._size = f"{job.request.width}x{job.request.height}"
        self._call = call
        self._has_ended = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._service.waiting_call():
                await super().__call__(scope, receive, send)
        finally:
            if not self._has_ended:
                with contextlib.suppress(DarkroomError):
                    await self._service.queue.cancel(self._job_id)
                log.info("job_cancelled", job_id=self._job_id, reason="nobody waits for it any more")
                metrics.JOBS_ANSWERED.labels("abandoned").inc()

    async def _events(self) -> AsyncIterator[bytes]:
        # So that the client and all proxies know at once that there is an answer.
        yield KEEPALIVE_COMMENT
        queue = self._service.queue
        try:
            async for event in self._following():
                yield event
            status = await queue.status(self._job_id)
            if not status.state.is_terminal:
                raise Draining("this server is shutting down; another one will answer")
            self._has_ended = True
            metrics.JOBS_ANSWERED.labels(status.state.value).inc()
            log.info("job_answered", job_id=self._job_id, state=status.state.value)
            for image in result_of(status).images:
                yield self._completed(status, await queue.image(self._job_id, image.index))
        except DarkroomError as error:
            metrics.REJECTS.labels(error.code).inc()
            content = msgspec.json.encode(error_body(problem_of(error.code, str(error))))
            yield format_sse_event(event="error", data_str=content.decode())

    async def _following(self) -> AsyncIterator[bytes]:
        """Previews, spread over the steps, and pings, until the job has ended."""
        wanted, shown = self._call.partial_images or 0, 0
        events = until_handed_over(self._service, self._job_id, None, "linear" if wanted else "off")
        async with contextlib.aclosing(_or_pings(events)) as events_or_pings:
            async for event in events_or_pings:
                if event is None:
                    yield KEEPALIVE_COMMENT
                elif event.kind == "preview" and event.index == 0 and shown < wanted:
                    # Between the first step and the last, as far as they come that evenly.
                    if event.step * (wanted + 1) < (shown + 1) * event.num_steps:
                        continue
                    yield self._partial(event, shown)
                    shown += 1

    def _partial(self, event: JobEvent, index: int) -> bytes:
        return _written(
            PartialImage(
                type=f"{self._call.kind}.partial_image",
                b64_json=event.image,
                partial_image_index=index,
                created_at=int(time.time()),
                size=self._size,
                quality=self._call.quality,
                background="opaque",
                output_format="jpeg",
            )
        )

    def _completed(self, status: JobStatus, content: bytes) -> bytes:
        request = status.job.request
        return _written(
            CompletedImage(
                type=f"{self._call.kind}.completed",
                b64_json=content,
                created_at=(status.finished_at_ms or status.job.created_at_ms) // 1000,
                size=self._size,
                quality=self._call.quality,
                background="opaque",
                output_format=self._call.output_format,
                usage=usage_of(request, 1),
                safety_identifier=self._call.end_user,
            )
        )


def _written(event: PartialImage | CompletedImage) -> bytes:
    return format_sse_event(event=event.type, data_str=msgspec.json.encode(event).decode())


async def _or_pings(source: AsyncIterator[JobEvent]) -> AsyncGenerator[JobEvent | None]:
    """The items of `source`; None where there is none for a while."""
    coming: asyncio.Future[JobEvent] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(source))
            await asyncio.wait((coming,), timeout=_PING_INTERVAL_S)
            if not coming.done():
                yield None
                continue
            done, coming = coming, None
            yield done.result()
    except StopAsyncIteration:
        return
    finally:
        if coming is not None:
            coming.cancel()
        else:
            await cast("AsyncGenerator[Any]", source).aclose()
