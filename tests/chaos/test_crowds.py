"""Very many jobs, and the randomised campaign in small."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest
from darkroom.jobs import Job
from darkroom.queue import JobQueue

from tests.chaos.__main__ import PATIENT, SETTINGS
from tests.chaos.campaign import Campaign
from tests.chaos.soak import slope_with_interval
from tests.chaos.stack import Stack
from tests.chaos.verdict import judge
from tests.support.jobs import MODEL, make_card, make_job, make_result


async def herd(stack: Stack, num_jobs: int, num_workers: int) -> None:
    """All jobs wait when all workers, which have their results at once, start together."""
    jobs = [make_job() for _ in range(num_jobs)]
    room, ready = asyncio.Semaphore(24), asyncio.Barrier(num_workers)

    async def enqueue(job: Job) -> None:
        async with room:
            await stack.queue.enqueue(job, result_bytes=1000)

    async def work(name: str) -> int:
        queue, num_done = await JobQueue.connect(stack.settings, stack.redis.url), 0
        async with contextlib.AsyncExitStack() as closing:
            closing.push_async_callback(queue.close)
            await queue.register(name, [make_card()])
            await ready.wait()
            while claimed := await queue.claim(name, [MODEL], 16, 64):
                await queue.heartbeat(name)
                ends = (queue.succeed(name, job, make_result([b"picture"], name), [b"picture"]) for job in claimed)
                num_done += sum(await asyncio.gather(*ends))
        return num_done

    await asyncio.gather(*map(enqueue, jobs))
    assert (await stack.queue.stats()).waiting == num_jobs
    done = await asyncio.gather(*(work(f"worker-{number}") for number in range(num_workers)))
    assert sum(done) == num_jobs
    assert min(done) > 0, "each had its share"
    verdict = await judge(stack.queue, stack.settings, [job.id for job in jobs])
    assert verdict, verdict.wrong
    assert verdict.states == {"succeeded": num_jobs}


@pytest.mark.parametrize("num_jobs", [500, pytest.param(10_000, marks=(pytest.mark.chaos, pytest.mark.timeout(600)))])
async def test_a_herd_of_workers_that_finds_a_mountain_of_jobs_does_each_once(
    chaos_model: Path, tmp_path: Path, num_jobs: int
) -> None:
    async with Stack(tmp_path, chaos_model, max_queue_jobs=20_000, lease_s=15.0) as stack:
        await herd(stack, num_jobs, 8)


@pytest.mark.timeout(300)
async def test_ten_random_kills_lose_and_double_nothing(chaos_model: Path, tmp_path: Path) -> None:
    said: list[str] = []
    async with Stack(tmp_path, chaos_model, max_failures=20, **SETTINGS) as stack:
        campaign = Campaign(stack, 7, say=said.append)
        verdict, line = await campaign.kills(10)
    assert verdict, said
    assert not campaign.book.failed, said
    assert line.startswith("lost 0 doubled 0 of ")
    assert campaign.num_compared > 0


@pytest.mark.chaos
@pytest.mark.timeout(300)
async def test_rolling_restarts_fail_no_request_and_repeat_no_step(chaos_model: Path, tmp_path: Path) -> None:
    said: list[str] = []
    async with Stack(tmp_path, chaos_model, **PATIENT) as stack:
        campaign = Campaign(stack, 7, num_workers=2, say=said.append)
        verdict, line = await campaign.restarts(2)
    assert verdict, said
    assert line.startswith("0 of "), said
    assert line.endswith(" 0 steps repeated"), said


def test_the_interval_of_a_slope_knows_a_leak_from_a_wobble() -> None:
    seconds = [2.0 * n for n in range(200)]
    wobble = [float((n * 7919) % 101) for n in range(200)]
    slope, half = slope_with_interval(seconds, wobble)
    assert abs(slope) < half
    slope, half = slope_with_interval(seconds, [value + at for at, value in zip(seconds, wobble, strict=True)])
    assert 0.9 < slope - half < slope + half < 1.1


def test_one_page_of_memory_within_minutes_is_no_slope_and_a_page_each_few_seconds_is_one() -> None:
    """Of a single step hardly two samples count: the normal distribution called it growth."""
    seconds = [2.0 * n for n in range(300)]
    slope, half = slope_with_interval(seconds, [4096.0 * (at >= 250) for at in seconds])
    assert abs(slope) < half
    slope, half = slope_with_interval(seconds, [4096.0 * (at // 10) for at in seconds])
    assert slope - half > 0
