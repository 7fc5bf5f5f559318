"""What `accepted` means, by DARKROOM_DURABILITY and by the settings of the server."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from darkroom.config import Settings
from darkroom.errors import ConfigError, NotReplicated
from darkroom.jobs import JobState
from darkroom.queue import EmbeddedRedis, JobQueue
from darkroom.queue.durability import promise_of
from redis import Redis

from tests.support.jobs import MODEL, make_job, make_result
from tests.support.redis_servers import RedisServer, eventually

BYTES = 1000


@contextlib.asynccontextmanager
async def opened(settings: Settings, url: str, **changes: object) -> AsyncIterator[JobQueue]:
    queue = await JobQueue.connect(settings.model_copy(update=changes), url)
    try:
        yield queue
    finally:
        await queue.close()


async def logged(settings: Settings, url: str) -> list[Any]:
    with structlog.testing.capture_logs() as logs:
        async with opened(settings, url):
            return logs


@pytest.mark.parametrize(("durability", "appendfsync"), [("fsync", "always"), ("relaxed", "everysec")])
async def test_the_private_redis_keeps_what_it_is_told_to(tmp_path: Path, durability: Any, appendfsync: str) -> None:
    settings = Settings(data_dir=tmp_path, redis_url=None, durability=durability)
    with EmbeddedRedis(settings) as server:
        with Redis.from_url(server.url, protocol=2, decode_responses=True) as redis:
            assert redis.config_get("append*")["appendfsync"] == appendfsync
        [promise] = await logged(settings, server.url)
        assert (promise["event"], promise["durability"], promise["appendfsync"]) == (
            "queue_promise",
            durability,
            appendfsync,
        )


def test_the_private_redis_cannot_be_replicated(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="set DARKROOM_REDIS_URL to one with"):
        EmbeddedRedis(Settings(data_dir=tmp_path, redis_url=None, durability="replicated"))


async def test_what_an_external_server_promises_is_logged_and_less_than_was_asked_for_is_a_warning(
    settings: Settings, tmp_path: Path
) -> None:
    with RedisServer(tmp_path) as server, server.client() as redis:

        async def promise(durability: str = "fsync", **config: str) -> list[Any]:
            for name, value in config.items():
                redis.config_set(name.replace("_", "-"), value)
            return await logged(settings.model_copy(update={"durability": durability}), server.url)

        said, warning = await promise(save="3600 1")
        assert "since its last snapshot: appendonly is off" in said["promise"]
        assert (warning["log_level"], warning["wanted"]) == ("warning", "DARKROOM_DURABILITY=fsync")
        said, warning = await promise(save="")
        assert "loses every accepted job" in said["promise"] == warning["found"]
        said, warning = await promise(appendonly="yes", appendfsync="everysec")
        assert "may lose the last second" in said["promise"] == warning["found"]
        [said] = await promise("relaxed")
        said, warning = await promise("relaxed", appendfsync="no")
        assert "may lose the last half minute" in warning["found"]
        [said] = await promise(appendfsync="always")
        assert "any crash, the server's and the machine's included" in said["promise"]
        assert (said["appendonly"], said["maxmemory_policy"]) == ("yes", "noeviction")

        said, warning = await promise("replicated")
        assert warning["found"] == "0 replicas follow this server, and 1 must have a job to accept it"
        _, evicting = await promise(maxmemory_policy="allkeys-lru")
        assert evicting["log_level"] == "error"
        assert "deletes accepted jobs" in evicting["risk"]


async def test_a_server_that_hides_its_settings_is_said_to_and_is_no_obstacle(
    settings: Settings, tmp_path: Path
) -> None:
    with RedisServer(tmp_path) as server, server.client() as redis:
        redis.execute_command("ACL", "SETUSER", "default", "-config", "-info")
        [said] = await logged(settings, server.url)
        assert "cannot be inspected" in said["promise"]
        redis.execute_command("ACL", "SETUSER", "default", "+info")
        async with opened(settings, server.url) as queue:
            await queue.enqueue(make_job(), result_bytes=BYTES)


def test_a_promise_is_only_as_good_as_what_is_known() -> None:
    assert promise_of(None, None).shortfall("fsync", 1) is None
    assert promise_of(None, None).shortfall("replicated", 1) is None
    two = promise_of({"appendonly": "yes", "appendfsync": "always"}, {"connected_slaves": 2})
    assert two.sentence.endswith("; 2 replicas follow")
    assert two.shortfall("replicated", 2) is None
    assert "3 must have a job" in (two.shortfall("replicated", 3) or "")


# Replicated


async def test_a_replicated_job_is_on_the_replica_when_it_is_accepted(settings: Settings, tmp_path: Path) -> None:
    with RedisServer(tmp_path / "master") as master, RedisServer(tmp_path / "replica") as replica:
        replica.follow(master)
        async with opened(settings, master.url, durability="replicated") as queue:
            jobs = [make_job() for _ in range(20)]
            for job in jobs:
                await queue.enqueue(job, result_bytes=BYTES)
            claimed = await queue.claim("w1", [MODEL], 1, 100)
            picture = b"x" * 100_000
            assert await queue.succeed("w1", claimed[0], make_result([picture]), (picture,))
            master.kill()
        replica.promote()
        async with opened(settings, replica.url) as queue:
            for job in jobs[1:]:
                assert (await queue.status(job.id)).state == "queued"
            assert await queue.images(jobs[0].id) == [picture]


async def test_a_job_that_no_replica_has_is_refused_and_taken_back_unless_it_can_be_asked_for_again(
    settings: Settings, tmp_path: Path
) -> None:
    with RedisServer(tmp_path / "master") as master, RedisServer(tmp_path / "replica") as replica:
        replica.follow(master)
        async with opened(settings, master.url, durability="replicated") as queue:
            replica.stop_answering()
            with pytest.raises(NotReplicated) as refused:
                await queue.enqueue(make_job(), result_bytes=BYTES)
            assert refused.value.job_id is not None
            assert (await queue.status(refused.value.job_id)).state == JobState.CANCELLED

            keyed: dict[str, Any] = {"result_bytes": BYTES, "idempotency_key": "order 1", "body_hash": "a"}
            with pytest.raises(NotReplicated) as refused:
                await queue.enqueue(make_job(), **keyed)
            async with opened(settings, master.url, durability="replicated") as other:
                with pytest.raises(NotReplicated) as again:
                    await other.enqueue(make_job(), **keyed)
            assert again.value.job_id == refused.value.job_id
            replica.answer_again()
            await eventually(lambda: replica.is_in_step_with(master))
            accepted = await queue.enqueue(make_job(), **keyed)
            assert (accepted.job_id, accepted.is_new, accepted.state) == (refused.value.job_id, False, "queued")


async def test_a_result_that_no_replica_has_yet_still_counts(settings: Settings, tmp_path: Path) -> None:
    with RedisServer(tmp_path / "master") as master, RedisServer(tmp_path / "replica") as replica:
        replica.follow(master)
        async with opened(settings, master.url, durability="replicated") as queue:
            await queue.enqueue(make_job(), result_bytes=BYTES)
            [job] = await queue.claim("w1", [MODEL], 1, 100)
            replica.stop_answering()
            with structlog.testing.capture_logs() as logs:
                assert await queue.succeed("w1", job, make_result([b"picture"]), (b"picture",))
            assert [log["event"] for log in logs] == ["result_not_replicated"]
            assert await queue.images(job.id) == [b"picture"]
            replica.answer_again()
