"""A job's event stream, read without a connection of its own: the shared notices say when there is more."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from typing import Any

from darkroom.errors import JobNotFound, QueueUnavailable
from darkroom.jobs import JobState
from darkroom.queue.connection import RedisConnection
from darkroom.queue.notices import Notices, wait_for
from darkroom.queue.records import JobEvent

_POLL_S = 5.0
_OUTAGE_PAUSE_S = 0.25
_MAX_OUTAGE_S = 30.0
# One digit less than the largest id of a stream, so that whatever matches is one.
_EVENT_ID = re.compile(r"[0-9]{1,19}-[0-9]{1,19}")


def is_event_id(text: str) -> bool:
    """Whether a stream of events could have sent this id."""
    return _EVENT_ID.fullmatch(text) is not None


async def read_events(
    connection: RedisConnection, notices: Notices, job_id: str, after: str | None
) -> AsyncIterator[JobEvent]:
    """See `JobQueue.events`. An `after` that is no event id counts as none."""
    keys = connection.keys
    last = after if after is not None and is_event_id(after) else None
    reached_at = time.monotonic()
    with notices.watch(job_id) as woken:
        await notices.subscribe("ended", "progress")
        while True:
            woken.clear()
            try:
                # One transaction: whoever sees the terminal state sees the terminal event, too.
                state, entries, is_kept = await connection.transaction(
                    ("HMGET", keys.job(job_id), "state", "step", "num_steps"),
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
            for event in map(_event_of, entries):
                last = event.id
                yield event
                if event.is_terminal:
                    return
            if JobState(state[0].decode()).is_terminal:
                if not is_kept:
                    yield JobEvent("", state[0].decode(), int(state[1] or 0), int(state[2] or 0))
                return
            await wait_for(woken, _POLL_S)


def _event_of(entry: Any) -> JobEvent:
    event_id, fields = entry
    return JobEvent(event_id.decode(), fields[b"kind"].decode(), int(fields[b"step"]), int(fields[b"num_steps"]))
