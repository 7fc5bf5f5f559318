"""Another server takes over: what the old one had alone is reported as lost, and `replicated` leaves nothing there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from darkroom import metrics
from darkroom.diffusion.loader import DiffusionModel
from darkroom.jobs import JobState

from tests.chaos.redis_world import World, soon, world
from tests.support.redis_servers import RedisServer, eventually


@contextlib.contextmanager
def pair(directory: Path) -> Iterator[tuple[RedisServer, RedisServer]]:
    """A master and its replica, in step."""
    with RedisServer(directory / "master") as master, RedisServer(directory / "replica") as replica:
        replica.follow(master)
        yield master, replica


async def point_to(all_: World, server: RedisServer) -> None:
    """The address leads to `server` from now on, for new connections."""
    all_.api.target = all_.worker.target = server.address
    await all_.look_at(server)


@pytest.mark.parametrize("durability", ["fsync", pytest.param("replicated", marks=pytest.mark.chaos)])
async def test_a_promoted_replica_goes_on_with_what_it_has_and_the_rest_is_reported_lost(
    tiny_model: DiffusionModel, tmp_path: Path, durability: str
) -> None:
    with pair(tmp_path) as (master, replica):
        async with world(tiny_model, master, tmp_path, durability=durability) as all_:
            all_.gate.clear()
            accepted = await all_.accept(3)
            await all_.runs(accepted[0])
            await eventually(lambda: replica.is_in_step_with(master))
            # The old master is alone from here on, and for a while nobody knows.
            replica.promote()
            replies = [await all_.submit() for _ in range(3)]
            late = [reply.json()["job_id"] for reply in replies]
            if durability == "replicated":
                assert {reply.json().get("code") for reply in replies} == {"not_replicated"}
                assert {reply.status_code for reply in replies} == {503}
            else:
                assert {reply.status_code for reply in replies} == {202}
            master.kill()
            await point_to(all_, replica)
            all_.gate.set()
            assert [await all_.state(job_id) for job_id in late] == ["job_not_found"] * 3
            if durability == "fsync":
                accepted.append(await all_.accept_soon(key="after"))
            verdict = await all_.verdict(accepted)
            assert verdict, verdict.wrong
            assert verdict.states == {"succeeded": len(accepted)}


async def test_a_claim_that_the_new_master_never_heard_of_is_made_again_and_drawn_once(
    tiny_model: DiffusionModel, tmp_path: Path
) -> None:
    """Regression: the worker was given the attempt that it held already, and drew the job twice side by side
    (tests/test_worker.py looks at that more closely)."""
    with pair(tmp_path) as (master, replica):
        # No renewal falls into the test, by which the worker would learn that the claim is lost and give the job up.
        async with world(tiny_model, master, tmp_path, lease_s=60.0) as all_:
            all_.gate.clear()
            all_.worker.cut()
            [job_id] = await all_.accept(1)
            await eventually(lambda: replica.is_in_step_with(master))
            # From here on the replica hears nothing, and the claim is made at a master that is about to die.
            replica.promote()
            all_.worker.mend()
            await all_.runs(job_id)
            await all_.look_at(replica)
            status = await all_.look.status(job_id)
            assert (status.state, status.job.attempt) == (JobState.QUEUED, 0), "it has never heard of the claim"
            steps = metrics.ROW_STEPS._value.get()
            master.kill()
            await point_to(all_, replica)
            await all_.runs(job_id)
            status = await all_.look.status(job_id)
            assert status.job.attempt == 1, "the server has forgotten that there was such an attempt"
            all_.gate.set()
            verdict = await all_.verdict([job_id])
            assert verdict, verdict.wrong
            assert metrics.ROW_STEPS._value.get() - steps == status.job.request.num_inference_steps
            assert (await all_.look.status(job_id)).job.failures == 0


async def test_a_master_that_was_made_a_replica_is_left_for_the_new_one(
    tiny_model: DiffusionModel, tmp_path: Path
) -> None:
    """It keeps old connections open and answers each write with -READONLY."""
    with pair(tmp_path) as (master, replica):
        async with world(tiny_model, master, tmp_path) as all_:
            all_.gate.clear()
            accepted = await all_.accept(2)
            await all_.runs(accepted[0])
            await eventually(lambda: replica.is_in_step_with(master))
            replica.promote()
            master.follow(replica)
            refused = await all_.submit()
            assert (refused.status_code, refused.json()["code"]) == (503, "queue_unavailable")
            assert "read-only replica" in refused.json()["detail"]
            num_reset = all_.api.num_reset + all_.worker.num_reset
            await point_to(all_, replica)
            accepted.append(await all_.accept_soon(key="after"))
            all_.gate.set()
            verdict = await all_.verdict(accepted)
            assert verdict, verdict.wrong
            assert verdict.states == {"succeeded": 3}
            assert all_.api.num_reset + all_.worker.num_reset == num_reset, "nobody broke the old connections for them"
            await soon(all_.is_ready)
