"""The description of the API is complete, agrees with what the API does, and every error code reaches a client."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import structlog
from darkroom.api import body as body_module
from darkroom.api.app import create_app
from darkroom.api.problems import TITLES
from darkroom.config import Settings
from darkroom.errors import HTTP_STATUS
from darkroom.jobs import Failure, Job
from darkroom.queue import Cards, EmbeddedRedis, Enqueued, JobQueue, Rate, new_key

from tests.support.http import in_process, served
from tests.support.instant_worker import InstantWorker, card

FOX = {"prompt": "a red fox in the snow"}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return create_app(Settings(redis_url="redis://unused")).openapi()


def test_every_route_has_examples_and_its_errors(document: dict[str, Any]) -> None:
    routes = {f"{method} {path}" for path, methods in document["paths"].items() for method in methods}
    theirs = {route for route in routes if " /sdapi/v1/" in route or " /v1/" in route}
    assert theirs >= {f"{call} /sdapi/v1/{name}" for call, name in (("post", "txt2img"), ("get", "progress"))}
    assert routes - theirs == {
        "post /generate",
        "get /jobs/{job_id}",
        "delete /jobs/{job_id}",
        "get /jobs/{job_id}/images/{index}",
        "get /jobs/{job_id}/previews/{index}",
        "get /jobs/{job_id}/events",
        "get /batch",
        "get /health/live",
        "get /health/ready",
        "get /models",
    }
    for path, methods in document["paths"].items():
        for operation in methods.values():
            for status, reply in operation["responses"].items():
                assert reply["description"]
                for kind, content in reply.get("content", {}).items():
                    if int(status) >= 400 and path.startswith("/v1/"):
                        assert kind == "application/json"
                        for code, example in content["examples"].items():
                            assert {"message", "type", "code"} <= set(example["value"]["error"])
                            assert HTTP_STATUS[code] in ({int(status)} if int(status) != 400 else {400, 422})
                    elif int(status) >= 400 and path.startswith("/sdapi/"):
                        assert kind == "application/json"
                        for code, example in content["examples"].items():
                            assert example["value"]["error"] == code
                            assert HTTP_STATUS[code] == int(status)
                    elif int(status) >= 400:
                        assert kind == "application/problem+json"
                        for code, example in content["examples"].items():
                            assert example["value"]["status"] == int(status) == HTTP_STATUS[code]
                    elif kind == "application/json" and content["schema"] != {"type": "null"}:
                        assert "example" in content, f"{path} {status}"


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    names = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document)))
    assert names <= set(document["components"]["schemas"])


def test_every_error_code_has_a_title_and_is_documented(document: dict[str, Any]) -> None:
    assert set(TITLES) == set(HTTP_STATUS)
    shown = {
        code
        for methods in document["paths"].values()
        for operation in methods.values()
        for reply in operation["responses"].values()
        for code in reply.get("content", {}).get("application/problem+json", {}).get("examples", {})
    }
    # What holds for every address is said in the list of errors.
    everywhere = {"not_found", "method_not_allowed", "unauthorized", "forbidden"}
    assert set(HTTP_STATUS) - shown == {"unavailable", *everywhere}


async def test_the_pages_load_nothing_from_elsewhere(settings: Settings, queue: JobQueue) -> None:
    async with in_process(settings, queue) as client:
        for path in ("/", "/docs"):
            page = await client.get(path)
            policy = page.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert not re.search(r"""(src|href)=["']?(https?:)?//""", page.text)
            assert not re.search(r"<script(?! src=)|<style|\son\w+=|\sstyle=", page.text)
            for asset in re.findall(r'(?:src|href)="(/static/[^"]+)"', page.text):
                assert (await client.get(asset)).status_code == 200
        again = await client.get(
            "/static/app.js", headers={"If-None-Match": (await client.get("/static/app.js")).headers["etag"]}
        )
        assert again.status_code == 304
        for code in HTTP_STATUS:
            assert f'id="error-{code}"' in page.text
        assert (await client.get("/static/..%2fpage.py")).status_code == 404
        assert (await client.get("/openapi.json")).json()["info"]["title"] == "Darkroom"


def test_the_page_never_writes_markup_from_text() -> None:
    scripts = sorted((Path(body_module.__file__).parent / "static").glob("*.js"))
    assert "app.js" in {script.name for script in scripts}
    for script in scripts:
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", script.read_text())


# Every error code, as a client meets it.


@dataclass
class World:
    """A served API with one worker, and what a case may do to it."""

    settings: Settings
    queue: JobQueue
    worker: InstantWorker
    client: httpx.AsyncClient


async def failing(world: World, code: str) -> httpx.Response:
    world.worker.failure = Failure(code=code, message=f"told by the worker: {code}")
    return await world.client.post("/generate", json=FOX)


async def running_job(world: World) -> str:
    """The URL of a job that will not end by itself."""
    world.worker.gate.clear()
    reply = await world.client.post("/generate", json={**FOX, "mode": "async"})
    await world.worker.started.wait()
    return reply.headers["location"]


async def malformed_json(world: World) -> httpx.Response:
    return await world.client.post("/generate", content=b"{", headers={"Content-Type": "application/json"})


async def body_too_large(world: World) -> httpx.Response:
    content = b" " * (world.settings.max_body_bytes + 1)
    return await world.client.post("/generate", content=content, headers={"Content-Type": "application/json"})


async def request_timeout(world: World) -> httpx.Response:
    async def too_slow() -> Any:
        yield b"{"
        await asyncio.sleep(60)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(body_module, "_BODY_TIMEOUT_S", 0.01)
        async with served(world.settings, world.queue) as site:
            reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
            writer.write(
                b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
            )
            head, _, content = (await reader.read()).partition(b"\r\n\r\n")
            writer.close()
            await writer.wait_closed()
    return httpx.Response(int(head.split()[1]), content=content, headers={"content-type": "application/problem+json"})


async def unsupported_media_type(world: World) -> httpx.Response:
    return await world.client.post("/generate", content=b"{}", headers={"Content-Type": "text/plain"})


async def not_acceptable(world: World) -> httpx.Response:
    return await world.client.post("/generate", json=FOX, headers={"Accept": "text/html"})


async def invalid_request(world: World) -> httpx.Response:
    return await world.client.post("/generate", json={**FOX, "num_inference_steps": 0})


async def unknown_model(world: World) -> httpx.Response:
    return await world.client.post("/generate", json={**FOX, "model": "sd15"})


async def idempotency_mismatch(world: World) -> httpx.Response:
    headers = {"Idempotency-Key": "one"}
    await world.client.post("/generate", json=FOX, headers=headers)
    return await world.client.post("/generate", json={**FOX, "seed": 1}, headers=headers)


async def image_not_found(world: World) -> httpx.Response:
    job_id = (await world.client.post("/generate", json=FOX)).json()["job_id"]
    return await world.client.get(f"/jobs/{job_id}/images/1")


async def job_not_finished(world: World) -> httpx.Response:
    return await world.client.get(f"{await running_job(world)}/images/0")


async def cancelled(world: World) -> httpx.Response:
    world.worker.gate.clear()
    waiting = asyncio.ensure_future(world.client.post("/generate", json=FOX, headers={"Idempotency-Key": "k"}))
    await world.worker.started.wait()
    job = await world.client.post("/generate", json={**FOX, "mode": "async"}, headers={"Idempotency-Key": "k"})
    await world.client.delete(job.headers["location"])
    return await waiting


async def expired(world: World) -> httpx.Response:
    # A model whose worker has left: its jobs wait, here until their deadline.
    await world.queue.register("gone", [card("nobody")])
    await world.queue.unregister("gone")
    body = {**FOX, "model": "nobody", "deadline_s": 0.01}
    waiting = asyncio.ensure_future(world.client.post("/generate", json=body))
    while not waiting.done():
        await world.queue.reap()
        await asyncio.wait((waiting,), timeout=0.02)
    return await waiting


async def with_a_key(world: World, *bodies: dict[str, Any], scope: str = "generate", **limits: Any) -> httpx.Response:
    """The last reply to a caller who sends these one after the other."""
    key, token = new_key(name="ann", tenant="ann", scopes=[scope], **limits)
    await world.queue.api_keys.add(key)
    world.worker.gate.clear()
    async with in_process(world.settings.model_copy(update={"auth": "keys"}), world.queue) as client:
        for body in bodies:
            reply = await client.post("/generate", json=body, headers={"Authorization": f"Bearer {token}"})
    return reply


async def unauthorized(world: World) -> httpx.Response:
    async with in_process(world.settings.model_copy(update={"auth": "keys"}), world.queue) as client:
        return await client.post("/generate", json=FOX)


async def forbidden(world: World) -> httpx.Response:
    return await with_a_key(world, FOX, scope="read")


async def prompt_refused(world: World) -> httpx.Response:
    path = world.settings.data_dir / "denylist"
    path.write_text("fox")
    async with in_process(world.settings.model_copy(update={"prompt_denylist": path}), world.queue) as client:
        return await client.post("/generate", json=FOX)


async def rate_limited(world: World) -> httpx.Response:
    return await with_a_key(world, {}, FOX, rate=Rate(count=1, period_s=60, burst=1))


async def budget_exceeded(world: World) -> httpx.Response:
    return await with_a_key(world, {**FOX, "mode": "async"}, FOX, max_cost=3000)


async def queue_full(world: World) -> httpx.Response:
    await world.queue.register("gone", [card("nobody")])
    small = world.settings.model_copy(update={"max_queue_jobs": 1})
    queue = await JobQueue.connect(small, small.redis_url or "")
    body = {**FOX, "model": "nobody", "mode": "async"}
    async with in_process(small, queue) as client:
        await client.post("/generate", json=body)
        reply = await client.post("/generate", json=body)
    await queue.close()
    return reply


class OneTenant(JobQueue):
    """A queue whose callers are all the same tenant."""

    async def enqueue(self, job: Job, **options: Any) -> Enqueued:
        return await super().enqueue(msgspec.structs.replace(job, tenant="one"), **options)


async def tenant_queue_full(world: World) -> httpx.Response:
    await world.queue.register("gone", [card("nobody")])
    small = world.settings.model_copy(update={"max_queue_jobs": 2, "tenant_queue_share": 0.5})
    queue = OneTenant(small, small.redis_url or "")
    body = {**FOX, "model": "nobody", "mode": "async"}
    async with in_process(small, queue) as client:
        await client.post("/generate", json=body)
        reply = await client.post("/generate", json=body)
    await queue.close()
    return reply


async def deadline_unmet(world: World) -> httpx.Response:
    await world.queue.register("slow", [card("slow")])
    await world.queue.heartbeat("slow", {"slow": 2 * 4 * 256})
    body = {**FOX, "model": "slow", "mode": "async"}
    for _ in range(3):
        accepted = await world.client.post("/generate", json=body)
    assert accepted.json()["eta_s"] == pytest.approx(3, abs=0.01)
    reply = await world.client.post("/generate", json={**body, "deadline_s": 1.5})
    [error] = reply.json()["errors"]
    assert error == {"field": "deadline_s", "value": "1.5", "accepted": "at least 4.0"}
    return reply


async def storage_full(world: World) -> httpx.Response:
    data_dir = world.settings.data_dir / "small"
    settings = world.settings.model_copy(update={"data_dir": data_dir, "redis_maxmemory_bytes": 4 << 20})
    with EmbeddedRedis(settings) as server:
        queue = await JobQueue.connect(settings, server.url)
        await queue.register("idle", [card(max_width=2048, max_height=2048)])
        async with in_process(settings, queue) as client:
            reply = await client.post("/generate", json={**FOX, "width": 2048, "height": 2048})
        await queue.close()
    return reply


async def no_model(world: World) -> httpx.Response:
    settings = world.settings.model_copy(update={"shard": f"{world.settings.shard}-empty"})
    queue = await JobQueue.connect(settings, settings.redis_url or "")
    async with in_process(settings, queue) as client:
        reply = await client.post("/generate", json=FOX)
    await queue.close()
    return reply


async def queue_unavailable(world: World) -> httpx.Response:
    settings = world.settings.model_copy(update={"redis_url": "unix:///nowhere/redis.sock"})
    async with in_process(settings) as client:
        return await client.post("/generate", json=FOX)


async def not_replicated(world: World) -> httpx.Response:
    settings = world.settings.model_copy(update={"durability": "replicated"})
    async with in_process(settings) as client:
        return await client.post("/generate", json=FOX)


async def draining(world: World) -> httpx.Response:
    async with in_process(world.settings, world.queue) as client:
        client._transport.app.state.service.is_draining = True  # type: ignore[attr-defined]
        return await client.post("/generate", json=FOX)


class BrokenQueue(JobQueue):
    async def cards(self) -> Cards:
        raise RuntimeError("secret /path/to/the/inside at 0x7f00")


async def internal(world: World) -> httpx.Response:
    queue = BrokenQueue(world.settings, world.settings.redis_url or "")
    with structlog.testing.capture_logs() as lines:
        async with in_process(world.settings, queue) as client:
            reply = await client.post("/generate", json=FOX)
    await queue.close()
    assert [line["event"] for line in lines if line["log_level"] == "error"] == ["unexpected_error"]
    assert "secret" not in reply.text
    assert "RuntimeError" not in reply.text
    return reply


# What a worker may end a job with.
JOB_CODES = (
    "job_failed",
    "bad_message",
    "dead_letter",
    "prompt_too_long",
    "non_finite",
    "out_of_memory",
    "storage_unavailable",
)

CASES: dict[str, Callable[[World], Awaitable[httpx.Response]]] = {
    "malformed_json": malformed_json,
    "body_too_large": body_too_large,
    "request_timeout": request_timeout,
    "unsupported_media_type": unsupported_media_type,
    "not_acceptable": not_acceptable,
    "invalid_request": invalid_request,
    "unknown_model": unknown_model,
    "idempotency_mismatch": idempotency_mismatch,
    "image_not_found": image_not_found,
    "job_not_finished": job_not_finished,
    "cancelled": cancelled,
    "expired": expired,
    "unauthorized": unauthorized,
    "forbidden": forbidden,
    "prompt_refused": prompt_refused,
    "rate_limited": rate_limited,
    "budget_exceeded": budget_exceeded,
    "queue_full": queue_full,
    "tenant_queue_full": tenant_queue_full,
    "deadline_unmet": deadline_unmet,
    "storage_full": storage_full,
    "no_model": no_model,
    "queue_unavailable": queue_unavailable,
    "not_replicated": not_replicated,
    "draining": draining,
    "internal": internal,
    "not_found": lambda world: world.client.get("/nowhere"),
    "method_not_allowed": lambda world: world.client.put("/generate"),
    "job_not_found": lambda world: world.client.get(f"/jobs/{'0' * 26}"),
    **{
        code: lambda world, code=code: failing(world, code)  # type: ignore[misc]
        for code in JOB_CODES
    },
}


def test_every_code_is_tried() -> None:
    # `unavailable` is the parent of the 503 codes and never raised itself.
    assert set(CASES) | {"unavailable"} == set(HTTP_STATUS)


@pytest.mark.parametrize("code", CASES)
async def test_every_error_code_reaches_a_client(code: str, settings: Settings, queue: JobQueue) -> None:
    async with InstantWorker(queue).running() as worker, in_process(settings, queue) as client:
        reply = await CASES[code](World(settings, queue, worker, client))
    assert reply.headers["content-type"] == "application/problem+json"
    problem = reply.json()
    assert (reply.status_code, problem["status"], problem["code"]) == (HTTP_STATUS[code], HTTP_STATUS[code], code)
    assert problem["type"] == f"/docs#error-{code}"
    assert problem["title"] == TITLES[code]
    assert problem["detail"]
    if reply.status_code in (429, 503):
        assert int(reply.headers["retry-after"]) >= 1
    if code in (*JOB_CODES, "cancelled", "expired"):
        assert re.fullmatch("[0-9a-f]{26}", problem["job_id"])


def test_replies_follow_their_documented_schemas(document: dict[str, Any]) -> None:
    """The examples in the document are decoded by the very structs that replies are made of."""
    from darkroom.api import schema
    from darkroom.api.openai import shapes as openai_shapes
    from darkroom.api.sdapi import shapes

    for methods in document["paths"].values():
        for operation in methods.values():
            for reply in operation["responses"].values():
                content = reply.get("content", {}).get("application/json", {})
                name = content.get("schema", {}).get("$ref", "").rpartition("/")[2]
                if name:
                    (kind,) = (getattr(one, name) for one in (schema, shapes, openai_shapes) if hasattr(one, name))
                    for example in [content["example"]] if "example" in content else content["examples"].values():
                        value = example if "example" in content else example["value"]
                        msgspec.json.decode(json.dumps(value), type=kind)
