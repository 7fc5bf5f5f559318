"""Redis behind Sentinel: the address, and a failover that real sentinels decide."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest
from darkroom.config import Settings
from darkroom.errors import ConfigError, QueueUnavailable
from darkroom.queue import JobQueue

from tests.support.jobs import MODEL, make_job
from tests.support.redis_servers import RedisServer, eventually, sentinels

BYTES = 1000


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://127.0.0.1",
        "redis+sentinel:///jobs",
        "redis+sentinel://a:b:c/jobs",
        "redis+sentinel://a,,b/jobs",
        "redis+sentinel://a:26379/jobs/first",
        "redis+sentinel://a:26379/jobs?db=1",
    ],
)
def test_an_address_that_is_none_is_refused_with_the_form_it_should_have(settings: Settings, url: str) -> None:
    with pytest.raises(ConfigError, match=r"expected redis\+sentinel://\[user:password@\]host"):
        JobQueue(settings, url)


@pytest.mark.chaos
async def test_after_a_failover_the_queue_is_where_the_sentinels_say(settings: Settings, tmp_path: Path) -> None:
    with RedisServer(tmp_path / "master") as master, RedisServer(tmp_path / "replica") as replica:
        replica.follow(master)
        with sentinels(tmp_path / "sentinels", master, count=3) as ports:
            # One that is away does not matter.
            hosts = ",".join(f"127.0.0.1:{port}" for port in (1, *ports))
            queue = await JobQueue.connect(
                settings.model_copy(update={"durability": "replicated"}), f"redis+sentinel://{hosts}/jobs"
            )
            try:
                job = make_job()
                await queue.enqueue(job, result_bytes=BYTES)
                master.kill()
                with pytest.raises(QueueUnavailable):
                    await queue.ping()
                ends_at = time.monotonic() + 30
                while time.monotonic() < ends_at:
                    with contextlib.suppress(QueueUnavailable):
                        [claimed] = await queue.claim("w1", [MODEL], 1, 100)
                        break
                assert claimed.id == job.id
                with replica.client() as redis:
                    assert redis.role()[0] == "master"
                master.start()
                await eventually(lambda: master.is_replica_of(replica), timeout_s=30)
                await queue.enqueue(make_job(), result_bytes=BYTES)
            finally:
                await queue.close()
