"""Pictures in a bucket or a directory: a real S3 server, a real Redis, and replies that are those of Redis alone.

Of Google's storage there is no server to be had here; what is tested of it is that its URL leads to its client.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import msgspec
import pytest
import torch
from darkroom import metrics
from darkroom.config import Settings, load_settings
from darkroom.diffusion.loader import load_model
from darkroom.engine.engine import Engine
from darkroom.errors import ConfigError, ImageNotFound, JobError, ResultStoreUnavailable
from darkroom.jobs import Job, JobState, new_job_id
from darkroom.queue import JobQueue, results
from darkroom.queue.results import ResultStore
from darkroom.worker.worker import Worker

from tests.support.engines import job_for
from tests.support.http import in_process
from tests.support.instant_worker import InstantWorker
from tests.support.jobs import MODEL, end_lease, make_job, make_result
from tests.support.s3 import BUCKET, S3Server
from tests.support.tiny_models import write_tiny_model

pytest_plugins = "tests.support.bucket"

FOX = {"prompt": "a red fox in the snow", "seed": 7}


@pytest.fixture
def bucket(settings: Settings, s3: S3Server) -> Settings:
    """Settings with the bucket as the result store."""
    return settings.model_copy(update={"result_store": f"s3://{BUCKET}/darkroom"})


@pytest.fixture
def directory(settings: Settings, tmp_path: Path) -> Settings:
    """Settings with a directory as the result store."""
    return settings.model_copy(update={"result_store": f"file://{tmp_path}/result%20store"})


@contextlib.asynccontextmanager
async def opened(settings: Settings, **changes: object) -> AsyncIterator[JobQueue]:
    queue = await JobQueue.connect(settings.model_copy(update=changes), settings.redis_url or "")
    try:
        yield queue
    finally:
        await queue.close()


@contextlib.asynccontextmanager
async def site(settings: Settings, **changes: object) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the API with a worker behind it."""
    settings = settings.model_copy(update=changes)
    async with (
        opened(settings) as queue,
        InstantWorker(queue).running(),
        in_process(settings, queue) as client,
    ):
        yield client


async def claimed(queue: JobQueue, worker: str = "w1", num_images: int = 1) -> Job:
    """A new job in the hands of a worker."""
    await queue.enqueue(make_job(num_images=num_images), result_bytes=1000)
    [job] = await queue.claim(worker, [MODEL], 1, 100)
    return job


async def finish(queue: JobQueue, job: Job, images: list[bytes], worker: str = "w1") -> bool:
    """What a worker does with finished pictures."""
    result = await queue.store_images(job, make_result(images, worker), images)
    return await queue.succeed(worker, job, result, images)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - counters and threads say nothing by themselves
            await asyncio.sleep(0.02)


def failed_puts() -> float:
    return metrics.REGISTRY.get_sample_value("darkroom_result_store_errors_total", {"operation": "put"}) or 0.0


def without(data: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in data.items() if name not in names}


# The path of a picture.


@pytest.mark.parametrize("kind", ["bucket", "directory"])
async def test_replies_are_those_of_redis(settings: Settings, kind: str, request: pytest.FixtureRequest) -> None:
    stored: Settings = request.getfixturevalue(kind)
    replies: list[dict[str, Any]] = []
    pictures: list[httpx.Response] = []
    for where in (settings, stored):
        async with site(where) as client:
            reply = await client.post("/generate", json={**FOX, "num_images_per_prompt": 2})
            job_id = reply.json()["job_id"]
            job = (await client.get(f"/jobs/{job_id}")).json()
            first = await client.post("/generate", json=FOX, headers={"Accept": "image/webp"})
            second = await client.get(f"/jobs/{job_id}/images/1")
            beyond = await client.get(f"/jobs/{job_id}/images/2")
        assert reply.status_code == first.status_code == second.status_code == 200
        assert beyond.json()["code"] == "image_not_found"
        assert base64.b64decode(reply.json()["images"][1]["base64"]) == second.content
        assert [image["url"] for image in job["images"]] == [f"/jobs/{job_id}/images/{index}" for index in (0, 1)]
        replies.append({"generated": reply.json()["images"][0], "job": job["images"][0], "manifest": job["manifest"]})
        pictures += [first, second]
    of_redis, of_store = replies
    for part in of_redis:
        varying = ("job_id", "url", "total_s")
        assert without(of_store[part], *varying) == without(of_redis[part], *varying)
    for in_redis, in_store in zip(pictures[:2], pictures[2:], strict=True):
        assert in_store.content == in_redis.content
        assert set(in_store.headers) == set(in_redis.headers)
        assert in_store.headers["content-type"] == in_redis.headers["content-type"]


async def test_pictures_lie_in_the_bucket_alone(bucket: Settings, s3: S3Server) -> None:
    async with opened(bucket) as queue:
        job = await claimed(queue, num_images=2)
        assert await finish(queue, job, [b"first", b"second"])
        place = f"darkroom/{bucket.shard}/{job.id}/1-[0-9a-f]{{8}}"
        assert [re.sub(place, "", key) for key in s3.objects] == ["-0.png", "-1.png"]
        assert await queue.images(job.id) == [b"first", b"second"]
        assert await queue._connection.command("EXISTS", queue._connection.keys.image(job.id, 0)) == 0
        assert not await queue._connection.command("HGET", queue._connection.keys.counters, "stored_bytes")


@pytest.mark.parametrize(("kind", "is_reserved"), [("settings", True), ("directory", False)])
async def test_redis_reserves_memory_only_for_pictures_that_go_there(
    kind: str, is_reserved: bool, request: pytest.FixtureRequest
) -> None:
    async with opened(request.getfixturevalue(kind)) as queue:
        await queue.enqueue(make_job(), result_bytes=1 << 20)
        assert ((await queue.stats()).reserved_bytes > 1 << 20) == is_reserved


async def test_pictures_of_before_the_store_are_still_served(settings: Settings, directory: Settings) -> None:
    async with opened(settings) as before, opened(directory) as after:
        job = await claimed(before)
        assert await finish(before, job, [b"in redis"])
        assert await after.image(job.id, 0) == b"in redis"
        assert await after.images(job.id) == [b"in redis"]


async def test_a_server_without_the_store_says_so(settings: Settings, directory: Settings) -> None:
    async with opened(directory) as worker, opened(settings) as api:
        job = await claimed(worker)
        assert await finish(worker, job, [b"elsewhere"])
        with pytest.raises(ResultStoreUnavailable, match="was given none"):
            await api.image(job.id, 0)


async def test_a_record_that_points_elsewhere_reads_nothing(directory: Settings, tmp_path: Path) -> None:
    (tmp_path / "secret-0.png").write_bytes(b"secret")
    async with opened(directory) as queue:
        job = await claimed(queue)
        result = make_result([b"x"])
        for location in ("../secret", "/etc/passwd", f"{directory.shard}/../../secret"):
            damaged = results.msgspec.structs.replace(result, location=location)
            store = ResultStore(directory, directory.result_store or "")
            with pytest.raises(JobError, match="cannot be read"):
                await store.fetch(damaged, 0)
        async with in_process(directory, queue) as client:
            for path in ("..%2f..%2fsecret", f"{job.id}%2f..", f"{job.id}/images/..%2f0"):
                assert (await client.get(f"/jobs/{path}")).status_code == 404
                assert (await client.get(f"/jobs/{path}/images/0")).status_code == 404


# Outages.


async def test_a_worker_waits_out_a_restart_of_the_store_and_keeps_its_lease(
    bucket: Settings, s3: S3Server, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    model = load_model(write_tiny_model(tmp_path / "model", "sd1", seed=5))
    settings = bucket.model_copy(update={"lease_s": 0.5, "num_threads": 1})
    s3.stop()
    before = failed_puts()
    async with opened(settings) as queue:
        worker = Worker(settings, queue, functools.partial(Engine, {model.id: model}, settings))
        running = asyncio.create_task(worker.run())
        job = job_for(model, new_job_id())
        await queue.enqueue(job, result_bytes=1000)
        # The pauses between three tries, a quarter of a second and a half, are longer than the lease.
        await until(lambda: failed_puts() >= before + 3)
        assert (await queue.status(job.id)).state is JobState.RUNNING
        s3.start()
        status = await queue.wait(job.id, 30)
        worker.drain()
        await running
        assert (status.state, status.job.attempt) == (JobState.SUCCEEDED, 1)
        assert (await queue.image(job.id, 0)).startswith(b"\x89PNG")


async def test_a_job_fails_with_its_own_code_when_the_store_stays_away(
    bucket: Settings, s3: S3Server, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    model = load_model(write_tiny_model(tmp_path / "model", "sd1", seed=5))
    settings = bucket.model_copy(update={"result_store_timeout_s": 0.3, "num_threads": 1})
    s3.stop()
    async with opened(settings) as queue, in_process(settings, queue) as client:
        worker = Worker(settings, queue, functools.partial(Engine, {model.id: model}, settings))
        ready = asyncio.Event()
        running = asyncio.create_task(worker.run(ready.set))
        await ready.wait()
        reply = await client.post("/generate", json={**FOX, "num_inference_steps": 2})
        job = (await client.get(f"/jobs/{reply.json()['job_id']}")).json()
        worker.drain()
        await running
    assert (reply.status_code, reply.json()["code"]) == (503, "storage_unavailable")
    assert int(reply.headers["retry-after"]) >= 1
    assert (job["state"], job["failure"]["code"]) == ("failed", "storage_unavailable")


async def test_a_server_that_never_answers_costs_no_more_than_the_time_allowed(
    bucket: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    callers: list[asyncio.StreamWriter] = []

    def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        callers.append(writer)

    monkeypatch.setattr(results, "_DISCARD_TIMEOUT_S", 0.1)
    silent = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.sockets[0].getsockname()[1]}")
    async with opened(bucket, result_store_timeout_s=0.2) as queue:
        job = await claimed(queue)
        began = time.monotonic()
        with pytest.raises(ResultStoreUnavailable):
            await finish(queue, job, [b"x"])
        assert time.monotonic() - began < 9, "the library's own timeout is 10 s"
    silent.close()
    assert callers
    for caller in callers:
        caller.close()
    await asyncio.gather(*(caller.wait_closed() for caller in callers), return_exceptions=True)


async def test_what_was_written_before_the_store_gave_up_is_removed(
    directory: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(directory, result_store_timeout_s=0.3) as queue:
        job = await claimed(queue, num_images=2)
        monkeypatch.setattr(results.secrets, "token_hex", lambda _: "0" * 8)
        folder = tmp_path / "result store" / directory.shard / job.id
        (folder / "1-00000000-1.png").mkdir(parents=True)  # a picture cannot take its name
        with pytest.raises(ResultStoreUnavailable):
            await finish(queue, job, [b"first", b"second"])
        assert os.listdir(folder) == ["1-00000000-1.png"]


async def test_a_picture_that_cannot_be_had_is_503_and_one_that_is_gone_404(bucket: Settings, s3: S3Server) -> None:
    async with opened(bucket) as queue, in_process(bucket, queue) as client:
        job = await claimed(queue)
        assert await finish(queue, job, [b"x"])
        result = (await queue.status(job.id)).result
        assert result is not None
        await ResultStore(bucket, bucket.result_store or "").discard(result)
        assert s3.objects == []
        gone = await client.get(f"/jobs/{job.id}/images/0")
        s3.stop()
        away = await client.get(f"/jobs/{job.id}/images/0")
    assert (gone.status_code, gone.json()["code"]) == (404, "image_not_found")
    assert (away.status_code, away.json()["code"]) == (503, "storage_unavailable")


async def test_a_worker_that_lost_its_lease_leaves_no_pictures_and_harms_none(bucket: Settings, s3: S3Server) -> None:
    async with opened(bucket) as queue:
        late = await claimed(queue)
        stored = await queue.store_images(late, make_result([b"late"]), [b"late"])
        await end_lease(queue, late)
        await queue.reap()
        [owned] = await queue.claim("w2", [MODEL], 1, 100)
        assert await finish(queue, owned, [b"owned"], "w2")
        assert len(s3.objects) == 2
        assert not await queue.succeed("w1", late, stored, [b"late"])
        [left] = s3.objects
        assert left.startswith(f"darkroom/{bucket.shard}/{late.id}/2-")
        assert await queue.image(late.id, 0) == b"owned"


async def test_two_workers_with_the_same_attempt_do_not_touch_each_others_pictures(directory: Settings) -> None:
    """After a failover that made Redis forget a claim, the next one has its number."""
    async with opened(directory) as queue:
        job = await claimed(queue)
        forgotten, owned = [
            await queue.store_images(job, make_result([content]), [content]) for content in (b"forgotten", b"owned")
        ]
        assert await queue.succeed("w1", job, owned, [b"owned"])
        assert not await queue.succeed("w0", job, forgotten, [b"forgotten"])
        assert await queue.image(job.id, 0) == b"owned"


async def test_pictures_of_an_earlier_release_are_still_served(directory: Settings, tmp_path: Path) -> None:
    async with opened(directory) as queue:
        job = await claimed(queue)
        stored = await queue.store_images(job, make_result([b"x"]), [b"x"])
        [file] = (tmp_path / "result store" / directory.shard / job.id).iterdir()
        file.rename(file.with_name("1-0.png"))
        earlier = msgspec.structs.replace(stored, location=f"{directory.shard}/{job.id}/1")
        assert await queue.succeed("w1", job, earlier, [b"x"])
        assert await queue.image(job.id, 0) == b"x"


# Signed URLs.


@contextlib.asynccontextmanager
async def redirected(settings: Settings, **changes: object) -> AsyncIterator[tuple[httpx.AsyncClient, str, bytes]]:
    """A client of nobody in particular, the signed URL that it was sent to, and the picture."""
    async with site(settings, result_urls="signed", **changes) as client, httpx.AsyncClient(trust_env=False) as anyone:
        generated = (await client.post("/generate", json=FOX)).json()
        reply = await client.get(generated["images"][0]["url"])
        assert generated["images"][0]["url"] == f"/jobs/{generated['job_id']}/images/0"
        assert (reply.status_code, reply.headers["cache-control"]) == (307, "no-store")
        yield anyone, reply.headers["location"], base64.b64decode(generated["images"][0]["base64"])


async def test_a_signed_url_needs_no_credentials_and_is_good_for_nothing_else(bucket: Settings) -> None:
    async with redirected(bucket) as (client, url, picture):
        reply = await client.get(url)
        assert (reply.status_code, reply.content, reply.headers["content-type"]) == (200, picture, "image/png")
        assert 1 <= int(parse_qs(urlsplit(url).query)["X-Amz-Expires"][0]) <= bucket.result_ttl_s
        last = "0" if url[-1] != "0" else "1"
        for altered in (url[:-1] + last, url.replace("-0.png", "-1.png"), url.partition("?")[0]):
            assert (await client.get(altered)).status_code in (400, 403)
        assert (await client.delete(url)).status_code == 403
        assert (await client.put(url, content=b"x")).status_code == 403
        assert (await client.get(url)).content == picture


async def test_a_signed_url_ends_with_its_picture(bucket: Settings) -> None:
    async with redirected(bucket, result_ttl_s=1) as (client, url, _):
        assert parse_qs(urlsplit(url).query)["X-Amz-Expires"] == ["1"]
        ends_at = time.monotonic() + 20
        while (reply := await client.get(url)).status_code == 200 and time.monotonic() < ends_at:
            pass
    assert "AccessDenied" in reply.text


async def test_who_asks_not_to_be_redirected_gets_the_picture_from_the_api(bucket: Settings) -> None:
    """The page shows a key that a bucket would not know, and may load nothing from elsewhere."""
    async with site(bucket, result_urls="signed") as client:
        generated = (await client.post("/generate", json=FOX)).json()
        url, picture = generated["images"][0]["url"], base64.b64decode(generated["images"][0]["base64"])
        assert (await client.get(f"{url}?redirect=true")).status_code == 307
        reply = await client.get(f"{url}?redirect=false")
        assert (reply.status_code, reply.content, reply.headers["content-type"]) == (200, picture, "image/png")
        assert (await client.get(f"{url}?redirect=no")).status_code == 422
        assert "img-src 'self' blob:" in (await client.get("/")).headers["content-security-policy"]


# The end of a picture.


@pytest.mark.parametrize("result_urls", ["proxy", "signed"])
async def test_pictures_expire_on_time_though_the_bucket_still_has_them(
    bucket: Settings, s3: S3Server, result_urls: str
) -> None:
    settings = bucket.model_copy(update={"result_urls": result_urls})
    async with opened(settings) as queue, in_process(settings, queue) as client:
        job = await claimed(queue)
        assert await finish(queue, job, [b"x"])
        assert (await client.get(f"/jobs/{job.id}/images/0")).status_code in (200, 307)
        key = queue._connection.keys.job(job.id)
        await queue._connection.command("HINCRBY", key, "finished_ms", -1000 * settings.result_ttl_s)
        reply = await client.get(f"/jobs/{job.id}/images/0")
        assert (reply.status_code, reply.json()["code"]) == (404, "image_not_found")
        assert "has expired" in reply.json()["detail"]
        with pytest.raises(ImageNotFound, match="has expired"):
            await queue.images(job.id)
        assert (await client.get(f"/jobs/{job.id}")).json()["state"] == "succeeded"
    assert len(s3.objects) == 1


async def test_the_api_sweeps_a_directory_of_what_has_expired_and_of_nothing_else(
    directory: Settings, tmp_path: Path
) -> None:
    root = tmp_path / "result store" / directory.shard
    async with opened(directory) as queue:
        old, fresh = await claimed(queue), await claimed(queue)
        for job in (old, fresh):
            assert await finish(queue, job, [b"x"])
        (root / "photos").mkdir()
        (root / "photos" / "1-0.png").touch()
        (root / ("f" * 26)).mkdir()
        (root / ("f" * 26) / "diary.txt").touch()
        (root / old.id / "1-1.png#1").touch()  # of a write that a crash broke off
        long_ago = time.time() - directory.result_ttl_s - results._SWEEP_MARGIN_S - 10
        for folder in ("photos", "f" * 26, old.id):
            os.utime(root / folder, (long_ago, long_ago))
        async with in_process(directory, queue):
            assert sorted(os.listdir(root)) == sorted([fresh.id, "f" * 26, "photos"])
        assert os.listdir(root / ("f" * 26)) == ["diary.txt"]
        assert os.listdir(root / "photos") == ["1-0.png"]
        os.utime(root / fresh.id, (long_ago, long_ago))
        await queue.sweep_results()
        assert (root / fresh.id).is_dir(), "swept again within the minute"
        with pytest.raises(ImageNotFound):
            await queue.image(old.id, 0)


# Settings.


@pytest.mark.parametrize(
    "value",
    [
        "ftp://host/x", "s3://", "s3://Bucket", "s3://bucket/../other", "s3://bucket?region=x", "s3://key:word@bucket",
        "gs://b", "file://relative", "/var/lib", "",
    ],
)  # fmt: skip
def test_a_store_that_is_none_is_refused_by_name(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_RESULT_STORE", value)
    with pytest.raises(ConfigError) as refused:
        load_settings()
    assert f"DARKROOM_RESULT_STORE='{value}'" in str(refused.value)
    assert "expected file:///directory, s3://bucket/prefix or gs://bucket/prefix" in str(refused.value)


@pytest.mark.parametrize("store", [None, "file:///var/lib/darkroom/results"])
def test_only_a_bucket_has_signed_urls(store: str | None) -> None:
    with pytest.raises(ConfigError, match=r"DARKROOM_RESULT_URLS='signed'.*only a bucket"):
        load_settings(result_store=store, result_urls="signed")
    assert load_settings(result_store="gs://pictures/darkroom", result_urls="signed").result_urls == "signed"


def test_googles_storage_is_reached_through_its_own_client() -> None:
    from obstore.store import GCSStore

    store = ResultStore(load_settings(result_urls="signed", result_store="gs://pictures/a"), "gs://pictures/a")
    assert isinstance(store._store, GCSStore)
    assert (store._store.config["bucket"], store._store.prefix) == ("pictures", "a")
    assert store.signs_urls


def test_a_missing_library_is_named_with_the_extra_that_brings_it(
    directory: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ConfigError, match=r"obstore is missing: pip install 'darkroom\[store\]'"):
        JobQueue(directory, directory.redis_url or "")


def test_a_directory_that_cannot_be_made_stops_the_start(settings: Settings) -> None:
    url = "file:///proc/nowhere/results"
    with pytest.raises(ConfigError, match=f"DARKROOM_RESULT_STORE={url}: .*No such file"):
        JobQueue(settings.model_copy(update={"result_store": url}), settings.redis_url or "")


def test_an_endpoint_that_is_no_address_stops_the_start(bucket: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library panics with every call then, which no handler of errors sees."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "storage.internal:9000")
    with pytest.raises(ConfigError, match=r"AWS_ENDPOINT_URL='storage.internal:9000': expected https://host"):
        JobQueue(bucket, bucket.redis_url or "")


async def test_a_worker_finds_out_at_its_start_whether_it_may_write(
    bucket: Settings, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(bucket) as queue:
        await queue.check_result_store()
    assert s3.objects == []
    async with opened(bucket, result_store="s3://nowhere/x") as queue:
        with pytest.raises(ConfigError, match=r"s3://nowhere/x: cannot write: .*NoSuchBucket"):
            await queue.check_result_store()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    async with opened(bucket) as queue:
        with pytest.raises(ConfigError, match=r"cannot write: .*SignatureDoesNotMatch"):
            await queue.check_result_store()
        s3.stop()
        await queue.check_result_store()  # an outage may pass


async def test_calls_to_the_store_are_timed_by_what_they_do(directory: Settings) -> None:
    def count(operation: str) -> float:
        name = "darkroom_result_store_seconds_count"
        return metrics.REGISTRY.get_sample_value(name, {"operation": operation}) or 0.0

    before = {operation: count(operation) for operation in ("put", "get", "delete")}
    async with opened(directory) as queue:
        job = await claimed(queue)
        assert await finish(queue, job, [b"x"])
        await queue.image(job.id, 0)
        await queue.check_result_store()
    assert {operation: count(operation) - before[operation] for operation in before} == {
        "put": 2,
        "get": 1,
        "delete": 1,
    }
