"""Redis has no memory or no disk left, or the result store has none."""

from __future__ import annotations

from pathlib import Path

import pytest
from darkroom import metrics
from darkroom.diffusion.loader import DiffusionModel
from darkroom.jobs import JobState
from redis.exceptions import OutOfMemoryError

from tests.chaos.redis_world import World, soon, world
from tests.support.redis_servers import RedisServer, eventually
from tests.support.tmpfs import filled, small_disk

DISK_BYTES = 8 << 20


async def test_at_its_memory_limit_new_jobs_are_refused_and_running_ones_are_stored(
    tiny_model: DiffusionModel, tmp_path: Path
) -> None:
    with RedisServer(tmp_path / "redis") as server, server.client() as redis:
        async with world(tiny_model, server, tmp_path) as all_:
            all_.gate.clear()
            accepted = await all_.accept(2)
            await all_.runs(accepted[0])
            redis.config_set("maxmemory", redis.info("memory")["used_memory"] - (100 << 10))
            with pytest.raises(OutOfMemoryError):
                redis.set("more", 1)
            refused = await all_.submit()
            assert (refused.status_code, refused.json()["code"]) == (503, "storage_full")
            all_.gate.set()
            for job_id in accepted:
                assert (await all_.ends(job_id)).state is JobState.SUCCEEDED
            assert (await all_.client.get(f"/jobs/{accepted[0]}/images/0")).status_code == 200
            redis.config_set("maxmemory", 0)
            accepted.append(await all_.accept_soon(key="after"))
            verdict = await all_.verdict(accepted)
            assert verdict, verdict.wrong
            assert verdict.states == {"succeeded": 3}


@pytest.mark.parametrize("appendfsync", ["everysec", "always"])
async def test_a_full_disk_makes_a_server_refuse_writes_or_ends_it_where_each_is_synced(
    tiny_model: DiffusionModel, tmp_path: Path, appendfsync: str
) -> None:
    with (
        small_disk(tmp_path / "disk", DISK_BYTES) as disk,
        RedisServer(disk / "redis", appendonly="yes", appendfsync=appendfsync) as server,
    ):
        async with world(tiny_model, server, tmp_path) as all_:
            all_.gate.clear()
            accepted = await all_.accept(2)
            await all_.runs(accepted[0])
            with filled(disk):
                refused = await all_.refused(accepted)
                assert (refused.status_code, refused.json()["code"]) == (503, "queue_unavailable")
                if appendfsync == "everysec":
                    assert await soon(lambda: _says_disk(all_))
                    assert server.is_running
                else:
                    await eventually(lambda: not server.is_running)
                all_.gate.set()
            if appendfsync == "always":
                server.start()
            accepted.append(await all_.accept_soon(key="after"))
            verdict = await all_.verdict(accepted)
            assert verdict, verdict.wrong
            # A call whose reply the end of the server cut off may have left its job.
            assert set(verdict.states) == {"succeeded"}


@pytest.mark.parametrize("patience_s", [20.0, 0.5], ids=["for long enough", "too briefly"])
async def test_a_full_disk_of_the_result_store_is_waited_out(
    tiny_model: DiffusionModel, tmp_path: Path, patience_s: float
) -> None:
    with small_disk(tmp_path / "disk", DISK_BYTES) as disk, RedisServer(tmp_path / "redis") as server:
        store = {"result_store": f"file://{disk}/pictures", "result_store_timeout_s": patience_s}
        async with world(tiny_model, server, tmp_path, **store) as all_:
            all_.gate.clear()
            [job_id] = await all_.accept(1)
            await all_.runs(job_id)
            with filled(disk):
                all_.gate.set()
                if patience_s < 1:
                    status = await all_.ends(job_id)
                    assert status.failure is not None
                    assert (status.state, status.failure.code) == (JobState.FAILED, "storage_unavailable")
                else:
                    failed = metrics.RESULT_STORE_ERRORS.labels("put")._value.get()
                    await soon(lambda: _more_puts_failed(failed))
                    assert (await all_.look.status(job_id)).state is JobState.RUNNING
            expected = "failed" if patience_s < 1 else "succeeded"
            assert (await all_.ends(job_id)).state == expected
            after = await all_.accept_soon(key="after")
            assert (await all_.ends(after)).state is JobState.SUCCEEDED
            assert (await all_.client.get(f"/jobs/{after}/images/0")).status_code == 200
            verdict = await all_.verdict([job_id, after])
            assert verdict, verdict.wrong


async def _says_disk(all_: World) -> bool:
    reply = await all_.submit()
    return reply.status_code == 503 and "cannot write to its disk" in reply.json()["detail"]


async def _more_puts_failed(before: float) -> bool:
    return metrics.RESULT_STORE_ERRORS.labels("put")._value.get() > before
