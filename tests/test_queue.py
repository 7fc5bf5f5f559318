"""The queue's promises, each against a real redis-server."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import pickle
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from darkroom.config import Settings
from darkroom.errors import (
    IdempotencyMismatch,
    ImageNotFound,
    JobError,
    JobNotFinished,
    JobNotFound,
    QueueFull,
    QueueUnavailable,
    StorageFull,
)
from darkroom.jobs import BatchView, Failure, Job, JobState, Priority, new_job_id
from darkroom.queue import EmbeddedRedis, JobQueue, Rate, new_key
from darkroom.queue.admission import MEMORY_SHARE
from darkroom.queue.embedded import find_redis_server
from darkroom.queue.keys import CHANNEL_TABLE, KEY_TABLE, Keys, digest
from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.client import PubSub

from tests.support.jobs import MODEL, end_lease, make_card, make_job, make_result
from tests.support.proxy import lossy_proxy

FAILURE = Failure(code="non_finite", message="the picture came out as noise")
BYTES = 1000
# Small pictures travel as arguments of the script, large ones are staged beside it.
PICTURES = pytest.mark.parametrize("picture", [b"picture", random.Random(0).randbytes(200_000)], ids=["small", "large"])


@pytest_asyncio.fixture
async def redis(redis_url: str) -> AsyncIterator[Any]:
    """A plain client, to look behind the queue's back."""
    client = Redis.from_url(redis_url, protocol=2)
    yield client
    await client.aclose()


@pytest.fixture
def keys(settings: Settings) -> Keys:
    return Keys(settings.shard)


@contextlib.asynccontextmanager
async def opened(settings: Settings, url: str, **changes: object) -> AsyncIterator[JobQueue]:
    """Another process's view of the queue, with settings that a user could not choose where a test needs them short."""
    queue = await JobQueue.connect(settings.model_copy(update=changes), url)
    try:
        yield queue
    finally:
        await queue.close()


async def enqueue(queue: JobQueue, job: Job | None = None, **arguments: Any) -> Job:
    job = job or make_job()
    await queue.enqueue(job, **{"result_bytes": BYTES, **arguments})
    return job


async def enqueue_until_full(queue: JobQueue, result_bytes: int) -> list[Job]:
    jobs = []
    while True:
        try:
            jobs.append(await enqueue(queue, result_bytes=result_bytes))
        except StorageFull:
            return jobs


async def claim(queue: JobQueue, worker: str = "w1", max_jobs: int = 100, max_model_rows: int = 1000) -> list[Job]:
    return await queue.claim(worker, [MODEL], max_jobs, max_model_rows)


async def claim_one(queue: JobQueue, worker: str = "w1") -> Job:
    [job] = await claim(queue, worker, max_jobs=1)
    return job


async def succeed(queue: JobQueue, job: Job, worker: str = "w1", images: tuple[bytes, ...] = (b"picture",)) -> bool:
    return await queue.succeed(worker, job, make_result(list(images), worker), images)


async def eventually(condition: Callable[[], Awaitable[bool]], timeout_s: float = 10.0) -> None:
    ends_at = time.monotonic() + timeout_s
    while not await condition():
        assert time.monotonic() < ends_at, "it never became true"
        await asyncio.sleep(0.02)


async def assert_reconciled(queue: JobQueue) -> None:
    stats = await queue.stats()
    ended = sum(count for name, count in stats.counters.items() if name != "accepted")
    assert stats.counters["accepted"] == ended + stats.waiting + stats.in_flight
    if stats.waiting + stats.in_flight == 0:
        assert stats.reserved_bytes == 0


# The life of a job


async def test_a_job_is_queued_run_and_answered(queue: JobQueue) -> None:
    job = make_job(num_images=2)
    accepted = await queue.enqueue(job, result_bytes=BYTES)
    assert (accepted.job_id, accepted.is_new, accepted.state, accepted.position) == (job.id, True, "queued", 0)
    waiting = await queue.status(job.id)
    assert (waiting.state, waiting.position, waiting.job.request) == ("queued", 0, job.request)
    assert waiting.job.created_at_ms > 0

    claimed = await claim_one(queue)
    assert (claimed.id, claimed.attempt, claimed.failures, claimed.request) == (job.id, 1, 0, job.request)
    assert claimed.claimed_at_ms >= claimed.created_at_ms == waiting.job.created_at_ms
    await queue.progress("w1", [(job.id, 1, 3, 4)])
    running = await queue.status(job.id)
    assert (running.state, running.position, running.step, running.num_steps) == ("running", None, 3, 4)
    with pytest.raises(JobNotFinished):
        await queue.images(job.id)

    images = (b"\x00first\xff", b"second\r\n")
    assert await succeed(queue, claimed, images=images)
    ended = await queue.status(job.id)
    assert (ended.state, ended.step, ended.failure) == ("succeeded", 4, None)
    assert ended.result == make_result(list(images))
    assert ended.started_at_ms is not None
    assert ended.finished_at_ms is not None
    assert ended.finished_at_ms >= ended.started_at_ms >= ended.job.created_at_ms
    assert await queue.images(job.id) == list(images)
    assert await queue.image(job.id, 1) == images[1]
    with pytest.raises(ImageNotFound):
        await queue.image(job.id, 2)
    await assert_reconciled(queue)


async def test_an_unknown_job_is_not_found_by_any_question(queue: JobQueue) -> None:
    unknown = new_job_id()
    for ask in (queue.status, queue.cancel, queue.images):
        with pytest.raises(JobNotFound):
            await ask(unknown)
    with pytest.raises(JobNotFound):
        await queue.image(unknown, 0)
    with pytest.raises(JobNotFound):
        await queue.wait(unknown, 1)
    with pytest.raises(JobNotFound):
        _ = [event async for event in queue.events(unknown)]


async def test_a_failed_job_tells_its_code_and_has_no_images(queue: JobQueue) -> None:
    await enqueue(queue)
    job = await claim_one(queue)
    assert await queue.fail("w1", job, FAILURE)
    status = await queue.status(job.id)
    assert (status.state, status.failure, status.result) == ("failed", FAILURE, None)
    with pytest.raises(ImageNotFound):
        await queue.images(job.id)


# Twice is once


async def test_an_enqueue_whose_reply_is_lost_does_not_double(
    settings: Settings, embedded_redis: EmbeddedRedis, tmp_path: Path
) -> None:
    socket = Path(embedded_redis.url.removeprefix("unix://"))
    path = tmp_path / "proxy.sock"
    async with lossy_proxy(socket, path) as proxy, opened(settings, f"unix://{path}") as queue:
        await enqueue(queue)
        job = make_job()
        proxy.lose_replies_to(job.id, 1)
        accepted = await queue.enqueue(job, result_bytes=BYTES)
        assert proxy.num_dropped == 1
        assert (accepted.job_id, accepted.is_new) == (job.id, True)
        stats = await queue.stats()
        assert (stats.waiting, stats.counters["accepted"]) == (2, 2)
        assert len(await claim(queue)) == 2


@pytest.mark.parametrize("lost_replies", [1, 3], ids=["retried by the client", "retried by the worker"])
async def test_a_claim_whose_reply_is_lost_does_not_strand_its_jobs(
    settings: Settings, embedded_redis: EmbeddedRedis, tmp_path: Path, lost_replies: int
) -> None:
    socket = Path(embedded_redis.url.removeprefix("unix://"))
    path = tmp_path / "proxy.sock"
    async with lossy_proxy(socket, path) as proxy, opened(settings, f"unix://{path}") as queue:
        assert await claim(queue) == []
        jobs = {(await enqueue(queue)).id for _ in range(3)}
        proxy.lose_replies_to("lossy-worker", lost_replies)
        with contextlib.suppress(QueueUnavailable):
            claimed = await claim(queue, "lossy-worker", max_jobs=3)
            assert lost_replies == 1
        if lost_replies > 1:
            claimed = await claim(queue, "lossy-worker", max_jobs=3)
        assert proxy.num_dropped == lost_replies
        assert {job.id for job in claimed} == jobs
        assert {job.attempt for job in claimed} == {1}
        assert await claim(queue, "lossy-worker") == []


@PICTURES
async def test_a_success_whose_reply_is_lost_is_still_a_success(
    settings: Settings, embedded_redis: EmbeddedRedis, tmp_path: Path, picture: bytes
) -> None:
    socket = Path(embedded_redis.url.removeprefix("unix://"))
    path = tmp_path / "proxy.sock"
    async with lossy_proxy(socket, path) as proxy, opened(settings, f"unix://{path}") as queue:
        first, second = await enqueue(queue), await enqueue(queue)
        jobs = {job.id: job for job in await claim(queue)}
        assert await succeed(queue, jobs[first.id])
        proxy.lose_replies_to(second.id, 1)
        assert await succeed(queue, jobs[second.id], images=(picture,))
        assert proxy.num_dropped == 1
        assert await succeed(queue, jobs[second.id], images=(picture,)), "publishing once more is harmless"
        assert await queue.images(second.id) == [picture]
        assert (await queue.stats()).counters["succeeded"] == 2
        await assert_reconciled(queue)


async def test_large_pictures_are_stored_by_their_owner_alone(queue: JobQueue, redis: Any, keys: Keys) -> None:
    await enqueue(queue)
    stale = await claim_one(queue, "asleep")
    await end_lease(queue, stale)
    await queue.reap()
    job = await claim_one(queue, "awake")
    late, ours = (os.urandom(100_000),), (os.urandom(100_000), b"", os.urandom(100_000))
    assert not await succeed(queue, stale, "asleep", late)
    assert await _names(redis, keys, "image", "staged") == set()
    await redis.script_flush()
    assert await succeed(queue, job, "awake", ours)
    assert not await succeed(queue, stale, "asleep", late)
    assert await queue.images(job.id) == list(ours)
    assert await _names(redis, keys, "image", "staged") == {keys.image(job.id, index) for index in range(3)}
    assert await redis.pttl(keys.image(job.id, 0)) > 0
    assert await redis.hget(keys.counters, "stored_bytes") == b"200000"
    await assert_reconciled(queue)


async def _names(redis: Any, keys: Keys, *kinds: str) -> set[str]:
    found = [await redis.keys(f"{keys.prefix}{kind}:*") for kind in kinds]
    return {name.decode() for names in found for name in names}


async def test_a_key_seen_before_returns_the_same_job_and_refuses_another_body(queue: JobQueue) -> None:
    first = await enqueue(queue, idempotency_key="order 1", body_hash="a")
    again = await queue.enqueue(make_job(), result_bytes=BYTES, idempotency_key="order 1", body_hash="a")
    assert (again.job_id, again.is_new) == (first.id, False)
    with pytest.raises(IdempotencyMismatch):
        await queue.enqueue(make_job(), result_bytes=BYTES, idempotency_key="order 1", body_hash="b")
    await succeed(queue, await claim_one(queue))
    ended = await queue.enqueue(make_job(), result_bytes=BYTES, idempotency_key="order 1", body_hash="a")
    assert (ended.job_id, ended.is_new, ended.state) == (first.id, False, "succeeded")
    assert (await queue.stats()).counters["accepted"] == 1


async def test_eight_claimers_at_once_win_each_job_once(settings: Settings, redis_url: str) -> None:
    async with contextlib.AsyncExitStack() as stack:
        queues = [await stack.enter_async_context(opened(settings, redis_url)) for _ in range(8)]
        jobs = [await enqueue(queues[0]) for _ in range(40)]

        async def take(worker: int) -> list[str]:
            won: list[str] = []
            while claimed := await claim(queues[worker], f"w{worker}", max_jobs=2):
                won += [job.id for job in claimed]
            return won

        won = await asyncio.gather(*map(take, range(8)))
        assert Counter(job_id for ids in won for job_id in ids) == Counter(job.id for job in jobs)


# Leases and fencing


async def test_a_lost_lease_gives_the_job_to_another_and_fences_off_the_first(
    queue: JobQueue, redis: Any, keys: Keys, settings: Settings
) -> None:
    assert (await queue.reap()).next_lease_s is None
    await enqueue(queue)
    stale = await claim_one(queue, "asleep")
    reaped = await queue.reap()
    assert reaped.requeued == [], "a live lease is left alone"
    assert reaped.next_lease_s is not None
    assert 0 < reaped.next_lease_s <= settings.lease_s
    await end_lease(queue, stale)
    assert (await queue.reap()).requeued == [stale.id]
    fresh = await claim_one(queue, "awake")
    assert (fresh.id, fresh.attempt, fresh.failures) == (stale.id, 2, 1)

    assert (await queue.renew("asleep", {stale.id: stale.attempt})).lost == {stale.id}
    await queue.progress("asleep", [(stale.id, stale.attempt, 4, 4)])
    assert not await succeed(queue, stale, "asleep", (b"stale",))
    assert not await queue.fail("asleep", stale, FAILURE)
    assert not await queue.acknowledge_cancel("asleep", stale)
    assert not await queue.hand_back("asleep", stale)
    status = await queue.status(stale.id)
    assert (status.state, status.step) == ("running", 0)

    assert (await queue.renew("awake", {fresh.id: fresh.attempt})).lost == set()
    assert await succeed(queue, fresh, "awake", (b"fresh",))
    assert not await succeed(queue, stale, "asleep", (b"stale",))
    assert await queue.images(fresh.id) == [b"fresh"]


async def test_the_same_worker_is_fenced_by_the_attempt_alone(queue: JobQueue, redis: Any, keys: Keys) -> None:
    await enqueue(queue)
    stale = await claim_one(queue)
    await end_lease(queue, stale)
    await queue.reap()
    fresh = await claim_one(queue)
    assert (await queue.renew("w1", {stale.id: stale.attempt})).lost == {stale.id}
    assert not await succeed(queue, stale)
    assert await succeed(queue, fresh)


async def test_a_lease_runs_out_by_the_servers_clock_unless_renewed(
    queue: JobQueue, settings: Settings, redis_url: str
) -> None:
    async with opened(settings, redis_url, lease_s=0.2) as brief:
        kept, lost = await enqueue(brief), await enqueue(brief)
        held = {job.id: job.attempt for job in await claim(brief)}
        # For long, and also where it has run out: as long as nobody reaps, its worker still has it.
        assert not (await queue.renew("w1", {kept.id: held[kept.id]})).lost
        reaped: list[str] = []

        async def one_is_reaped() -> bool:
            reaped.extend((await queue.reap()).requeued)
            return bool(reaped)

        await eventually(one_is_reaped)
        assert reaped == [lost.id]


async def test_a_job_that_loses_its_third_worker_is_a_dead_letter(queue: JobQueue, redis: Any, keys: Keys) -> None:
    job = await enqueue(queue)
    for failures in range(3):
        claimed = await claim_one(queue, f"victim-{failures}")
        assert (claimed.attempt, claimed.failures) == (failures + 1, failures)
        await end_lease(queue, claimed)
        reaped = await queue.reap()
    assert (reaped.requeued, reaped.dead) == ([], [job.id])
    assert await claim(queue) == []
    status = await queue.status(job.id)
    assert status.state == "failed"
    assert status.failure is not None
    assert status.failure.code == "dead_letter"
    [(_, letter)] = await redis.xrange(f"{keys.prefix}dead")
    assert (letter[b"job"], letter[b"failures"], letter[b"worker"]) == (job.id.encode(), b"3", b"victim-2")
    await assert_reconciled(queue)


async def test_handing_back_counts_no_failure_and_keeps_the_place(queue: JobQueue) -> None:
    first = await enqueue(queue)
    await enqueue(queue)
    for attempt in range(1, 6):
        claimed = await claim_one(queue)
        assert (claimed.id, claimed.attempt, claimed.failures) == (first.id, attempt, 0)
        assert await queue.hand_back("w1", claimed)
        assert await queue.hand_back("w1", claimed), "handing back once more is harmless"
    assert (await queue.stats()).waiting == 2


async def test_a_wiped_server_takes_the_lease_and_the_worker_learns_it(queue: JobQueue, redis: Any, keys: Keys) -> None:
    await queue.register("w1", [make_card()])
    await enqueue(queue)
    job = await claim_one(queue)
    await redis.script_flush()
    await redis.delete(*await redis.keys(f"{keys.prefix}*"))
    assert (await queue.renew("w1", {job.id: job.attempt})).lost == {job.id}
    assert not await succeed(queue, job)
    with pytest.raises(JobNotFound):
        await queue.status(job.id)
    await queue.heartbeat("w1")
    assert [worker.id for worker in await queue.live_workers()] == ["w1"]
    again = await enqueue(queue)
    assert (await claim_one(queue)).id == again.id


# Cancelling and deadlines


async def test_a_waiting_job_is_cancelled_at_once(queue: JobQueue) -> None:
    job = await enqueue(queue)
    assert (await queue.cancel(job.id)).state == "cancelled"
    assert await claim(queue) == []
    assert (await queue.cancel(job.id)).state == "cancelled"
    assert (await queue.stats()).counters["cancelled"] == 1
    await assert_reconciled(queue)


async def test_a_running_job_is_cancelled_by_its_worker(queue: JobQueue, settings: Settings, redis_url: str) -> None:
    await enqueue(queue)
    job = await claim_one(queue)
    async with opened(settings, redis_url) as other:
        heard = asyncio.ensure_future(anext(aiter(queue.cancellations("w1"))))
        await eventually(lambda: _is_subscribed(other, "cancel:w1"))
        assert (await other.cancel(job.id)).state == "running"
        assert await asyncio.wait_for(heard, 20) == (job.id, False)
    renewal = await queue.renew("w1", {job.id: job.attempt})
    assert (renewal.cancelled, renewal.lost) == ({job.id}, set())
    assert await queue.acknowledge_cancel("w1", job)
    assert await queue.acknowledge_cancel("w1", job)
    assert (await queue.status(job.id)).state == "cancelled"
    await assert_reconciled(queue)


async def test_a_cancelled_job_may_keep_what_was_drawn_unless_it_was_to_be_dropped(
    queue: JobQueue, settings: Settings, redis_url: str
) -> None:
    await enqueue(queue)
    job = await claim_one(queue)
    async with opened(settings, redis_url) as other:
        heard = asyncio.ensure_future(anext(aiter(queue.cancellations("w1"))))
        await eventually(lambda: _is_subscribed(other, "cancel:w1"))
        assert (await other.cancel(job.id, keep=True)).state == "running"
        assert await asyncio.wait_for(heard, 20) == (job.id, True)
        renewal = await queue.renew("w1", {job.id: job.attempt})
        assert (renewal.cancelled, renewal.cut_short) == (set(), {job.id})
        await other.cancel(job.id)
        await other.cancel(job.id, keep=True)
        renewal = await queue.renew("w1", {job.id: job.attempt})
        assert (renewal.cancelled, renewal.cut_short) == ({job.id}, set())
    assert await queue.acknowledge_cancel("w1", job)
    await assert_reconciled(queue)


async def test_a_cancellation_is_told_to_the_worker_that_runs_the_job_alone(
    queue: JobQueue, settings: Settings, redis_url: str
) -> None:
    """What goes to every worker costs Redis time that grows with the fleet."""
    jobs = [await enqueue(queue) for _ in range(2)]
    [first] = await claim(queue, "w1", max_jobs=1)
    [second] = await claim(queue, "w2", max_jobs=1)
    assert [first.id, second.id] == [job.id for job in jobs]
    async with opened(settings, redis_url) as other:
        heard = [asyncio.ensure_future(anext(aiter(queue.cancellations(worker)))) for worker in ("w1", "w2")]
        for worker in ("w1", "w2"):
            await eventually(lambda worker=worker: _is_subscribed(other, f"cancel:{worker}"))  # type: ignore[misc]
        await other.cancel(second.id)
        assert await asyncio.wait_for(heard[1], 20) == (second.id, False)
        await other.cancel(first.id)
        assert await asyncio.wait_for(heard[0], 20) == (first.id, False)


async def _is_subscribed(queue: JobQueue, channel: str) -> bool:
    name = queue._connection.keys.channel(channel)
    return bool((await queue._connection.command("PUBSUB", "NUMSUB", name))[0][1])


async def test_cancelling_an_ended_job_changes_nothing(queue: JobQueue) -> None:
    await enqueue(queue)
    job = await claim_one(queue)
    await succeed(queue, job)
    assert (await queue.cancel(job.id)).state == "succeeded"
    assert await queue.images(job.id) == [b"picture"]


async def test_a_cancelled_job_whose_worker_is_lost_is_not_run_again(queue: JobQueue, redis: Any, keys: Keys) -> None:
    await enqueue(queue)
    job = await claim_one(queue)
    await queue.cancel(job.id)
    await end_lease(queue, job)
    assert (await queue.reap()).cancelled == [job.id]
    assert (await queue.status(job.id)).state == "cancelled"


async def test_a_job_past_its_deadline_expires_before_it_costs_anything(queue: JobQueue) -> None:
    late = await enqueue(queue, deadline_s=0)
    in_time = await enqueue(queue, deadline_s=60)
    [job] = await claim(queue)
    assert job.id == in_time.id
    assert job.deadline_at_ms == job.created_at_ms + 60_000
    assert (await queue.status(late.id)).state == "expired"
    await succeed(queue, job)
    await assert_reconciled(queue)


async def test_a_job_past_its_deadline_expires_without_any_worker(queue: JobQueue) -> None:
    job = await enqueue(queue, deadline_s=0)
    assert (await queue.reap()).expired == [job.id]
    assert (await queue.status(job.id)).state == "expired"
    await assert_reconciled(queue)


# Order and shares


async def test_an_urgent_class_goes_first_and_each_class_keeps_its_order(queue: JobQueue) -> None:
    order = [Priority.LOW, Priority.NORMAL, Priority.HIGH, Priority.LOW, Priority.NORMAL, Priority.HIGH]
    jobs = [await enqueue(queue, make_job(priority=priority)) for priority in order]
    expected = [jobs[index].id for index in (2, 5, 1, 4, 0, 3)]
    assert [(await queue.status(job_id)).position for job_id in expected] == [0, 1, 2, 3, 4, 5]
    assert [job.id for job in await claim(queue)] == expected


async def test_a_class_is_a_head_start_so_nobody_starves(queue: JobQueue, redis: Any, keys: Keys) -> None:
    """A low job that came 21 minutes ago goes before a high one of now; one of 19 minutes ago does not."""
    old, newer = (
        await enqueue(queue, make_job(priority=Priority.LOW)),
        await enqueue(queue, make_job(priority=Priority.LOW)),
    )
    for job, minutes in ((old, 21), (newer, 19)):
        await redis.zincrby(f"{keys.prefix}ready:{Priority.LOW.rank}:{MODEL}", -minutes * 60e6, job.id)
    urgent = await enqueue(queue, make_job(priority=Priority.HIGH))
    assert [job.id for job in await claim(queue)] == [old.id, urgent.id, newer.id]


async def test_a_full_worker_is_offered_only_more_urgent_classes(queue: JobQueue) -> None:
    normal = await enqueue(queue)
    urgent = await enqueue(queue, make_job(priority=Priority.HIGH))
    assert [job.id for job in await queue.claim("w1", [MODEL], 5, 5, min_rank=Priority.HIGH.rank)] == [urgent.id]
    assert await queue.claim("w1", [MODEL], 5, 5, min_rank=Priority.HIGH.rank) == []
    assert [job.id for job in await claim(queue)] == [normal.id]


async def test_a_claim_stops_at_its_rows_but_never_starves_a_large_job(queue: JobQueue) -> None:
    small, large, last = make_job(), make_job(num_images=4, guidance_scale=7.0), make_job()
    for job in (small, large, last):
        await enqueue(queue, job)
    assert [job.id for job in await claim(queue, max_model_rows=4)] == [small.id]
    assert [job.id for job in await claim(queue, max_model_rows=4)] == [large.id]
    assert await claim(queue, max_model_rows=0) == []
    assert [job.id for job in await claim(queue, max_model_rows=4)] == [last.id]


async def test_a_worker_takes_no_more_than_its_share_of_the_backlog(queue: JobQueue) -> None:
    for worker in ("w1", "w2", "w3"):
        await queue.register(worker, [make_card()])
    for _ in range(8):
        await enqueue(queue)
    assert len(await claim(queue, "w1")) == 3
    await queue.unregister("w2")
    await queue.unregister("w3")
    assert len(await claim(queue, "w1")) == 5
    assert [worker.id for worker in await queue.live_workers()] == ["w1"]


async def test_a_worker_claims_only_its_models(queue: JobQueue) -> None:
    other = await enqueue(queue, make_job(model="other"))
    mine = await enqueue(queue)
    assert [job.id for job in await claim(queue)] == [mine.id]
    assert [job.id for job in await queue.claim("w2", [MODEL, "other"], 9, 9)] == [other.id]


async def test_workers_and_cards_are_known_after_they_register(queue: JobQueue, settings: Settings) -> None:
    assert (await queue.cards()).known == {}
    await queue.register("w1", [make_card("b"), make_card("a")])
    [worker] = await queue.live_workers()
    assert (worker.id, worker.models) == ("w1", ["a", "b"])
    async with opened(settings, settings.redis_url or "") as other:
        assert (await other.cards()).live == {"a": make_card("a"), "b": make_card("b")}
        await queue.unregister("w1")
        assert await other.live_workers() == []


async def cards_of(settings: Settings) -> tuple[set[str], set[str], set[str]]:
    """Live, recent and known models as a process sees them that looks for the first time."""
    async with opened(settings, settings.redis_url or "") as fresh:
        cards = await fresh.cards()
        return set(cards.live), set(cards.recent), set(cards.known)


async def test_a_model_is_recent_for_a_minute_after_its_last_worker_and_then_forgotten(
    queue: JobQueue, settings: Settings, redis: Any, keys: Keys
) -> None:
    both, none = {"a", "b"}, set[str]()
    await queue.register("w1", [make_card("a"), make_card("b")])
    await queue.register("w2", [make_card("b")])
    assert await cards_of(settings) == (both, both, both)
    await queue.unregister("w1")
    assert await cards_of(settings) == ({"b"}, both, both)

    async def served_ago(seconds: float) -> None:
        await redis.zadd(f"{keys.prefix}served", {"a": int((time.time() - seconds) * 1000)})

    await served_ago(59)
    assert await cards_of(settings) == ({"b"}, both, both)
    await served_ago(61)
    assert await cards_of(settings) == ({"b"}, {"b"}, both)
    await served_ago(settings.job_ttl_s + 1)
    assert await cards_of(settings) == ({"b"}, {"b"}, {"b"})
    await queue.heartbeat("w2")
    assert await redis.hkeys(f"{keys.prefix}cards") == [b"b"]
    assert await redis.zrange(f"{keys.prefix}served", 0, -1) == [b"b"]
    await queue.register("w1", [make_card("a")])
    assert await cards_of(settings) == (both, both, both)
    await queue.forget_workers()
    assert await cards_of(settings) == (none, both, both)
    assert (await queue.stats()).live_workers == len(await queue.live_workers()) == 0
    await queue.heartbeat("w2")
    assert await cards_of(settings) == ({"b"}, both, both)
    await queue.unregister("w2")
    assert await cards_of(settings) == (none, both, both)


# Waking and waiting


def never_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those who wait are woken, or wait for ever: they do not look by themselves now and then."""
    monkeypatch.setattr("darkroom.queue.client_side.SAFETY_POLL_S", 1000.0)
    monkeypatch.setattr("darkroom.queue.events._POLL_S", 1000.0)


async def test_an_idle_worker_wakes_at_once(queue: JobQueue, settings: Settings, redis_url: str) -> None:
    async with opened(settings, redis_url) as worker:
        waiting = asyncio.ensure_future(worker.wait_for_work([MODEL, "other"], 30))
        await eventually(lambda: _has_blocked_client(queue))
        await enqueue(queue)
        assert await asyncio.wait_for(waiting, 20)
        assert not await worker.wait_for_work(["other"], 0.05)


async def _has_blocked_client(queue: JobQueue) -> bool:
    return bool((await queue._connection.command("INFO", "clients"))["blocked_clients"])


async def test_a_worker_that_waits_longer_than_the_socket_allows_is_not_disturbed(queue: JobQueue) -> None:
    """A blocking pop longer than the socket timeout once failed after a minute of retries; ours is cut in pieces."""
    assert not await queue.wait_for_work([MODEL], 2.2)


async def test_waiters_wake_together_and_a_late_one_returns_at_once(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    never_look(monkeypatch)
    await enqueue(queue)
    job = await claim_one(queue)
    waiters = [asyncio.ensure_future(queue.wait(job.id, 30)) for _ in range(2)]
    await eventually(lambda: _is_subscribed(queue, "ended"))
    await succeed(queue, job)
    assert [status.state for status in await asyncio.wait_for(asyncio.gather(*waiters), 20)] == ["succeeded"] * 2
    assert (await asyncio.wait_for(queue.wait(job.id, 30), 20)).state == "succeeded"
    assert queue.num_waiters == 0


async def test_a_wait_ends_at_its_time_and_leaves_nothing_behind(queue: JobQueue) -> None:
    job = await enqueue(queue)
    assert (await queue.wait(job.id, 0.05)).state == "queued"
    left = asyncio.ensure_future(queue.wait(job.id, 30))
    await eventually(lambda: _is(queue.num_waiters == 1))
    left.cancel()
    with pytest.raises(asyncio.CancelledError):
        await left
    assert queue.num_waiters == 0


async def _is(value: bool) -> bool:
    return value


async def test_five_hundred_waiters_share_a_few_connections(queue: JobQueue, redis: Any) -> None:
    jobs = [await enqueue(queue) for _ in range(50)]
    before = len(await redis.client_list())
    waiters = [asyncio.ensure_future(queue.wait(job.id, 30)) for job in jobs for _ in range(10)]
    await eventually(lambda: _is(queue.num_waiters == 500))
    for job in await claim(queue):
        await succeed(queue, job)
    assert {status.state for status in await asyncio.gather(*waiters)} == {JobState.SUCCEEDED}
    assert len(await redis.client_list()) - before <= 32


async def test_events_tell_the_whole_life_and_resume_anywhere(queue: JobQueue) -> None:
    job = await enqueue(queue)
    seen = asyncio.ensure_future(_collect(queue, job.id))
    claimed = await claim_one(queue)
    for step in (1, 2, 2):
        await queue.progress("w1", [(job.id, claimed.attempt, step, 4)])
    await succeed(queue, claimed)
    events = await asyncio.wait_for(seen, 20)
    assert [(event.kind, event.step) for event in events] == [
        ("queued", 0),
        ("running", 0),
        ("progress", 1),
        ("progress", 2),
        ("succeeded", 4),
    ]
    assert [event.kind for event in await _collect(queue, job.id, events[2].id)] == ["progress", "succeeded"]
    assert await _collect(queue, job.id, events[-1].id) == []
    assert len(await _collect(queue, job.id, "nonsense")) == 5
    assert queue.num_waiters == 0


async def _collect(queue: JobQueue, job_id: str, after: str | None = None) -> list[Any]:
    return [event async for event in queue.events(job_id, after)]


async def test_an_event_stream_is_capped_and_its_end_survives_it(queue: JobQueue, redis: Any, keys: Keys) -> None:
    await enqueue(queue)
    job = await claim_one(queue)
    await queue.progress("w1", [(job.id, job.attempt, step, 400) for step in range(1, 400)])
    assert await redis.xlen(keys.events(job.id)) == 256
    await succeed(queue, job)
    await redis.delete(keys.events(job.id))
    assert [(event.id, event.kind) for event in await _collect(queue, job.id)] == [("", "succeeded")]


# Damage


async def test_a_damaged_record_fails_its_job_and_is_not_looped(queue: JobQueue, redis: Any, keys: Keys) -> None:
    garbage, pickled, wrong_type, gone, numbers = [await enqueue(queue) for _ in range(5)]
    healthy = await enqueue(queue)
    await redis.hset(keys.job(garbage.id), "payload", b"\x00\xff\xfe garbage")
    await redis.hset(keys.job(pickled.id), "payload", pickle.dumps({"id": pickled.id}))
    await redis.delete(keys.job(wrong_type.id), keys.job(gone.id))
    await redis.set(keys.job(wrong_type.id), "a string")
    await redis.hset(keys.job(numbers.id), "attempt", b"\xffmany")
    assert [job.id for job in await claim(queue)] == [healthy.id]
    for job in (garbage, pickled, wrong_type, gone, numbers):
        with pytest.raises(JobError) as caught:
            await queue.status(job.id)
        assert caught.value.code == "bad_message"
        stored = await redis.hmget(keys.job(job.id), "state", "error_code")
        assert stored == [b"failed", b"bad_message"]
    assert await claim(queue) == []
    assert (await queue.reap()).requeued == []
    stats = await queue.stats()
    assert (stats.counters["failed"], stats.in_flight, stats.waiting) == (5, 1, 0)


async def test_a_payload_of_a_newer_release_is_failed_and_says_so(queue: JobQueue, redis: Any, keys: Keys) -> None:
    job = await enqueue(queue)
    await redis.hset(keys.job(job.id), "payload", msgspec.msgpack.encode({**msgspec.to_builtins(job), "version": 99}))
    assert await claim(queue) == []
    assert (await redis.hmget(keys.job(job.id), "state", "error_code")) == [b"failed", b"bad_message"]


async def test_a_damaged_record_gives_back_what_it_held_where_that_can_be_read(
    queue: JobQueue, redis: Any, keys: Keys
) -> None:
    for index, damage in enumerate(({"attempt": "many"}, {"score": "high", "idempotency": "0"}, {"rows": "no"})):
        job = await enqueue(queue, idempotency_key=str(index))
        await redis.hset(keys.job(job.id), mapping=damage)
    held = (await queue.stats()).reserved_bytes
    worst = await enqueue(queue)
    worst_holds = (await queue.stats()).reserved_bytes - held
    await redis.hset(keys.job(worst.id), "reserved", "a lot")
    assert await claim(queue) == []
    assert (await queue.stats()).reserved_bytes == worst_holds
    stays = [await redis.ttl(f"{keys.prefix}idempotency:{digest(str(index))}") for index in range(3)]
    assert [stay > 0 for stay in stays] == [True, False, True]


async def test_an_unreadable_job_that_cannot_be_settled_takes_no_other_along(
    queue: JobQueue, redis: Any, keys: Keys
) -> None:
    garbage, healthy = await enqueue(queue), await enqueue(queue)
    await redis.hset(keys.job(garbage.id), "payload", b"\xff garbage")
    connection = queue._connection
    text, sha = connection._scripts["settle"], connection._shas["settle"]
    broken = "return redis.error_reply('refused')"
    connection._scripts["settle"], connection._shas["settle"] = broken, hashlib.sha1(broken.encode()).hexdigest()
    assert [job.id for job in await claim(queue)] == [healthy.id]
    connection._scripts["settle"], connection._shas["settle"] = text, sha
    await end_lease(queue, garbage)
    await queue.reap()
    assert await claim(queue) == []
    assert await redis.hget(keys.job(garbage.id), "state") == b"failed"


# Suspects


async def test_a_job_with_which_two_workers_were_lost_is_given_alone_to_an_idle_worker(
    queue: JobQueue, redis: Any, keys: Keys
) -> None:
    poison = await enqueue(queue)
    for failures in (1, 2):
        [job] = await claim(queue)
        await end_lease(queue, job)
        await queue.reap()
        assert (await queue.status(poison.id)).job.failures == failures
    healthy = [await enqueue(queue) for _ in range(3)]
    assert (await queue.stats()).waiting == 4
    assert [job.id for job in await claim(queue, "idle")] == [poison.id]
    assert {job.id for job in await claim(queue, "other")} == {job.id for job in healthy}


async def test_one_busy_worker_makes_itself_free_for_a_suspect_while_others_go_on(
    queue: JobQueue, redis: Any, keys: Keys
) -> None:
    await enqueue(queue)
    for _ in range(2):
        [suspect] = await claim(queue)
        await end_lease(queue, suspect)
        await queue.reap()
    held = [make_job()]
    await enqueue(queue)
    assert await queue.claim("w1", [MODEL], 4, 8, held=held) == [], "it is to become free"
    [healthy] = await queue.claim("w2", [MODEL], 4, 8, held=held)
    assert healthy.failures == 0
    [alone] = await queue.claim("w1", [MODEL], 4, 8)
    assert (alone.id, alone.failures) == (suspect.id, 2)
    await enqueue(queue)
    assert await queue.claim("w1", [MODEL], 4, 8, held=[alone]) == [], "it stays alone"
    assert len(await queue.claim("w2", [MODEL], 4, 8, held=held)) == 1
    await end_lease(queue, alone)
    await queue.reap()
    status = await queue.status(suspect.id)
    assert status.failure is not None
    assert status.failure.code == "dead_letter"


# Limits


async def test_a_full_queue_refuses_with_a_time_to_come_back(settings: Settings, redis_url: str) -> None:
    async with opened(settings, redis_url, max_queue_jobs=2) as queue:
        first = await enqueue(queue)
        await enqueue(queue, idempotency_key="second")
        with pytest.raises(QueueFull) as caught:
            await enqueue(queue)
        assert 1 <= caught.value.retry_after_s <= 60
        again = await queue.enqueue(make_job(), result_bytes=BYTES, idempotency_key="second")
        assert not again.is_new, "a repeated request is not a new one"
        await queue.cancel(first.id)
        await enqueue(queue)


async def refusal(queue: JobQueue, body: str, connection: str = "") -> float | None:
    """Seconds that a caller of `body` is told to wait; None when it is let in."""
    try:
        await enqueue(queue, body_hash=body, caller=connection or f"{body}:1")
    except QueueFull as full:
        return full.retry_after_s
    return None


@contextlib.asynccontextmanager
async def full_queue(settings: Settings, redis_url: str, redis: Any, keys: Keys) -> AsyncIterator[JobQueue]:
    """Four jobs wait, which is as many as may, and one was claimed every ten seconds lately."""
    async with opened(settings, redis_url, max_queue_jobs=4) as queue:
        for _ in range(4):
            await enqueue(queue)
        await redis.hset(f"{keys.prefix}pace", "gap_ms", 10_000)
        yield queue


async def come_due(redis: Any, keys: Keys, body: str) -> None:
    """Let the time of a caller's promises come now."""
    now_ms = int(time.time() * 1000) - 10
    own = f"{keys.prefix}promise:{body}"
    for connection in await redis.zrange(own, 0, -1):
        await redis.zadd(own, {connection: now_ms})
        await redis.zadd(f"{keys.prefix}promises", {f"{body}:{connection.decode()}": now_ms})


async def test_callers_that_are_refused_are_told_times_one_after_the_other(
    settings: Settings, redis_url: str, redis: Any, keys: Keys
) -> None:
    async with full_queue(settings, redis_url, redis, keys) as queue:
        waits = [await refusal(queue, body) for body in ("a", "b", "c")]
        assert waits == [pytest.approx(9.5 * (index + 1), abs=1) for index in range(3)]
        assert await refusal(queue, "b") == pytest.approx(19, abs=1), "who asks too early is told the same time"
        assert await redis.zcard(f"{keys.prefix}promises") == 3


async def test_a_caller_that_comes_back_in_time_gets_the_place_that_newcomers_do_not(
    settings: Settings, redis_url: str, redis: Any, keys: Keys
) -> None:
    async with full_queue(settings, redis_url, redis, keys) as queue:
        assert await refusal(queue, "patient")
        await claim(queue, max_jobs=1)
        assert await refusal(queue, "newcomer"), "the free place is promised"
        await come_due(redis, keys, "patient")
        assert await refusal(queue, "patient", "patient:2") is None, "also over a new connection"
        assert await redis.exists(f"{keys.prefix}promise:patient") == 0
        await claim(queue, max_jobs=1)
        assert await refusal(queue, "patient"), "a promise is kept once"


async def test_a_promise_is_kept_a_little_above_the_limit_but_not_far_above_it(
    settings: Settings, redis_url: str, redis: Any, keys: Keys
) -> None:
    async with full_queue(settings, redis_url, redis, keys) as queue:
        for body in ("a", "b"):
            await refusal(queue, body)
            await come_due(redis, keys, body)
        assert await refusal(queue, "a") is None, "the queue was slower than it thought"
        assert await refusal(queue, "b") == pytest.approx(19, abs=1), "the place after the one that is too many"
        await come_due(redis, keys, "b")
        await claim(queue, max_jobs=1)
        assert await refusal(queue, "b") is None


async def test_a_place_whose_caller_does_not_come_back_is_given_away(
    settings: Settings, redis_url: str, redis: Any, keys: Keys
) -> None:
    async with full_queue(settings, redis_url, redis, keys) as queue:
        await refusal(queue, "gone")
        await claim(queue, max_jobs=1)
        assert await refusal(queue, "next")
        long_ago = int(time.time() * 1000) - 6_000
        for key in (f"{keys.prefix}promises", f"{keys.prefix}promise:gone"):
            for member in await redis.zrange(key, 0, 0):
                await redis.zadd(key, {member: long_ago})
        assert await refusal(queue, "next") is None


async def test_callers_that_never_come_back_do_not_leave_the_queue_empty(
    settings: Settings, redis_url: str, redis: Any, keys: Keys
) -> None:
    """Each asks for something else the next time, so no promise is ever taken up."""
    async with full_queue(settings, redis_url, redis, keys) as queue:
        for index in range(20):
            assert await refusal(queue, f"fickle-{index}")
        await claim(queue, max_jobs=2)
        assert await refusal(queue, "one"), "the upper half is kept for those who were promised"
        await claim(queue, max_jobs=1)
        assert await refusal(queue, "two") is None
        assert await refusal(queue, "three")


async def test_nobody_is_promised_a_place_ten_minutes_ahead_or_before_a_pace_is_known(
    settings: Settings, redis_url: str, redis: Any, keys: Keys
) -> None:
    async with full_queue(settings, redis_url, redis, keys) as queue:
        await redis.hset(f"{keys.prefix}pace", "gap_ms", 250_000)
        waits = [await refusal(queue, body) for body in ("a", "b", "c")]
        assert waits == [pytest.approx(237.5, abs=1), pytest.approx(475, abs=1), 600]
        assert await redis.zcard(f"{keys.prefix}promises") == 2
        await redis.delete(f"{keys.prefix}pace", f"{keys.prefix}promises", f"{keys.prefix}promise:a")
        assert await refusal(queue, "d") == 5


async def test_the_pace_is_the_time_between_claims_over_the_jobs_of_a_claim(
    queue: JobQueue, redis: Any, keys: Keys
) -> None:
    pace = f"{keys.prefix}pace"
    for _ in range(8):
        await enqueue(queue)
    await claim(queue, max_jobs=1)
    for num_jobs in (1, 3):
        await redis.hset(pace, "claimed_ms", int(time.time() * 1000) - 6000)
        assert len(await claim(queue, max_jobs=num_jobs)) == num_jobs
    interval_s = float(await redis.hget(pace, "interval_ms")) / 1000
    gap_s = float(await redis.hget(pace, "gap_ms")) / 1000
    assert interval_s == pytest.approx(6, abs=1)
    assert gap_s == pytest.approx(interval_s / 1.2, abs=0.01)


async def test_a_pause_in_which_nothing_waited_is_no_pace(queue: JobQueue, redis: Any, keys: Keys) -> None:
    pace = f"{keys.prefix}pace"
    for _ in range(2):
        await enqueue(queue)
    assert len(await claim(queue)) == 2
    await redis.hset(pace, "claimed_ms", int(time.time() * 1000) - 50_000)
    await enqueue(queue)
    assert len(await claim(queue)) == 1
    assert await redis.hget(pace, "gap_ms") is None


async def test_results_are_counted_before_they_exist_so_memory_never_runs_out(
    settings: Settings, tmp_path: Path
) -> None:
    megabyte = 1 << 20
    limited = settings.model_copy(update={"data_dir": tmp_path, "redis_maxmemory_bytes": 24 * megabyte})
    with EmbeddedRedis(limited) as server:
        async with opened(limited, server.url) as queue:
            accepted = await enqueue_until_full(queue, megabyte)
            assert 12 <= len(accepted) <= 24 * MEMORY_SHARE
            for job in await claim(queue):
                assert await succeed(queue, job, images=(b"x" * (megabyte - 1000),))
            assert len(await enqueue_until_full(queue, megabyte)) < 24 * MEMORY_SHARE - len(accepted)
            memory = await queue._connection.command("INFO", "memory")
            assert memory["used_memory"] < 24 * megabyte
            assert len(await queue.images(accepted[0].id)) == 1


async def test_what_is_reserved_for_a_job_covers_it_from_start_to_end(queue: JobQueue, redis: Any, keys: Keys) -> None:
    job = await enqueue(queue, result_bytes=0, idempotency_key="k")
    reserved = (await queue.stats()).reserved_bytes

    async def cost() -> int:
        names = (keys.job(job.id), keys.events(job.id), f"{keys.prefix}idempotency:{digest('k')}")
        return sum([await redis.memory_usage(name, samples=0) for name in names])

    assert await cost() < reserved
    claimed = await claim_one(queue)
    for step in range(1, 257):
        await queue.progress("w1", [(job.id, claimed.attempt, step, 256)])
    assert 0.8 * reserved < await cost() < reserved
    running = await redis.memory_usage(keys.job(job.id), samples=0)
    await queue.fail("w1", claimed, FAILURE)
    assert await cost() < reserved
    assert await redis.memory_usage(keys.job(job.id), samples=0) <= running, "a finished record is no larger"


@PICTURES
async def test_a_server_at_its_memory_limit_still_finishes_what_it_accepted(
    settings: Settings, tmp_path: Path, picture: bytes
) -> None:
    """Redis refuses a script whose first write may grow memory; the scripts that end jobs get through."""
    limited = settings.model_copy(update={"data_dir": tmp_path})
    with EmbeddedRedis(limited) as server:
        async with opened(limited, server.url) as queue:
            first, second, third = [await enqueue(queue) for _ in range(3)]
            [job] = await claim(queue, max_jobs=1)
            await queue._connection.command("CONFIG", "SET", "maxmemory", "1")
            with pytest.raises(QueueUnavailable, match="memory is full"):
                await enqueue(queue)
            assert not (await queue.renew("w1", {job.id: job.attempt})).lost
            await queue.progress("w1", [(job.id, job.attempt, 1, 4)])
            assert await succeed(queue, job, images=(picture,))
            assert (await queue.cancel(third.id)).state == "cancelled"
            other = await claim_one(queue)
            assert await queue.hand_back("w1", other)
            assert await succeed(queue, await claim_one(queue))
            await queue.reap()
            assert await queue.images(first.id) == [picture]
            assert (await queue.status(second.id)).state == "succeeded"
            await queue._connection.command("CONFIG", "SET", "maxmemory", "100mb")
            await asyncio.sleep(1.1)  # the age of a memory sample
            await enqueue(queue)


async def test_nothing_is_left_when_everything_has_expired(settings: Settings, redis_url: str, redis: Any) -> None:
    pattern = f"{Keys(settings.shard).prefix}*"
    permanent = {"counters", "models", "pace"}
    async with opened(settings, redis_url, result_ttl_s=1.5, job_ttl_s=2.0) as queue:
        done, cancelled, expired, failed = [await enqueue(queue, idempotency_key=str(i)) for i in range(4)]
        await queue.cancel(cancelled.id)
        for job in await claim(queue):
            if job.id == failed.id:
                await queue.fail("w1", job, FAILURE)
            else:
                await succeed(queue, job)
        assert await queue.images(done.id) == [b"picture"]
        await enqueue(queue, deadline_s=0)
        await queue.reap()

        async def is_clean() -> bool:
            left = {key.decode().split("}:")[1] for key in await redis.keys(pattern)}
            return {name for name in left if name.split(":")[0] not in ("notify", "claim", "debts")} <= permanent

        await eventually(is_clean)
        with pytest.raises(JobNotFound):
            await queue.status(expired.id)
        for key in await redis.keys(pattern):
            if key.decode().split("}:")[1] not in ("counters", "models"):
                assert await redis.pttl(key) > 0, f"{key!r} never expires"


async def test_every_key_is_in_the_table_and_carries_the_hash_tag(queue: JobQueue, redis: Any, keys: Keys) -> None:
    before = set(await redis.keys("*"))
    await queue.register("w1", [make_card()])
    await queue.heartbeat("w1", {MODEL: 100.0})
    api_key, token = new_key(name="ann", tenant="ann", scopes=["generate"])
    await queue.api_keys.add(api_key)
    assert await queue.api_keys.find(token) == api_key
    await queue.api_keys.take(api_key.id, Rate(count=1, period_s=60, burst=1))
    await queue.callers.begin("ann", "0" * 26, "first")
    await queue.callers.choose("ann", {"model": MODEL})
    await queue.left_calls.leave("0" * 64, "key", kept_s=30)
    for index in range(3):
        options: dict[str, Any] = {"cancel_when_left": True, "inputs": {"init_image": b"picture"}}
        await enqueue(queue, costing(100.0), idempotency_key=str(index), payer=api_key.id, **options)
    await succeed(queue, await claim_one(queue))
    poison = await claim_one(queue)
    running: list[Job] = []
    for _ in range(3):
        await end_lease(queue, poison)
        await queue.reap()
        running += [job for job in await claim(queue) if job.id != poison.id]
    await queue.keep_checkpoints("w1", {(job.id, job.attempt, 0): b"state" for job in running})
    await queue.show("w1", {(job.id, job.attempt, 0): (1, b"preview") for job in running})
    await queue.batches()
    await queue.tell_batch("w1", BatchView(rows=[], max_model_rows=8))

    assert set(CHANNEL_TABLE) == {"ended", "progress", "cancel", "look"}
    written = {key.decode() for key in set(await redis.keys("*")) - before}
    assert all(key.startswith(keys.prefix) for key in written)
    kinds = {key: key.removeprefix(keys.prefix).split(":")[0] for key in written}
    # The last claim emptied the queue, and so the wake-up list, the waiting jobs and their cost. Nothing stays staged.
    waiting = {"ready", "ready_of", "shares", "tenants", "queued", "notify", "backlog"}
    unseen = waiting | {"promises", "promise", "staged", "reserved"}
    assert set(kinds.values()) == set(KEY_TABLE) - unseen
    for key, kind in kinds.items():
        assert (await redis.type(key)).decode() == KEY_TABLE[kind][0]


async def test_a_job_costs_few_round_trips(queue: JobQueue, redis: Any) -> None:
    """Enqueue, sleep, claim, renew, three progress reports, publish, wait and fetch."""

    async def live() -> None:
        job = make_job()
        woken = asyncio.ensure_future(queue.wait_for_work([MODEL], 5))
        await queue.enqueue(job, result_bytes=BYTES)
        ended = asyncio.ensure_future(queue.wait(job.id, 5))
        await woken
        claimed = await claim_one(queue)
        await queue.renew("w1", {job.id: claimed.attempt})
        for step in range(1, 4):
            await queue.progress("w1", [(job.id, claimed.attempt, step, 4)])
        await succeed(queue, claimed)
        await ended
        await queue.image(job.id, 0)

    await live()  # scripts are loaded and the subscription stands, as in any process but a new one
    sent: list[str] = []
    async with redis.monitor() as monitor:
        await live()
        await queue._connection.command("ECHO", "the end")
        while "the end" not in (seen := await monitor.next_command())["command"]:
            if seen["client_type"] != "lua":
                sent.append(seen["command"].split()[0])
    assert len(sent) <= 12, sent


async def test_one_queue_lives_in_one_slot_of_a_cluster(settings: Settings, tmp_path: Path) -> None:
    """Redis refuses, in cluster mode, a command or script whose keys lie in different slots."""
    path = tmp_path / "redis.sock"
    node = await asyncio.create_subprocess_exec(
        find_redis_server(),
        *("--port", "0", "--unixsocket", str(path), "--dir", str(tmp_path), "--save", "", "--cluster-enabled", "yes"),
        stdout=asyncio.subprocess.DEVNULL,
    )
    try:
        await eventually(lambda: _is(path.exists()))
        async with Redis(unix_socket_path=str(path), protocol=2) as redis:
            await redis.execute_command("CLUSTER", "ADDSLOTS", *range(16384))

            async def is_whole() -> bool:
                return "cluster_state:ok" in str(await redis.execute_command("CLUSTER", "INFO"))

            await eventually(is_whole)
        async with opened(settings, f"unix://{path}") as queue:
            await queue.register("w1", [make_card(), make_card("other")])
            job = await enqueue(queue, make_job(num_images=2), idempotency_key="one")
            other = await enqueue(queue, make_job(model="other"))
            assert await queue.wait_for_work([MODEL, "other"], 5)
            claimed = {found.id: found for found in await queue.claim("w1", [MODEL, "other"], 9, 9)}
            await queue.renew("w1", {job.id: 1, other.id: 1})
            await queue.progress("w1", [(job.id, 1, 1, 4), (other.id, 1, 1, 4)])
            assert await succeed(queue, claimed[job.id], images=(b"a", b"b"))
            assert await queue.hand_back("w1", claimed[other.id])
            await queue.cancel(other.id)
            await queue.reap()
            assert await queue.images(job.id) == [b"a", b"b"]
            assert (await _collect(queue, job.id))[-1].kind == "succeeded"
            await assert_reconciled(queue)
    finally:
        node.kill()
        await node.wait()


# Redis comes and goes


async def test_jobs_and_waiters_survive_a_killed_server(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are woken by the new subscription."""
    never_look(monkeypatch)
    own = settings.model_copy(update={"data_dir": tmp_path})
    with EmbeddedRedis(own) as server:
        async with opened(own, server.url) as queue:
            done, waiting = await enqueue(queue), await enqueue(queue)
            job = await claim_one(queue)
            waiter = asyncio.ensure_future(queue.wait(done.id, 30))
            stream = asyncio.ensure_future(_collect(queue, done.id))
            await eventually(lambda: _is_subscribed(queue, "progress"))
            os.kill(server.server_pid, signal.SIGKILL)
            await eventually(lambda: _is(server.poll() is not None))
            with pytest.raises(QueueUnavailable) as caught:
                await queue.enqueue(make_job(), result_bytes=BYTES)
            assert caught.value.retry_after_s > 0
            assert not waiter.done()
            server.restart()
            assert (await queue.status(waiting.id)).state == "queued"
            assert await succeed(queue, job)
            assert (await asyncio.wait_for(waiter, 20)).state == "succeeded"
            assert (await asyncio.wait_for(stream, 20))[-1].kind == "succeeded"
            assert (await claim_one(queue)).id == waiting.id
            await assert_reconciled(queue)


async def test_a_server_that_was_flushed_is_used_again_without_a_restart(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is told that a job is gone; those who wait for it see it when they look by themselves."""
    monkeypatch.setattr("darkroom.queue.client_side.SAFETY_POLL_S", 0.3)
    own = settings.model_copy(update={"data_dir": tmp_path})
    with EmbeddedRedis(own) as server:
        async with opened(own, server.url) as queue:
            lost = await enqueue(queue)
            waiter = asyncio.ensure_future(queue.wait(lost.id, 30))
            await eventually(lambda: _is_subscribed(queue, "ended"))
            await queue._connection.command("FLUSHALL")
            await queue._connection.command("SCRIPT", "FLUSH")
            job = await enqueue(queue)
            assert await succeed(queue, await claim_one(queue))
            assert (await queue.wait(job.id, 1)).state == "succeeded"
            with pytest.raises(JobNotFound):
                await asyncio.wait_for(waiter, 20)


async def test_a_link_that_falls_silent_is_noticed_and_replaced(
    settings: Settings, embedded_redis: EmbeddedRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, queue: JobQueue
) -> None:
    monkeypatch.setattr("darkroom.queue.connection.SOCKET_TIMEOUT_S", 0.2)
    monkeypatch.setattr("darkroom.queue.notices.SOCKET_TIMEOUT_S", 0.1)
    never_look(monkeypatch)
    socket = Path(embedded_redis.url.removeprefix("unix://"))
    path = tmp_path / "proxy.sock"
    async with lossy_proxy(socket, path) as proxy, opened(settings, f"unix://{path}") as far:
        first, second = await enqueue(queue), await enqueue(queue)
        jobs = {job.id: job for job in await claim(queue)}
        waiter = asyncio.ensure_future(far.wait(first.id, 30))
        await eventually(lambda: _is_subscribed(queue, "ended"))
        await asyncio.sleep(0.5)  # several silences, each answered with a ping
        assert await succeed(queue, jobs[first.id])
        assert (await asyncio.wait_for(waiter, 20)).state == "succeeded"

        waiter = asyncio.ensure_future(far.wait(second.id, 30))
        await eventually(lambda: _is(far.num_waiters == 1))
        proxy.freeze()
        assert await succeed(queue, jobs[second.id])
        assert (await asyncio.wait_for(waiter, 20)).state == "succeeded"


async def test_a_server_that_is_full_sooner_than_was_thought_refuses_a_job_as_full(
    settings: Settings, tmp_path: Path
) -> None:
    own = settings.model_copy(update={"data_dir": tmp_path})
    with EmbeddedRedis(own) as server:
        async with opened(own, server.url) as queue:
            job = await enqueue(queue)  # and so its memory has just been looked at
            used = (await queue.memory()).used_bytes
            queue._memory._taken_at = float("inf")
            await queue._connection.command("CONFIG", "SET", "maxmemory", used - (100 << 10))
            with pytest.raises(QueueUnavailable) as refused:
                await enqueue(queue)
            assert (refused.value.code, str(refused.value)) == ("storage_full", "the queue's memory is full")
            assert await succeed(queue, await claim_one(queue))
            assert (await queue.status(job.id)).state == "succeeded"


async def test_any_mixture_of_accidents_ends_every_job_once(settings: Settings, redis_url: str) -> None:
    """Workers vanish, come back late, hand back, and clients cancel; each accepted job still ends exactly once."""
    dice = random.Random(20)
    stored: Counter[str] = Counter()
    late: list[tuple[str, Job]] = []

    async def publish(queue: JobQueue, job: Job, owner: str) -> None:
        if await succeed(queue, job, owner):
            stored[job.id] += 1

    async def work(name: str, queue: JobQueue) -> None:
        while (stats := await queue.stats()).waiting + stats.in_flight:
            await queue.reap()
            for job in await claim(queue, name, max_jobs=3):
                fate = dice.random()
                if fate < 0.15:
                    late.append((name, job))
                elif fate < 0.3:
                    await queue.hand_back(name, job)
                elif fate < 0.4:
                    await queue.fail(name, job, FAILURE)
                else:
                    await publish(queue, job, name)
            if late and dice.random() < 0.3:
                owner, job = late.pop(0)
                await publish(queue, job, owner)
            await asyncio.sleep(0.005)

    async with contextlib.AsyncExitStack() as stack:
        queues = [
            await stack.enter_async_context(opened(settings, redis_url, lease_s=0.05, max_failures=2)) for _ in range(3)
        ]
        jobs = [await enqueue(queues[0], make_job(priority=dice.choice(list(Priority)))) for _ in range(60)]
        workers = [asyncio.ensure_future(work(f"w{index}", queue)) for index, queue in enumerate(queues)]
        for job in dice.sample(jobs, 10):
            await queues[0].cancel(job.id)
        await asyncio.wait_for(asyncio.gather(*workers), 50)

        states = Counter([(await queues[0].status(job.id)).state.value for job in jobs])
        counters = (await queues[0].stats()).counters
        assert counters.pop("accepted") == 60 == sum(states.values())
        assert {name: count for name, count in counters.items() if count} == dict(states)
        assert sum(stored.values()) == states["succeeded"] == len(stored)
        await assert_reconciled(queues[0])


async def test_a_read_only_or_absent_server_is_named_as_such(settings: Settings, tmp_path: Path) -> None:
    own = settings.model_copy(update={"data_dir": tmp_path})
    with pytest.raises(QueueUnavailable, match="cannot be reached"):
        await JobQueue.connect(own, f"unix://{tmp_path}/nothing.sock")
    with EmbeddedRedis(own) as server:
        async with opened(own, server.url) as queue:
            await queue._connection.command("REPLICAOF", "127.0.0.1", "1")
            with pytest.raises(QueueUnavailable, match="read-only"):
                await enqueue(queue)
            await queue._connection.command("REPLICAOF", "NO", "ONE")
            await enqueue(queue)


async def test_a_cancelled_call_does_not_poison_the_next_one(queue: JobQueue) -> None:
    """A reply that arrives after its caller has left must not be read as the answer to another question."""
    job = await enqueue(queue)
    for _ in range(40):
        call = asyncio.ensure_future(queue.status(job.id))
        await asyncio.sleep(0)
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await call
        await queue.ping()
        assert (await queue.status(job.id)).state == "queued"


# The work that waits


def costing(cost: float) -> Job:
    return msgspec.structs.replace(make_job(), cost=cost)


async def backlog_cost(queue: JobQueue) -> float:
    """The cost that waits; one worker of rate 1 would take as many seconds."""
    return (await queue.stats()).backlog_s.get(MODEL, 0.0)


async def test_the_backlog_follows_every_way_into_and_out_of_the_waiting_jobs(
    settings: Settings, queue: JobQueue, redis: Any, keys: Keys
) -> None:
    await queue.register("w1", [make_card()])
    await queue.heartbeat("w1", {MODEL: 1.0})
    jobs = [await enqueue(queue, costing(10.0**power)) for power in range(5)]
    assert await backlog_cost(queue) == 11111
    claimed = {job.id: job for job in await claim(queue, max_jobs=2)}
    assert await backlog_cost(queue) == 11100
    await queue.cancel(jobs[2].id)
    assert await backlog_cost(queue) == 11000
    await queue.hand_back("w1", claimed[jobs[0].id])
    await end_lease(queue, jobs[1])
    await queue.reap()
    assert await backlog_cost(queue) == 11011
    late = await enqueue(queue, costing(500.0))
    await redis.zadd(f"{keys.prefix}queued", {late.id: 1})
    assert (await queue.reap()).expired == [late.id]
    assert await backlog_cost(queue) == 11011
    # A record that cannot be read cannot say what it cost; that is made good once nothing waits.
    await redis.delete(keys.job(jobs[4].id))
    for job in await claim(queue):
        await succeed(queue, job)
    await enqueue(queue, costing(3.0))
    assert await backlog_cost(queue) == 3


async def test_the_backlog_is_divided_by_what_all_live_workers_do_in_a_second(queue: JobQueue) -> None:
    await enqueue(queue, costing(1200.0))
    assert (await queue.stats()).backlog_s == {}, "nobody knows how fast a worker is"
    await queue.register("w1", [make_card()])
    await queue.heartbeat("w1", {MODEL: 100.0})
    assert (await queue.stats()).backlog_s == {MODEL: 12.0}
    await queue.register("w2", [make_card()])
    await queue.heartbeat("w2", {MODEL: 100.0})
    assert (await queue.stats()).backlog_s == {MODEL: 6.0}
    for _ in range(200):
        await queue.heartbeat("w1", {MODEL: 100.0})
        await queue.heartbeat("w2", {MODEL: 200.0})
    assert (await queue.stats()).backlog_s[MODEL] == pytest.approx(4.0, rel=0.05)
    for worker in ("w1", "w2"):
        await queue.unregister(worker)
    assert (await queue.stats()).backlog_s[MODEL] == pytest.approx(8.0, rel=0.05), "one worker would take this long"


async def test_a_cancellation_that_gets_lost_in_the_client_does_not_keep_a_process_from_ending(
    settings: Settings, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An API that was told to end while its way to Redis was cut did not, now and then."""
    get_message = PubSub.get_message
    num_lost = 0

    async def losing(*arguments: Any, **keywords: Any) -> Any:
        nonlocal num_lost
        try:
            return await get_message(*arguments, **keywords)
        except asyncio.CancelledError:
            num_lost += 1
            if num_lost > 1:
                raise
            raise exceptions.TimeoutError from None

    monkeypatch.setattr(PubSub, "get_message", losing)
    queue = await JobQueue.connect(settings, redis_url)
    job = make_job()
    await queue.enqueue(job, result_bytes=1000)
    await queue.wait(job.id, 0.1)
    closing = asyncio.ensure_future(queue.close())
    ended, _ = await asyncio.wait((closing,), timeout=20)
    assert num_lost > 0
    assert ended == {closing}


async def _has_clients(redis: Any, number: int) -> bool:
    """The server notices a moment later that a client is gone."""
    return len(await redis.client_list()) == number


async def test_after_an_outage_workers_get_the_time_to_renew_their_leases(
    queue: JobQueue, redis: Any, keys: Keys
) -> None:
    """All of them had lost their jobs, and three outages of more than a lease made a dead letter."""
    await enqueue(queue)
    job = await claim_one(queue)
    for _ in range(3):
        await end_lease(queue, job)
        await redis.delete(f"{keys.prefix}looked_after")
        assert (await queue.reap()).requeued == []
        assert not (await queue.renew("w1", {job.id: job.attempt})).lost
    await end_lease(queue, job)
    assert (await queue.reap()).requeued == [job.id], "one that does not come back"


async def test_after_a_start_that_knows_of_no_workers_leases_are_not_given_anew(
    queue: JobQueue, redis: Any, keys: Keys
) -> None:
    await enqueue(queue)
    job = await claim_one(queue)
    await end_lease(queue, job)
    await redis.delete(f"{keys.prefix}looked_after")
    await queue.forget_workers()
    assert (await queue.reap()).requeued == [job.id]


@pytest.mark.parametrize(("max_failures", "alone_after"), [(2, 1), (3, 2), (20, 2)])
async def test_a_job_runs_alone_before_it_is_given_up(
    settings: Settings, redis_url: str, max_failures: int, alone_after: int
) -> None:
    async with opened(settings, redis_url, max_failures=max_failures) as queue:
        for _ in range(3):
            await enqueue(queue)
        for failures in range(alone_after + 1):
            jobs = await claim(queue)
            assert len(jobs) == (3 if failures < alone_after else 1)
            for job in jobs:
                await end_lease(queue, job)
            assert (await queue.reap()).dead == ([jobs[0].id] if failures + 1 == max_failures else [])


async def test_what_is_under_way_when_the_queue_is_closed_does_not_connect_again(
    settings: Settings, redis_url: str, redis: Any
) -> None:
    before = len(await redis.client_list())
    queue = await JobQueue.connect(settings, redis_url)
    waiting = asyncio.ensure_future(queue.wait_for_work([MODEL], 600))
    await eventually(lambda: _has_blocked_client(queue))
    await queue.close()
    with pytest.raises(QueueUnavailable):
        await asyncio.wait_for(waiting, 20)
    with pytest.raises(QueueUnavailable):
        await queue.stats()
    await eventually(lambda: _has_clients(redis, before))


async def test_a_process_that_ends_while_it_connects_leaves_no_connection(
    settings: Settings, redis_url: str, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinged = asyncio.Event()

    async def long(*_: Any) -> None:
        pinged.set()
        await asyncio.sleep(600)

    before = len(await redis.client_list())
    monkeypatch.setattr(JobQueue, "log_promise", long)
    connecting = asyncio.ensure_future(JobQueue.connect(settings, redis_url))
    await asyncio.wait_for(pinged.wait(), 20)
    connecting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await connecting
    await eventually(lambda: _has_clients(redis, before))
