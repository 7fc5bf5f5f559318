"""Links to Redis that are cut, fall silent, are slow or break in the middle of a reply."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable

import pytest
from darkroom.jobs import JobState

from tests.chaos.calls import ended, stepped, submit
from tests.chaos.link import Link
from tests.chaos.stack import Member, Stack
from tests.chaos.verdict import wait_until

# What is done to a link, and the counter that proves it.
BREAKS: dict[str, tuple[Callable[[Link], None], Callable[[Link], int]]] = {
    "cut": (Link.cut, lambda link: link.num_refused),
    "silent": (Link.fall_silent, lambda link: link.num_bytes_held),
    "slow": (lambda link: setattr(link, "latency_s", 1.0), lambda link: link.num_delayed),
    "reset in a reply": (lambda link: link.reset_after(200), lambda link: link.num_reset),
}
BROKEN = ["cut", "silent"]
# The worse of the two; the others take their time with `make test-chaos`.
FAST = ["silent"]


def breaks() -> list[object]:
    return [pytest.param(name, id=name, marks=() if name in FAST else pytest.mark.chaos) for name in BREAKS]


async def break_until_proven(member: Member, name: str) -> None:
    spoil, count = BREAKS[name]
    before = count(member.link)
    spoil(member.link)
    await wait_until(lambda: count(member.link) > before, what=f"a link that is {name}")


@pytest.mark.parametrize("name", breaks())
async def test_a_worker_cut_off_for_two_leases_loses_its_job_and_writes_nothing_late(stack: Stack, name: str) -> None:
    api = await stack.start("api-0")
    lonely = await stack.start("worker-0")
    async with stack.client(api) as client:
        job_id = await submit(client, num_inference_steps=200)
        await stepped(stack.queue, job_id, 10)
        await break_until_proven(lonely, name)
        await stack.start("worker-1")
        status = await ended(stack.queue, job_id)
        assert status.state is JobState.SUCCEEDED
        if name in ("cut", "silent"):
            assert status.job.attempt == 2, "it was taken over while its worker could not be heard"
        await asyncio.sleep(2 * stack.settings.lease_s)
        lonely.link.mend()
        assert (await stack.queue.status(job_id)) == status
        # The lonely one is back: the other is gone, and jobs are done.
        await stack.kill(stack.members["worker-1"])
        later = await submit(client)
        assert (await ended(stack.queue, later, 60)).state is JobState.SUCCEEDED
    assert lonely.child.exit_code is None
    assert await stack.queue.status(job_id) == status
    assert (verdict := await stack.verdict([job_id, later])), verdict.wrong


@pytest.mark.parametrize("name", breaks())
async def test_an_api_cut_off_answers_503_and_waits_are_answered_when_the_link_is_back(stack: Stack, name: str) -> None:
    api = await stack.start("api-0")
    await stack.start("worker-0")
    async with stack.client(api) as client:
        waiting = asyncio.ensure_future(
            client.post(
                "/generate", json={"prompt": "a cat", "num_inference_steps": 200}, headers={"Idempotency-Key": "1"}
            )
        )
        await wait_until(lambda: api.events("job_accepted"), what="the job")
        await break_until_proven(api, name)
        meanwhile = await client.post("/generate", json={"prompt": "a dog", "mode": "async"})
        if name in ("cut", "silent"):
            assert (meanwhile.status_code, meanwhile.json()["code"]) == (503, "queue_unavailable")
            assert "retry-after" in meanwhile.headers
        else:
            assert meanwhile.status_code in (202, 503)
        api.link.mend()
        reply = await waiting
        assert reply.status_code == 200, reply.text
        job_id = reply.json()["job_id"]
        later = await submit(client)
        assert (await ended(stack.queue, later)).state is JobState.SUCCEEDED
    assert (verdict := await stack.verdict([job_id, later])), verdict.wrong


@pytest.mark.parametrize("name", BROKEN)
async def test_a_worker_told_to_end_while_its_link_is_broken_does_so_in_time(stack: Stack, name: str) -> None:
    api = await stack.start("api-0")
    lonely = await stack.start("worker-0")
    async with stack.client(api) as client:
        job_id = await submit(client, num_inference_steps=200)
        await stepped(stack.queue, job_id, 10)
        await break_until_proven(lonely, name)
        told_s = time.monotonic()
        lonely.child.signal(signal.SIGTERM)
        assert await lonely.child.wait() == 0
        assert time.monotonic() - told_s < 4, "a supervisor grants 2.5 s, and this machine may be busy"
        await stack.start("worker-1")
        assert (await ended(stack.queue, job_id)).state is JobState.SUCCEEDED
    assert (verdict := await stack.verdict([job_id])), verdict.wrong


@pytest.mark.parametrize("name", BROKEN)
async def test_an_api_told_to_end_while_its_link_is_broken_tells_its_callers_and_does_so_in_time(
    stack: Stack, name: str
) -> None:
    api = await stack.start("api-0")
    await stack.start("worker-0")
    async with stack.client(api) as client:
        waiting = asyncio.ensure_future(
            client.post(
                "/generate", json={"prompt": "a cat", "num_inference_steps": 200}, headers={"Idempotency-Key": "1"}
            )
        )
        accepted = await api.logged("job_accepted")
        await break_until_proven(api, name)
        told_s = time.monotonic()
        api.child.signal(signal.SIGTERM)
        reply = await waiting
        assert (reply.status_code, reply.json()["code"]) == (503, "queue_unavailable")
        assert reply.json()["job_id"] == accepted["job_id"]
    assert await api.child.wait() == 0
    assert time.monotonic() - told_s < 4, "a supervisor grants 1.7 s, and this machine may be busy"
    assert (await ended(stack.queue, accepted["job_id"])).state in (JobState.SUCCEEDED, JobState.CANCELLED)
    assert (verdict := await stack.verdict([accepted["job_id"]])), verdict.wrong
