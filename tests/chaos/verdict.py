"""One judgement for every accident: what was accepted has ended, once, with one result, and nothing is left behind.

`judge` reads the whole of a queue that has come to rest. Keep result_ttl_s and job_ttl_s longer than the test, so that
every record, event and picture is still there to be read.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from darkroom.config import Settings
from darkroom.errors import JobError, QueueUnavailable
from darkroom.jobs import Job, JobState, Result, decode
from darkroom.queue import JobQueue
from darkroom.queue.keys import KEY_TABLE, Keys

from tests.chaos.load import Book, name_of

TERMINAL = tuple(state.value for state in JobState if state.is_terminal)
# Who may not outlive the last job, and who need not ever go, as the table of keys says itself.
GONE_AT_REST = {kind for kind, (_, _, expiry) in KEY_TABLE.items() if "empty when idle" in expiry}
GONE_AT_REST |= {"backlog", "checkpoint"}
NEVER_EXPIRES = {kind for kind, (_, _, expiry) in KEY_TABLE.items() if expiry.startswith("none")} - GONE_AT_REST
_MAX_EVENTS = 256
_PAGE = 500


@dataclass
class Verdict:
    """`accepted` counts jobs, `states` their ends. `lost` never ended, or ended without what they were to give;
    `doubled` ended more than once, or were made for a request that had one. `num_asked_anew` counts the jobs that a
    request rightly had after an earlier one. `wrong` says every fault in words, those included."""

    accepted: int = 0
    states: Counter[str] = field(default_factory=Counter)
    lost: set[str] = field(default_factory=set)
    doubled: set[str] = field(default_factory=set)
    num_asked_anew: int = 0
    wrong: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return not (self.lost or self.doubled or self.wrong)

    def line(self, num_kills: int) -> str:
        return f"lost {len(self.lost)} doubled {len(self.doubled)} of {self.accepted} accepted ({num_kills} kills)"


@dataclass(frozen=True)
class Record:
    """A job as it is stored, and the history of its events as (server's ms, kind, step)."""

    fields: dict[str, bytes]
    events: list[tuple[int, str, int]]

    @property
    def state(self) -> str:
        return self.fields.get("state", b"").decode()

    def ms(self, name: str) -> int:
        """A time by the server's clock; 0 where there is none."""
        return int(self.fields.get(name) or 0)


async def come_to_rest(queue: JobQueue, timeout_s: float = 60.0) -> None:
    """Wait until no job waits or runs. Raises `TimeoutError`."""
    async with asyncio.timeout(timeout_s):
        while True:
            try:
                stats = await queue.stats()
                if stats.waiting == stats.in_flight == 0:
                    return
            except QueueUnavailable:
                pass
            await asyncio.sleep(0.1)


async def read_keys(queue: JobQueue, settings: Settings) -> dict[str, int]:
    """Every key of the shard without its prefix, and its remaining ms; -1 for one that never expires."""
    prefix, names, cursor = Keys(settings.shard).prefix, set[bytes](), b"0"
    while True:
        cursor, page = await queue._connection.command("SCAN", cursor, "MATCH", f"{prefix}*", "COUNT", _PAGE)
        names.update(page)
        if int(cursor) == 0:
            break
    found = sorted(names)
    left_ms = await _in_pages(queue, [("PTTL", name) for name in found])
    # -2: it expired in between.
    return {name.decode().removeprefix(prefix): ms for name, ms in zip(found, left_ms, strict=True) if ms != -2}


async def read_records(queue: JobQueue, settings: Settings, job_ids: Iterable[str]) -> dict[str, Record]:
    """The records of jobs that have one, with their histories."""
    keys, found = Keys(settings.shard), {}
    ids = list(job_ids)
    hashes = await _in_pages(queue, [("HGETALL", keys.job(job_id)) for job_id in ids])
    streams = await _in_pages(queue, [("XRANGE", keys.events(job_id), "-", "+") for job_id in ids])
    for job_id, fields, entries in zip(ids, hashes, streams, strict=True):
        # Over MULTI a hash comes flat or as a mapping, as the client library likes.
        pairs = fields.items() if isinstance(fields, dict) else zip(fields[::2], fields[1::2], strict=True)
        record = {name.decode(): value for name, value in pairs}
        if record:
            found[job_id] = Record(record, [_event_of(entry) for entry in entries])
    return found


async def judge(queue: JobQueue, settings: Settings, accepted: Collection[str], book: Book | None = None) -> Verdict:
    """Judge a queue at rest. `accepted` are the ids that clients were given. `book`, if all requests had names, has
    each of them: the jobs of a request are found by what is stored, as nobody may have been told their ids."""
    verdict = Verdict()
    left = await read_keys(queue, settings)
    stored = {name.removeprefix("job:") for name in left if name.startswith("job:")}
    jobs = sorted(stored | set(accepted))
    verdict.accepted = len(jobs)
    records = await read_records(queue, settings, jobs)
    images = Counter(name.split(":")[1] for name in left if name.startswith("image:"))
    sizes = await _image_sizes(queue, settings, left)
    for job_id in jobs:
        _judge_job(verdict, job_id, records.get(job_id), images[job_id], sizes)
    if book is not None:
        _judge_requests(verdict, settings, records, book)
    _judge_keys(verdict, settings, left, records)
    await _judge_counters(verdict, queue, left)
    return verdict


def _judge_job(
    verdict: Verdict, job_id: str, record: Record | None, num_images: int, sizes: dict[tuple[str, int], int]
) -> None:
    def lost(reason: str) -> None:
        verdict.lost.add(job_id)
        verdict.wrong.append(f"job {job_id} is lost: {reason}")

    def doubled(reason: str) -> None:
        verdict.doubled.add(job_id)
        verdict.wrong.append(f"job {job_id} is doubled: {reason}")

    if record is None:
        lost("its record is gone")
        return
    verdict.states[record.state] += 1
    if record.state not in TERMINAL:
        lost(f"it is {record.state or 'without a state'}")
        return
    ends = [kind for _, kind, _ in record.events if kind in TERMINAL]
    if len(ends) > 1:
        doubled(f"it ended as {', '.join(ends)}")
    elif ends != [record.state] or record.events[-1][1] != record.state:
        verdict.wrong.append(f"job {job_id} is {record.state}, and its events are {record.events[-3:]}")
    attempts, runs = int(record.fields.get("attempt", 0)), sum(kind == "running" for _, kind, _ in record.events)
    if runs != attempts and len(record.events) < _MAX_EVENTS:
        verdict.wrong.append(f"job {job_id} has {attempts} attempts and ran {runs} times")
    result = record.fields.get("result", b"")
    if record.state != "succeeded":
        if result or num_images:
            verdict.wrong.append(f"job {job_id} is {record.state} and has {num_images} pictures")
        return
    try:
        asked = decode(record.fields.get("payload", b""), Job).request.num_images_per_prompt
        manifest = decode(result, Result)
    except JobError as error:
        lost(str(error))
        return
    if len(manifest.images) != asked:
        lost(f"it has {len(manifest.images)} pictures of {asked}")
    elif not manifest.location:
        if num_images > asked:
            doubled(f"{num_images} pictures are stored of {asked}")
        for image in manifest.images:
            if sizes.get((job_id, image.index)) != image.num_bytes:
                lost(f"picture {image.index} is not the one that its result tells of")


def _judge_requests(verdict: Verdict, settings: Settings, records: dict[str, Record], book: Book) -> None:
    """A request has one job, however often it was sent and whoever was told of it."""
    grace_ms = round(settings.disconnect_grace_s * 1000)
    jobs_of: dict[str, list[str]] = defaultdict(list)
    for job_id, record in records.items():
        try:
            jobs_of[name_of(decode(record.fields.get("payload", b""), Job).request)].append(job_id)
        except JobError as error:
            verdict.wrong.append(f"job {job_id} cannot be read: {error}")
    for name in jobs_of.keys() - book.ids_of.keys():
        verdict.wrong.append(f"jobs {sorted(jobs_of[name])} are of no request: {name[-100:]!r}")
    for name, told in book.ids_of.items():
        jobs = sorted(jobs_of[name], key=lambda job_id: records[job_id].ms("created_ms"))
        if others := told & records.keys() - set(jobs):
            verdict.wrong.append(f"request {name} was answered with jobs of others: {sorted(others)}")
        for earlier, later in pairwise(jobs):
            state, began_ms = records[earlier].state, records[earlier].ms("created_ms")
            ended_after_ms = records[earlier].ms("finished_ms") - began_ms
            anew_after_ms = records[later].ms("created_ms") - began_ms
            # A key comes back when its job is given up because nobody has waited for so long, and only then.
            is_given_up = name in book.waited_for and state == "cancelled" and ended_after_ms >= grace_ms
            if is_given_up and anew_after_ms >= grace_ms:
                verdict.num_asked_anew += 1
                continue
            verdict.doubled.add(later)
            verdict.wrong.append(
                f"request {name} has job {later} beside {earlier}: {state} after {ended_after_ms} ms, and asked for "
                f"anew after {anew_after_ms} ms"
            )


def _judge_keys(verdict: Verdict, settings: Settings, left: dict[str, int], records: dict[str, Record]) -> None:
    longest_ms = {
        "job": settings.job_ttl_s * 1000,
        "idempotency": settings.job_ttl_s * 1000,
        "image": settings.result_ttl_s * 1000,
        "staged": settings.job_ttl_s * 1000,
        "events": settings.result_ttl_s * 1000,
        "claim": settings.lease_s * 1000,
        "reserved": settings.lease_s * 1000,
        "notify": 60_000,
        "pace": 3_600_000,
    }
    for name, ms in left.items():
        kind, _, rest = name.partition(":")
        if kind not in KEY_TABLE:
            verdict.wrong.append(f"key {name} is in no table")
        elif kind in GONE_AT_REST:
            verdict.wrong.append(f"key {name} is left behind")
        elif kind not in NEVER_EXPIRES and ms < 0:
            verdict.wrong.append(f"key {name} never expires")
        elif ms > longest_ms.get(kind, float("inf")):
            verdict.wrong.append(f"key {name} expires in {ms} ms only")
        elif kind in ("events", "image") and rest.split(":")[0] not in records:
            verdict.wrong.append(f"key {name} has no job")


async def _judge_counters(verdict: Verdict, queue: JobQueue, left: dict[str, int]) -> None:
    stats = await queue.stats()
    counters = {name: stats.counters.get(name, 0) for name in TERMINAL}
    ended = sum(counters.values())
    if stats.counters["accepted"] != ended:
        verdict.wrong.append(f"{stats.counters['accepted']} were accepted and {ended} have ended: {counters}")
    if counters != {name: verdict.states[name] for name in TERMINAL}:
        verdict.wrong.append(f"the counters {counters} are not the jobs {dict(verdict.states)}")
    if stats.reserved_bytes:
        verdict.wrong.append(f"{stats.reserved_bytes} bytes are still reserved")


async def _image_sizes(queue: JobQueue, settings: Settings, left: Iterable[str]) -> dict[tuple[str, int], int]:
    names = [name for name in left if name.startswith("image:")]
    prefix = Keys(settings.shard).prefix
    lengths = await _in_pages(queue, [("STRLEN", prefix + name) for name in names])
    parts = (name.split(":") for name in names)
    return {(job_id, int(index)): length for (_, job_id, index), length in zip(parts, lengths, strict=True)}


async def _in_pages(queue: JobQueue, commands: list[tuple[Any, ...]]) -> list[Any]:
    replies: list[Any] = []
    for start in range(0, len(commands), _PAGE):
        replies += await queue._connection.transaction(*commands[start : start + _PAGE])
    return replies


def _event_of(entry: Any) -> tuple[int, str, int]:
    event_id, fields = entry
    return int(event_id.split(b"-")[0]), fields[b"kind"].decode(), int(fields[b"step"])


def server_ms(now: tuple[int, int]) -> int:
    """A reply to TIME in ms."""
    return int(now[0]) * 1000 + int(now[1]) // 1000


async def wait_until(found: Any, timeout_s: float = 20.0, what: str = "it") -> Any:
    """Poll `found`, sync or async, until it is true; its value. Raises `AssertionError` that names `what`."""
    until = time.monotonic() + timeout_s
    while True:
        value = found()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return value
        assert time.monotonic() < until, f"{what} did not happen in {timeout_s} s"
        await asyncio.sleep(0.01)
