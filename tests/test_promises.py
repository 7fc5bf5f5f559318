"""What a client is told of its job before it is done: when it will be, and that it is in time."""

from __future__ import annotations

import heapq
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from darkroom.config import Settings
from darkroom.errors import DeadlineUnmet, InvalidRequest
from darkroom.jobs import Failure, Job
from darkroom.queue import EmbeddedRedis, JobQueue
from darkroom.queue.keys import Keys
from redis.asyncio import Redis

from tests.support.jobs import MODEL, make_card, make_job, make_result

RATE = 100.0


@pytest_asyncio.fixture
async def redis(redis_url: str) -> AsyncIterator[Any]:
    """A plain client, to look behind the queue's back."""
    client = Redis.from_url(redis_url, protocol=2)
    yield client
    await client.aclose()


@pytest.fixture
def keys(settings: Settings) -> Keys:
    return Keys(settings.shard)


def costing(cost: float, tenant: str = "default", **fields: Any) -> Job:
    return msgspec.structs.replace(make_job(**fields), cost=cost, tenant=tenant)


async def workers(queue: JobQueue, count: int) -> None:
    """Live ones, each of which makes a cost of 100 in a second."""
    for index in range(count):
        await queue.register(f"w{index}", [make_card()])
        await queue.heartbeat(f"w{index}", {MODEL: RATE})


async def enqueue(queue: JobQueue, job: Job, **options: Any) -> Job:
    await queue.enqueue(job, **{"result_bytes": 1000, "max_waiting": 10_000, **options})
    return job


async def claim(queue: JobQueue, max_jobs: int = 1) -> list[Job]:
    return await queue.claim("w0", [MODEL], max_jobs, 10_000)


async def eta_s(queue: JobQueue, job: Job) -> float | None:
    return (await queue.status(job.id)).eta_s


async def claimed_ago(redis: Any, keys: Keys, job: Job, seconds: float) -> None:
    """As if the job had been claimed that long ago."""
    claimed_ms = int(await redis.hget(keys.job(job.id), "claimed_ms"))
    await redis.hset(keys.job(job.id), "claimed_ms", claimed_ms - int(seconds * 1000))


# When it will be done


async def test_nobody_knows_before_a_worker_has_measured_how_fast_it_is(queue: JobQueue) -> None:
    job = costing(500)
    told = await queue.enqueue(job, result_bytes=0)
    assert (told.position, told.eta_s) == (0, None)
    await queue.register("w0", [make_card()])
    assert await eta_s(queue, job) is None
    await queue.heartbeat("w0", {MODEL: RATE})
    assert await eta_s(queue, job) == 5
    await queue.unregister("w0")
    assert await eta_s(queue, job) is None, "nobody is there to do it"


async def test_a_job_is_done_when_what_waits_before_it_and_itself_are(queue: JobQueue) -> None:
    await workers(queue, 2)
    told = [(await queue.enqueue(costing(cost), result_bytes=0)).eta_s for cost in (200, 600, 100)]
    assert told == [2, 200 / 200 + 6, 800 / 200 + 1]


async def test_the_time_told_is_kept_whoever_shares_the_workers(queue: JobQueue) -> None:
    """Three workers, each at one job at a time, on a clock of the test's own. Costs differ up to sevenfold, and only
    their sums are known: all jobs end within 15 % of the time told or five mean jobs, on average within one and a half
    mean jobs."""
    dice = random.Random(5)
    await workers(queue, 3)
    weights = {"a": 1.0, "b": 1.0, "c": 3.0}
    jobs = [costing(float(dice.randint(50, 350)), dice.choice("aabc")) for _ in range(300)]
    for job in jobs:
        await enqueue(queue, job, weight=weights[job.tenant])
    told = {job.id: await eta_s(queue, job) for job in jobs}
    ended: dict[str, float] = {}
    free_at = [0.0, 0.0, 0.0]
    while claimed := await claim(queue):
        ended[claimed[0].id] = heapq.heappop(free_at) + claimed[0].cost / RATE
        heapq.heappush(free_at, ended[claimed[0].id])
    mean_s = sum(job.cost for job in jobs) / len(jobs) / RATE
    errors = {job_id: abs((told[job_id] or 0) - ended[job_id]) for job_id in ended}
    assert len(errors) == len(jobs)
    assert max(ended.values()) > 90 * mean_s
    assert sum(errors.values()) / len(jobs) <= 1.5 * mean_s
    for job_id, error in errors.items():
        assert error <= max(5 * mean_s, 0.15 * ended[job_id])


async def test_a_running_job_goes_on_as_fast_as_it_went(queue: JobQueue, redis: Any, keys: Keys) -> None:
    await workers(queue, 1)
    await enqueue(queue, costing(2000))
    [job] = await claim(queue)
    assert await eta_s(queue, job) == pytest.approx(20, abs=0.5)
    await claimed_ago(redis, keys, job, 4)
    assert await eta_s(queue, job) == pytest.approx(16, abs=0.5)
    await queue.progress("w0", [(job.id, 1, 10, 40)])
    assert await eta_s(queue, job) == pytest.approx(12, abs=0.5), "three quarters are to go"
    await queue.hand_back("w0", job)
    assert await eta_s(queue, job) == 20
    [again] = await claim(queue)
    await claimed_ago(redis, keys, again, 6)
    await queue.progress("w0", [(job.id, 2, 30, 40)])
    assert await eta_s(queue, job) == pytest.approx(3, abs=0.5), "the first ten steps were done before"
    await queue.succeed("w0", again, make_result([b"picture"]), [b"picture"])
    assert await eta_s(queue, job) is None


async def test_the_events_of_a_running_job_tell_how_long_the_rest_takes(
    queue: JobQueue, redis: Any, keys: Keys
) -> None:
    """Also where a stream is taken up again, of which the job's claim is no part then."""
    await enqueue(queue, costing(100))
    [job] = await claim(queue)
    await redis.delete(keys.events(job.id))
    told = [("queued", 0), ("running", 0), ("progress", 5), ("queued", 5), ("running", 5), ("progress", 15)]
    for second, (kind, step) in enumerate(told):
        await redis.xadd(
            keys.events(job.id), {"kind": kind, "step": step, "num_steps": 20}, id=f"{1000 + second * 1000}-0"
        )
    await queue.fail("w0", job, FAILURE)
    events = [(event.kind, event.eta_s) async for event in queue.events(job.id)]
    assert events[:4] == [("queued", None), ("running", None), ("progress", 3), ("queued", None)]
    assert events[4:6] == [("running", None), ("progress", 0.5)]
    rest = [(event.kind, event.eta_s) async for event in queue.events(job.id, "5000-0")]
    assert rest == [("progress", 0.5), ("failed", None)]


async def test_a_job_takes_longer_the_more_rows_share_its_ticks(queue: JobQueue) -> None:
    await workers(queue, 2)
    for images in (1, 2, 3):
        await enqueue(queue, costing(100.0 * images, num_images=images))
        await claim(queue)
    assert (await queue.enqueue(costing(200, num_images=2), result_bytes=0)).eta_s == 2 + 3, "three are beside it"


async def test_a_lone_job_takes_as_long_as_lone_jobs_took(queue: JobQueue, redis: Any, keys: Keys) -> None:
    """A worker makes less than it could while its ticks are far from full."""
    await workers(queue, 1)
    for _ in range(100):
        await enqueue(queue, costing(100))
        [job] = await claim(queue)
        await claimed_ago(redis, keys, job, 8)
        await queue.succeed("w0", job, make_result([b"picture"]), [b"picture"])
    small, large, unlike = costing(100), costing(200), costing(800, num_images=4)
    assert (await queue.enqueue(small, result_bytes=0)).eta_s == pytest.approx(8, rel=0.05)
    assert (await queue.enqueue(large, result_bytes=0)).eta_s == pytest.approx(1 + 16, rel=0.05)
    assert (await queue.enqueue(unlike, result_bytes=0)).eta_s == pytest.approx(3 + 16, rel=0.05), "images share ticks"


# Whether it is in time


async def test_a_deadline_that_the_backlog_does_not_allow_is_refused_until_it_does(queue: JobQueue) -> None:
    await workers(queue, 1)
    waiting = [await enqueue(queue, costing(200)) for _ in range(5)]
    with pytest.raises(DeadlineUnmet, match=r"deadline_s: got 8\.0, expected at least 11\.0") as refused:
        await enqueue(queue, costing(100), deadline_s=8.0, idempotency_key="k")
    assert refused.value.retry_after_s == pytest.approx(3)
    assert (await queue.stats()).counters["accepted"] == 5
    in_time = await queue.enqueue(costing(100), result_bytes=0, deadline_s=11.5)
    assert in_time.eta_s == 11
    await queue.cancel(in_time.job_id)
    for job in waiting[:2]:
        await queue.cancel(job.id)
    now = await queue.enqueue(costing(100), result_bytes=0, deadline_s=8.0, idempotency_key="k")
    assert (now.is_new, now.eta_s) == (True, 7)


async def test_a_deadline_shorter_than_the_job_is_the_callers_mistake(queue: JobQueue) -> None:
    await workers(queue, 1)
    with pytest.raises(InvalidRequest, match=r"deadline_s: got 4\.0, expected at least 5\.0"):
        await enqueue(queue, costing(500), deadline_s=4.0)


async def test_a_measurement_that_became_wrong_does_not_refuse_what_could_correct_it(
    queue: JobQueue, redis: Any, keys: Keys
) -> None:
    await workers(queue, 1)
    await redis.hset(f"{keys.prefix}spans", MODEL, 80)
    tried = await queue.enqueue(costing(100), result_bytes=0, deadline_s=4)
    assert tried.eta_s == 8
    with pytest.raises(DeadlineUnmet):
        await enqueue(queue, costing(100), deadline_s=4)
    await claim(queue)
    with pytest.raises(DeadlineUnmet):
        await enqueue(queue, costing(100), deadline_s=4)


async def test_no_deadline_is_refused_while_nobody_knows(queue: JobQueue) -> None:
    await enqueue(queue, costing(1e6), deadline_s=1.0)
    await queue.register("w0", [make_card()])
    await enqueue(queue, costing(1e6), deadline_s=1.0)
    await queue.heartbeat("w0", {MODEL: RATE})
    await queue.unregister("w0")
    await enqueue(queue, costing(1e6), deadline_s=1.0)
    assert (await queue.stats()).waiting == 3


async def test_a_tenants_deadline_is_judged_by_its_share(queue: JobQueue) -> None:
    """A thousand jobs of another are no reason to refuse it."""
    await workers(queue, 1)
    for _ in range(50):
        await enqueue(queue, costing(100, "greedy"))
    with pytest.raises(DeadlineUnmet):
        await enqueue(queue, costing(100, "greedy"), deadline_s=10)
    told = await queue.enqueue(costing(100, "small"), result_bytes=0, deadline_s=10)
    assert told.eta_s is not None
    assert told.eta_s <= 3


# Whether anybody still wants it


FAILURE = Failure(code="job_failed", message="it did not work")


async def time_is_up(redis: Any, keys: Keys, job_id: str) -> None:
    """Let the grace time run out now. Somebody has reaped a moment ago, as somebody always does."""
    await redis.set(f"{keys.prefix}looked_after", "1", px=10_000)
    await redis.zadd(f"{keys.prefix}abandoned", {job_id: 1}, xx=True)


async def waited_for(queue: JobQueue, key: str = "k", **options: Any) -> str:
    """The job of a call that waits for it and has sent a key."""
    options = {"result_bytes": 0, "idempotency_key": key, "cancel_when_left": True, **options}
    return (await queue.enqueue(make_job(), **options)).job_id


async def test_a_job_whose_client_does_not_come_back_is_cancelled_wherever_it_is(
    queue: JobQueue, redis: Any, keys: Keys
) -> None:
    running, waiting = await waited_for(queue, "1"), await waited_for(queue, "2")
    assert [job.id for job in await queue.claim("w0", [MODEL], 1, 9)] == [running]
    await queue.reap()
    for job_id in (waiting, running):
        await time_is_up(redis, keys, job_id)
    assert sorted((await queue.reap()).abandoned) == sorted((waiting, running))
    assert (await queue.status(waiting)).state == "cancelled"
    assert (await queue.renew("w0", {running: 1})).cancelled == {running}
    assert (await queue.reap()).abandoned == [], "it is told once"
    for key, job_id in (("1", running), ("2", waiting)):
        assert await waited_for(queue, key) != job_id, "whoever comes later gets a new one"


async def test_a_job_lives_while_somebody_waits_for_it(queue: JobQueue, redis: Any, keys: Keys) -> None:
    job_id = await waited_for(queue)
    await time_is_up(redis, keys, job_id)
    await queue.stay(job_id)
    assert (await queue.reap()).abandoned == []
    left_ms = await redis.zscore(f"{keys.prefix}abandoned", job_id) - 1000 * (await redis.time())[0]
    assert 28_000 <= left_ms <= 31_000
    await time_is_up(redis, keys, job_id)
    assert await waited_for(queue) == job_id
    assert (await queue.reap()).abandoned == [], "another call of the same key waits"


@pytest.mark.parametrize("way", ["looks", "asks not to wait", "lets it continue"])
async def test_a_client_that_comes_back_in_another_way_keeps_its_job_for_good(
    queue: JobQueue, redis: Any, keys: Keys, way: str
) -> None:
    job_id = await waited_for(queue)
    if way == "looks":
        await queue.status(job_id, is_back=True)
    else:
        assert await waited_for(queue, cancel_when_left=False) == job_id
    await queue.stay(job_id)
    await time_is_up(redis, keys, job_id)
    assert (await queue.reap()).abandoned == []
    assert (await queue.status(job_id)).state == "queued"


async def test_after_an_outage_those_who_wait_get_the_time_to_say_so(queue: JobQueue, redis: Any, keys: Keys) -> None:
    job_id = await waited_for(queue)
    await time_is_up(redis, keys, job_id)
    await redis.delete(f"{keys.prefix}looked_after")
    assert (await queue.reap()).abandoned == []
    assert await redis.zscore(f"{keys.prefix}abandoned", job_id) > 1
    await time_is_up(redis, keys, job_id)
    assert (await queue.reap()).abandoned == [job_id]


async def test_a_job_that_nobody_may_abandon_stays_though_a_call_with_its_key_waits_and_leaves(
    queue: JobQueue, redis: Any, keys: Keys
) -> None:
    job_id = await waited_for(queue, cancel_when_left=False)
    assert await waited_for(queue) == job_id
    await time_is_up(redis, keys, job_id)
    assert (await queue.reap()).abandoned == []
    assert (await queue.status(job_id)).state == "queued"


async def test_at_its_memory_limit_too_the_server_hears_that_somebody_waits(settings: Settings, tmp_path: Path) -> None:
    limited = settings.model_copy(update={"data_dir": tmp_path})
    with EmbeddedRedis(limited) as server:
        queue = await JobQueue.connect(limited, server.url)
        try:
            job_id = await waited_for(queue)
            leaves_at = ("ZSCORE", f"{Keys(settings.shard).prefix}abandoned", job_id)
            before = await queue._connection.command(*leaves_at)
            await queue._connection.command("CONFIG", "SET", "maxmemory", "1")
            await queue.stay(job_id)
            assert await queue._connection.command(*leaves_at) > before
        finally:
            await queue.close()


async def test_a_job_that_has_ended_is_not_looked_after(queue: JobQueue, redis: Any, keys: Keys) -> None:
    done, cancelled, expired = [await waited_for(queue, key) for key in "123"]
    [job] = await queue.claim("w0", [MODEL], 1, 9)
    await queue.fail("w0", job, FAILURE)
    await queue.cancel(cancelled)
    await redis.zadd(f"{keys.prefix}queued", {expired: 1})
    await queue.reap()
    assert (await queue.status(done)).state == "failed"
    await queue.stay(done)
    assert await waited_for(queue, "1") == done
    assert not await redis.exists(f"{keys.prefix}abandoned")
