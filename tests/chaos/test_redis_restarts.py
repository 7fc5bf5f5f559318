"""Redis is killed, restarted, wiped: what its settings promise is kept, and what is lost is said to be lost."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
from darkroom.diffusion.loader import DiffusionModel
from darkroom.jobs import JobState

from tests.chaos.redis_world import World, soon, world
from tests.support.redis_servers import RedisServer


@pytest.mark.parametrize("end", ["kill -9", pytest.param("in good order", marks=pytest.mark.chaos)])
@pytest.mark.parametrize("appendfsync", ["always", pytest.param("everysec", marks=pytest.mark.chaos)])
async def test_with_an_append_only_file_no_accepted_job_is_lost_by_a_restart(
    tiny_model: DiffusionModel, tmp_path: Path, appendfsync: str, end: str
) -> None:
    options = {"appendonly": "yes", "appendfsync": appendfsync}
    with RedisServer(tmp_path / "redis", **options) as server:
        async with world(tiny_model, server, tmp_path) as all_:
            all_.gate.clear()
            accepted = await all_.accept(4)
            await all_.runs(accepted[0])
            waiting = asyncio.create_task(all_.submit(mode="wait"))
            await soon(lambda: _num_accepted(all_, 5))
            if end == "kill -9":
                server.kill()
            else:
                server.end()
            assert not server.is_running
            refused = await all_.submit()
            assert (refused.status_code, refused.json()["code"]) == (503, "queue_unavailable")
            assert int(refused.headers["retry-after"]) >= 1
            all_.gate.set()
            server.start()
            answered = await waiting
            assert answered.status_code == 200, "the call that waited through it has its picture"
            accepted += [answered.json()["job_id"], await all_.accept_soon(key="after")]
            verdict = await all_.verdict(accepted)
            assert verdict, verdict.wrong
            assert verdict.states == {"succeeded": 6}


async def test_snapshots_alone_lose_what_came_after_the_last_one_and_it_is_said_so(
    tiny_model: DiffusionModel, tmp_path: Path
) -> None:
    with RedisServer(tmp_path / "redis") as server:
        async with world(tiny_model, server, tmp_path) as all_:
            all_.gate.clear()
            kept = await all_.accept(2)
            await all_.runs(kept[0])
            with server.client() as redis:
                redis.save()
            lost = await all_.accept(6)
            waiting = asyncio.create_task(all_.submit(mode="wait"))
            await soon(lambda: _num_accepted(all_, 9))
            server.kill()
            server.start()
            gone = await waiting
            assert (gone.status_code, gone.json()["code"]) == (404, "job_not_found")
            assert [await all_.state(job_id) for job_id in lost] == ["job_not_found"] * 6
            all_.gate.set()
            verdict = await all_.verdict(kept)
            assert verdict, verdict.wrong
            assert verdict.states == {"succeeded": 2}, "and no result of a job that is no more"


@pytest.mark.parametrize("wiped_by", [pytest.param("FLUSHALL", marks=pytest.mark.chaos), "an empty directory"])
async def test_a_wiped_redis_is_taken_into_use_again_and_its_jobs_are_not_found(
    tiny_model: DiffusionModel, tmp_path: Path, wiped_by: str
) -> None:
    with RedisServer(tmp_path / "redis", appendonly="yes") as server:
        async with world(tiny_model, server, tmp_path) as all_:
            all_.gate.clear()
            lost = await all_.accept(5)
            await all_.runs(lost[0])
            waiting = asyncio.create_task(all_.submit(mode="wait"))
            await soon(lambda: _num_accepted(all_, 6))
            if wiped_by == "FLUSHALL":
                with server.client() as redis:
                    redis.flushall()
                    redis.script_flush()
            else:
                server.kill()
                shutil.rmtree(server.directory)
                server.start()
            gone = await waiting
            assert (gone.status_code, gone.json()["code"]) == (404, "job_not_found")
            all_.gate.set()
            job_id = await all_.accept_soon(key="after")
            assert (await all_.ends(job_id)).state is JobState.SUCCEEDED
            assert [await all_.state(job_id) for job_id in lost] == ["job_not_found"] * 5
            assert (await all_.client.get("/models")).json()["models"][0]["id"] == tiny_model.id
            await soon(all_.is_ready)
            verdict = await all_.verdict([job_id])
            assert verdict, verdict.wrong
            assert verdict.states == {"succeeded": 1}, "the worker wrote nothing of the jobs that are no more"


@pytest.mark.chaos
async def test_a_server_that_still_loads_its_data_is_waited_for(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    with RedisServer(tmp_path / "redis", appendonly="yes", appendfsync="always") as server:
        async with world(tiny_model, server, tmp_path) as all_:
            all_.gate.clear()
            accepted = await all_.accept(30)
            with server.client() as redis:
                # A file of commands is read in one go; in one of values there is a pause after each.
                redis.bgrewriteaof()
                await soon(lambda: _is_rewritten(redis))
            server.kill()
            server.start(until="it listens", key_load_delay=20_000, loading_process_events_interval_bytes=1024)
            refused = await soon(lambda: _refusal(all_, "still loads its data"))
            assert refused.json()["code"] == "queue_unavailable"
            all_.gate.set()
            accepted.append(await all_.accept_soon(key="after"))
            verdict = await all_.verdict(accepted)
            assert verdict, verdict.wrong
            assert verdict.states == {"succeeded": 31}


async def _num_accepted(all_: World, count: int) -> bool:
    return (await all_.look.stats()).counters["accepted"] == count


async def _is_rewritten(redis: Any) -> bool:
    info = redis.info("persistence")
    return not info["aof_rewrite_in_progress"] and not info["aof_rewrite_scheduled"]


async def _refusal(all_: World, detail: str) -> httpx.Response | None:
    reply = await all_.submit()
    return reply if reply.status_code == 503 and detail in reply.json()["detail"] else None
