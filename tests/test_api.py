"""The HTTP service, from a prompt to pictures, over the real queue and a worker with a known answer."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import inspect
import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import structlog
from darkroom import metrics
from darkroom.api.service import Service
from darkroom.config import Settings
from darkroom.jobs import Failure
from darkroom.queue import EmbeddedRedis, JobQueue
from PIL import Image

from tests.support.http import Served, in_process, served
from tests.support.instant_worker import InstantWorker, card, colour

pytest_plugins = "tests.support.service"

FOX = {"prompt": "a red fox in the snow"}


@pytest_asyncio.fixture
async def idle_client(settings: Settings, queue: JobQueue) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a service whose only worker never claims anything."""
    await queue.register("idle", [card()])
    async with in_process(settings, queue) as client:
        yield client


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    """A redis-server of this test's own, to be stopped and started again."""
    with EmbeddedRedis(Settings(data_dir=tmp_path / "own", redis_url=None)) as server:
        yield server


def picture(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a finished stream, comments left out."""
    events = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            events.append({**fields, "data": json.loads(fields["data"])})
    return events


# POST /generate


async def test_a_prompt_alone_gives_a_picture_made_with_the_models_own_settings(client: httpx.AsyncClient) -> None:
    reply = await client.post("/generate", json=FOX)
    assert reply.status_code == 200
    body = reply.json()
    image, manifest = body["images"][0], body["manifest"]
    assert picture(base64.b64decode(image["base64"])).getpixel((5, 5)) == colour(manifest["seed"])
    assert image["url"] == f"/jobs/{body['job_id']}/images/0"
    assert 0 <= manifest["seed"] < 2**32
    assert {name: manifest[name] for name in ("model", "width", "height", "num_inference_steps", "guidance_scale")} == {
        "model": "test-world",
        "width": 64,
        "height": 64,
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
    }
    assert (manifest["sampler"], manifest["sigma_schedule"]) == ("dpmpp_2m", "karras")
    assert manifest["weights_hash"] == card().weights_hash
    assert manifest["timings"]["denoise_s"] == 0.003
    assert (manifest["attempts"], manifest["max_batch_rows"], manifest["worker"]) == (1, 2, "instant")


async def test_each_image_of_a_request_has_a_seed_of_its_own(client: httpx.AsyncClient) -> None:
    body = (await client.post("/generate", json={**FOX, "seed": 7, "num_images_per_prompt": 3})).json()
    assert body["manifest"]["seeds"] == [7, 8, 9]
    pictures = [picture(base64.b64decode(image["base64"])) for image in body["images"]]
    assert [one.getpixel((0, 0)) for one in pictures] == [colour(7), colour(8), colour(9)]


@pytest.mark.parametrize(
    ("accept", "output_format", "kind"),
    [
        ("image/png", None, "image/png"),
        ("image/jpeg", None, "image/jpeg"),
        ("image/webp", None, "image/webp"),
        ("image/*", None, "image/png"),
        ("image/*", "webp", "image/webp"),
        ("image/webp, image/png;q=0.5, */*;q=0.1", None, "image/webp"),
        ("*/*", "jpeg", "application/json"),
        ("application/json, image/png", None, "application/json"),
    ],
)
async def test_accept_decides_the_form_of_the_reply(
    client: httpx.AsyncClient, accept: str, output_format: str | None, kind: str
) -> None:
    body = {**FOX, "seed": 11} | ({"output_format": output_format} if output_format else {})
    reply = await client.post("/generate", json=body, headers={"Accept": accept})
    assert reply.status_code == 200
    assert reply.headers["content-type"] == kind
    if kind != "application/json":
        assert picture(reply.content).get_format_mimetype() == kind
        assert reply.headers["darkroom-seed"] == "11"
        location = reply.headers["content-location"]
        assert location == f"/jobs/{reply.headers['darkroom-job-id']}/images/0"
        assert (await client.get(location)).content == reply.content


async def test_a_sampler_that_cannot_use_the_models_own_schedule_gets_the_simple_one(client: httpx.AsyncClient) -> None:
    manifest = (await client.post("/generate", json={**FOX, "sampler": "ddim"})).json()["manifest"]
    assert manifest["sigma_schedule"] == "simple"


async def test_async_mode_answers_with_the_jobs_url_at_once(client: httpx.AsyncClient, worker: InstantWorker) -> None:
    worker.gate.clear()
    reply = await client.post("/generate", json={**FOX, "mode": "async", "priority": "high"})
    assert reply.status_code == 202
    location = reply.headers["location"]
    assert reply.json()["url"] == location
    await worker.started.wait()
    job = (await client.get(location)).json()
    assert (job["state"], job["step"], job["num_steps"], job["priority"]) == ("running", 1, 4, "high")
    assert job["manifest"] is None
    worker.gate.set()
    assert events_of((await client.get(f"{location}/events")).text)[-1]["event"] == "succeeded"
    job = (await client.get(location)).json()
    assert job["state"] == "succeeded"
    assert job["manifest"]["seed"] == reply.json()["seed"]
    assert (await client.get(job["images"][0]["url"])).status_code == 200


async def test_a_call_that_waits_too_long_is_handed_the_jobs_url(idle_client: httpx.AsyncClient) -> None:
    reply = await idle_client.post("/generate", json={**FOX, "wait_timeout_s": 0.05})
    assert reply.status_code == 202
    assert (await idle_client.get(reply.headers["location"])).json()["state"] == "queued"


async def test_the_servers_own_limit_caps_the_wait(settings: Settings, queue: JobQueue) -> None:
    await queue.register("idle", [card()])
    async with in_process(settings.model_copy(update={"wait_timeout_s": 0.05}), queue) as client:
        reply = await asyncio.wait_for(client.post("/generate", json={**FOX, "wait_timeout_s": 500}), 20)
    assert reply.status_code == 202


async def test_a_job_past_its_deadline_expires_also_where_no_worker_is_left(idle_client: httpx.AsyncClient) -> None:
    reply = await idle_client.post("/generate", json={**FOX, "deadline_s": 0.1, "wait_timeout_s": 10})
    assert (reply.status_code, reply.json()["code"]) == (504, "expired")


async def test_waiting_jobs_know_their_place_in_the_queue(idle_client: httpx.AsyncClient) -> None:
    calls = [await idle_client.post("/generate", json={**FOX, "mode": "async"}) for _ in range(3)]
    assert [call.json()["position"] for call in calls] == [0, 1, 2]


async def test_waiting_jobs_know_when_they_will_be_done(idle_client: httpx.AsyncClient, queue: JobQueue) -> None:
    body = {**FOX, "mode": "async"}
    assert (await idle_client.post("/generate", json=body)).json()["eta_s"] is None, "nobody knows how fast it is"
    await queue.heartbeat("idle", {"test-world": 1024.0})
    reply = await idle_client.post("/generate", json=body)
    # Two model rows, four evaluations, 256 latent pixels: two seconds each.
    assert reply.json()["eta_s"] == 4
    assert (await idle_client.get(reply.headers["location"])).json()["eta_s"] == 4


async def test_several_models_ask_for_a_choice(settings: Settings, queue: JobQueue) -> None:
    async with InstantWorker(queue, card("one"), card("two")).running(), in_process(settings, queue) as client:
        refused = await client.post("/generate", json=FOX)
        assert refused.status_code == 422
        assert refused.json()["errors"] == [{"field": "model", "value": "nothing", "accepted": "one of one, two"}]
        assert (await client.post("/generate", json={**FOX, "model": "two"})).json()["manifest"]["model"] == "two"
        assert [model["id"] for model in (await client.get("/models")).json()["models"]] == ["one", "two"]


async def test_who_names_none_of_several_models_means_the_built_in_one(settings: Settings, queue: JobQueue) -> None:
    async with (
        InstantWorker(queue, card("another"), card("emoji-world"), card("zoo")).running(),
        in_process(settings, queue) as client,
    ):
        assert (await client.post("/generate", json=FOX)).json()["manifest"]["model"] == "emoji-world"
        assert (await client.post("/generate", json={**FOX, "model": "zoo"})).json()["manifest"]["model"] == "zoo"


async def last_served_ago(queue: JobQueue, model: str, seconds: float) -> None:
    """As if the model's last worker had gone that long ago."""
    connection = queue._connection
    await connection.command("ZADD", f"{connection.keys.prefix}served", int((time.time() - seconds) * 1000), model)


async def test_a_model_whose_workers_are_gone_is_not_offered_beside_a_living_one(
    settings: Settings, queue: JobQueue
) -> None:
    async with InstantWorker(queue, card("old"), worker_id="gone").running():
        pass
    async with InstantWorker(queue, card("new")).running(), in_process(settings, queue) as client:
        assert [model["id"] for model in (await client.get("/models")).json()["models"]] == ["new"]
        assert (await client.post("/generate", json=FOX)).json()["manifest"]["model"] == "new"
        asked = await client.post("/generate", json={**FOX, "model": "old", "mode": "async"})
        assert asked.status_code == 202, "its worker may be about to come back"


async def test_a_model_without_a_worker_for_a_minute_takes_no_jobs_and_says_when_to_come_back(
    settings: Settings, queue: JobQueue
) -> None:
    async with InstantWorker(queue, card("old"), worker_id="gone").running():
        pass
    await last_served_ago(queue, "old", 61)
    async with in_process(settings, queue) as client:
        for body in ({**FOX, "model": "old"}, FOX):
            refused = await client.post("/generate", json=body)
            assert (refused.status_code, refused.json()["code"]) == (503, "no_model")
            assert int(refused.headers["retry-after"]) >= 1
        assert (await client.get("/models")).json()["models"] == []


async def test_the_only_model_takes_jobs_while_its_worker_restarts(settings: Settings, queue: JobQueue) -> None:
    worker = InstantWorker(queue)
    async with worker.running():
        pass
    await last_served_ago(queue, "test-world", 30)
    async with in_process(settings, queue) as client:
        assert [model["id"] for model in (await client.get("/models")).json()["models"]] == ["test-world"]
        url = (await client.post("/generate", json={**FOX, "mode": "async"})).headers["location"]
        async with worker.running():
            assert (await queue.wait(url.removeprefix("/jobs/"), 20)).state == "succeeded"


# Idempotency


async def test_the_same_key_and_body_give_the_same_job_even_after_it_has_ended(client: httpx.AsyncClient) -> None:
    headers = {"Idempotency-Key": "order-1"}
    first = await client.post("/generate", json=FOX, headers=headers)
    again = await client.post("/generate", json=FOX, headers=headers)
    later = await client.post("/generate", json={**FOX, "mode": "async"}, headers=headers)
    assert again.json() == first.json()
    assert later.json()["job_id"] == first.json()["job_id"]
    assert later.json()["seed"] == first.json()["manifest"]["seed"]
    assert later.json()["state"] == "succeeded"


async def test_two_calls_at_once_under_one_key_share_a_job(client: httpx.AsyncClient, worker: InstantWorker) -> None:
    worker.gate.clear()
    calls = [
        asyncio.ensure_future(client.post("/generate", json=FOX, headers={"Idempotency-Key": "k"})) for _ in range(4)
    ]
    await worker.started.wait()
    worker.gate.set()
    replies = [(await call).json() for call in calls]
    assert len({reply["job_id"] for reply in replies}) == 1


# GET and DELETE /jobs/{id}


async def test_a_picture_never_changes_and_may_be_cached_for_good(client: httpx.AsyncClient) -> None:
    url = (await client.post("/generate", json=FOX)).json()["images"][0]["url"]
    reply = await client.get(url)
    assert reply.headers["content-type"] == "image/png"
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert "immutable" in reply.headers["cache-control"]
    assert "sandbox" in reply.headers["content-security-policy"]
    unchanged = await client.get(url, headers={"If-None-Match": reply.headers["etag"]})
    assert (unchanged.status_code, unchanged.content) == (304, b"")


async def test_events_tell_a_job_from_start_to_end_and_can_be_taken_up_again(client: httpx.AsyncClient) -> None:
    url = (await client.post("/generate", json=FOX)).json()["images"][0]["url"].removesuffix("/images/0")
    reply = await client.get(f"{url}/events")
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = events_of(reply.text)
    assert [event["event"] for event in events] == ["queued", "running", "progress", "progress", "succeeded"]
    assert events[3]["data"] == {
        "job_id": url.removeprefix("/jobs/"),
        "state": "running",
        "step": 4,
        "num_steps": 4,
        "eta_s": 0.0,
    }
    rest = events_of((await client.get(f"{url}/events", headers={"Last-Event-ID": events[2]["id"]})).text)
    assert rest == events[3:]


async def test_events_arrive_while_the_job_runs(site: Served, worker: InstantWorker) -> None:
    worker.gate.clear()
    url = (await site.client.post("/generate", json={**FOX, "mode": "async"})).headers["location"]
    kinds = []
    async with site.client.stream("GET", f"{url}/events") as stream:
        async for line in stream.aiter_lines():
            if line.startswith("event: "):
                kinds.append(line.removeprefix("event: "))
            if kinds[-1:] == ["progress"]:
                worker.gate.set()
    assert (kinds[0], kinds[-1]) == ("queued", "succeeded")


async def test_the_batch_is_shown_as_it_changes_and_names_only_the_jobs_asked_for(
    site: Served, worker: InstantWorker
) -> None:
    worker.gate.clear()
    own, others = [(await site.client.post("/generate", json={**FOX, "mode": "async"})).json()["job_id"] for _ in "12"]
    async with asyncio.timeout(20), site.client.stream("GET", "/batch", params={"job_id": own}) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        seen = []
        async for line in stream.aiter_lines():
            if not line.startswith("data: "):
                continue
            rows = [row for told in json.loads(line.removeprefix("data: "))["workers"] for row in told["rows"]]
            if rows:
                seen.append(rows)
                worker.gate.set()
            elif seen:
                break
    assert {row["job_id"] for rows in seen for row in rows} == {own, None}
    assert others not in json.dumps(seen)
    assert {(row["state"], row["step"], row["num_steps"]) for rows in seen for row in rows} == {("in_tick", 1, 4)}


async def test_cancelling_is_final_and_can_be_repeated(idle_client: httpx.AsyncClient) -> None:
    url = (await idle_client.post("/generate", json={**FOX, "mode": "async"})).headers["location"]
    first, second = await idle_client.delete(url), await idle_client.delete(url)
    assert (first.status_code, second.status_code) == (200, 200)
    assert first.json()["state"] == second.json()["state"] == "cancelled"


async def test_a_finished_job_stays_finished_when_cancelled(client: httpx.AsyncClient) -> None:
    job_id = (await client.post("/generate", json=FOX)).json()["job_id"]
    assert (await client.delete(f"/jobs/{job_id}")).json()["state"] == "succeeded"


async def test_a_failed_job_shows_why(client: httpx.AsyncClient, worker: InstantWorker) -> None:
    worker.failure = Failure(code="non_finite", message="the picture is not a number")
    refused = (await client.post("/generate", json=FOX)).json()
    job = (await client.get(f"/jobs/{refused['job_id']}")).json()
    assert job["state"] == "failed"
    assert job["failure"] == {"code": "non_finite", "message": "the picture is not a number"}


# Clients that leave


async def _post(port: int, headers: str = "", **fields: str) -> asyncio.StreamWriter:
    """POST /generate over a raw socket, and wait for nothing."""
    body = json.dumps(FOX | fields)
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    writer.write(f"{head}{headers}\r\n{body}".encode())
    return writer


async def _leave(writer: asyncio.StreamWriter) -> None:
    writer.close()
    await writer.wait_closed()


async def _post_and_leave(site: Served, worker: InstantWorker, headers: str = "", **fields: str) -> str:
    """POST /generate over a raw socket, wait until a worker has the job, hang up; returns the job's id."""
    worker.gate.clear()
    with structlog.testing.capture_logs() as lines:
        writer = await _post(site.port, headers, **fields)
        await worker.started.wait()
    await _leave(writer)
    return next(line["job_id"] for line in lines if line["event"] == "job_accepted")


async def test_a_waiting_client_that_leaves_cancels_its_job(
    site: Served, worker: InstantWorker, queue: JobQueue
) -> None:
    job_id = await _post_and_leave(site, worker)
    assert (await queue.wait(job_id, 20)).state == "cancelled"


async def test_a_client_with_an_idempotency_key_may_leave_and_come_back(
    site: Served, worker: InstantWorker, queue: JobQueue
) -> None:
    service: Service = site.app.state.service
    job_id = await _post_and_leave(site, worker, "Idempotency-Key: back-soon\r\n")
    await service.all_answered(5)
    assert (await queue.status(job_id)).state == "running"
    worker.gate.set()
    reply = await site.client.post("/generate", json=FOX, headers={"Idempotency-Key": "back-soon"})
    assert reply.json()["job_id"] == job_id


async def test_a_client_that_wants_its_job_to_continue_may_leave(
    site: Served, worker: InstantWorker, queue: JobQueue
) -> None:
    service: Service = site.app.state.service
    job_id = await _post_and_leave(site, worker, on_disconnect="continue")
    await service.all_answered(5)
    assert (await queue.status(job_id)).state == "running"
    worker.gate.set()
    assert (await queue.wait(job_id, 20)).state == "succeeded"


async def test_a_job_whose_client_has_a_key_and_stays_away_is_cancelled_after_a_while(
    settings: Settings, queue: JobQueue, worker: InstantWorker
) -> None:
    quick = settings.model_copy(update={"disconnect_grace_s": 0.2})
    own = await JobQueue.connect(quick, quick.redis_url or "")
    async with served(quick, own) as site:
        job_id = await _post_and_leave(site, worker, "Idempotency-Key: gone\r\n")
        assert (await queue.wait(job_id, 10)).state == "cancelled"
        worker.gate.set()
        again = await site.client.post("/generate", json=FOX, headers={"Idempotency-Key": "gone"})
        assert again.status_code == 200
        assert again.json()["job_id"] != job_id
    await own.close()


async def _eventually(look: Callable[[], Any], is_right: Callable[[Any], bool] = bool) -> None:
    """Look until it is right, at most ten seconds."""
    ends_at = time.monotonic() + 10
    while True:
        seen = look()
        if is_right(await seen if inspect.isawaitable(seen) else seen):
            return
        assert time.monotonic() < ends_at, "it never became right"
        await asyncio.sleep(0.02)


async def _due_ms(queue: JobQueue, job_id: str) -> float:
    """When the job counts as abandoned; 0 where nobody has said that it may be."""
    connection = queue._connection
    return float(await connection.command("ZSCORE", f"{connection.keys.prefix}abandoned", job_id) or 0)


async def test_the_last_of_several_waiting_calls_counts(
    settings: Settings, queue: JobQueue, worker: InstantWorker
) -> None:
    quick = settings.model_copy(update={"disconnect_grace_s": 1.0})
    own = await JobQueue.connect(quick, quick.redis_url or "")
    async with served(quick, own) as site:
        service: Service = site.app.state.service
        worker.gate.clear()
        key = "Idempotency-Key: shared\r\n"
        with structlog.testing.capture_logs() as lines:
            first = await _post(site.port, key)
            await worker.started.wait()
        job_id = next(line["job_id"] for line in lines if line["event"] == "job_accepted")
        second = await _post(site.port, key)
        await _eventually(lambda: service.num_waiting == 2)
        await _leave(first)
        await _eventually(lambda: service.num_waiting == 1)
        left_ms = await _due_ms(queue, job_id)
        await _eventually(lambda: _due_ms(queue, job_id), lambda due_ms: due_ms > left_ms + 1200)
        assert (await queue.status(job_id)).state == "running", "the other one stays, longer than the grace time"
        await _leave(second)
        assert (await queue.wait(job_id, 10)).state == "cancelled"
    await own.close()


@pytest.mark.parametrize("path", ["", "/events", "/images/0"])
async def test_whoever_looks_at_an_abandoned_job_keeps_it(
    site: Served, worker: InstantWorker, queue: JobQueue, path: str
) -> None:
    service: Service = site.app.state.service
    job_id = await _post_and_leave(site, worker, "Idempotency-Key: back-soon\r\n")
    await service.all_answered(5)
    assert await _due_ms(queue, job_id) > 0
    async with site.client.stream("GET", f"/jobs/{job_id}{path}") as reply:
        assert reply.status_code == (409 if path.startswith("/images") else 200)
    assert await _due_ms(queue, job_id) == 0


async def test_a_call_that_is_handed_its_jobs_url_need_not_stay(
    idle_client: httpx.AsyncClient, queue: JobQueue
) -> None:
    body, headers = {**FOX, "wait_timeout_s": 0.05}, {"Idempotency-Key": "k"}
    reply = await idle_client.post("/generate", json=body, headers=headers)
    assert reply.status_code == 202
    assert await _due_ms(queue, reply.json()["job_id"]) == 0


async def test_a_job_whose_server_is_killed_is_cancelled_by_another_unless_its_client_comes_back(
    settings: Settings, queue: JobQueue, worker: InstantWorker
) -> None:
    worker.gate.clear()
    quick = {"disconnect_grace_s": 1.0, "shard": settings.shard}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _SERVE, settings.redis_url or "", json.dumps(quick)),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    prefix = f"{queue._connection.keys.prefix}abandoned"
    try:
        assert process.stdout is not None
        port = int(json.loads(await process.stdout.readline())["url"].rpartition(":")[2])
        writers = [await _post(port, f"Idempotency-Key: {key}\r\n") for key in ("a", "b")]
        await _eventually(lambda: queue._connection.command("ZCARD", prefix), lambda count: count == 2)
    finally:
        process.kill()
        await process.communicate()
    for writer in writers:
        with contextlib.suppress(ConnectionError):
            await _leave(writer)
    async with in_process(settings.model_copy(update={"disconnect_grace_s": 1.0}), queue) as client:
        back = await client.post("/generate", json={**FOX, "mode": "async"}, headers={"Idempotency-Key": "b"})
        kept = back.json()["job_id"]
        [left] = set(await queue._connection.command("ZRANGE", prefix, 0, -1))
        assert (await queue.wait(left.decode(), 10)).state == "cancelled"
        assert (await queue.status(kept)).state in ("queued", "running")


# Health, drain, Redis away


async def test_readiness_follows_the_workers(settings: Settings, queue: JobQueue) -> None:
    async with in_process(settings, queue) as client:
        starting = await client.get("/health/ready")
        assert (starting.status_code, starting.json()["health"]) == (503, "starting")
        async with InstantWorker(queue).running():
            ready = await client.get("/health/ready")
            assert (ready.status_code, ready.json()["health"], ready.json()["workers"]) == (200, "ready", 1)
        failed = await client.get("/health/ready")
        assert (failed.status_code, failed.json()["health"]) == (503, "failed")
        assert int(failed.headers["retry-after"]) >= 1


@pytest.mark.parametrize("path", ["/health/live", "/health/ready"])
async def test_health_may_be_asked_without_a_body(site: Served, path: str) -> None:
    full, head = await site.client.get(path), await site.client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(full.content))
    site.app.state.service.is_draining = True
    assert (await site.client.head(path)).status_code == (await site.client.get(path)).status_code


async def test_a_full_queue_is_busy_and_says_when_to_come_back(settings: Settings, queue: JobQueue) -> None:
    small = settings.model_copy(update={"max_queue_jobs": 2})
    small_queue = await JobQueue.connect(small, small.redis_url or "")
    await queue.register("idle", [card()])
    async with in_process(small, small_queue) as client:
        for _ in range(2):
            assert (await client.post("/generate", json={**FOX, "mode": "async"})).status_code == 202
        refused = await client.post("/generate", json=FOX)
        assert (refused.status_code, refused.json()["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        busy = await client.get("/health/ready")
        assert (busy.status_code, busy.json()["health"]) == (200, "busy")
    await small_queue.close()


async def test_a_drain_answers_everyone_and_ends_within_two_seconds(site: Served, worker: InstantWorker) -> None:
    worker.gate.clear()
    client = site.client
    waiting = asyncio.ensure_future(client.post("/generate", json=FOX))
    await worker.started.wait()
    url = (await client.post("/generate", json={**FOX, "mode": "async"})).headers["location"]
    following = asyncio.ensure_future(client.get(f"{url}/events"))
    async with client.stream("GET", f"{url}/events") as stream:
        await anext(stream.aiter_lines())
        began = time.monotonic()
        site.server.stop()
        refused = await client.post("/generate", json=FOX)
        ready = await client.get("/health/ready")
        live = await client.get("/health/live")
        assert (refused.status_code, refused.json()["code"]) == (503, "draining")
        assert refused.headers["retry-after"] == "1"
        assert (ready.status_code, ready.json()["health"]) == (503, "draining")
        assert (live.status_code, live.json()["health"]) == (200, "draining")
        handed_over = await waiting
        assert handed_over.status_code == 202
        assert handed_over.headers["location"].startswith("/jobs/")
    assert (await following).status_code == 200
    await site.finished
    assert time.monotonic() - began < 2


async def test_a_call_that_is_done_during_the_drain_gets_its_picture(site: Served, worker: InstantWorker) -> None:
    worker.gate.clear()
    waiting = asyncio.ensure_future(site.client.post("/generate", json=FOX))
    await worker.started.wait()
    site.server.stop()
    worker.gate.set()
    assert (await waiting).status_code == 200
    await site.finished


async def test_the_api_starts_without_redis_and_recovers_by_itself(own_redis: EmbeddedRedis, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, redis_url=own_redis.url)
    own_redis.stop()
    with structlog.testing.capture_logs() as lines:
        async with in_process(settings) as client:
            service: Service = client._transport.app.state.service  # type: ignore[attr-defined]
            assert (await client.get("/health/live")).status_code == 200
            ready = await client.get("/health/ready")
            assert (ready.status_code, ready.json()["health"]) == (503, "starting")
            for call in (client.post("/generate", json=FOX), client.get("/models"), client.get(f"/jobs/{'0' * 26}")):
                reply = await call
                assert (reply.status_code, reply.json()["code"]) == (503, "queue_unavailable")
                assert int(reply.headers["retry-after"]) >= 1
            await service.look()
            own_redis.start()
            await service.look()
            queue = await JobQueue.connect(settings, own_redis.url)
            async with InstantWorker(queue).running():
                assert (await client.get("/health/ready")).json()["health"] == "ready"
                assert (await client.post("/generate", json=FOX)).status_code == 200
            own_redis.stop()
            await service.look()
            assert (await client.post("/generate", json=FOX)).status_code == 503
            assert (await client.get("/health/ready")).json()["health"] == "failed"
            await queue.close()
    said = [line["event"] for line in lines if line["event"] in ("queue_unavailable", "queue_reached")]
    assert said == ["queue_unavailable", "queue_reached", "queue_unavailable"]


# The process


async def test_metrics_are_served_on_a_port_of_their_own(client: httpx.AsyncClient) -> None:
    await client.post("/generate", json=FOX)
    port = metrics.serve_metrics("127.0.0.1", 0)
    async with httpx.AsyncClient() as scraper:
        text = (await scraper.get(f"http://127.0.0.1:{port}/metrics")).text
    assert 'darkroom_http_requests_total{method="POST",route="/generate",status="200"}' in text
    assert 'darkroom_jobs_answered_total{outcome="succeeded"}' in text
    assert (await client.get("/metrics")).status_code == 404


_SERVE = """
import json, sys
from darkroom import logs
from darkroom.api.server import serve
from darkroom.config import Settings

def listening(url):
    status = open("/proc/self/status").read()
    heavy = [name for name in ("torch", "numpy", "transformers", "PIL", "safetensors") if name in sys.modules]
    rss_kib = int(status.split("VmRSS:")[1].split()[0]) if "VmRSS:" in status else 0
    print(json.dumps({"url": url, "heavy": heavy, "rss_kib": rss_kib}), flush=True)

logs.configure("info", process="api")
changes = json.loads(sys.argv[2]) if sys.argv[2:] else {}
serve(Settings(port=0, **changes), sys.argv[1], on_listening=listening)
"""


def test_the_api_process_is_small_and_ends_well(redis_url: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVE, redis_url], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        told = json.loads(line)
        assert told["heavy"] == []
        assert told["rss_kib"] < 150 * 1024
        assert httpx.get(f"{told['url']}/health/live").json()["health"] == "live"
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert time.monotonic() - began < 5
    finally:
        process.kill()
        process.communicate()
