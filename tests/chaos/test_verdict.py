"""The verdict itself: it must see a second job of a request, whoever was told of it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
from darkroom.jobs import Job, JobState, new_job_id

from tests.chaos.load import Book, named
from tests.chaos.stack import Stack
from tests.chaos.verdict import wait_until
from tests.support.jobs import MODEL, make_job, make_result

NAME = "client-0-1"


def job_of(name: str) -> Job:
    """A new job for the request of that name, as the API makes one for each call."""
    job = make_job()
    request = msgspec.structs.replace(job.request, **named({}, name))
    return msgspec.structs.replace(job, id=new_job_id(), request=request)


async def ask(stack: Stack, name: str = NAME, **options: Any) -> str:
    """Ask with the name as the Idempotency-Key; the job's id."""
    asked = await stack.queue.enqueue(
        job_of(name), result_bytes=10, idempotency_key=name, body_hash="the body", **options
    )
    return asked.job_id


async def forget_keys(stack: Stack) -> None:
    """As if the server did not look them up."""
    connection = stack.queue._connection
    names = await connection.command("KEYS", f"{connection.keys.prefix}idempotency:*")
    await connection.command("DEL", *names)


async def draw_all(stack: Stack) -> None:
    while jobs := await stack.queue.claim("worker", [MODEL], 8, 64):
        for job in jobs:
            await stack.queue.succeed("worker", job, make_result([b"picture"]), [b"picture"])


async def test_one_job_for_a_request_that_is_sent_again_is_well(stack: Stack) -> None:
    job_id = await ask(stack)
    assert await ask(stack) == job_id
    await draw_all(stack)
    verdict = await stack.verdict([job_id], Book({NAME: {job_id}}))
    assert verdict, verdict.wrong
    assert verdict.line(1) == "lost 0 doubled 0 of 1 accepted (1 kills)"


@pytest.mark.parametrize("is_waited_for", [False, True])
async def test_a_second_job_is_seen_though_no_client_was_told_the_first_ones_id(
    stack: Stack, is_waited_for: bool
) -> None:
    """Regression: ids that clients were told were compared, and one whose API is killed before its reply is never told.
    With the key's look-up taken out, a campaign that killed APIs found nothing doubled."""
    first = await ask(stack, cancel_when_left=is_waited_for)
    await forget_keys(stack)
    second = await ask(stack, cancel_when_left=is_waited_for)
    await draw_all(stack)
    verdict = await stack.verdict([second], Book({NAME: {second}}, {NAME} if is_waited_for else set()))
    assert first != second
    assert verdict.doubled == {second}
    assert not verdict
    assert verdict.line(1) == "lost 0 doubled 1 of 2 accepted (1 kills)"
    assert f"request {NAME} has job {second} beside {first}" in verdict.wrong[0]


@pytest.mark.parametrize("is_waited_for", [False, True])
async def test_a_request_may_have_a_new_job_only_if_nobody_waited_for_the_first(
    chaos_model: Path, tmp_path: Path, is_waited_for: bool
) -> None:
    async with Stack(tmp_path, chaos_model, disconnect_grace_s=0.3) as stack:

        async def is_given_up() -> bool:
            await stack.queue.reap()
            return (await stack.queue.status(first)).state is JobState.CANCELLED

        first = await ask(stack, cancel_when_left=True)
        await wait_until(is_given_up, what="the end of a job for which nobody waits")
        second = await ask(stack, cancel_when_left=True)
        await draw_all(stack)
        verdict = await stack.verdict([second], Book({NAME: {second}}, {NAME} if is_waited_for else set()))
    assert first != second
    assert bool(verdict) == is_waited_for, verdict.wrong
    assert (verdict.num_asked_anew, len(verdict.doubled)) == ((1, 0) if is_waited_for else (0, 1))


async def test_a_cancelled_job_excuses_no_other_before_its_time(stack: Stack) -> None:
    """Nobody has waited for too short a time: the key still leads to the job."""
    first = await ask(stack, cancel_when_left=True)
    await stack.queue.cancel(first)
    await forget_keys(stack)
    second = await ask(stack, cancel_when_left=True)
    await draw_all(stack)
    verdict = await stack.verdict([second], Book({NAME: {second}}, {NAME}))
    assert verdict.doubled == {second}


async def test_a_client_that_is_told_of_anothers_job_is_seen(stack: Stack) -> None:
    mine, theirs = await asyncio.gather(ask(stack), ask(stack, "client-1-1"))
    await draw_all(stack)
    verdict = await stack.verdict([mine, theirs], Book({NAME: {theirs}, "client-1-1": {theirs}}))
    assert verdict.wrong == [f"request {NAME} was answered with jobs of others: ['{theirs}']"]


async def test_a_job_that_nobody_asked_for_is_seen(stack: Stack) -> None:
    job_id = await ask(stack, "client-1-1")
    await draw_all(stack)
    verdict = await stack.verdict([job_id], Book({NAME: set()}))
    assert verdict.wrong == [f"jobs ['{job_id}'] are of no request: 'client-1-1'"]
