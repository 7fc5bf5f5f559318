"""The API of AUTOMATIC1111's web UI, as its clients use it, and what each of them keeps to itself."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
import pytest_asyncio
from darkroom.api.pictures import read_texts
from darkroom.api.sdapi.lists import NOTHING, NOTHING_TO_DO
from darkroom.config import Settings
from darkroom.diffusion.images import encode_image
from darkroom.errors import InvalidRequest
from darkroom.jobs import Failure
from darkroom.queue import JobQueue, new_key
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from tests.support.clients import CLIENTS, client_python
from tests.support.http import Served, in_process, served
from tests.support.instant_worker import InstantWorker, card, colour
from tests.support.jobs import make_job

pytest_plugins = "tests.support.service"

FOX: dict[str, Any] = {"prompt": "a (red:1.2) fox"}


async def txt2img(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    """The reply to a call that must succeed, its `info` read."""
    reply = await client.post("/sdapi/v1/txt2img", json={**FOX, **fields})
    assert reply.status_code == 200, reply.text
    body = reply.json()
    assert isinstance(body["info"], str)
    return {**body, "info": json.loads(body["info"])}


async def manifest_of(client: httpx.AsyncClient, reply: dict[str, Any]) -> dict[str, Any]:
    manifest: dict[str, Any] = (await client.get(f"/jobs/{reply['info']['job_id']}")).json()["manifest"]
    return manifest


def picture(encoded: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(encoded, validate=True)))


async def eventually(is_so: Callable[[], Awaitable[bool]], timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while True:
            if await is_so():
                return
            await asyncio.sleep(0.01)


# Pictures


async def test_a_prompt_alone_gives_a_picture_and_its_info_as_a_string(client: httpx.AsyncClient) -> None:
    reply = await txt2img(client, seed=7)
    (image,) = reply["images"]
    assert not image.startswith("data:")
    assert picture(image).format == "PNG"
    assert picture(image).getpixel((5, 5)) == colour(7)
    info = reply["info"]
    assert {name: info[name] for name in ("prompt", "seed", "all_seeds", "width", "height", "steps", "cfg_scale")} == {
        "prompt": FOX["prompt"],
        "seed": 7,
        "all_seeds": [7],
        "width": 64,
        "height": 64,
        "steps": 4,
        "cfg_scale": 3.0,
    }
    assert (info["sampler_name"], info["sd_model_name"], info["sd_model_hash"]) == (
        "DPM++ 2M",
        "test-world",
        "0123456789",
    )
    assert info["infotexts"][0].startswith("a (red:1.2) fox\nSteps: 4, Sampler: DPM++ 2M, Schedule type: Karras")
    assert {"subseed", "all_subseeds", "all_prompts", "all_negative_prompts", "styles", "job_timestamp"} <= set(info)
    assert (info["clip_skip"], info["version"][:9]) == (1, "darkroom ")
    assert reply["parameters"]["prompt"] == FOX["prompt"]


async def test_there_are_batch_size_times_n_iter_pictures_of_seeds_that_follow(client: httpx.AsyncClient) -> None:
    reply = await txt2img(client, seed=20, batch_size=2, n_iter=3)
    assert [picture(image).getpixel((0, 0)) for image in reply["images"]] == [colour(20 + i) for i in range(6)]
    assert reply["info"]["all_seeds"] == list(range(20, 26))
    assert len(reply["info"]["infotexts"]) == 6


async def test_a_seed_of_minus_one_is_a_random_one_that_is_told(client: httpx.AsyncClient) -> None:
    seeds = {(await txt2img(client, seed=-1))["info"]["seed"] for _ in range(4)}
    assert len(seeds) > 1
    assert all(0 <= seed < 2**32 for seed in seeds)


async def test_prompts_are_read_with_their_weights(client: httpx.AsyncClient) -> None:
    manifest = await manifest_of(client, await txt2img(client))
    assert (manifest["prompt"], manifest["prompt_syntax"]) == (FOX["prompt"], "weighted")


@pytest.mark.parametrize(
    ("fields", "sampler", "sigma_schedule"),
    [
        ({}, "dpmpp_2m", "karras"),
        ({"sampler_name": "Euler a"}, "euler_a", "simple"),
        ({"sampler_name": "Euler", "scheduler": "Karras"}, "euler", "karras"),
        ({"sampler_name": "Euler", "scheduler": "Uniform"}, "euler", "simple"),
        ({"sampler_index": "Heun", "scheduler": "automatic"}, "heun", "simple"),
        ({"sampler_name": "DPM++ 2M"}, "dpmpp_2m", "karras"),
        ({"sampler_name": "DPM++ 2M", "scheduler": "Simple"}, "dpmpp_2m", "simple"),
        ({"sampler_name": "DPM++ 2M SDE"}, "dpmpp_2m_sde", "exponential"),
        ({"sampler_name": "DPM++ 2M SDE Karras"}, "dpmpp_2m_sde", "karras"),
        ({"sampler_name": "DPM++ 2M Exponential", "scheduler": None}, "dpmpp_2m", "exponential"),
        ({"sampler_name": "k_dpmpp_2m"}, "dpmpp_2m", "karras"),
        ({"sampler_name": "DDIM", "scheduler": "Karras"}, "ddim", "simple"),
        ({"sampler_name": "UniPC", "scheduler": "exponential"}, "unipc", "exponential"),
        ({"scheduler": "Exponential"}, "dpmpp_2m", "exponential"),
    ],
)
async def test_samplers_and_schedulers_go_by_their_names(
    client: httpx.AsyncClient, fields: dict[str, Any], sampler: str, sigma_schedule: str
) -> None:
    manifest = await manifest_of(client, await txt2img(client, **fields))
    assert (manifest["sampler"], manifest["sigma_schedule"]) == (sampler, sigma_schedule)


@pytest.mark.parametrize(
    ("fields", "status", "detail"),
    [
        ({"sampler_name": "DPM++ 3M SDE"}, 404, "Sampler not found"),
        ({"sampler_name": "Karras"}, 404, "Sampler not found"),
        ({"sampler_name": "Euler", "scheduler": "SGM Uniform"}, 404, "Scheduler not found"),
        ({"sampler_name": "Euler a", "scheduler": "Karras"}, 422, "scheduler: got 'karras', expected one of simple"),
        ({"script_name": "X/Y/Z plot"}, 422, "Script 'X/Y/Z plot' not found"),
        ({"alwayson_scripts": {"ControlNet": {"args": [{"model": "x"}]}}}, 422, "always on script ControlNet not foun"),
        ({"restore_faces": True}, 422, "restore_faces: got True, expected False"),
        ({"tiling": True}, 422, "tiling: got True"),
        ({"enable_hr": True}, 422, "enable_hr: got True"),
        ({"subseed_strength": 0.5}, 422, "subseed_strength: got 0.5"),
        ({"styles": ["cinematic"]}, 422, "styles: got an array"),
        ({"steps": 0}, 422, "steps: got 0, expected greater than or equal to 1"),
        ({"steps": 100_000}, 422, "steps: got 100000, expected an integer from 1 to 200"),
        ({"batch_size": 8, "n_iter": 8}, 422, "batch_size * n_iter: got 64, expected an integer from 1 to 16"),
        ({"width": 65}, 422, "width: got 65, expected a multiple of 8"),
        ({"cfg_scale": "much"}, 422, "cfg_scale: got 'much'"),
        ({"prompt": ""}, 422, "prompt: got ''"),
        ({"override_settings": {"sd_model_checkpoint": "sd15"}}, 404, "sd_model_checkpoint: got"),
        ({"override_settings": {"CLIP_stop_at_last_layers": 9}}, 422, "CLIP_stop_at_last_layers: got 8"),
    ],
)
async def test_what_cannot_be_done_is_refused_in_their_words(
    client: httpx.AsyncClient, fields: dict[str, Any], status: int, detail: str
) -> None:
    reply = await client.post("/sdapi/v1/txt2img", json={**FOX, **fields})
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    error = reply.json()
    assert set(error) == {"error", "detail", "body", "errors"}
    assert error["detail"].startswith(detail)


async def test_errors_outside_of_any_route_have_their_form_too(client: httpx.AsyncClient) -> None:
    for reply in (
        await client.post("/sdapi/v1/interrogate", json={}),
        await client.get("/sdapi/v1/txt2img"),
        await client.post("/sdapi/v1/txt2img", content=b"{", headers={"Content-Type": "application/json"}),
    ):
        assert set(reply.json()) == {"error", "detail", "body", "errors"}
    assert "type" in (await client.get("/nowhere")).json()


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "a", "something": "\\ud800"}',
        b'{"prompt": "a\\ud800"}',
        b'{"prompt": "a", "script_args": ' + b"[" * 2000 + b"]" * 2000 + b"}",
        b'{"prompt": "a", "force_task_id": "\\udc00"}',
        b'{"prompt": "a", "override_settings": {"x": "\\udc00"}}',
    ],
    ids=["unknown field", "prompt", "depth", "task", "override"],
)
async def test_what_could_not_be_sent_back_is_refused(client: httpx.AsyncClient, body: bytes) -> None:
    reply = await client.post("/sdapi/v1/txt2img", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code in (400, 422)
    assert set(reply.json()) == {"error", "detail", "body", "errors"}


async def test_numbers_of_any_size_in_unknown_fields_do_no_harm(client: httpx.AsyncClient) -> None:
    body = b'{"prompt": "a", "x": 1e999, "y": ' + b"9" * 40 + b', "z": NaN}'
    reply = await client.post("/sdapi/v1/txt2img", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 200
    assert reply.json()["parameters"]["y"] == int("9" * 40)


async def test_a_job_that_fails_says_why(client: httpx.AsyncClient, worker: InstantWorker) -> None:
    worker.failure = Failure(code="out_of_memory", message="the device ran out of memory")
    reply = await client.post("/sdapi/v1/txt2img", json=FOX)
    assert (reply.status_code, reply.json()["error"]) == (507, "out_of_memory")


async def test_what_asks_for_nothing_is_taken_and_unknown_fields_too(client: httpx.AsyncClient) -> None:
    await txt2img(
        client,
        alwayson_scripts={"ControlNet": {"args": []}, "ADetailer": {"args": [False]}, "refiner": {}},
        script_name="",
        script_args=[],
        styles=None,
        subseed=-1,
        subseed_strength=0,
        restore_faces=False,
        refiner_checkpoint=None,
        s_noise=1.0,
        eta=0,
        something_new={"deep": [1]},
    )


async def test_pictures_are_left_out_where_nobody_wants_them(client: httpx.AsyncClient) -> None:
    reply = await txt2img(client, send_images=False)
    assert reply["images"] == []
    assert len(reply["info"]["infotexts"]) == 1


async def test_a_client_that_goes_away_cancels_its_job(site: Served, worker: InstantWorker) -> None:
    worker.gate.clear()
    call = asyncio.ensure_future(site.client.post("/sdapi/v1/txt2img", json=FOX))
    await worker.started.wait()
    state = (await site.client.get("/sdapi/v1/progress")).json()["state"]
    call.cancel()

    async def is_cancelled() -> bool:
        return bool((await site.client.get(f"/jobs/{state['job']}")).json()["state"] == "cancelled")

    await eventually(is_cancelled)
    assert (await site.client.get("/sdapi/v1/progress")).json()["state"]["job_count"] == 0


async def test_a_server_that_shuts_down_leaves_no_job_that_nobody_can_ask_for(
    site: Served, worker: InstantWorker
) -> None:
    worker.gate.clear()
    call = asyncio.ensure_future(site.client.post("/sdapi/v1/txt2img", json=FOX))
    await worker.started.wait()
    job = (await site.client.get("/sdapi/v1/progress")).json()["state"]["job"]
    site.app.state.service.handing_over.set()
    reply = await call
    assert (reply.status_code, reply.json()["error"]) == (503, "draining")
    assert "retry-after" in reply.headers

    async def is_cancelled() -> bool:
        return bool((await site.client.get(f"/jobs/{job}")).json()["state"] == "cancelled")

    await eventually(is_cancelled)


# Options


@pytest_asyncio.fixture
async def two_models(settings: Settings, queue: JobQueue) -> AsyncIterator[httpx.AsyncClient]:
    cards = card("one", weights_hash="sha256:aaaaaaaaaaaa"), card("two", weights_hash="sha256:bbbbbbbbbbbb")
    async with InstantWorker(queue, *cards).running(), in_process(settings, queue) as client:
        yield client


def at(client: httpx.AsyncClient, address: str) -> httpx.AsyncClient:
    """Another caller of the same application."""
    app = client._transport.app  # type: ignore[attr-defined]
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, client=(address, 1)), base_url="http://darkroom")


async def test_options_are_each_callers_own(two_models: httpx.AsyncClient) -> None:
    async with at(two_models, "10.0.0.2") as other:
        assert (await two_models.get("/sdapi/v1/options")).json()["sd_model_checkpoint"] == "one [aaaaaaaaaa]"
        for name in ("two", "two [bbbbbbbbbb]", "two.safetensors", "bbbbbbbbbb", "bbbbbbbbbbbb"):
            await two_models.post("/sdapi/v1/options", json={"sd_model_checkpoint": "one"})
            set_ = await two_models.post("/sdapi/v1/options", json={"sd_model_checkpoint": name})
            assert (set_.status_code, set_.json()) == (200, None)
            assert (await two_models.get("/sdapi/v1/options")).json()["sd_model_checkpoint"] == "two [bbbbbbbbbb]"
        assert (await txt2img(two_models))["info"]["sd_model_name"] == "two"
        assert (await txt2img(other))["info"]["sd_model_name"] == "one"
        assert (await other.get("/sdapi/v1/options")).json()["sd_checkpoint_hash"] == "aaaaaaaaaaaa"


async def test_an_override_holds_for_one_call_unless_it_is_to_stay(two_models: httpx.AsyncClient) -> None:
    override = {"sd_model_checkpoint": "two", "CLIP_stop_at_last_layers": 2, "samples_format": "webp"}
    reply = await txt2img(two_models, override_settings=override)
    assert (reply["info"]["sd_model_name"], reply["info"]["clip_skip"]) == ("two", 2)
    assert picture(reply["images"][0]).format == "WEBP"
    assert (await txt2img(two_models))["info"]["sd_model_name"] == "one"
    await txt2img(two_models, override_settings=override, override_settings_restore_afterwards=False)
    reply = await txt2img(two_models)
    assert (reply["info"]["sd_model_name"], reply["info"]["clip_skip"]) == ("two", 2)


async def test_an_unknown_checkpoint_is_an_error_and_changes_nothing(two_models: httpx.AsyncClient) -> None:
    before = (await two_models.get("/sdapi/v1/options")).json()
    wanted = {"sd_model_checkpoint": "sd15", "samples_format": "webp"}
    reply = await two_models.post("/sdapi/v1/options", json=wanted)
    assert reply.status_code == 404
    assert reply.json()["detail"].startswith("sd_model_checkpoint: got 'sd15', expected one of one [aaaaaaaaaa], two [")
    assert (await two_models.get("/sdapi/v1/options")).json() == before


async def test_sdxl_knows_no_clip_skip(settings: Settings, queue: JobQueue) -> None:
    async with InstantWorker(queue, card(family="sdxl")).running(), in_process(settings, queue) as client:
        reply = await txt2img(client, override_settings={"CLIP_stop_at_last_layers": 2})
        assert reply["info"]["clip_skip"] == 1


# Progress and interruption


async def test_progress_is_of_the_callers_own_jobs(client: httpx.AsyncClient, worker: InstantWorker) -> None:
    idle = (await client.get("/sdapi/v1/progress?skip_current_image=true")).json()
    assert (idle["progress"], idle["state"]["job_count"], idle["current_image"]) == (0, 0, None)
    worker.gate.clear()
    call = asyncio.ensure_future(client.post("/sdapi/v1/txt2img", json=FOX))
    await worker.started.wait()
    running = (await client.get("/sdapi/v1/progress")).json()
    assert running["progress"] == 0.25
    assert running["eta_relative"] >= 0
    assert {name: running["state"][name] for name in ("job_count", "job_no", "sampling_step", "sampling_steps")} == {
        "job_count": 1,
        "job_no": 0,
        "sampling_step": 1,
        "sampling_steps": 4,
    }
    async with at(client, "10.0.0.2") as other:
        assert (await other.get("/sdapi/v1/progress")).json() == idle
    worker.gate.set()
    assert (await call).status_code == 200
    assert (await client.get("/sdapi/v1/progress")).json() == idle


async def test_progress_shows_what_the_picture_looks_like_to_those_who_watch(
    client: httpx.AsyncClient, worker: InstantWorker, queue: JobQueue
) -> None:
    worker.gate.clear()
    call = asyncio.ensure_future(client.post("/sdapi/v1/txt2img", json=FOX))
    await worker.started.wait()
    first = (await client.get("/sdapi/v1/progress?skip_current_image=false")).json()
    assert first["current_image"] is None
    await queue.show(worker.worker_id, {(first["state"]["job"], 1, 0): (1, b"a small JPEG")})
    assert base64.b64decode((await client.get("/sdapi/v1/progress")).json()["current_image"]) == b"a small JPEG"
    skipped = (await client.get("/sdapi/v1/progress?skip_current_image=true")).json()
    assert skipped["current_image"] is None
    worker.gate.set()
    await call


@pytest.mark.parametrize("path", ["interrupt", "skip"])
async def test_each_caller_stops_its_own_jobs_alone(
    client: httpx.AsyncClient, worker: InstantWorker, path: str
) -> None:
    worker.gate.clear()
    async with at(client, "10.0.0.2") as second, at(client, "10.0.0.3") as third:
        callers = (client, second, third)
        calls = [asyncio.ensure_future(one.post("/sdapi/v1/txt2img", json={**FOX, "seed": 5})) for one in callers]
        for one in callers:

            async def is_drawn(one: httpx.AsyncClient = one) -> bool:
                return bool((await one.get("/sdapi/v1/progress")).json()["progress"])

            await eventually(is_drawn)
        assert (await second.post(f"/sdapi/v1/{path}")).status_code == 200
        stopped = await asyncio.wait_for(calls[1], 20)
        assert stopped.status_code == 200
        (image,) = stopped.json()["images"]
        assert picture(image).getpixel((5, 5)) == colour(5)
        assert (await second.get("/sdapi/v1/progress")).json()["state"]["job_count"] == 0
        assert not calls[0].done()
        assert not calls[2].done()
        worker.gate.set()
        for call in (calls[0], calls[2]):
            assert len((await call).json()["images"]) == 1


async def test_tenants_stop_their_own_jobs_alone_where_keys_are_on(
    settings: Settings, queue: JobQueue, worker: InstantWorker
) -> None:
    headers = []
    for tenant in ("ann", "bob"):
        key, token = new_key(name=tenant, tenant=tenant, scopes=["generate"])
        await queue.api_keys.add(key)
        basic = base64.b64encode(f"{tenant}:{token}".encode()).decode()
        headers.append({"Authorization": f"Basic {basic}"})
    worker.gate.clear()
    async with in_process(settings.model_copy(update={"auth": "keys"}), queue) as client:
        assert (await client.post("/sdapi/v1/txt2img", json=FOX)).status_code == 401
        calls = [asyncio.ensure_future(client.post("/sdapi/v1/txt2img", json=FOX, headers=one)) for one in headers]
        for one in headers:

            async def is_drawn(one: dict[str, str] = one) -> bool:
                return bool((await client.get("/sdapi/v1/progress", headers=one)).json()["progress"])

            await eventually(is_drawn)
        await client.post("/sdapi/v1/interrupt", headers=headers[0])
        assert len((await asyncio.wait_for(calls[0], 20)).json()["images"]) == 1
        assert not calls[1].done()
        worker.gate.set()
        assert len((await calls[1]).json()["images"]) == 1


async def test_a_caller_can_name_its_jobs_and_stop_one(client: httpx.AsyncClient, worker: InstantWorker) -> None:
    worker.gate.clear()
    calls = [
        asyncio.ensure_future(client.post("/sdapi/v1/txt2img", json={**FOX, "force_task_id": name})) for name in "ab"
    ]

    async def are_drawn() -> bool:
        told = [(await client.get(f"/sdapi/v1/progress?id_task={name}")).json() for name in "ab"]
        return all(one["progress"] for one in told)

    await eventually(are_drawn)
    assert (await client.get("/sdapi/v1/progress")).json()["state"]["job_count"] == 2
    assert (await client.get("/sdapi/v1/progress?id_task=a")).json()["state"]["job_count"] == 1
    await client.post("/sdapi/v1/interrupt?id_task=a")
    assert len((await asyncio.wait_for(calls[0], 20)).json()["images"]) == 1
    assert not calls[1].done()
    worker.gate.set()
    assert len((await calls[1]).json()["images"]) == 1


async def test_a_call_that_is_interrupted_while_it_waits_has_no_images(settings: Settings, queue: JobQueue) -> None:
    await queue.register("busy", [card()])
    async with in_process(settings, queue) as client:
        call = asyncio.ensure_future(client.post("/sdapi/v1/txt2img", json=FOX))

        async def is_waiting() -> bool:
            return bool((await client.get("/sdapi/v1/progress")).json()["state"]["job_count"])

        await eventually(is_waiting)
        await client.post("/sdapi/v1/interrupt")
        reply = await asyncio.wait_for(call, 20)
    assert (reply.status_code, reply.json()["images"]) == (200, [])


async def test_jobs_of_a_lost_process_are_forgotten(client: httpx.AsyncClient, queue: JobQueue) -> None:
    reply = await txt2img(client)
    caller = "address 127.0.0.1"
    await queue.callers.begin(caller, reply["info"]["job_id"])
    await queue.callers.begin(caller, "0" * 26)
    assert (await client.get("/sdapi/v1/progress")).json()["state"]["job_count"] == 0
    assert await queue.callers.jobs(caller) == []


# Lists


async def test_lists_tell_what_is_served(client: httpx.AsyncClient) -> None:
    samplers = (await client.get("/sdapi/v1/samplers")).json()
    assert {"name": "DPM++ 2M", "aliases": ["k_dpmpp_2m"], "options": {}} in samplers
    schedulers = (await client.get("/sdapi/v1/schedulers")).json()
    assert [one["label"] for one in schedulers] == ["Automatic", "Simple", "Karras", "Exponential"]
    assert set(schedulers[0]) == {"name", "label", "aliases", "default_rho", "need_inner_model"}
    assert (await client.get("/sdapi/v1/sd-models")).json() == [
        {
            "title": "test-world [0123456789]",
            "model_name": "test-world",
            "hash": "0123456789",
            "sha256": "0123456789abcdef",
            "filename": "test-world",
            "config": None,
        }
    ]


@pytest.mark.parametrize("name", NOTHING)
async def test_what_there_is_not_is_an_empty_list(client: httpx.AsyncClient, name: str) -> None:
    reply = await client.get(f"/sdapi/v1/{name}")
    assert (reply.status_code, reply.json()) == (200, NOTHING[name])


@pytest.mark.parametrize("name", NOTHING_TO_DO)
async def test_looking_for_new_files_does_no_harm(client: httpx.AsyncClient, name: str) -> None:
    assert (await client.post(f"/sdapi/v1/{name}")).status_code == 200


def picture_with(kind: str = "PNG", **texts: str) -> bytes:
    out = io.BytesIO()
    image = Image.new("RGB", (8, 8))
    if kind == "PNG":
        chunks = PngImagePlugin.PngInfo()
        for name, text in texts.items():
            chunks.add_text(name, text)
        image.save(out, kind, pnginfo=chunks)
    else:
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + texts["parameters"].encode(texts["encoding"])
        image.save(out, kind, exif=exif)
    return out.getvalue()


async def png_info(client: httpx.AsyncClient, data: bytes, prefix: str = "") -> httpx.Response:
    return await client.post("/sdapi/v1/png-info", json={"image": prefix + base64.b64encode(data).decode()})


TEXT = 'a fox\nNegative prompt: blurry\nSteps: 20, Sampler: Euler a, Seed: 7, Size: 64x72, Model: "a, b"'


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
async def test_a_png_says_how_it_was_made(client: httpx.AsyncClient, prefix: str) -> None:
    found = (await png_info(client, picture_with(parameters=TEXT, Software="x"), prefix)).json()
    assert found["info"] == TEXT
    assert found["items"] == {"parameters": TEXT, "Software": "x"}
    assert found["parameters"] == {
        "Prompt": "a fox",
        "Negative prompt": "blurry",
        "Steps": "20",
        "Sampler": "Euler a",
        "Seed": "7",
        "Size-1": "64",
        "Size-2": "72",
        "Model": "a, b",
    }


@pytest.mark.parametrize(("kind", "encoding"), [("JPEG", "utf-16-be"), ("WEBP", "utf-16-le")])
async def test_pictures_of_other_kinds_say_it_too(client: httpx.AsyncClient, kind: str, encoding: str) -> None:
    found = (await png_info(client, picture_with(kind, parameters="🦊 " + TEXT, encoding=encoding))).json()
    assert found["info"] == "🦊 " + TEXT


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
async def test_what_was_drawn_here_says_how(client: httpx.AsyncClient, output_format: str) -> None:
    made = msgspec.structs.replace(make_job().request, prompt="a (red:1.2) fox", output_format=output_format)
    data = encode_image(np.zeros((64, 64, 3), np.uint8), made, 0, model_hash="sha256:0123456789ab", version="1")
    parameters = (await png_info(client, data)).json()["parameters"]
    assert {name: parameters[name] for name in ("Prompt", "Seed", "Steps", "Sampler", "Model hash", "Size-1")} == {
        "Prompt": "a (red:1.2) fox",
        "Seed": str(made.seed),
        "Steps": "4",
        "Sampler": "DDIM",
        "Model hash": "0123456789",
        "Size-1": "64",
    }


async def test_a_picture_that_says_nothing_is_no_error_and_no_picture_is_one(client: httpx.AsyncClient) -> None:
    assert (await png_info(client, picture_with())).json() == {"info": "", "items": {}, "parameters": {}}
    for image in ("no base64!", base64.b64encode(b"GIF89a").decode(), "http://localhost/a.png", "data:image/png,a"):
        reply = await client.post("/sdapi/v1/png-info", json={"image": image})
        assert (reply.status_code, reply.json()["error"]) == (422, "invalid_request")
        assert reply.json()["detail"].startswith("image: got ")


@hypothesis_settings(max_examples=100, deadline=None)
@given(st.binary(max_size=100), st.integers(0, 300), st.integers(0, 300), st.sampled_from(["PNG", "JPEG", "WEBP"]))
def test_no_damage_to_a_picture_is_too_much(noise: bytes, start: int, cut: int, kind: str) -> None:
    whole = picture_with(kind, parameters="a fox", encoding="utf-16-be")
    damaged = (whole[:start] + noise + whole[start:])[: max(0, len(whole) - cut)]
    with contextlib.suppress(InvalidRequest):
        assert all(isinstance(text, str) for text in read_texts(base64.b64encode(damaged).decode()).values())


# Pictures of pictures


def encoded(image: Image.Image, kind: str = "PNG") -> str:
    out = io.BytesIO()
    image.save(out, kind)
    return base64.b64encode(out.getvalue()).decode()


RED = Image.new("RGB", (64, 72), (200, 30, 20))
LEFT_HALF = Image.new("L", (64, 72), 0)
LEFT_HALF.paste(255, (0, 0, 32, 72))


async def img2img(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    reply = await client.post("/sdapi/v1/img2img", json={**FOX, "init_images": [encoded(RED)], **fields})
    assert reply.status_code == 200, reply.text
    body = reply.json()
    return {**body, "info": json.loads(body["info"])}


async def inputs_of(queue: JobQueue, client: httpx.AsyncClient, worker: InstantWorker, **fields: Any) -> Any:
    """The pictures that a job brings, as images by name."""
    worker.gate.clear()
    call = asyncio.ensure_future(img2img(client, **fields))
    await worker.started.wait()
    job_id = (await client.get("/sdapi/v1/progress")).json()["state"]["job"]
    job = (await queue.status(job_id)).job
    found = await queue.inputs(job)
    worker.gate.set()
    await call
    return {name: Image.open(io.BytesIO(content)) for name, content in found.items()}


async def test_a_picture_is_drawn_from_a_picture(client: httpx.AsyncClient) -> None:
    reply = await img2img(client, denoising_strength=0.5, seed=3, steps=10)
    assert picture(reply["images"][0]).size == (64, 72)
    manifest = await manifest_of(client, reply)
    assert (manifest["strength"], manifest["prompt_syntax"]) == (0.5, "weighted")
    assert manifest["init_image"]
    assert (reply["info"]["denoising_strength"], reply["info"]["seed"]) == (0.5, 3)
    assert (reply["parameters"]["init_images"], reply["parameters"]["mask"]) == (None, None)
    again = await img2img(client, include_init_images=True, steps=10)
    assert again["parameters"]["init_images"] == [encoded(RED)]
    assert again["parameters"]["denoising_strength"] == 0.75


@pytest.mark.parametrize(("invert", "left", "right"), [(0, 255, 0), (1, 0, 255)])
async def test_what_is_white_in_a_mask_is_drawn_anew_unless_it_is_inverted(
    queue: JobQueue, client: httpx.AsyncClient, worker: InstantWorker, invert: int, left: int, right: int
) -> None:
    found = await inputs_of(queue, client, worker, mask=encoded(LEFT_HALF), inpainting_mask_invert=invert, steps=10)
    assert found["init_image"].getpixel((9, 9)) == (200, 30, 20)
    assert [found["mask_image"].getpixel((x, 9)) for x in (4, 60)] == [left, right]


@pytest.mark.parametrize(
    ("fields", "detail"),
    [
        ({"init_images": []}, "init_images: got an array"),
        ({"init_images": [encoded(RED)] * 2}, "init_images: got an array"),
        ({"init_images": ["http://localhost/a.png"]}, "init_images: got a http: address"),
        ({"init_images": ["bm8gcGljdHVyZQ=="]}, "init_images: got 10 bytes that are none"),
        ({"mask": "bm8gcGljdHVyZQ=="}, "mask: got 10 bytes that are none"),
        ({"denoising_strength": 0}, "denoising_strength: got 0"),
        ({"denoising_strength": 0.01, "steps": 4}, "denoising_strength: got 0.01"),
        ({"resize_mode": 3}, "resize_mode: got 3"),
        ({"inpainting_fill": 2}, "inpainting_fill: got 2"),
    ],
)
async def test_pictures_that_cannot_be_begun_with_are_refused(
    client: httpx.AsyncClient, fields: dict[str, Any], detail: str
) -> None:
    asked = {**FOX, "init_images": [encoded(RED)], **fields}
    reply = await client.post("/sdapi/v1/img2img", json=asked)
    assert reply.status_code == 422
    assert reply.json()["detail"].startswith(detail)


# Clients


async def test_the_calls_of_open_webui_are_understood(client: httpx.AsyncClient) -> None:
    """Recorded shapes: a whole options object sent back, an empty Authorization, and txt2img with few fields."""
    headers = {"authorization": ""}
    options = (await client.get("/sdapi/v1/options", headers=headers)).json()
    models = (await client.get("/sdapi/v1/sd-models", headers=headers)).json()
    options["sd_model_checkpoint"] = models[0]["title"]
    assert (await client.post("/sdapi/v1/options", json=options, headers=headers)).status_code == 200
    asked = {"prompt": "a fox", "batch_size": 1, "width": 64, "height": 64, "steps": 6, "negative_prompt": "blurry"}
    reply = (await client.post("/sdapi/v1/txt2img", json=asked, headers=headers)).json()
    assert picture(reply["images"][0]).size == (64, 64)
    assert json.loads(reply["info"])["negative_prompt"] == "blurry"


async def run_webuiapi(scene: str, port: int, key: str = "") -> dict[str, Any]:
    """What a scene of `tests/clients/webuiapi_client.py` saw."""
    python = await asyncio.to_thread(client_python, "webuiapi")
    command = [str(python), "-I", str(CLIENTS / "webuiapi_client.py"), scene, str(port), *([key] if key else [])]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    _, told = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, told.decode()
    seen: dict[str, Any] = json.loads(told)
    return seen


async def test_webuiapi_finds_its_way(site: Served) -> None:
    seen = await run_webuiapi("look", site.port)
    assert seen["version"] == "0.9.17"
    assert {"DPM++ 2M", "Euler a", "DDIM"} <= set(seen["samplers"])
    assert seen["schedulers"] == ["automatic", "exponential", "karras", "simple"]
    assert seen["models"] == [seen["current"]] == ["test-world [0123456789]"]
    assert not any(seen["nothing"])
    assert seen["scripts"] == {"txt2img": [], "img2img": []}


async def test_webuiapi_draws_and_reads_what_it_drew(site: Served) -> None:
    seen = await run_webuiapi("draw", site.port)
    assert seen["sizes"] == [[64, 72]] * 4
    assert [tuple(one) for one in seen["colours"]] == [colour(7 + i) for i in range(4)]
    assert (seen["info"]["all_seeds"], seen["info"]["sampler_name"]) == ([7, 8, 9, 10], "DPM++ 2M")
    assert seen["parameters"]["cfg_scale"] == 6.5


async def test_webuiapi_draws_from_a_picture(site: Served) -> None:
    seen = await run_webuiapi("redraw", site.port)
    assert seen["sizes"] == [[64, 72]]
    assert (seen["info"]["seed"], seen["info"]["denoising_strength"]) == (9, 0.5)
    assert seen["parameters"]["init_images"] is None


async def test_webuiapi_sets_options(settings: Settings, queue: JobQueue) -> None:
    async with InstantWorker(queue, card("one"), card("two")).running(), served(settings, queue) as site:
        seen = await run_webuiapi("choose", site.port)
    assert seen["options"]["sd_model_checkpoint"].startswith("two [")
    assert (seen["info"]["sd_model_name"], seen["info"]["clip_skip"]) == ("two", 2)


async def test_webuiapi_interrupts(settings: Settings, queue: JobQueue, worker: InstantWorker) -> None:
    worker.gate.clear()
    key, token = new_key(name="ann", tenant="ann", scopes=["generate"])
    await queue.api_keys.add(key)
    async with served(settings.model_copy(update={"auth": "keys"}), queue) as site:
        seen = await run_webuiapi("interrupt", site.port, token)
    assert seen["images"] == 1
    assert seen["progress"]["state"]["sampling_steps"] == 4
    assert (seen["reply"], seen["skipped"]) == ({}, None)
