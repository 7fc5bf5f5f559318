"""A job's event stream, read without a connection of its own: the shared notices say when there is more."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from typing import Any

from darkroom.errors import JobNotFound, QueueUnavailable
from darkroom.jobs import JobState, Previews
from darkroom.queue.connection import RedisConnection
from darkroom.queue.notices import Notices, wait_for
from darkroom.queue.records import LOOK_AGAIN_S, LOOK_MS, JobEvent

_POLL_S = 5.0
_OUTAGE_PAUSE_S = 0.25
_MAX_OUTAGE_S = 30.0
# One digit less than the largest id of a stream, so that whatever matches is one.
_EVENT_ID = re.compile(r"[0-9]{1,19}-[0-9]{1,19}")


def is_event_id(text: str) -> bool:
    """Whether a stream of events could have sent this id."""
    return _EVENT_ID.fullmatch(text) is not None


async def read_events(
    connection: RedisConnection, notices: Notices, job_id: str, after: str | None, previews: Previews
) -> AsyncIterator[JobEvent]:
    """See `JobQueue.events`. An `after` that is no event id counts as none."""
    shown: dict[int, int] = {}
    looked_at = float("-inf")
    keys = connection.keys
    # What was seen before is read once more: the speed of what is going on follows from it.
    last, seen = None, _moment_of(after) if after is not None and is_event_id(after) else (0, 0)
    claim: JobEvent | None = None
    reached_at = time.monotonic()
    with notices.watch(job_id) as woken:
        await notices.subscribe("ended", "progress")
        while True:
            woken.clear()
            try:
                if previews != "off" and time.monotonic() - looked_at >= LOOK_AGAIN_S:
                    looked_at = time.monotonic()
                    await connection.script("look", job_id, previews, LOOK_MS)
                # One transaction: whoever sees the terminal state sees the terminal event, too.
                state, entries, is_kept = await connection.transaction(
                    ("HMGET", keys.job(job_id), "state", "step", "num_steps", "previews"),
                    ("XRANGE", keys.events(job_id), "-" if last is None else f"({last}", "+"),
                    ("EXISTS", keys.events(job_id)),
                )
                reached_at = time.monotonic()
            except QueueUnavailable:
                if time.monotonic() - reached_at > _MAX_OUTAGE_S:
                    raise
                await asyncio.sleep(_OUTAGE_PAUSE_S)
                continue
            if state[0] is None:
                raise JobNotFound(f"there is no job {job_id}, or its record has expired")
            for entry in entries:
                event = _event_of(entry, claim)
                last = event.id
                if event.kind == JobState.RUNNING:
                    claim = event
                if _moment_of(last) > seen:
                    yield event
                if event.is_terminal:
                    return
            if JobState(state[0].decode()).is_terminal:
                if not is_kept:
                    yield JobEvent("", state[0].decode(), int(state[1] or 0), int(state[2] or 0))
                return
            if previews == "off":
                await wait_for(woken, _POLL_S)
                continue
            for event in await _new_previews(connection, job_id, int(state[2] or 0), state[3] or b"", shown):
                yield event
            await wait_for(woken, LOOK_AGAIN_S)


async def _new_previews(
    connection: RedisConnection, job_id: str, num_steps: int, steps: bytes, shown: dict[int, int]
) -> list[JobEvent]:
    """The previews that are not those in `shown` (image index → step), which they are added to. `steps` names them."""
    new = {index: int(step) for index, step in enumerate(steps.split()) if int(step) != shown.get(index, 0)}
    if not new:
        return []
    try:
        images = await connection.command("MGET", *(connection.keys.preview(job_id, index) for index in new))
    except QueueUnavailable:
        return []
    shown.update(new)
    return [
        JobEvent("", "preview", step, num_steps, index=index, image=image)
        for (index, step), image in zip(new.items(), images, strict=True)
        if image is not None
    ]


def _event_of(entry: Any, claim: JobEvent | None) -> JobEvent:
    event_id, kind = entry[0].decode(), entry[1][b"kind"].decode()
    step, num_steps = int(entry[1][b"step"]), int(entry[1][b"num_steps"])
    eta_s = None
    if kind == "progress" and claim is not None and step > claim.step:
        elapsed_s = (_moment_of(event_id)[0] - _moment_of(claim.id)[0]) / 1000
        eta_s = round(elapsed_s * (num_steps - step) / (step - claim.step), 3)
    return JobEvent(event_id, kind, step, num_steps, eta_s)


def _moment_of(event_id: str) -> tuple[int, int]:
    """Milliseconds and number within them."""
    milliseconds, number = event_id.split("-")
    return int(milliseconds), int(number)
