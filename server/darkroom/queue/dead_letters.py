"""Dead letters as an operator sees them: jobs that were given up because too many workers were lost with them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from darkroom.errors import JobError, LetterNotFound
from darkroom.jobs import Job, decode, new_job_id
from darkroom.queue.client_side import ClientSide
from darkroom.queue.connection import RedisConnection
from darkroom.queue.records import Enqueued


@dataclass(frozen=True)
class DeadLetter:
    """`id` is the letter's own, `job` what was asked for, None when this release cannot read it. `failures` workers
    were lost with it, the last of them `worker`, `attempt` counts its claims. `reserved_bytes` is 0 in letters of
    releases that did not note it."""

    id: str
    job_id: str
    job: Job | None
    failures: int
    attempt: int
    worker: str
    reason: str
    reserved_bytes: int

    @property
    def written_at_ms(self) -> int:
        """When the job was given up, by Redis server time."""
        return int(self.id.partition("-")[0])


class DeadLetters:
    """The stream of them, oldest first. Methods raise `QueueUnavailable` while Redis cannot serve them."""

    def __init__(self, queue: ClientSide, connection: RedisConnection) -> None:
        self._queue = queue
        self._connection = connection
        self._key = connection.keys.dead

    async def all(self) -> list[DeadLetter]:
        return [_letter_of(entry) for entry in await self._connection.command("XRANGE", self._key, "-", "+")]

    async def find(self, ids: Collection[str]) -> list[DeadLetter]:
        """The letters with these ids, their own or those of their jobs, in that order. Raises `LetterNotFound` naming
        the first that there is not."""
        letters = await self.all()
        by_id = {letter.job_id: letter for letter in letters} | {letter.id: letter for letter in letters}
        for letter_id in ids:
            if letter_id not in by_id:
                raise LetterNotFound(f"there is no dead letter {letter_id!r}; `darkroom jobs dead list` shows them")
        return list(dict.fromkeys(by_id[letter_id] for letter_id in ids))

    async def replay(self, letter: DeadLetter) -> Enqueued:
        """Queue what a letter asks for as a new job, and remove the letter.

        Two who replay one letter, or one who does so twice because a reply was lost, get the same job: the letter is
        its idempotency key. Pictures that its job began with are kept for `job_ttl_s`. Raises `JobError` (bad_message)
        for a letter that cannot be read or whose pictures are gone, and what `enqueue` raises, and keeps the letter
        then.
        """
        if letter.job is None:
            raise JobError("the letter's job cannot be read by this release", code="bad_message")
        request = letter.job.request
        inputs = await self._queue.inputs(letter.job)
        if len(inputs) < len(request.input_names):
            raise JobError("the pictures that it begins with are not kept any more", code="bad_message")
        job = Job(
            id=new_job_id(),
            request=request,
            priority=letter.job.priority,
            cost=letter.job.cost,
            tenant=letter.job.tenant,
        )
        enqueued = await self._queue.enqueue(
            job,
            result_bytes=request.width * request.height * 3 * request.num_images_per_prompt,
            checkpoint_bytes=letter.reserved_bytes,
            inputs=inputs,
            # No client's key has a space.
            idempotency_key=f"dead letter {letter.id}",
            body_hash=letter.id,
        )
        await self.purge([letter])
        return enqueued

    async def purge(self, letters: Sequence[DeadLetter]) -> int:
        """Remove letters; how many of them were still there."""
        if not letters:
            return 0
        return int(await self._connection.command("XDEL", self._key, *(letter.id for letter in letters)))

    async def server_ms(self) -> int:
        """The server's clock, by which letters are dated."""
        seconds, microseconds = await self._connection.command("TIME")
        return int(seconds) * 1000 + int(microseconds) // 1000


def _letter_of(entry: Any) -> DeadLetter:
    letter_id, fields = entry

    def text(name: bytes) -> str:
        value: bytes = fields.get(name, b"")
        return value.decode(errors="replace")

    try:
        job = decode(fields.get(b"payload", b""), Job)
    except JobError:
        job = None
    return DeadLetter(
        id=letter_id.decode(),
        job_id=text(b"job"),
        job=job,
        failures=int(text(b"failures") or 0),
        attempt=int(text(b"attempt") or 0),
        worker=text(b"worker"),
        reason=text(b"reason"),
        reserved_bytes=int(text(b"reserved") or 0),
    )


def shown(letter: DeadLetter) -> dict[str, Any]:
    """A letter as plain values for a machine."""
    return {
        "id": letter.id,
        "job_id": letter.job_id,
        "written_at_ms": letter.written_at_ms,
        "failures": letter.failures,
        "attempt": letter.attempt,
        "worker": letter.worker,
        "reason": letter.reason,
        "request": None if letter.job is None else msgspec.to_builtins(letter.job.request),
    }
