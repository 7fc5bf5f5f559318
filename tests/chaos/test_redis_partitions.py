"""The way to Redis breaks for one process while the others go on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from darkroom.diffusion.loader import DiffusionModel
from darkroom.jobs import JobState

from tests.chaos.link import Link
from tests.chaos.redis_world import World, soon, world
from tests.support.redis_servers import RedisServer

BREAKS: dict[str, Callable[[Link], None]] = {
    "cut": Link.cut,
    "half-open": Link.fall_silent,
    "reset within a reply": lambda link: link.reset_after(200),
}
broken = pytest.mark.parametrize("broken", BREAKS)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five seconds of silence prove no more than half a one."""
    monkeypatch.setattr("darkroom.queue.connection.SOCKET_TIMEOUT_S", 0.5)
    monkeypatch.setattr("darkroom.queue.notices.SOCKET_TIMEOUT_S", 0.3)
    monkeypatch.setattr("darkroom.queue.worker_side.BLOCK_S", 0.2)


def has_broken(link: Link) -> bool:
    return link.num_refused + link.num_bytes_held + link.num_reset > 0


@broken
async def test_a_worker_that_is_cut_off_gives_its_jobs_up_and_takes_work_again_when_it_is_back(
    tiny_model: DiffusionModel, tmp_path: Path, broken: str
) -> None:
    with RedisServer(tmp_path / "redis") as server:
        async with world(tiny_model, server, tmp_path) as all_:
            all_.gate.clear()
            accepted = await all_.accept(3)
            await all_.runs(accepted[0])
            BREAKS[broken](all_.worker)
            await soon(lambda: _is(has_broken(all_.worker)))
            if broken != "reset within a reply":
                # The API's look at the queue takes them back.
                await soon(lambda: _waits_again(all_, accepted[0]))
            accepted.append(await all_.accept_soon(key="meanwhile"))
            all_.worker.mend()
            all_.gate.set()
            verdict = await all_.verdict(accepted)
            assert verdict, verdict.wrong
            assert verdict.states == {"succeeded": 4}


@broken
async def test_an_api_that_is_cut_off_answers_503_and_its_waiting_calls_get_their_pictures(
    tiny_model: DiffusionModel, tmp_path: Path, broken: str
) -> None:
    with RedisServer(tmp_path / "redis") as server:
        async with world(tiny_model, server, tmp_path) as all_:
            all_.gate.clear()
            waiting = asyncio.create_task(all_.submit(mode="wait"))
            await soon(lambda: _has_accepted(all_, 1))
            BREAKS[broken](all_.api)
            await soon(lambda: _is(has_broken(all_.api)))
            if broken != "reset within a reply":
                refused = await all_.submit(key="again")
                assert (refused.status_code, refused.json()["code"]) == (503, "queue_unavailable")
                assert (await all_.client.get("/health/live")).status_code == 200
            all_.gate.set()
            await soon(lambda: _has_ended(all_, 1))
            all_.api.mend()
            answered = await waiting
            assert answered.status_code == 200
            # What it sent into the silence arrives now, and is the same job.
            job_id = await all_.accept_soon(key="again")
            verdict = await all_.verdict([answered.json()["job_id"], job_id])
            assert verdict, verdict.wrong
            assert verdict.states == {"succeeded": 2}


async def test_a_call_whose_reply_was_cut_in_half_is_one_job(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    with RedisServer(tmp_path / "redis") as server:
        async with world(tiny_model, server, tmp_path) as all_:
            accepted = []
            for num_bytes in (10, 300, 1000):
                num_reset = all_.api.num_reset
                all_.api.reset_after(num_bytes)
                accepted.append(await all_.accept_soon(key=f"order-{num_bytes}"))
                await soon(lambda num_reset=num_reset: _is(all_.api.num_reset > num_reset))
            verdict = await all_.verdict(accepted)
            assert verdict, verdict.wrong
            assert verdict.states == {"succeeded": 3}
            assert len(set(accepted)) == 3


@pytest.mark.chaos
async def test_a_redis_that_pauses_or_is_slow_costs_time_and_no_lease(
    tiny_model: DiffusionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    with RedisServer(tmp_path / "redis") as server:
        async with world(tiny_model, server, tmp_path, lease_s=8.0) as all_:
            all_.api.latency_s = all_.worker.latency_s = 1.0
            accepted = await all_.accept(2)
            statuses = [await all_.ends(job_id) for job_id in accepted]
            assert all_.api.num_delayed > 3
            assert all_.worker.num_delayed > 3
            all_.api.mend()
            all_.worker.mend()
            with server.client() as redis:
                redis.client_pause(2000)
            accepted += await all_.accept(1)
            statuses.append(await all_.ends(accepted[2]))
            assert {(status.state, status.job.attempt) for status in statuses} == {(JobState.SUCCEEDED, 1)}
            verdict = await all_.verdict(accepted)
            assert verdict, verdict.wrong


async def _is(value: bool) -> bool:
    return value


async def _waits_again(all_: World, job_id: str) -> bool:
    return (await all_.look.status(job_id)).state is JobState.QUEUED


async def _has_accepted(all_: World, count: int) -> bool:
    return (await all_.look.stats()).counters["accepted"] == count


async def _has_ended(all_: World, count: int) -> bool:
    return (await all_.look.stats()).counters["succeeded"] == count
