"""Jobs that were given up, and what an operator does with them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from darkroom.config import Settings
from darkroom.errors import JobError, LetterNotFound, QueueFull
from darkroom.jobs import Job, JobState, Priority
from darkroom.queue import DeadLetter, EmbeddedRedis, JobQueue
from darkroom.queue.keys import Keys
from redis.asyncio import Redis

from tests.support.jobs import MODEL, make_job, make_result
from tests.test_cli import darkroom, environment

BYTES = 1000


@pytest_asyncio.fixture
async def redis(redis_url: str) -> AsyncIterator[Any]:
    client = Redis.from_url(redis_url, protocol=2)
    yield client
    await client.aclose()


async def bury(queue: JobQueue, job: Job | None = None) -> DeadLetter:
    """Lose a job with as many workers as it takes."""
    job = job or make_job(num_images=2, priority=Priority.HIGH)
    await queue.enqueue(job, result_bytes=BYTES)
    while (await queue.status(job.id)).state is JobState.QUEUED:
        [claimed] = await queue.claim("victim", [MODEL], 1, 100)
        await queue.hand_back("victim", claimed, is_failure=True)
    return (await queue.dead_letters.all())[-1]


async def test_a_letter_tells_what_was_asked_for_and_how_it_ended(queue: JobQueue) -> None:
    job = make_job(num_images=2)
    letter = await bury(queue, job)
    assert (letter.job_id, letter.failures, letter.attempt, letter.worker) == (job.id, 3, 3, "victim")
    assert letter.reason == "its worker lost its device"
    assert letter.job is not None
    assert letter.job.request == job.request
    assert abs(letter.written_at_ms - await queue.dead_letters.server_ms()) < 60_000


async def test_a_replayed_letter_is_a_new_job_and_is_gone(queue: JobQueue) -> None:
    letter = await bury(queue)
    enqueued = await queue.dead_letters.replay(letter)
    assert enqueued.job_id != letter.job_id
    assert (await queue.status(letter.job_id)).state is JobState.FAILED
    assert await queue.dead_letters.all() == []
    again = await queue.dead_letters.replay(letter)
    assert (again.job_id, again.is_new) == (enqueued.job_id, False)

    [job] = await queue.claim("careful", [MODEL], 5, 100)
    assert (job.id, job.attempt, job.failures, job.priority) == (enqueued.job_id, 1, 0, Priority.HIGH)
    assert letter.job is not None
    assert job.request == letter.job.request
    pictures = [b"one", b"two"]
    assert await queue.succeed("careful", job, make_result(pictures, "careful"), pictures)
    assert (await queue.stats()).reserved_bytes == 0


async def test_two_operators_who_replay_one_letter_at_once_make_one_job(queue: JobQueue) -> None:
    letter = await bury(queue)
    replayed = await asyncio.gather(*(queue.dead_letters.replay(letter) for _ in range(5)))
    assert len({one.job_id for one in replayed}) == 1
    assert sum(one.is_new for one in replayed) == 1
    assert (await queue.stats()).waiting == 1


async def test_a_letter_that_cannot_be_replayed_is_kept(
    queue: JobQueue, redis: Any, settings: Settings, redis_url: str
) -> None:
    letter = await bury(queue)
    full = JobQueue(settings.model_copy(update={"max_queue_jobs": 1}), redis_url)
    await full.enqueue(make_job(), result_bytes=BYTES)
    with pytest.raises(QueueFull):
        await full.dead_letters.replay(letter)
    await full.close()
    await redis.xadd(Keys(settings.shard).dead, {"job": "0" * 26, "payload": b"\x80garbage"})
    unreadable = (await queue.dead_letters.all())[-1]
    with pytest.raises(JobError, match="cannot be read"):
        await queue.dead_letters.replay(unreadable)
    assert [kept.id for kept in await queue.dead_letters.all()] == [letter.id, unreadable.id]


async def test_letters_are_found_by_their_own_id_or_their_jobs(queue: JobQueue) -> None:
    first, second = await bury(queue), await bury(queue)
    assert await queue.dead_letters.find([second.job_id, first.id, second.id]) == [second, first]
    with pytest.raises(LetterNotFound, match="jobs dead list"):
        await queue.dead_letters.find([first.id, "1-1"])
    assert await queue.dead_letters.purge([first]) == 1
    assert await queue.dead_letters.purge([first, second]) == 1
    assert await queue.dead_letters.purge([]) == 0


# The command line


@pytest.fixture
def to_redis(settings: Settings) -> dict[str, str]:
    return environment(DARKROOM_REDIS_URL=settings.redis_url or "", DARKROOM_SHARD=settings.shard)


async def run(env: dict[str, str], *arguments: str) -> tuple[int, str, str]:
    return await asyncio.to_thread(darkroom, "jobs", *arguments, env=env)


async def test_an_operator_lists_replays_and_purges(queue: JobQueue, to_redis: dict[str, str]) -> None:
    assert await run(to_redis, "dead", "list") == (0, "There are no dead letters.\n", "")
    assert await run(to_redis, "dead", "replay", "--all") == (0, "There are no dead letters.\n", "")
    letters = [await bury(queue) for _ in range(4)]
    code, out, err = await run(to_redis, "dead", "list")
    assert (code, err) == (0, "")
    head, first, *rest = out.splitlines()
    assert head.split()[:2] == ["LETTER", "JOB"]
    assert len(rest) == 3
    for shown in (letters[0].id, letters[0].job_id, "victim", "its worker lost its device", MODEL, "a red circle"):
        assert shown in first
    listed = json.loads((await run(to_redis, "dead", "list", "--json"))[1])
    assert [one["id"] for one in listed] == [letter.id for letter in letters]
    assert listed[0]["request"]["prompt"] == "a red circle"

    code, out, _ = await run(to_redis, "dead", "replay", letters[0].id, letters[1].job_id)
    assert code == 0
    new = [line.split()[-1] for line in out.splitlines()]
    assert [(await queue.status(job_id)).state for job_id in new] == ["queued", "queued"]
    assert await run(to_redis, "dead", "purge", "--older-than", "1h") == (0, "0 dead letters removed.\n", "")
    assert await run(to_redis, "dead", "purge", letters[2].id) == (0, "1 dead letter removed.\n", "")
    assert await run(to_redis, "dead", "purge", "--all") == (0, "1 dead letter removed.\n", "")

    code, _, err = await run(to_redis, "dead", "replay", letters[0].id)
    assert (code, err.splitlines()) == (
        2,
        [f"darkroom: there is no dead letter '{letters[0].id}'; `darkroom jobs dead list` shows them"],
    )


async def test_a_letter_that_is_not_replayed_is_named_and_the_others_are(
    queue: JobQueue, redis: Any, settings: Settings, to_redis: dict[str, str]
) -> None:
    await redis.xadd(Keys(settings.shard).dead, {"job": "0" * 26, "payload": b"\x80garbage"})
    letter = await bury(queue)
    code, out, err = await run(to_redis, "dead", "replay", "--all")
    assert code == 1
    assert out.startswith(f"{letter.id}: job {letter.job_id} is now job ")
    assert "is not replayed: the letter's job cannot be read by this release" in err
    assert len(await queue.dead_letters.all()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("replay",),
        ("replay", "1-1", "--all"),
        ("purge",),
        ("purge", "--all", "--older-than", "1d"),
        ("purge", "--older-than", "soon"),
    ],
)
def test_a_choice_that_is_none_or_two_is_refused(to_redis: dict[str, str], arguments: tuple[str, ...]) -> None:
    code, out, err = darkroom("jobs", "dead", *arguments, env=to_redis)
    assert (code, out) == (2, "")
    assert err.startswith("darkroom: ")
    assert "expected" in err


async def test_a_job_is_shown_and_cancelled(queue: JobQueue, to_redis: dict[str, str]) -> None:
    job = make_job()
    await queue.enqueue(job, result_bytes=BYTES)
    code, out, _ = await run(to_redis, "show", job.id)
    assert code == 0
    for shown in ("STATE       queued", "JOBS AHEAD  0", "a red circle"):
        assert shown in out
    assert json.loads((await run(to_redis, "show", job.id, "--json"))[1])["state"] == "queued"
    assert await run(to_redis, "cancel", job.id) == (0, f"{job.id} is cancelled\n", "")
    letter = await bury(queue)
    assert "dead_letter: given up after 3 workers" in (await run(to_redis, "show", letter.job_id))[1]
    code, _, err = await run(to_redis, "show", "0" * 26)
    assert (code, "there is no job" in err) == (2, True)


async def test_beside_a_running_up_its_data_directory_is_enough(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, redis_url=None)
    with EmbeddedRedis(settings) as server:
        queue = await JobQueue.connect(settings, server.url)
        try:
            letter = await bury(queue)
            env = environment(DARKROOM_REDIS_URL="redis://127.0.0.1:1")
            code, out, err = await run(env, "dead", "list", "--data-dir", str(tmp_path))
            assert (code, err) == (0, "")
            assert letter.id in out
            code, out, _ = await run(environment(DARKROOM_DATA_DIR=str(tmp_path)), "dead", "replay", "--all")
            assert code == 0
            assert (await queue.status(out.split()[-1])).state is JobState.QUEUED
        finally:
            await queue.close()
    code, out, err = await run(environment(), "dead", "list", "--data-dir", str(tmp_path))
    assert (code, err) == (0, ""), "and while nobody runs"
    assert letter.id not in out
    code, _, err = await run(environment(), "dead", "list", "--redis-url", "redis://127.0.0.1:1")
    assert (code, err) == (1, "darkroom: the queue cannot be reached\n")
