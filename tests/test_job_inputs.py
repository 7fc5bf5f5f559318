"""Pictures that a job begins with lie beside it in Redis from its acceptance to its end, and no longer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from darkroom.config import Settings
from darkroom.errors import IdempotencyMismatch, JobError, QueueFull, QueueUnavailable
from darkroom.jobs import Failure, Job, JobState
from darkroom.queue import JobQueue
from darkroom.queue.keys import Keys
from redis.asyncio import Redis

from tests.support.jobs import MODEL, end_lease, make_job, make_result

INPUTS = {"init_image": b"picture" * 1000, "mask_image": b"mask" * 1000}


@pytest_asyncio.fixture
async def redis(redis_url: str) -> AsyncIterator[Any]:
    client = Redis.from_url(redis_url, protocol=2)
    yield client
    await client.aclose()


@pytest.fixture
def keys(settings: Settings) -> Keys:
    return Keys(settings.shard)


def masked_job() -> Job:
    job = make_job()
    request = msgspec.structs.replace(job.request, init_image="a", mask_image="b", strength=0.5)
    return msgspec.structs.replace(job, request=request)


async def enqueue(queue: JobQueue, job: Job, **arguments: Any) -> Job:
    await queue.enqueue(job, result_bytes=1000, inputs=INPUTS, **arguments)
    return job


async def stored(redis: Any, keys: Keys) -> set[str]:
    found = [*await redis.keys(f"{keys.prefix}input:*"), *await redis.keys(f"{keys.prefix}staged:*")]
    return {key.decode().removeprefix(keys.prefix) for key in found}


async def lose(queue: JobQueue, job: Job) -> None:
    await end_lease(queue, job)
    await queue.reap()


async def test_every_attempt_finds_them_and_the_end_removes_them(queue: JobQueue, redis: Any, keys: Keys) -> None:
    job = await enqueue(queue, masked_job())
    [first] = await queue.claim("w1", [MODEL], 1, 8)
    assert await queue.inputs(first) == INPUTS
    await lose(queue, job)
    [second] = await queue.claim("w2", [MODEL], 1, 8)
    assert await queue.inputs(second) == INPUTS
    for name in INPUTS:
        assert await redis.pttl(keys.input(job.id, name)) == -1, "they stay for as long as the job waits"
    assert await queue.succeed("w2", second, make_result([b"picture"]), [b"picture"])
    assert await stored(redis, keys) == set()


async def test_a_job_without_pictures_asks_for_none(queue: JobQueue) -> None:
    await queue.enqueue(make_job(), result_bytes=1000)
    [job] = await queue.claim("w1", [MODEL], 1, 8)
    assert await queue.inputs(job) == {}


@pytest.mark.parametrize("end", ["failed", "cancelled", "cancelled while waiting", "expired", "unreadable"])
async def test_whatever_its_end_nothing_is_left(queue: JobQueue, redis: Any, keys: Keys, end: str) -> None:
    job = await enqueue(queue, masked_job(), deadline_s=0.0 if end == "expired" else None)
    if end == "cancelled while waiting":
        await queue.cancel(job.id)
    elif end == "expired":
        await queue.reap()
    else:
        [held] = await queue.claim("w1", [MODEL], 1, 8)
        if end == "failed":
            await queue.fail("w1", held, Failure(code="non_finite", message="noise"))
        elif end == "cancelled":
            await queue.acknowledge_cancel("w1", held)
        else:
            await redis.hset(keys.job(job.id), "attempt", "many")
            await lose(queue, job)
    assert (await queue._connection.command("HGET", keys.job(job.id), "state")).decode() == end.split()[0].replace(
        "unreadable", "failed"
    )
    assert await stored(redis, keys) == set()


async def test_a_dead_letter_keeps_them_as_long_as_its_record(
    queue: JobQueue, redis: Any, keys: Keys, settings: Settings
) -> None:
    job = await enqueue(queue, masked_job())
    for _ in range(settings.max_failures):
        await queue.claim("w1", [MODEL], 1, 8)
        await lose(queue, job)
    assert (await queue.status(job.id)).state is JobState.FAILED
    assert await stored(redis, keys) == {f"input:{job.id}:{name}" for name in INPUTS}
    for name in INPUTS:
        assert 0 < await redis.pttl(keys.input(job.id, name)) <= settings.job_ttl_s * 1000
    [letter] = await queue.dead_letters.all()
    await queue.dead_letters.replay(letter)
    [again] = await queue.claim("w1", [MODEL], 1, 8)
    assert again.id != job.id
    assert await queue.inputs(again) == INPUTS


async def test_a_dead_letter_whose_pictures_are_gone_is_not_replayed(
    queue: JobQueue, redis: Any, keys: Keys, settings: Settings
) -> None:
    job = await enqueue(queue, masked_job())
    for _ in range(settings.max_failures):
        await queue.claim("w1", [MODEL], 1, 8)
        await lose(queue, job)
    await redis.delete(keys.input(job.id, "mask_image"))
    [letter] = await queue.dead_letters.all()
    with pytest.raises(JobError, match="pictures that it begins with are not kept any more"):
        await queue.dead_letters.replay(letter)
    assert await queue.dead_letters.all() == [letter]


async def test_a_job_that_is_not_taken_leaves_nothing(
    settings: Settings, queue: JobQueue, redis: Any, keys: Keys
) -> None:
    small = await JobQueue.connect(settings.model_copy(update={"max_queue_jobs": 1}), str(settings.redis_url))
    try:
        first = await enqueue(small, masked_job(), idempotency_key="one", body_hash="a")
        kept = {f"input:{first.id}:{name}" for name in INPUTS}
        assert await stored(redis, keys) == kept
        with pytest.raises(QueueFull):
            await enqueue(small, masked_job(), body_hash="b")
        with pytest.raises(IdempotencyMismatch):
            await enqueue(small, masked_job(), idempotency_key="one", body_hash="b")
        again = await small.enqueue(
            masked_job(), result_bytes=1000, inputs=INPUTS, idempotency_key="one", body_hash="a"
        )
        assert (again.is_new, again.job_id) == (False, first.id)
        assert await stored(redis, keys) == kept
    finally:
        await small.close()


async def test_one_sent_twice_is_one_job_with_its_pictures(queue: JobQueue, redis: Any, keys: Keys) -> None:
    """The first reply was lost, and the client library sends everything again."""
    job = masked_job()
    await enqueue(queue, job)
    assert (await queue.enqueue(job, result_bytes=1000, inputs=INPUTS)).is_new
    [held] = await queue.claim("w1", [MODEL], 1, 8)
    assert await queue.inputs(held) == INPUTS
    for key in await redis.keys(f"{keys.prefix}staged:*"):
        assert await redis.pttl(key) > 0


async def test_they_count_as_memory_until_the_job_ends(queue: JobQueue) -> None:
    await queue.enqueue(make_job(), result_bytes=1000)
    one = (await queue.stats()).reserved_bytes
    job = await enqueue(queue, masked_job())
    both = (await queue.stats()).reserved_bytes
    assert both - 2 * one >= sum(map(len, INPUTS.values()))
    await queue.cancel(job.id)
    assert (await queue.stats()).reserved_bytes == one


async def test_a_server_without_memory_for_them_says_so_and_keeps_none(queue: JobQueue, redis: Any, keys: Keys) -> None:
    await queue.memory()  # known for a second from now on
    await redis.config_set("maxmemory", 1)
    try:
        with pytest.raises(QueueUnavailable, match="memory is full"):
            await enqueue(queue, masked_job())
    finally:
        await redis.config_set("maxmemory", 0)
    assert await stored(redis, keys) == set()
    assert (await queue.stats()).counters["accepted"] == 0
