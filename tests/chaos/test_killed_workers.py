"""kill -9, SIGSTOP and SIGTERM of workers, and requests that take workers along."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from pathlib import Path

import pytest
from darkroom.errors import EXIT_DEVICE_LOST
from darkroom.jobs import JobState

from tests.chaos import shims
from tests.chaos.calls import ended, picture, stepped, submit, together
from tests.chaos.stack import Member, Stack
from tests.chaos.verdict import wait_until

STEPS = 60


async def undisturbed(stack: Stack, api: Member, worker: Member, **fields: object) -> tuple[str, bytes]:
    """The id and the picture of the same request when nothing happens."""
    async with stack.client(api) as client:
        job_id = await submit(client, num_inference_steps=STEPS, **fields)
    assert (await ended(stack.queue, job_id)).state is JobState.SUCCEEDED
    return job_id, await picture(stack.queue, job_id)


@pytest.mark.parametrize("moment", ["first step", "middle", "last step"])
async def test_a_job_whose_worker_is_killed_is_the_same_picture_from_another(stack: Stack, moment: str) -> None:
    api = await stack.start("api-0")
    first = await stack.start("worker-0")
    whole, expected = await undisturbed(stack, api, first)
    if moment == "first step":
        trap = first.link.trap(stack.script("progress"), "command", "hold")
    elif moment == "middle":
        trap = first.link.trap(stack.script("checkpoint"), "command", "hold", skip=1)
    else:
        trap = first.link.trap(stack.script("settle"), "command", "hold")
    async with stack.client(api) as client:
        job_id = await submit(client, num_inference_steps=STEPS)
    await asyncio.wait_for(trap.sprung.wait(), 20)
    await stack.kill(first)
    at_death = await stack.queue.status(job_id)
    assert (at_death.state, at_death.job.attempt) == (JobState.RUNNING, 1)

    await stack.start("worker-1")
    status = await ended(stack.queue, job_id)
    assert (status.state, status.job.attempt, status.job.failures) == (JobState.SUCCEEDED, 2, 1)
    assert await picture(stack.queue, job_id) == expected
    assert (verdict := await stack.verdict([whole, job_id])), verdict.wrong


async def test_a_worker_killed_between_storing_a_picture_and_saying_so_costs_nothing_but_time(
    chaos_model: Path, tmp_path: Path
) -> None:
    store = tmp_path / "pictures"
    async with Stack(tmp_path / "stack", chaos_model, result_store=f"file://{store}") as stack:
        api = await stack.start("api-0")
        first = await stack.start("worker-0")
        trap = first.link.trap(stack.script("settle"), "command", "hold")
        async with stack.client(api) as client:
            job_id = await submit(client)
            await asyncio.wait_for(trap.sprung.wait(), 20)
            await stack.kill(first)
            stored = {path.name: path.read_bytes() for path in store.rglob("*.png")}
            assert len(stored) == 1, "the picture is there and its job does not say so"
            assert (await stack.queue.status(job_id)).state is JobState.RUNNING

            await stack.start("worker-1")
            assert (await ended(stack.queue, job_id)).state is JobState.SUCCEEDED
            reply = await client.get(f"/jobs/{job_id}/images/0")
        assert reply.content in stored.values()
        assert (verdict := await stack.verdict([job_id])), verdict.wrong


async def test_a_success_whose_reply_is_lost_with_its_worker_is_not_run_again(stack: Stack) -> None:
    api = await stack.start("api-0")
    first = await stack.start("worker-0")
    trap = first.link.trap(stack.script("settle"), "reply", "hold")
    async with stack.client(api) as client:
        job_id = await submit(client)
    await asyncio.wait_for(trap.sprung.wait(), 20)
    await stack.kill(first)
    status = await ended(stack.queue, job_id)
    assert (status.state, status.job.attempt) == (JobState.SUCCEEDED, 1)
    assert (verdict := await stack.verdict([job_id])), verdict.wrong


async def test_a_success_whose_reply_is_lost_on_the_way_is_told_again_and_stored_once(stack: Stack) -> None:
    api = await stack.start("api-0")
    worker = await stack.start("worker-0")
    trap = worker.link.trap(stack.script("settle"), "reply", "reset")
    async with stack.client(api) as client:
        job_id = await submit(client)
    await worker.logged("job_ended", job_id=job_id, outcome="succeeded", stored=True)
    assert trap.sprung.is_set()
    assert (verdict := await stack.verdict([job_id])), verdict.wrong


async def test_a_worker_that_was_stopped_for_three_leases_writes_nothing_when_it_wakes(stack: Stack) -> None:
    api = await stack.start("api-0")
    sleeper = await stack.start("worker-0")
    async with stack.client(api) as client:
        job_id = await submit(client, num_inference_steps=200)
        await stepped(stack.queue, job_id, 20)
    sleeper.child.signal(signal.SIGSTOP)
    stopped_at = asyncio.get_running_loop().time()
    other = await stack.start("worker-1")
    status = await ended(stack.queue, job_id)
    assert (status.state, status.job.attempt) == (JobState.SUCCEEDED, 2)
    await asyncio.sleep(stopped_at + 3 * stack.settings.lease_s - asyncio.get_running_loop().time())
    before = await stack.queue.status(job_id)
    sleeper.child.signal(signal.SIGCONT)
    await wait_until(lambda: sleeper.events("lease_lost", job_id=job_id), what="the sleeper learns it")
    # It serves again: the next job is for either of the two.
    async with stack.client(api) as client:
        later = [await submit(client, num_images_per_prompt=2) for _ in range(4)]
    for one in later:
        assert (await ended(stack.queue, one)).state is JobState.SUCCEEDED
    assert not sleeper.events("job_ended", job_id=job_id, stored=True)
    after = await stack.queue.status(job_id)
    assert after == before
    assert after.result is not None
    assert after.result.worker == other.worker_id
    assert (verdict := await stack.verdict([job_id, *later])), verdict.wrong


async def test_a_poisonous_request_is_given_up_and_every_batch_mate_succeeds(stack: Stack) -> None:
    api = await stack.start("api-0")
    async with stack.client(api) as client:
        await stack.start("worker-0", prepare=shims.crash_on_poison)
        mates = [await submit(client, seed=seed, guidance_scale=1.0) for seed in range(3)]
        poison = await submit(client, prompt=shims.POISON, guidance_scale=1.0)
    crashes = 0

    async def keep_alive() -> None:
        """What a supervisor does."""
        nonlocal crashes
        while True:
            assert await stack.members["worker-0"].child.wait(30) == -signal.SIGKILL
            crashes += 1
            await stack.start("worker-0", prepare=shims.crash_on_poison)

    keeping = asyncio.ensure_future(keep_alive())
    try:
        poisoned = await ended(stack.queue, poison, 40)
        assert poisoned.failure is not None
        assert (poisoned.state, poisoned.failure.code, poisoned.job.failures) == (JobState.FAILED, "dead_letter", 3)
        states = [(await ended(stack.queue, mate)).state for mate in mates]
    finally:
        keeping.cancel()
    assert states == [JobState.SUCCEEDED] * 3
    assert crashes == 3
    assert (verdict := await stack.verdict([poison, *mates])), verdict.wrong


async def test_a_worker_told_twice_to_end_does_so_at_once_and_its_job_goes_on_elsewhere(stack: Stack) -> None:
    api = await stack.start("api-0")
    first = await stack.start("worker-0")
    async with stack.client(api) as client:
        job_id = await submit(client, num_inference_steps=200)
    await stepped(stack.queue, job_id, 10)
    # It cannot hand its job back.
    first.link.fall_silent()
    # Two signals that come before it has looked at the first one are one to the kernel.
    while first.child.exit_code is None:
        first.child.signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await first.child.wait(0.2)
    assert first.child.exit_code == 130, "and not 0, as a drain would end"
    first.link.mend()
    await stack.start("worker-1")
    assert (await ended(stack.queue, job_id)).state is JobState.SUCCEEDED
    assert (verdict := await stack.verdict([job_id])), verdict.wrong


@pytest.mark.parametrize(
    ("shim", "sign", "code"),
    [(shims.hang_while_loading, "loading", -signal.SIGTERM), (shims.hang_while_warming_up, "warming_up", 0)],
    ids=["while it loads", "while it warms up"],
)
async def test_a_worker_told_to_end_before_it_is_ready_ends_and_has_taken_nothing(
    stack: Stack, shim: object, sign: str, code: int
) -> None:
    api = await stack.start("api-0")
    await stack.start("worker-0")
    async with stack.client(api) as client:
        job_id = await submit(client, num_inference_steps=200)
        starting = await stack.start("worker-1", prepare=shim, is_awaited=False)  # type: ignore[arg-type]
        await starting.logged(sign)
        starting.child.signal(signal.SIGTERM)
        assert await starting.child.wait() == code
        assert not starting.events("job_claimed")
    status = await ended(stack.queue, job_id)
    assert (status.state, status.job.attempt) == (JobState.SUCCEEDED, 1)
    assert (verdict := await stack.verdict([job_id])), verdict.wrong


async def test_a_worker_that_loses_its_device_ends_with_its_own_code_and_another_goes_on(stack: Stack) -> None:
    api = await stack.start("api-0")
    first = await stack.start("worker-0", prepare=shims.lose_the_device)
    async with stack.client(api) as client:
        job_id = await submit(client, num_inference_steps=STEPS)
    assert await first.child.wait() == EXIT_DEVICE_LOST
    # It was under way, so it may be to blame; it need not wait for the lease to run out.
    status = await stack.queue.status(job_id)
    assert (status.state, status.job.attempt, status.job.failures) == (JobState.QUEUED, 1, 1)
    await stack.start("worker-1")
    assert (await ended(stack.queue, job_id)).state is JobState.SUCCEEDED
    assert (verdict := await stack.verdict([job_id])), verdict.wrong


async def test_a_full_log_volume_stops_no_work(stack: Stack) -> None:
    """Both write to a device that is always full."""
    async with stack.client(await stack.start("api-1")) as client:
        worker = await stack.start("worker-0", log=Path("/dev/full"), is_awaited=False)
        api = await stack.start("api-0", log=Path("/dev/full"), is_awaited=False)
        job_id = await submit_when_served(client)
        assert (await ended(stack.queue, job_id)).state is JobState.SUCCEEDED
    assert (worker.child.exit_code, api.child.exit_code) == (None, None)
    assert (verdict := await stack.verdict([job_id])), verdict.wrong


async def submit_when_served(client: object) -> str:
    job_ids: list[str] = []

    async def accepted() -> bool:
        reply = await client.post("/generate", json={"prompt": "a cat", "mode": "async"})  # type: ignore[attr-defined]
        if reply.status_code == 202:
            job_ids.append(reply.json()["job_id"])
        return bool(job_ids)

    await wait_until(accepted, 30, "a worker that serves")
    return job_ids[0]


async def test_a_stored_job_of_another_release_fails_and_the_worker_goes_on(stack: Stack) -> None:
    """Its payload says a version that nobody here knows."""
    from darkroom.jobs import Job, decode, encode
    from darkroom.queue.keys import Keys
    from msgspec.structs import replace

    api = await stack.start("api-0")
    first = await stack.start("worker-0")
    first.child.signal(signal.SIGTERM)
    assert await first.child.wait() == 0
    async with stack.client(api) as client:
        newer = await submit(client)
        known = await submit(client)
    key = Keys(stack.settings.shard).job(newer)
    payload = await stack.queue._connection.command("HGET", key, "payload")
    await stack.queue._connection.command("HSET", key, "payload", encode(replace(decode(payload, Job), version=99)))
    await stack.start("worker-1")
    assert (await ended(stack.queue, known)).state is JobState.SUCCEEDED
    state, code = await stack.queue._connection.command("HMGET", key, "state", "error_code")
    assert (state, code) == (b"failed", b"bad_message")
    assert (verdict := await stack.verdict([newer, known])), verdict.wrong


async def test_a_drained_worker_under_load_repeats_no_step(stack: Stack) -> None:
    api = await stack.start("api-0")
    first = await stack.start("worker-0")
    async with stack.client(api) as client:
        # Long enough that none is done before the signal, and a row each, so that none waits for another to end.
        asked = {"num_inference_steps": 200, "sampler": "heun", "guidance_scale": 1.0}
        jobs = await together(*(submit(client, seed=seed, **asked) for seed in range(3)))
    await stepped(stack.queue, jobs[0], 10)
    first.child.signal(signal.SIGTERM)
    assert await first.child.wait() == 0
    statuses = [await stack.queue.status(job_id) for job_id in jobs]
    assert {status.state for status in statuses} == {JobState.QUEUED}
    assert {status.job.failures for status in statuses} == {0}
    await stack.start("worker-1")
    for job_id in jobs:
        assert (await ended(stack.queue, job_id)).state is JobState.SUCCEEDED
    assert (verdict := await stack.verdict(jobs)), verdict.wrong
