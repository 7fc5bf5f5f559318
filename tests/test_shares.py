"""Tenants that share a queue: each gets its part of the workers, whatever the others do."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from darkroom.config import Settings
from darkroom.errors import QueueFull, TenantQueueFull
from darkroom.jobs import Failure, Job, Priority
from darkroom.queue import JobQueue
from darkroom.queue.keys import Keys
from redis.asyncio import Redis

from tests.support.jobs import MODEL, end_lease, make_card, make_job

FAILURE = Failure(code="job_failed", message="it did not work")


@pytest_asyncio.fixture
async def redis(redis_url: str) -> AsyncIterator[Any]:
    """A plain client, to look behind the queue's back."""
    client = Redis.from_url(redis_url, protocol=2)
    yield client
    await client.aclose()


@pytest.fixture
def keys(settings: Settings) -> Keys:
    return Keys(settings.shard)


def job_of(tenant: str, cost: float = 100.0, **fields: Any) -> Job:
    return msgspec.structs.replace(make_job(**fields), tenant=tenant, cost=cost)


async def enqueue(queue: JobQueue, job: Job, **options: Any) -> Job:
    await queue.enqueue(job, **{"result_bytes": 1000, "max_waiting": 1_000_000, **options})
    return job


async def claim(queue: JobQueue, max_jobs: int, **options: Any) -> list[Job]:
    return await queue.claim("w1", [MODEL], max_jobs, 10_000, **options)


async def tenants_of_next(queue: JobQueue, num_jobs: int) -> str:
    """Whose the next jobs are, one claim after the other: a letter for each."""
    return "".join([(await claim(queue, 1))[0].tenant for _ in range(num_jobs)])


# Whose turn it is


async def test_a_thousand_jobs_of_one_do_not_delay_the_one_of_another(settings: Settings, redis_url: str) -> None:
    queue = await JobQueue.connect(settings.model_copy(update={"max_queue_jobs": 2000}), redis_url)
    for _ in range(1000):
        await enqueue(queue, job_of("greedy"))
    for _ in range(8):
        assert await tenants_of_next(queue, 7) == "greedy" * 7
        one = await enqueue(queue, job_of("small"))
        assert (await queue.status(one.id)).position == 0
        [job] = await claim(queue, 1)
        assert job.id == one.id
        await queue.fail("w1", job, FAILURE)
    assert (await queue.stats()).waiting == 1000 - 56
    await queue.close()


async def test_tenants_of_equal_weight_take_turns_within_one_claim_too(queue: JobQueue) -> None:
    for tenant in "aaaaaabbbbcc":
        await enqueue(queue, job_of(tenant))
    claimed = [job.tenant for job in await claim(queue, 12)]
    assert ["".join(sorted(claimed[i : i + 3])) for i in (0, 3)] == ["abc", "abc"]
    assert sorted(claimed[6:10]) == ["a", "a", "b", "b"]
    assert claimed[10:] == ["a", "a"]


@pytest.mark.parametrize("batch", [1, 5, 64])
async def test_weights_of_three_to_one_give_three_times_the_cost(queue: JobQueue, batch: int) -> None:
    """Whatever the jobs cost: heavy ones of one tenant against light ones of the other."""
    for _ in range(100):
        await enqueue(queue, job_of("h", 900.0), weight=3)
    for _ in range(400):
        await enqueue(queue, job_of("l", 100.0), weight=1)
    served: Counter[str] = Counter()
    while sum(served.values()) < 40_000:
        for job in await claim(queue, batch):
            served[job.tenant] += int(job.cost)
    assert served["h"] / served["l"] == pytest.approx(3, rel=0.1)


async def test_a_tenant_that_was_idle_comes_back_without_a_credit(queue: JobQueue) -> None:
    for _ in range(40):
        await enqueue(queue, job_of("a"))
    await enqueue(queue, job_of("b"))
    assert (await tenants_of_next(queue, 20)).count("b") == 1
    for _ in range(10):
        await enqueue(queue, job_of("b"))
    assert (await tenants_of_next(queue, 10)).count("b") == 5


async def test_a_tenant_that_asks_for_one_job_after_the_other_gets_no_more_than_its_share(queue: JobQueue) -> None:
    """Between two jobs it has none waiting, and must not begin anew each time."""
    for _ in range(40):
        await enqueue(queue, job_of("a", 100.0))
    served = ""
    await enqueue(queue, job_of("b", 300.0))
    for _ in range(20):
        [job] = await claim(queue, 1)
        served += job.tenant
        if job.tenant == "b":
            await enqueue(queue, job_of("b", 300.0))
    assert served.count("b") == 5
    assert "bb" not in served


async def test_a_class_is_a_head_start_among_the_jobs_of_its_own_tenant_alone(queue: JobQueue) -> None:
    for priority in (Priority.LOW, Priority.NORMAL, Priority.HIGH):
        await enqueue(queue, job_of("a", priority=priority))
    for _ in range(3):
        await enqueue(queue, job_of("b", priority=Priority.LOW))
    claimed = await claim(queue, 6)
    assert [job.priority.value for job in claimed if job.tenant == "a"] == ["high", "normal", "low"]
    assert {job.tenant for job in claimed[:2]} == {job.tenant for job in claimed[2:4]} == {"a", "b"}


async def test_a_tenant_may_have_any_name(queue: JobQueue) -> None:
    names = ["a:1", "a", "1:a", "*", "", "default", "é 雪"]
    for name in names:
        await enqueue(queue, job_of(name))
    assert sorted(job.tenant for job in await claim(queue, 99)) == sorted(names)


async def test_each_model_has_shares_of_its_own(queue: JobQueue) -> None:
    for _ in range(4):
        await enqueue(queue, job_of("a"))
        await enqueue(queue, job_of("a", model="other"))
    assert len(await queue.claim("w1", ["other"], 4, 99)) == 4
    await enqueue(queue, job_of("b"))
    assert sorted(await tenants_of_next(queue, 2)) == ["a", "b"]


# Jobs that come back


@pytest.mark.parametrize("way", ["handed back", "lost"])
async def test_a_job_that_comes_back_keeps_its_place_and_is_not_charged_twice(
    queue: JobQueue, redis: Any, keys: Keys, way: str
) -> None:
    for tenant in "ab" * 6:
        await enqueue(queue, job_of(tenant))
    first, second = await claim(queue, 2)
    assert {first.tenant, second.tenant} == {"a", "b"}
    for _ in range(3):
        if way == "handed back":
            await queue.hand_back("w1", first)
        else:
            await end_lease(queue, first)
            await redis.hset(keys.job(first.id), "failures", 0)
            assert (await queue.reap()).requeued == [first.id]
        assert (await queue.status(first.id)).position == 0
        [first] = await claim(queue, 1)
        assert first.attempt > 1
    assert sorted(await tenants_of_next(queue, 10)) == sorted("ab" * 5)
    assert (await queue.stats()).waiting == 0


async def test_a_job_of_a_tenant_that_has_left_keeps_its_place_too(queue: JobQueue) -> None:
    mine = await enqueue(queue, job_of("b"))
    for _ in range(4):
        await enqueue(queue, job_of("a"))
    claimed = {job.tenant: job for job in await claim(queue, 2)}
    await queue.hand_back("w1", claimed["b"])
    [again] = await claim(queue, 1)
    assert (again.id, again.attempt) == (mine.id, 2)


# A full worker


async def test_a_full_worker_makes_room_for_one_job_of_a_tenant_of_which_it_has_none(queue: JobQueue) -> None:
    for _ in range(20):
        await enqueue(queue, job_of("greedy"))
    held = await claim(queue, 4)
    assert await claim(queue, 1, min_rank=3, held=held) == []
    one = await enqueue(queue, job_of("small", priority=Priority.LOW))
    await enqueue(queue, job_of("small"))
    [job] = await claim(queue, 1, min_rank=3, held=held)
    assert (job.tenant, job.id != one.id) == ("small", True)
    assert await claim(queue, 1, min_rank=3, held=[*held, job]) == [], "one is there now"


async def test_urgent_jobs_of_a_tenant_that_had_its_share_do_not_fill_a_full_worker(queue: JobQueue) -> None:
    for _ in range(5):
        await enqueue(queue, job_of("greedy"))
    await enqueue(queue, job_of("small", 5000.0))
    held = await claim(queue, 3)
    assert {job.tenant for job in held} == {"greedy", "small"}
    await enqueue(queue, job_of("small", priority=Priority.HIGH))
    assert await claim(queue, 1, min_rank=Priority.HIGH.rank, held=held) == []
    await enqueue(queue, job_of("greedy", priority=Priority.HIGH))
    [urgent] = await claim(queue, 1, min_rank=Priority.HIGH.rank, held=held)
    assert urgent.tenant == "greedy"


# Its share of the queue


async def test_a_tenant_cannot_fill_the_queue(settings: Settings, redis_url: str, redis: Any, keys: Keys) -> None:
    small = settings.model_copy(update={"max_queue_jobs": 10, "tenant_queue_share": 0.5})
    queue = await JobQueue.connect(small, redis_url)
    for _ in range(5):
        await queue.enqueue(job_of("greedy"), result_bytes=0)
    with pytest.raises(TenantQueueFull) as refused:
        await queue.enqueue(job_of("greedy"), result_bytes=0)
    assert refused.value.retry_after_s == 5, "no pace is known"
    await queue.enqueue(job_of("greedy"), result_bytes=0, max_waiting=6)
    await redis.hset(f"{keys.prefix}pace", "gap_ms", 2000)
    for _ in range(4):
        await queue.enqueue(job_of("other"), result_bytes=0, weight=3)
    with pytest.raises(TenantQueueFull) as refused:
        await queue.enqueue(job_of("greedy"), result_bytes=0)
    assert refused.value.retry_after_s == 8, "one claim in four is its own"
    with pytest.raises(QueueFull):
        await queue.enqueue(job_of("other"), result_bytes=0)
    await queue.close()


async def test_without_tenants_one_may_fill_the_queue(settings: Settings, redis_url: str) -> None:
    small = settings.model_copy(update={"max_queue_jobs": 4, "tenant_queue_share": 0.1})
    queue = await JobQueue.connect(small, redis_url)
    for _ in range(4):
        await queue.enqueue(make_job(), result_bytes=0)
    with pytest.raises(QueueFull):
        await queue.enqueue(make_job(), result_bytes=0)
    await queue.close()


# What is known of it


async def test_a_position_counts_what_others_get_meanwhile(queue: JobQueue) -> None:
    costs = {"a": 100.0, "b": 50.0, "c": 200.0}
    jobs = [
        await enqueue(queue, job_of(tenant, costs[tenant]), weight=2 if tenant == "c" else 1)
        for tenant in "aaabbbccc" * 4
    ]
    told = {job.id: (await queue.status(job.id)).position for job in jobs}
    order = [job.id for job in await claim(queue, len(jobs))]
    errors = [abs(order.index(job_id) - position) for job_id, position in told.items()]
    assert max(errors) <= 3
    assert sum(errors) / len(errors) <= 1


async def test_the_queue_is_seen_whole_whoever_its_jobs_are_of(queue: JobQueue) -> None:
    for tenant in ("a", "a", "a", "b", "default"):
        await enqueue(queue, job_of(tenant))
    stats = await queue.stats()
    assert (stats.depth, stats.num_tenants, stats.largest_tenant) == ({MODEL: 5}, 3, 3)
    await queue.register("w1", [make_card()])
    await queue.register("w2", [make_card()])
    assert len(await claim(queue, 9)) == 3, "half of what all have waiting"


async def test_a_look_at_a_job_costs_the_server_no_more_the_more_tenants_wait(queue: JobQueue, redis: Any) -> None:
    """It asked for four things of each; at five hundred that took the server several milliseconds for each look, and as
    many for each new job."""

    async def num_commands(tenant: str) -> tuple[int, int]:
        await redis.config_resetstat()
        job = await enqueue(queue, job_of(tenant))
        to_enqueue = await redis.info("commandstats")
        await redis.config_resetstat()
        await queue.status(job.id)
        to_look = await redis.info("commandstats")
        return calls(to_enqueue), calls(to_look)

    def calls(stats: dict[str, Any]) -> int:
        return sum(command["calls"] for command in stats.values())

    for index in range(4):
        await enqueue(queue, job_of(f"t{index}"))
    few = await num_commands("a")
    for index in range(100):
        await enqueue(queue, job_of(f"u{index}"))
    many = await num_commands("b")
    assert all(more - less < 10 for less, more in zip(few, many, strict=True))


async def test_a_tenant_that_has_nothing_waiting_leaves_nothing_behind(queue: JobQueue, redis: Any, keys: Keys) -> None:
    for index in range(30):
        job = await enqueue(queue, job_of(f"t{index}"))
        if index % 3 == 0:
            await queue.cancel(job.id)
    jobs = await claim(queue, 10)
    for job in jobs[:3]:
        await queue.hand_back("w1", job)
    for job in jobs[3:]:
        await queue.fail("w1", job, FAILURE)
    while jobs := await claim(queue, 100):
        for job in jobs:
            await queue.fail("w1", job, FAILURE)
    left = {key.decode().removeprefix(keys.prefix).split(":")[0] for key in await redis.keys(f"{keys.prefix}*")}
    assert not left & {"shares", "tenants", "ready", "ready_of", "backlog", "running"}
    debts = f"{keys.prefix}debts:{MODEL}"
    assert 0 < await redis.pttl(debts) <= 600_000
    for _ in range(3):
        await enqueue(queue, job_of("last", 1000.0))
        await claim(queue, 1)
    assert await redis.zcard(debts) <= 2, "the model's own time and at most who was last"


async def test_jobs_that_an_earlier_release_has_queued_are_claimed_among_those_of_tenants(
    queue: JobQueue, redis: Any, keys: Keys
) -> None:
    """It knew no shares: its jobs lie in the ready set alone."""
    old = await enqueue(queue, job_of("default"))
    await redis.delete(f"{keys.prefix}shares:{MODEL}", f"{keys.prefix}tenants:{MODEL}")
    for _ in range(3):
        await enqueue(queue, job_of("a"))
    assert (await queue.stats()).waiting == 4
    assert (await claim(queue, 1))[0].id == old.id
    assert await tenants_of_next(queue, 3) == "aaa"
