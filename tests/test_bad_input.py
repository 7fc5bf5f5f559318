"""Whatever a client sends ends in a 4xx that says what was wrong, and never touches the queue."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
import pytest_asyncio
from darkroom.api.body import parse_fields, parse_json
from darkroom.api.resolve import accepted_values, check_limits, fingerprint
from darkroom.api.schema import GenerateRequest
from darkroom.config import Settings
from darkroom.errors import RequestError
from darkroom.queue import JobQueue
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.support.http import in_process, served
from tests.support.instant_worker import card

FOX = {"prompt": "a red fox in the snow"}
MAX_BODY_BYTES = 200_000


@pytest_asyncio.fixture
async def client(settings: Settings, queue: JobQueue) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a service with one idle worker. After each test nothing must have reached the queue."""
    await queue.register("idle", [card()])
    settings = settings.model_copy(update={"max_body_bytes": MAX_BODY_BYTES, "max_job_cost": 100_000.0})
    async with in_process(settings, queue) as client:
        yield client
    assert (await queue.stats()).counters["accepted"] == 0


def refused_fields(reply: httpx.Response) -> dict[str, tuple[str, str]]:
    """Field → (value, accepted) of a well-formed 422."""
    assert reply.status_code == 422, reply.text
    assert reply.headers["content-type"] == "application/problem+json"
    problem = reply.json()
    assert problem["code"] == "invalid_request"
    assert problem["status"] == 422
    assert problem["type"] == "/docs#error-invalid_request"
    assert problem["title"]
    for error in problem["errors"]:
        assert f"{error['field']}: got {error['value']}, expected {error['accepted']}" in problem["detail"]
    return {error["field"]: (error["value"], error["accepted"]) for error in problem["errors"]}


NUMBERS = "an integer from "
WRONG_FIELDS: list[tuple[str, Any, str]] = [
    ("prompt", "", "1 to 8000 characters"),
    ("prompt", "  \n\t ", "1 to 8000 characters"),
    ("prompt", "x" * 100_000, "1 to 8000 characters"),
    ("prompt", "nul\0byte", "none of them NUL"),
    ("prompt", "\ud800", "valid Unicode"),
    ("prompt", 7, "1 to 8000 characters"),
    ("prompt", None, "1 to 8000 characters"),
    ("prompt", {"text": "fox"}, "1 to 8000 characters"),
    ("negative_prompt", "x" * 8001, "0 to 8000 characters"),
    ("negative_prompt", "\udfff", "valid Unicode"),
    ("width", 63, "a multiple of 8 from 8 to 256"),
    ("width", 264, "a multiple of 8 from 8 to 256"),
    ("width", 4, "a multiple of 8 from 8 to 256"),
    ("width", 0, "at least 1"),
    ("width", -64, "at least 1"),
    ("width", 64.0, "whole number"),
    ("width", "64", "whole number"),
    ("width", True, "whole number"),
    ("height", 10**9, "a multiple of 8 from 8 to 256"),
    ("height", 10**400, "a multiple of 8 from 8 to 256"),
    ("num_inference_steps", 0, NUMBERS + "1 to 200"),
    ("num_inference_steps", -1, NUMBERS + "1 to 200"),
    ("num_inference_steps", 201, NUMBERS + "1 to 200"),
    ("num_inference_steps", 10**9, NUMBERS + "1 to 200"),
    ("num_inference_steps", float("nan"), NUMBERS + "1 to 200"),
    ("num_inference_steps", float("inf"), NUMBERS + "1 to 200"),
    ("num_inference_steps", "20", NUMBERS + "1 to 200"),
    ("num_inference_steps", False, NUMBERS + "1 to 200"),
    ("num_inference_steps", [20], NUMBERS + "1 to 200"),
    ("guidance_scale", -0.1, "a number from 0 to 50"),
    ("guidance_scale", 50.1, "a number from 0 to 50"),
    ("guidance_scale", float("nan"), "a number from 0 to 50"),
    ("guidance_scale", float("-inf"), "a number from 0 to 50"),
    ("guidance_scale", 10**400, "a number from 0 to 50"),
    ("guidance_scale", "5", "a number from 0 to 50"),
    ("guidance_scale", True, "a number from 0 to 50"),
    ("num_images_per_prompt", 0, NUMBERS + "1 to 16"),
    ("num_images_per_prompt", 17, NUMBERS + "1 to 16"),
    ("seed", -1, NUMBERS + "0 to 9223372036854775807"),
    ("seed", 2**63, NUMBERS + "0 to 9223372036854775807"),
    ("seed", 1.5, NUMBERS + "0 to 9223372036854775807"),
    ("sampler", "plms", "one of ddpm, ddim"),
    ("sampler", "euler\0", "one of ddpm, ddim"),
    ("sigma_schedule", "cosine", "one of simple, karras, exponential"),
    ("clip_skip", -1, NUMBERS + "0 up"),
    ("clip_skip", 3, NUMBERS + "0 to 2 with model test-world"),
    ("clip_skip", None, NUMBERS + "0 up"),
    ("output_format", "gif", "one of png, jpeg, webp"),
    ("priority", "urgent", "one of low, normal, high"),
    ("deadline_s", 0, "a number of seconds above 0"),
    ("deadline_s", -5, "a number of seconds above 0"),
    ("deadline_s", float("inf"), "a number of seconds above 0"),
    ("mode", "sync", "one of wait, async"),
    ("wait_timeout_s", -1, "a number of seconds from 0 up"),
    ("model", 5, "GET /models"),
]


@pytest.mark.parametrize(("field", "value", "accepted"), WRONG_FIELDS, ids=lambda part: ascii(part)[:24])
async def test_a_wrong_field_is_named_with_its_value_and_its_range(
    client: httpx.AsyncClient, field: str, value: Any, accepted: str
) -> None:
    content = json.dumps({**FOX, field: value})
    fields = refused_fields(
        await client.post("/generate", content=content, headers={"Content-Type": "application/json"})
    )
    assert accepted in fields[field][1]
    assert len(fields[field][0]) <= 80


async def test_all_wrong_fields_are_named_at_once(client: httpx.AsyncClient) -> None:
    reply = await client.post("/generate", json={"prompt": "", "width": True, "guidance_scale": 99, "seed": -1})
    assert set(refused_fields(reply)) == {"prompt", "width", "guidance_scale", "seed"}


async def test_a_prompt_must_be_there(client: httpx.AsyncClient) -> None:
    assert refused_fields(await client.post("/generate", json={}))["prompt"][0] == "nothing"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("num_inference_step", "num_inference_steps"),
        ("steps", "num_inference_steps"),
        ("cfg_scale", "guidance_scale"),
        ("n", "num_images_per_prompt"),
        ("Prompt", "prompt"),
        ("negativ_prompt", "negative_prompt"),
        ("zzz", "one of the fields prompt, negative_prompt"),
        ("", "one of the fields"),
    ],
)
async def test_an_unknown_field_is_refused_with_the_nearest_name(
    client: httpx.AsyncClient, name: str, hint: str
) -> None:
    assert hint in refused_fields(await client.post("/generate", json={**FOX, name: 1}))[name][1]


async def test_field_names_of_any_kind_are_shown_safely(client: httpx.AsyncClient) -> None:
    body = json.dumps({**FOX, "\ud800": 1, "<script>": 2, "x" * 9999: 3, "a\r\nb": 4})
    reply = await client.post("/generate", content=body, headers={"Content-Type": "application/json"})
    assert {"\\ud800", "<script>", "x" * 64, "a\\r\\nb"} == set(refused_fields(reply))


async def test_a_sampler_and_a_schedule_that_do_not_go_together(client: httpx.AsyncClient) -> None:
    reply = await client.post("/generate", json={**FOX, "sampler": "ddim", "sigma_schedule": "karras"})
    assert refused_fields(reply) == {"sigma_schedule": ("'karras'", "one of simple with sampler ddim")}


async def test_the_last_seed_of_many_images_must_fit_too(client: httpx.AsyncClient) -> None:
    reply = await client.post("/generate", json={**FOX, "seed": 2**63 - 2, "num_images_per_prompt": 3})
    assert "seed" in refused_fields(reply)


async def test_a_request_that_costs_too_much_is_told_its_cost_and_the_cap(client: httpx.AsyncClient) -> None:
    reply = await client.post(
        "/generate", json={**FOX, "width": 256, "height": 256, "sampler": "heun", "num_inference_steps": 10}
    )
    # 2 model rows × 19 evaluations × 64² latent pixels
    assert refused_fields(reply)["cost"][0] == "155648"
    assert "at most 100000 model rows" in refused_fields(reply)["cost"][1]


async def test_an_unknown_model_is_answered_with_the_known_ones(client: httpx.AsyncClient) -> None:
    reply = await client.post("/generate", json={**FOX, "model": "sd15<b>\0"})
    assert reply.status_code == 404
    assert reply.json()["code"] == "unknown_model"
    assert reply.json()["errors"] == [{"field": "model", "value": "'sd15<b>\\x00'", "accepted": "one of test-world"}]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b'{"prompt": "a fox', 400, "malformed_json"),
        (b"", 400, "malformed_json"),
        (b"\xff\xfe{\x00}\x00", 400, "malformed_json"),
        (b'\xef\xbb\xbf{"prompt": "fox"}', 400, "malformed_json"),
        (b'{"prompt": "\xed\xa0\x80"}', 400, "malformed_json"),
        (b'{"prompt": "fox"} trailing', 400, "malformed_json"),
        (b'{"prompt": "fox", "seed": ' + b"9" * 9999 + b"}", 400, "malformed_json"),
        (b"[" * 100_000, 400, "malformed_json"),
        (b'{"a":' * 30_000, 400, "malformed_json"),
        (b'{"prompt": ' + b"[" * 500 + b"]" * 500 + b"}", 422, "invalid_request"),
        (b'{"prompt": "fox", "prompt": "cat"}', 422, "invalid_request"),
        (b'["prompt"]', 422, "invalid_request"),
        (b'"prompt"', 422, "invalid_request"),
        (b"null", 422, "invalid_request"),
        (b"NaN", 422, "invalid_request"),
        (b"x" * (MAX_BODY_BYTES + 1), 413, "body_too_large"),
    ],
    ids=lambda part: ascii(part)[:24],
)
async def test_a_body_that_is_no_json_object(client: httpx.AsyncClient, body: bytes, status: int, code: str) -> None:
    reply = await client.post("/generate", content=body, headers={"Content-Type": "application/json"})
    assert (reply.status_code, reply.json()["code"]) == (status, code)
    assert reply.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/jsonp", None],
)
async def test_a_body_must_say_that_it_is_json(client: httpx.AsyncClient, content_type: str | None) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    reply = await client.post("/generate", content=json.dumps(FOX).encode(), headers=headers)
    assert (reply.status_code, reply.json()["code"]) == (415, "unsupported_media_type")


async def test_a_compressed_body_is_refused_unread(client: httpx.AsyncClient) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    reply = await client.post("/generate", content=b"\x1f\x8b", headers=headers)
    assert reply.status_code == 415


@pytest.mark.parametrize(
    ("accept", "output_format"),
    [
        ("image/png", "jpeg"),
        ("text/html", None),
        ("image/avif", None),
        ("image/gif, application/xml", None),
        ("application/json;q=0", "png"),
        ("*/*;q=0", None),
        ("image/png;q=abc", None),
    ],
)
async def test_a_reply_that_nobody_can_take_is_not_made(
    client: httpx.AsyncClient, accept: str, output_format: str | None
) -> None:
    body = {**FOX} | ({"output_format": output_format} if output_format else {})
    reply = await client.post("/generate", json=body, headers={"Accept": accept})
    assert (reply.status_code, reply.json()["code"]) == (406, "not_acceptable")


@pytest.mark.parametrize("key", ["", " ", "x" * 201, "schlüssel"])
async def test_an_idempotency_key_is_visible_ascii(client: httpx.AsyncClient, key: str) -> None:
    reply = await client.post("/generate", json=FOX, headers={"Idempotency-Key": key.encode()})  # type: ignore[dict-item]
    assert "Idempotency-Key" in refused_fields(reply)


@pytest.mark.parametrize("job_id", ["x", "0" * 25, "0" * 27, "G" * 26, "%00", "..%2f..%2fetc", "0" * 26, "*" * 26])
async def test_only_real_job_ids_are_found(client: httpx.AsyncClient, job_id: str) -> None:
    for call in ("", "/images/0", "/events"):
        assert (await client.get(f"/jobs/{job_id}{call}")).status_code == 404
    assert (await client.delete(f"/jobs/{job_id}")).status_code == 404


@pytest.mark.parametrize("index", ["-1", "x", "1.0", "9999999999", "²", "%00"])
async def test_only_numbered_images_are_found(client: httpx.AsyncClient, index: str) -> None:
    reply = await client.get(f"/jobs/{'0' * 26}/images/{index}")
    assert (reply.status_code, reply.json()["code"]) == (404, "image_not_found")


@pytest.mark.parametrize("event_id", ["+inf", "1", "1-", "99999999999999999999-0", "1-0-0"])
async def test_an_event_id_of_ones_own_making_is_refused(client: httpx.AsyncClient, event_id: str) -> None:
    reply = await client.get(f"/jobs/{'0' * 26}/events", headers={"Last-Event-ID": event_id})
    assert "Last-Event-ID" in refused_fields(reply)


async def test_a_chunked_body_is_cut_off_at_the_cap_and_the_client_gets_to_know(
    settings: Settings, queue: JobQueue
) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"x" * 10_000

    async with served(settings.model_copy(update={"max_body_bytes": MAX_BODY_BYTES}), queue) as site:
        headers = {"Content-Type": "application/json"}
        for content in (chunks(), b"x" * 1_000_000):
            reply = await site.client.post("/generate", content=content, headers=headers)
            assert (reply.status_code, reply.json()["code"]) == (413, "body_too_large")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def refusal_of(read: Callable[[], object]) -> RequestError | None:
    try:
        read()
    except RequestError as error:
        return error
    return None


@given(fields=st.dictionaries(st.sampled_from(list(GenerateRequest.model_fields)) | st.text(max_size=9), JSON))
@hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_json_object_is_taken_or_refused_in_words(fields: dict[str, Any]) -> None:
    settings = Settings(redis_url="redis://unused")
    accepted = accepted_values(settings)

    def read() -> None:
        body = parse_fields(GenerateRequest, parse_json(json.dumps(fields).encode()), accepted)
        check_limits(body, settings, accepted)
        fingerprint(body, "png").encode()

    error = refusal_of(read)
    assert error is None or str(error).isascii()


@given(body=st.binary(max_size=200))
@hypothesis_settings(max_examples=150, deadline=None)
def test_any_bytes_at_all_are_an_object_or_refused(body: bytes) -> None:
    error = refusal_of(lambda: parse_json(body))
    assert error is None or error.code in ("malformed_json", "invalid_request")
