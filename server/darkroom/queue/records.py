"""What the queue tells its callers, and how a stored record becomes a `JobStatus`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from darkroom.errors import JobError
from darkroom.jobs import MESSAGE_VERSION, Failure, Job, JobState, JobStatus, ModelCard, Previews, Result, decode

# For how long a look at the batches, and what workers tell of them, is good.
LOOK_MS = 3000
# How often one who looks on looks again.
LOOK_AGAIN_S = 1.0
PREVIEW_TTL_MS = 60_000


@dataclass(frozen=True)
class Enqueued:
    """`is_new` is false when an idempotency key led to an earlier job; `position` counts the jobs ahead of a waiting
    one, None once it runs or has ended; `eta_s` is the estimated time until it is done, None while nobody knows."""

    job_id: str
    is_new: bool
    state: JobState
    position: int | None
    eta_s: float | None


@dataclass(frozen=True)
class Renewal:
    """Held jobs whose lease is lost (drop them, write nothing), those whose client asked to cancel, and those
    that are to end with pictures of what was drawn by now."""

    lost: set[str] = field(default_factory=set)
    cancelled: set[str] = field(default_factory=set)
    cut_short: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Reaped:
    """What one look at lost leases, passed deadlines and clients that have left did, as job ids.

    `next_lease_s` is the time until the next lease runs out if it is not renewed, None when nothing is leased.
    """

    requeued: list[str]
    dead: list[str]
    cancelled: list[str]
    expired: list[str]
    abandoned: list[str]
    next_lease_s: float | None


@dataclass(frozen=True)
class JobEvent:
    """One line of a job's history. `id` is a stream id to resume after, or '' when the history itself has expired.

    `kind` is a `JobState` value or "progress"; `step` of `num_steps` counts UNet evaluations; `eta_s` is how long the
    rest will take at the speed since the job was last claimed, where that can be told. For those who watch there is
    "preview", too, which is no part of the history: `image` is a JPEG of what image `index` looked like.
    """

    id: str
    kind: str
    step: int
    num_steps: int
    eta_s: float | None = None
    index: int = 0
    image: bytes = b""

    @property
    def is_terminal(self) -> bool:
        return self.kind not in ("progress", "preview") and JobState(self.kind).is_terminal


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A live worker, as it described itself when it registered."""

    id: str
    models: list[str]
    started_at_ms: int
    version: int = MESSAGE_VERSION


@dataclass(frozen=True)
class Cards:
    """The models' cards by id: `live` ones have a worker, `recent` ones have or had one within the last minute, and
    `known` ones within job_ttl_s."""

    live: dict[str, ModelCard]
    recent: dict[str, ModelCard]
    known: dict[str, ModelCard]

    @property
    def offered(self) -> dict[str, ModelCard]:
        """What a client may choose from: the live models, or while there is none the recent ones, whose workers may be
        about to come back."""
        return self.live or self.recent


@dataclass(frozen=True)
class QueueStats:
    """The whole queue at one moment.

    `counters` has accepted and the four terminal states; what was accepted is either counted as ended, waiting or in
    flight. `oldest_wait_s` is 0 when nothing waits. `backlog_s` is by model how long the live workers, or one where
    none lives, will take for what waits; a model whose rate is not known has none. `num_tenants` have jobs that
    wait, `largest_tenant` is how many the one with most has.
    """

    depth: dict[str, int]
    backlog_s: dict[str, float]
    in_flight: int
    oldest_wait_s: float
    counters: dict[str, int]
    reserved_bytes: int
    live_workers: int
    dead_letters: int
    num_tenants: int
    largest_tenant: int

    @property
    def waiting(self) -> int:
        return sum(self.depth.values())


def pairs(flat: Sequence[bytes]) -> dict[bytes, bytes]:
    """A script's flat list of fields and values as a dict."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


def job_of(
    payload: bytes,
    *,
    created_ms: int,
    claimed_ms: int,
    deadline_ms: int | None,
    attempt: int,
    failures: int,
    num_checkpoints: int = 0,
    previews: Previews = "off",
) -> Job:
    """The stored job with what the queue knows of it by now. Raises `JobError` (bad_message) on garbage."""
    return msgspec.structs.replace(
        decode(payload, Job),
        created_at_ms=created_ms,
        claimed_at_ms=claimed_ms,
        deadline_at_ms=deadline_ms,
        attempt=attempt,
        failures=failures,
        num_checkpoints=num_checkpoints,
        previews=previews,
    )


def seconds_of(milliseconds: Any) -> float | None:
    """A script's milliseconds, '' where it knows none."""
    return None if milliseconds == b"" else milliseconds / 1000


def status_of(record: dict[bytes, bytes], position: int, eta_s: float | None) -> JobStatus:
    """A job record as a client may see it. Raises `JobError` (bad_message) when it is damaged."""

    def number(name: bytes) -> int | None:
        text = record.get(name, b"")
        return int(text) if text else None

    try:
        state = JobState(record[b"state"].decode())
        job = job_of(
            record.get(b"payload", b""),
            created_ms=number(b"created_ms") or 0,
            claimed_ms=number(b"started_ms") or 0,
            deadline_ms=number(b"deadline_ms"),
            attempt=number(b"attempt") or 0,
            failures=number(b"failures") or 0,
        )
        code, result = record.get(b"error_code"), record.get(b"result")
        return JobStatus(
            job=job,
            state=state,
            step=number(b"step") or 0,
            num_steps=number(b"num_steps") or 0,
            started_at_ms=number(b"started_ms"),
            finished_at_ms=number(b"finished_ms"),
            position=position if position >= 0 else None,
            eta_s=eta_s,
            result=decode(result, Result) if result else None,
            failure=Failure(code=code.decode(), message=record.get(b"error_message", b"").decode()) if code else None,
        )
    except (ValueError, KeyError) as error:
        raise JobError("the stored job cannot be read", code="bad_message") from error
