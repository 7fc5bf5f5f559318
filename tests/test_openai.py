"""OpenAI's Images API, as its SDK and other clients use it."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import pytest_asyncio
from darkroom.api.openai.shapes import WORTH_A_RETRY
from darkroom.config import Settings, load_settings
from darkroom.errors import HTTP_STATUS, ConfigError
from darkroom.jobs import Failure
from darkroom.queue import JobQueue, new_key
from PIL import Image

from tests.support.clients import CLIENTS, client_python
from tests.support.http import Served, in_process, served
from tests.support.instant_worker import InstantWorker, card, colour
from tests.support.metrics import Change

pytest_plugins = "tests.support.service"

FOX: dict[str, Any] = {"prompt": "a red fox"}
GENERATIONS = "/v1/images/generations"


async def generate(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    """The reply to a call that must succeed, and the manifest of its job."""
    reply = await client.post(GENERATIONS, json={**FOX, **fields})
    assert reply.status_code == 200, reply.text
    job = (await client.get(f"/jobs/{reply.headers['darkroom-job-id']}")).json()
    return {**reply.json(), "manifest": job["manifest"]}


def picture(encoded: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(encoded, validate=True)))


# Pictures


async def test_a_prompt_alone_gives_a_picture_in_base64(client: httpx.AsyncClient) -> None:
    reply = await generate(client, seed=7)
    assert picture(reply["data"][0]["b64_json"]).getpixel((5, 5)) == colour(7)
    manifest = reply.pop("manifest")
    assert (manifest["num_inference_steps"], manifest["guidance_scale"], manifest["sampler"]) == (4, 3.0, "dpmpp_2m")
    del reply["data"], reply["created"]
    assert reply == {
        "size": "64x64",
        "quality": "medium",
        "output_format": "png",
        "background": "opaque",
        "usage": {
            "input_tokens": 3,
            "input_tokens_details": {"text_tokens": 3, "image_tokens": 0},
            "output_tokens": 16,
            "output_tokens_details": {"text_tokens": 0, "image_tokens": 16},
            "total_tokens": 19,
        },
    }


@pytest.mark.parametrize(
    ("quality", "told", "steps"),
    [
        ("auto", "medium", 4), ("standard", "medium", 4), ("low", "low", 2), ("medium", "medium", 4),
        ("high", "high", 6), ("hd", "high", 6), ("xhigh", "xhigh", 8), ("max", "max", 12),
    ],
)  # fmt: skip
async def test_quality_is_a_number_of_steps(client: httpx.AsyncClient, quality: str, told: str, steps: int) -> None:
    reply = await generate(client, quality=quality)
    assert (reply["quality"], reply["manifest"]["num_inference_steps"]) == (told, steps)


async def test_no_quality_asks_for_more_steps_than_may_be(settings: Settings, queue: JobQueue) -> None:
    few = settings.model_copy(update={"max_num_inference_steps": 20})
    slow = card(num_inference_steps=15)
    async with InstantWorker(queue, slow).running(), in_process(few, queue) as client:
        assert (await generate(client, quality="max"))["manifest"]["num_inference_steps"] == 20


async def test_a_model_goes_by_its_aliases_too(settings: Settings, queue: JobQueue, worker: InstantWorker) -> None:
    named = settings.model_copy(update={"model_aliases": "gpt-image-2=test-world, dall-e-3 = test-world,other=nothing"})
    async with in_process(named, queue) as client:
        assert (await generate(client, model="dall-e-3"))["manifest"]["model"] == "test-world"
        models = (await client.get("/v1/models")).json()["data"]
        assert [model["id"] for model in models] == ["dall-e-3", "gpt-image-2", "test-world"]
        assert (await client.get("/v1/models/gpt-image-2")).status_code == 200
        assert (await client.get("/v1/models/other")).status_code == 404
    for wrong in ("gpt-image-2", "=test-world", "a=b,"):
        with pytest.raises(ConfigError, match="DARKROOM_MODEL_ALIASES"):
            load_settings(model_aliases=wrong)


async def test_what_the_sdk_calls_extra_is_heeded(client: httpx.AsyncClient) -> None:
    extra = {
        "seed": 11, "steps": 3, "guidance_scale": 1.5, "negative_prompt": "blurry", "sampler": "euler",
        "sigma_schedule": "karras",
    }  # fmt: skip
    manifest = (await generate(client, quality="max", **extra))["manifest"]
    extra["num_inference_steps"] = extra.pop("steps")
    assert {name: manifest[name] for name in extra} == extra
    assert (await generate(client, sampler="euler", scheduler="karras"))["manifest"]["sigma_schedule"] == "karras"


async def test_what_asks_for_nothing_is_taken(client: httpx.AsyncClient) -> None:
    reply = await generate(
        client, model=None, size="auto", background="opaque", moderation="low", style="natural", complexity="high",
        output_compression=100, partial_images=0, stream=False, user="ann", svg=None, frame_count=None,
    )  # fmt: skip
    assert reply["safety_identifier"] == "ann"
    assert (await generate(client, user="ann", safety_identifier="bob"))["safety_identifier"] == "bob"


async def test_compression_is_the_quality_of_a_jpeg(client: httpx.AsyncClient) -> None:
    for output_format, kind in (("jpeg", "JPEG"), ("webp", "WEBP")):
        reply = await generate(client, output_format=output_format, output_compression=40)
        assert picture(reply["data"][0]["b64_json"]).format == kind
        assert (reply["output_format"], reply["manifest"]["output_quality"]) == (output_format, 40)


async def test_the_settings_of_a_url_are_those_of_the_call(client: httpx.AsyncClient) -> None:
    reply = await generate(client, response_format="url", n=2, seed=3)
    urls = [one["url"] for one in reply["data"]]
    assert all(url.startswith("http://darkroom/jobs/") for url in urls)
    pictures = [Image.open(io.BytesIO((await client.get(url)).content)) for url in urls]
    assert [one.getpixel((0, 0)) for one in pictures] == [colour(3), colour(4)]


# Edits


def png(size: tuple[int, int] = (64, 48), colour: tuple[int, ...] = (200, 30, 20)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB" if len(colour) == 3 else "RGBA", size, colour).save(out, "PNG")
    return out.getvalue()


def data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


async def edited(client: httpx.AsyncClient, reply: httpx.Response) -> dict[str, Any]:
    """The manifest of an edit that must succeed."""
    assert reply.status_code == 200, reply.text
    job = (await client.get(f"/jobs/{reply.headers['darkroom-job-id']}")).json()
    manifest: dict[str, Any] = job["manifest"]
    return manifest


async def test_an_edit_in_json_is_that_of_a_form(client: httpx.AsyncClient, worker: InstantWorker) -> None:
    mask = png(colour=(0, 0, 0, 0))
    sent = {"images": [{"image_url": data_url(png())}], "mask": {"image_url": data_url(mask)}}
    as_json = await edited(client, await client.post("/v1/images/edits", json={**FOX, **sent, "seed": 3}))
    files = {"image[]": ("a.png", png()), "mask": ("m.png", mask)}
    as_form = await edited(client, await client.post("/v1/images/edits", data={**FOX, "seed": "3"}, files=files))
    assert (as_json["width"], as_json["height"], as_json["strength"]) == (64, 48, 1.0)
    same = ("seed", "init_image", "mask_image", "strength", "num_inference_steps", "guidance_scale")
    assert [as_json[name] for name in same] == [as_form[name] for name in same]


@pytest.mark.parametrize(
    ("fields", "strength"),
    [({}, 0.8), ({"input_fidelity": "low"}, 0.8), ({"input_fidelity": "high"}, 0.5), ({"strength": 0.3}, 0.3)],
)
async def test_fidelity_is_how_much_may_change(
    client: httpx.AsyncClient, fields: dict[str, Any], strength: float
) -> None:
    sent = {**FOX, "images": [{"image_url": data_url(png())}], "quality": "max", **fields}
    assert (await edited(client, await client.post("/v1/images/edits", json=sent)))["strength"] == strength


async def test_a_variation_is_guided_by_its_picture_alone(client: httpx.AsyncClient) -> None:
    reply = await client.post("/v1/images/variations", data={"n": "2", "user": "ann"}, files={"image": png()})
    manifest = await edited(client, reply)
    assert (manifest["guidance_scale"], manifest["strength"], manifest["prompt"]) == (1.0, 0.6, " ")
    assert len(reply.json()["data"]) == 2


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"images": []}, "images", "images: got an array, expected"),
        ({"images": None}, "images", "images: got 'nothing'"),
        ({"images": [{"file_id": "file-1"}]}, "images.0.image_url", "images.0.image_url: got 'nothing'"),
        ({"images": [{"image_url": "https://one.example/a.png"}]}, "image", "image: got a https: address"),
        ({"images": [{"image_url": "data:image/png;base64,AAAA"}]}, "image", "image: got"),
        ({"mask": {"image_url": "data:image/png;base64,AAAA"}}, "mask", "mask: got"),
        ({"strength": 0}, "strength", "strength: got 0"),
        ({"style": "vivid"}, "style", "style: got 'vivid', expected no such field"),
    ],
)
async def test_what_cannot_be_edited_is_refused(
    client: httpx.AsyncClient, fields: dict[str, Any], param: str, message: str
) -> None:
    sent = {**FOX, "images": [{"image_url": data_url(png())}], **fields}
    reply = await client.post("/v1/images/edits", json=sent)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), reply.text
    assert reply.json()["error"]["message"].startswith(message)


@pytest.mark.parametrize(
    ("content_type", "content"),
    [
        ("multipart/form-data", b""),
        ("multipart/form-data; boundary=x", b""),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--\r\n"),
        ("multipart/form-data; boundary=x", b"--x\r\nno header at all\r\n\r\n"),
        ("multipart/form-data; boundary=x", b"\0" * 100),
        (
            "multipart/form-data; charset=utf-16; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\na',
        ),
        ("multipart/form-data; boundary=" + "x" * 5000, b"--x"),
    ],
    ids=["no boundary", "nothing", "no name", "no header", "no form", "another charset", "long boundary"],
)
async def test_forms_that_are_none_are_refused(client: httpx.AsyncClient, content_type: str, content: bytes) -> None:
    reply = await client.post("/v1/images/variations", content=content, headers={"Content-Type": content_type})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_request"), reply.text


async def test_forms_keep_to_their_size(settings: Settings, queue: JobQueue) -> None:
    small = settings.model_copy(update={"max_image_bytes": 4096})
    async with in_process(small, queue) as client:
        reply = await client.post("/v1/images/variations", files={"image": b"a" * 5000})
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large")
        reply = await client.post("/v1/images/variations", data={f"f{i}": "a" for i in range(70)}, files={"image": b""})
        assert reply.status_code in (400, 413)


# Errors


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": ""}, "prompt", "prompt: got ''"),
        ({"prompt": None}, "prompt", "prompt: got 'nothing', expected"),
        ({"n": 0}, "n", "n: got 0, expected greater than or equal to 1"),
        ({"n": "2"}, "n", "n: got '2', expected a valid integer"),
        ({"size": "64"}, "size", "size: got '64', expected auto, or width and height such as 512x768"),
        ({"prompt": ""}, "prompt", "prompt: got '', expected a text"),
        ({"size": "64x65"}, "size", "size: got 65, expected a multiple of 8 from 8 to 256"),
        ({"size": "1024x1024"}, "size", "size: got 1024"),
        ({"quality": "ultra"}, "quality", "quality: got 'ultra', expected 'auto', 'low'"),
        ({"output_format": "gif"}, "output_format", "output_format: got 'gif', expected 'png', 'jpeg' or 'webp'"),
        ({"output_format": "svg"}, "output_format", "output_format: got 'svg'"),
        ({"output_compression": 50}, "output_compression", "output_compression: got 50"),
        ({"output_format": "jpeg", "output_compression": 101}, "output_compression", "output_compression: got 101"),
        ({"background": "transparent"}, "background", "background: got 'transparent'"),
        ({"frame_count": 9}, "frame_count", "frame_count: got 9, expected no such field"),
        ({"stream": True, "partial_images": 4}, "partial_images", "partial_images: got 4"),
        ({"partial_images": 1}, "partial_images", "partial_images: got 1, expected 0 without stream"),
        ({"stream": True, "response_format": "url"}, "response_format", "response_format: got 'url'"),
        ({"steps": 100_000}, "steps", "steps: got 100000, expected an integer from 1 to 200"),
        ({"sampler": "dpm++"}, "sampler", "sampler: got 'dpm++', expected one of"),
        ({"hires\u2028": 1}, "hires\\u2028", "hires\\u2028: got 1"),
        ({"prompt": "a\ud800"}, "prompt", "prompt: got 'a\\ud800'"),
        ({"user": "a\ud800"}, "user", "user: got 'a\\ud800'"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_the_name_of_its_field(
    client: httpx.AsyncClient, fields: dict[str, Any], param: str, message: str
) -> None:
    reply = await client.post(
        GENERATIONS, content=json.dumps({**FOX, **fields}), headers={"Content-Type": "application/json"}
    )
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert (error["param"], error["type"], error["code"]) == (param, "invalid_request_error", "invalid_request")
    assert error["message"].startswith(message)
    assert reply.headers["x-should-retry"] == "false"


async def test_an_edit_of_several_pictures_is_refused_by_name(client: httpx.AsyncClient) -> None:
    files = [("image[]", ("cat.png", png(), "image/png")) for _ in range(2)]
    as_form = await client.post("/v1/images/edits", data=FOX, files=files)
    as_json = await client.post("/v1/images/edits", json={**FOX, "images": [{"image_url": data_url(png())}] * 2})
    for reply, param in ((as_form, "image"), (as_json, "images")):
        error = reply.json()["error"]
        assert (reply.status_code, error["param"], error["code"]) == (400, param, "invalid_request")
        assert error["message"].endswith("expected one picture; Darkroom does not compose several")


async def test_errors_outside_of_any_route_have_their_form_too(client: httpx.AsyncClient) -> None:
    json_type = {"Content-Type": "application/json"}
    for reply, status, code in (
        (await client.post("/v1/embeddings", json={}), 404, "not_found"),
        (await client.get(GENERATIONS), 405, "method_not_allowed"),
        (await client.get("/v1/models/dall-e-3"), 404, "model_not_found"),
        (await client.post(GENERATIONS, content=b"{", headers=json_type), 400, "malformed_json"),
        (await client.post(GENERATIONS, content=b"{}", headers={"Content-Type": "text/plain"}), 415, None),
        (await client.post(GENERATIONS, content=b" " * (1 << 21), headers=json_type), 413, "body_too_large"),
    ):
        assert reply.status_code == status
        error = reply.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == (code or "unsupported_media_type")
        assert reply.headers["x-should-retry"] == "false"
        assert reply.headers["x-request-id"]
    assert "type" in (await client.get("/nowhere")).json()


async def test_who_should_come_back_is_told_so_and_when(settings: Settings, queue: JobQueue) -> None:
    async with in_process(settings, queue) as client:
        reply = await client.post(GENERATIONS, json=FOX)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "no_model")
        assert (reply.headers["x-should-retry"], reply.headers["retry-after-ms"]) == ("true", "2000")
    assert set(HTTP_STATUS) >= WORTH_A_RETRY


async def test_what_poisons_workers_should_not_be_sent_again(client: httpx.AsyncClient, worker: InstantWorker) -> None:
    worker.failure = Failure(code="dead_letter", message="three workers were lost")
    reply = await client.post(GENERATIONS, json=FOX)
    assert (reply.status_code, reply.headers["x-should-retry"]) == (500, "false")
    assert reply.json()["error"] == {
        "message": "three workers were lost",
        "type": "server_error",
        "param": None,
        "code": "dead_letter",
    }


# Tries


async def eventually(is_so: Callable[[], Awaitable[object]], timeout_s: float = 15.0) -> None:
    async with asyncio.timeout(timeout_s):
        while True:
            if await is_so():
                return
            await asyncio.sleep(0.01)


async def count(queue: JobQueue, state: str = "accepted") -> int:
    """How many jobs were accepted, or ended so."""
    return int((await queue.stats()).counters[state])


async def num_left(queue: JobQueue) -> int:
    """How many calls wait for another try."""
    connection = queue._connection
    keys = await connection.command("KEYS", f"{connection.keys.prefix.replace('{', '[{]')}left:*")
    return sum([await connection.command("LLEN", key) for key in keys])


def a_try(client: httpx.AsyncClient, number: int, **options: Any) -> asyncio.Task[httpx.Response]:
    headers = {"x-stainless-retry-count": str(number), **options.pop("headers", {})}
    return asyncio.ensure_future(client.post(GENERATIONS, json={**FOX, **options}, headers=headers))


async def break_off(site: Served, queue: JobQueue, call: asyncio.Task[httpx.Response]) -> None:
    """Let the client of a call that waits give up, and the server notice it."""

    async def is_waiting() -> bool:
        return bool(site.app.state.service.num_waiting)

    await eventually(is_waiting)
    before = await num_left(queue)

    async def is_noticed() -> bool:
        return await num_left(queue) > before

    call.cancel()
    await eventually(is_noticed)


async def test_a_retry_finds_its_first_job_still_running(site: Served, queue: JobQueue, worker: InstantWorker) -> None:
    worker.gate.clear()
    await break_off(site, queue, a_try(site.client, 0))
    again = a_try(site.client, 1)
    await break_off(site, queue, again)
    last = a_try(site.client, 2)

    async def is_taken_up() -> bool:
        return await num_left(queue) == 0

    await eventually(is_taken_up)
    assert not last.done()
    worker.gate.set()
    reply = await last
    assert reply.status_code == 200
    assert await count(queue) == 1
    # The seed is that of the first try.
    assert picture(reply.json()["data"][0]["b64_json"]).getpixel((0, 0)) == colour(int(reply.headers["darkroom-seed"]))


async def test_a_retry_finds_its_first_job_done(site: Served, queue: JobQueue, worker: InstantWorker) -> None:
    worker.gate.clear()
    await break_off(site, queue, a_try(site.client, 0))
    worker.gate.set()

    async def is_done() -> bool:
        return await count(queue, "succeeded") == 1

    await eventually(is_done)
    assert (await a_try(site.client, 1)).status_code == 200
    assert await count(queue) == 1


async def test_calls_that_only_ask_for_the_same_never_meet(
    site: Served, queue: JobQueue, worker: InstantWorker
) -> None:
    worker.gate.clear()
    first, second = a_try(site.client, 0), a_try(site.client, 0)

    async def are_running() -> bool:
        return (await queue.stats()).in_flight == 2

    await eventually(are_running)
    # A retry of some other call that was refused: both jobs belong to clients that still wait.
    third = a_try(site.client, 1)

    async def is_a_third() -> bool:
        return await count(queue) == 3

    await eventually(is_a_third)
    await break_off(site, queue, first)
    await break_off(site, queue, second)
    retries = [a_try(site.client, 1), a_try(site.client, 1)]
    other = a_try(site.client, 1, prompt="a blue fox")

    async def are_all_taken_up() -> bool:
        return await num_left(queue) == 0 and site.app.state.service.num_waiting == 4

    await eventually(are_all_taken_up)
    worker.gate.set()
    replies = [await call for call in (third, *retries, other)]
    assert [reply.status_code for reply in replies] == [200] * 4
    assert len({reply.headers["darkroom-job-id"] for reply in replies}) == 4
    assert await count(queue) == 4


async def test_a_retry_of_a_call_that_was_refused_has_the_key_of_the_first_try(
    settings: Settings, queue: JobQueue, worker: InstantWorker
) -> None:
    """A place in a full queue is promised to a key."""
    small = settings.model_copy(update={"max_queue_jobs": 1})
    crowded = await JobQueue.connect(small, small.redis_url or "")
    try:
        await crowded.register("nobody", [card("busy")])
        async with in_process(small, crowded) as client:
            assert (await client.post("/generate", json={**FOX, "model": "busy", "mode": "async"})).status_code == 202
            refused = await a_try(client, 0, model="test-world")
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
            assert (refused.headers["x-should-retry"], await num_left(queue)) == ("true", 1)
            await a_try(client, 1, model="test-world")
            assert await num_left(queue) == 1
            await a_try(client, 0, model="test-world")
            assert await num_left(queue) == 2
    finally:
        await crowded.close()


async def test_tenants_never_take_up_each_others_calls(
    settings: Settings, queue: JobQueue, worker: InstantWorker
) -> None:
    headers = []
    for tenant in ("ann", "bob"):
        key, token = new_key(name=tenant, tenant=tenant, scopes=["generate"])
        await queue.api_keys.add(key)
        headers.append({"Authorization": f"Bearer {token}"})
    worker.gate.clear()
    async with served(settings.model_copy(update={"auth": "keys"}), queue) as site:
        await break_off(site, queue, a_try(site.client, 0, headers=headers[0]))
        stranger = a_try(site.client, 1, headers=headers[1])

        async def is_second() -> bool:
            return await count(queue) == 2

        await eventually(is_second)
        worker.gate.set()
        assert (await stranger).status_code == 200


async def test_a_client_that_never_comes_back_cancels_its_job(
    settings: Settings, queue: JobQueue, worker: InstantWorker
) -> None:
    hasty = settings.model_copy(update={"disconnect_grace_s": 0.3})
    queue = await JobQueue.connect(hasty, hasty.redis_url or "")
    worker.gate.clear()
    try:
        async with served(hasty, queue) as site:
            await break_off(site, queue, a_try(site.client, 0))

            async def is_cancelled() -> bool:
                return await count(queue, "cancelled") == 1

            await eventually(is_cancelled)
            worker.gate.set()
            # One who comes too late gets another.
            assert (await a_try(site.client, 1)).status_code == 200
            assert await count(queue) == 2
    finally:
        await queue.close()


async def test_a_client_that_repeats_nothing_cancels_at_once(
    site: Served, queue: JobQueue, worker: InstantWorker
) -> None:
    worker.gate.clear()
    for stream in (False, True):
        call = asyncio.ensure_future(site.client.post(GENERATIONS, json={**FOX, "stream": stream}))

        async def is_running() -> bool:
            return (await queue.stats()).in_flight == 1

        await eventually(is_running)
        call.cancel()

        async def is_cancelled(expected: int = 1 + stream) -> bool:
            return await count(queue, "cancelled") == expected

        await eventually(is_cancelled)
    assert await num_left(queue) == 0


async def test_a_retry_finds_its_job_from_another_server(
    site: Served, settings: Settings, queue: JobQueue, worker: InstantWorker
) -> None:
    worker.gate.clear()
    first = a_try(site.client, 0)
    await worker.started.wait()
    site.app.state.service.handing_over.set()
    reply = await first
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "draining")
    assert reply.headers["x-should-retry"] == "true"
    async with in_process(settings, queue) as other:
        again = a_try(other, 1)

        async def is_taken_up() -> bool:
            return await num_left(queue) == 0

        await eventually(is_taken_up)
        worker.gate.set()
        assert (await again).status_code == 200
    assert await count(queue) == 1


# Clients


async def test_the_calls_of_open_webui_are_understood(site: Served) -> None:
    """Recorded shapes: base64 for models that are none of OpenAI's, addresses that are fetched with the same header."""
    headers = {"Authorization": "Bearer sk-anything"}
    asked = {"model": "test-world", "prompt": "a fox", "n": 2, "size": "64x64", "response_format": "b64_json"}
    reply = await site.client.post(GENERATIONS, json=asked, headers=headers)
    assert [set(one) for one in reply.json()["data"]] == [{"b64_json"}] * 2
    reply = await site.client.post(GENERATIONS, json={**asked, "response_format": "url"}, headers=headers)
    for one in reply.json()["data"]:
        found = await site.client.get(one["url"], headers=headers)
        assert found.headers["content-type"] == "image/png"
    models = (await site.client.get("/v1/models", headers=headers)).json()
    assert [model["id"] for model in models["data"]] == ["test-world"]


@dataclass
class Guarded:
    """A server that asks for keys, and one of them."""

    site: Served
    token: str

    async def play(self, scene: str) -> dict[str, Any]:
        """What a scene of `tests/clients/openai_client.py` saw."""
        python = await asyncio.to_thread(client_python, "openai")
        process = await asyncio.create_subprocess_exec(
            str(python), "-I", str(CLIENTS / "openai_client.py"), scene, str(self.site.port), self.token,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        told, problem = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == 0, problem.decode()
        seen: dict[str, Any] = json.loads(told)
        return seen


@pytest_asyncio.fixture
async def guarded(settings: Settings, queue: JobQueue, worker: InstantWorker) -> AsyncIterator[Guarded]:
    key, token = new_key(name="ann", tenant="ann", scopes=["generate"])
    await queue.api_keys.add(key)
    small = settings.model_copy(update={"auth": "keys", "max_body_bytes": 2048})
    async with served(small, queue) as site:
        yield Guarded(site, token)


async def test_the_sdk_generates(guarded: Guarded) -> None:
    seen = await guarded.play("generate")
    assert seen["version"] == "3.57.0"
    pictures = [picture(one["b64_json"]) for one in seen["data"]]
    assert [one.size for one in pictures] == [(64, 72)] * 3
    assert (seen["output_format"], seen["quality"], seen["size"]) == ("webp", "high", "64x72")
    assert seen["usage"]["total_tokens"] == seen["usage"]["input_tokens"] + 3 * 4 * 5
    assert len(seen["request_id"]) == 32
    by_environment = await guarded.play("by_environment")
    assert picture(by_environment["data"][0]["b64_json"]).getpixel((0, 0)) == colour(7)


async def test_the_sdk_streams_previews_and_pictures(guarded: Guarded, worker: InstantWorker) -> None:
    change = Change()
    worker.gate.clear()
    call = asyncio.ensure_future(guarded.play("stream"))
    await worker.started.wait()
    for step in (1, 2, 3, 5):
        await worker.show(step)

        async def is_seen(expected: int = (step > 1) + (step > 3)) -> bool:
            return change("http_requests_total", route="/v1/models") == expected

        await eventually(is_seen)
    worker.gate.set()
    seen = await call
    assert [event["type"].rpartition(".")[2] for event in seen["events"]] == ["partial_image"] * 2 + ["completed"] * 2
    partial = seen["events"][:2]
    assert [event["partial_image_index"] for event in partial] == [0, 1]
    assert picture(partial[1]["b64_json"]).format == "JPEG"
    completed = [event for event in seen["events"] if event["type"] == "image_generation.completed"]
    assert [picture(one["b64_json"]).getpixel((0, 0)) for one in completed] == [colour(7), colour(8)]
    assert all(one["usage"]["output_tokens"] == 16 for one in completed)


async def test_the_sdk_edits(guarded: Guarded, worker: InstantWorker) -> None:
    seen = await guarded.play("edit")
    masked, plain, streamed = worker.inputs.values()
    mask = Image.open(io.BytesIO(masked["mask_image"]))
    # What was transparent is drawn anew.
    assert (mask.getpixel((5, 5)), mask.getpixel((5, 60))) == (255, 0)
    assert Image.open(io.BytesIO(masked["init_image"])).getpixel((5, 5)) == (255, 0, 0)
    assert set(plain) == set(streamed) == {"init_image"}
    assert [picture(one["b64_json"]).format for one in seen["masked"]["data"]] == ["WEBP"] * 2
    assert seen["masked"]["quality"] == "low"
    assert seen["masked"]["usage"]["input_tokens_details"] == {"text_tokens": 2, "image_tokens": 32}
    assert picture(seen["plain"]["data"][0]["b64_json"]).size == (64, 64)
    assert [event["type"] for event in seen["events"]] == ["image_edit.completed"]


async def test_the_sdk_makes_variations(guarded: Guarded, worker: InstantWorker) -> None:
    seen = await guarded.play("vary")
    assert [picture(one["b64_json"]).getpixel((0, 0)) for one in seen["data"]] == [colour(7), colour(8)]
    assert [set(inputs) for inputs in worker.inputs.values()] == [{"init_image"}]


async def test_the_sdk_is_told_why_a_stream_ended(guarded: Guarded, worker: InstantWorker) -> None:
    worker.failure = Failure(code="out_of_memory", message="the device ran out of memory")
    assert await guarded.play("stream_that_fails") == {
        "kind": "APIError",
        "message": "the device ran out of memory",
        "code": "out_of_memory",
    }


async def test_the_sdk_downloads(guarded: Guarded) -> None:
    seen = await guarded.play("download")
    assert picture(seen["content"]).getpixel((0, 0)) == colour(7)
    assert (await guarded.site.client.get(seen["url"])).status_code == 401


async def test_the_sdk_lists_models(guarded: Guarded) -> None:
    model = {"id": "test-world", "object": "model", "created": 0, "owned_by": "darkroom"}
    assert await guarded.play("models") == {"all": [model], "one": model}


async def test_the_sdk_raises_what_its_users_expect(guarded: Guarded) -> None:
    seen = await guarded.play("refused")
    told = {name: (one["kind"], one["status"], one["param"], one["code"]) for name, one in seen.items()}
    assert told == {
        "key": ("AuthenticationError", 401, None, "invalid_api_key"),
        "model": ("NotFoundError", 404, "model", "model_not_found"),
        "unknown": ("NotFoundError", 404, "model", "model_not_found"),
        "size": ("BadRequestError", 400, "size", "invalid_request"),
        "n": ("BadRequestError", 400, "n", "invalid_request"),
        "format": ("BadRequestError", 400, "output_format", "invalid_request"),
        "background": ("BadRequestError", 400, "background", "invalid_request"),
        "field": ("BadRequestError", 400, "hires", "invalid_request"),
        "address": ("NotFoundError", 404, None, "not_found"),
        "method": ("APIStatusError", 405, None, "method_not_allowed"),
        "image": ("BadRequestError", 400, "image", "invalid_request"),
        "images": ("BadRequestError", 400, "image", "invalid_request"),
        "markup": ("BadRequestError", 400, "markup", "invalid_request"),
        "large": ("APIStatusError", 413, None, "body_too_large"),
    }
    assert {one["should_retry"] for one in seen.values()} == {"false"}
    assert all(one["request_id"] for one in seen.values())


async def test_the_sdk_does_not_repeat_what_failed_for_good(
    guarded: Guarded, queue: JobQueue, worker: InstantWorker
) -> None:
    worker.failure = Failure(code="dead_letter", message="three workers were lost")
    seen = await guarded.play("failed")
    assert (seen["kind"], seen["code"], seen["type"]) == ("InternalServerError", "dead_letter", "server_error")
    assert await count(queue) == 1


async def test_the_sdk_finds_its_first_job_still_running(
    guarded: Guarded, queue: JobQueue, worker: InstantWorker
) -> None:
    worker.gate.clear()
    call = asyncio.ensure_future(guarded.play("retry"))

    async def is_left() -> bool:
        return await num_left(queue) == 1

    async def is_taken_up() -> bool:
        return await num_left(queue) == 0 and guarded.site.app.state.service.num_waiting == 1

    await eventually(is_left)
    await eventually(is_taken_up)
    worker.gate.set()
    assert len((await call)["data"]) == 1
    assert await count(queue) == await count(queue, "succeeded") == 1


async def test_two_callers_of_the_sdk_each_find_their_own(
    guarded: Guarded, queue: JobQueue, worker: InstantWorker
) -> None:
    worker.gate.clear()
    call = asyncio.ensure_future(guarded.play("two_retries"))

    async def have_both_given_up() -> bool:
        return await num_left(queue) == 2

    await eventually(have_both_given_up)
    worker.gate.set()
    seen = (await call)["seen"]
    assert len({one["data"][0]["b64_json"] for one in seen}) == 2
    assert await count(queue) == 2
