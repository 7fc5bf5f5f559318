"""API keys: nothing without one, nothing of another's, no more than it allows; and the command that makes them."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from darkroom.api import problems
from darkroom.api.app import create_app
from darkroom.api.auth import OPEN_PATHS
from darkroom.config import Settings, load_settings
from darkroom.errors import ConfigError
from darkroom.jobs import Failure, Priority
from darkroom.queue import EmbeddedRedis, JobQueue, Rate, new_key
from darkroom.queue.api_keys import CACHE_S
from darkroom.up import first_request, run_up
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Route

from tests.support.http import in_process, served
from tests.support.instant_worker import InstantWorker, card
from tests.support.jobs import end_lease

pytest_plugins = "tests.support.service"

FOX = {"prompt": "a red fox in the snow"}
# Two model rows × 4 evaluations × 16 × 16 latent pixels.
FOX_COST = 2048


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"auth": "keys", "metrics_public": True})


@pytest_asyncio.fixture
async def client(settings: Settings, queue: JobQueue) -> AsyncIterator[httpx.AsyncClient]:
    async with in_process(settings, queue) as client:
        yield client


async def bearer(queue: JobQueue, tenant: str = "ann", scope: str = "generate", **limits: Any) -> dict[str, str]:
    """The headers of a caller with a new key."""
    key, token = new_key(name=tenant, tenant=tenant, scopes=[scope], **limits)
    await queue.api_keys.add(key)
    return {"Authorization": f"Bearer {token}"}


async def eventually(is_so: Callable[[], Awaitable[bool]], timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while True:
            if await is_so():
                return
            await asyncio.sleep(0.02)


async def is_closed(client: httpx.AsyncClient, headers: dict[str, str]) -> bool:
    return (await client.get("/models", headers=headers)).status_code == 401


def is_refused(reply: httpx.Response, status: int, code: str) -> bool:
    return (reply.status_code, reply.json()["code"]) == (status, code)


# Default deny


def paths_of(routes: list[BaseRoute]) -> list[tuple[str, str]]:
    """Every method and path that some route answers, with its parameters filled in."""
    found = []
    for route in routes:
        if isinstance(route, Route):
            path = route.path.replace(":path", "").format(job_id="0" * 26, index=0, name="app.css", model="one")
            found += [(method, path) for method in route.methods or ()]
        else:
            found += paths_of(route.original_router.routes)  # type: ignore[attr-defined]
    return found


async def test_every_route_but_the_open_ones_wants_a_key(settings: Settings, queue: JobQueue) -> None:
    routes = paths_of(create_app(settings, queue).routes)
    assert len(routes) > 12
    open_paths = set()
    async with in_process(settings, queue) as client:
        for method, path in [
            *routes,
            ("GET", "/nowhere"),
            ("OPTIONS", "/generate"),
            ("POST", "/"),
            ("PUT", "/metrics"),
        ]:
            reply = await client.request(method, path)
            if reply.status_code != 401:
                open_paths.add((method, path))
                continue
            assert reply.headers["www-authenticate"].startswith("Bearer")
            if path.startswith("/sdapi/"):
                assert reply.json()["error"] == "unauthorized"
            elif path.startswith("/v1/"):
                assert reply.json()["error"]["code"] == "invalid_api_key"
            elif method != "HEAD":
                assert reply.headers["content-type"] == "application/problem+json"
                assert reply.json()["code"] == "unauthorized"
    assert open_paths == {
        ("GET", "/"),
        ("GET", "/static/app.css"),
        ("GET", "/health/live"),
        ("HEAD", "/health/live"),
        ("GET", "/health/ready"),
        ("HEAD", "/health/ready"),
    }
    assert {path for path in OPEN_PATHS if not path.startswith("/static/")} == {"/", "/health/live", "/health/ready"}


async def test_the_page_and_all_it_loads_come_without_a_key(client: httpx.AsyncClient) -> None:
    for path in sorted(OPEN_PATHS - {"/health/ready"}):
        assert (await client.get(path)).status_code == 200
    assert (await client.get("/health/ready")).status_code == 503  # there is no worker


def basic(token: str) -> str:
    return "Basic " + base64.b64encode(f"anyone:{token}".encode()).decode()


async def rows_of(client: httpx.AsyncClient, job_id: str, headers: dict[str, str]) -> list[str | None]:
    """The jobs that the first look at a batch with something in it names."""
    async with (
        asyncio.timeout(20),
        client.stream("GET", "/batch", params={"job_id": job_id}, headers=headers) as stream,
    ):
        async for line in stream.aiter_lines():
            told = json.loads(line.removeprefix("data: "))["workers"] if line.startswith("data: ") else []
            if rows := [row["job_id"] for one in told for row in one["rows"]]:
                return rows
    raise AssertionError("the stream ended")


async def test_the_batch_names_no_job_of_another_tenant(
    settings: Settings, queue: JobQueue, worker: InstantWorker
) -> None:
    ann, bob = await bearer(queue, "ann"), await bearer(queue, "bob")
    worker.gate.clear()
    async with served(settings, queue) as site:
        made = await site.client.post("/generate", json={**FOX, "mode": "async"}, headers=ann)
        job_id = made.json()["job_id"]
        assert await rows_of(site.client, job_id, ann) == [job_id]
        assert await rows_of(site.client, job_id, bob) == [None]


@pytest.mark.parametrize(
    "show",
    [
        lambda token: {"Authorization": f"Bearer {token}"},
        lambda token: {"Authorization": f"bearer  {token} "},
        lambda token: {"Authorization": basic(token)},
        lambda token: {"X-API-Key": token},
        lambda token: {"Authorization": "", "X-API-Key": token},
    ],
)
async def test_a_key_may_be_shown_in_any_of_the_usual_ways(
    client: httpx.AsyncClient, queue: JobQueue, show: Callable[[str], dict[str, str]]
) -> None:
    token = (await bearer(queue))["Authorization"].removeprefix("Bearer ")
    assert (await client.get("/models", headers=show(token))).status_code == 200


@pytest.mark.parametrize(
    "spoil",
    [
        lambda token: f"Bearer {token[:-1]}{'A' if token[-1] != 'A' else 'B'}",
        lambda token: f"Bearer {token.replace('dk_', 'dk-')}",
        lambda token: f"Bearer dk_{'0' * 12}_{token.rpartition('_')[2]}",
        lambda token: f"Bearer {token}x",
        lambda token: f"Digest {token}",
        lambda token: token,
        lambda token: "Bearer",
        lambda token: "Bearer \u00e9",
        lambda token: "Basic !!!",
        lambda token: "Basic /w==",
        lambda token: "",
    ],
)
async def test_anything_else_is_no_key(client: httpx.AsyncClient, queue: JobQueue, spoil: Callable[[str], str]) -> None:
    token = (await bearer(queue))["Authorization"].removeprefix("Bearer ")
    reply = await client.get("/models", headers={"Authorization": spoil(token).encode("latin-1")})
    assert is_refused(reply, 401, "unauthorized")


async def test_an_unknown_and_a_wrong_key_are_answered_alike(client: httpx.AsyncClient, queue: JobQueue) -> None:
    headers = await bearer(queue)
    wrong = await client.get("/models", headers={"Authorization": headers["Authorization"][:-3] + "xxx"})
    unknown = await client.get("/models", headers={"Authorization": f"Bearer dk_{'0' * 12}_{'x' * 43}"})
    assert wrong.content == unknown.content


async def test_a_revoked_key_is_refused_within_two_seconds(client: httpx.AsyncClient, queue: JobQueue) -> None:
    headers = await bearer(queue)
    assert (await client.get("/models", headers=headers)).status_code == 200
    ((key, used_at_ms),) = await queue.api_keys.all()
    assert used_at_ms is not None
    assert abs(used_at_ms / 1000 - time.time()) < 60
    assert await queue.api_keys.revoke(key.id)
    assert CACHE_S < 2
    await eventually(lambda: is_closed(client, headers))
    assert not await queue.api_keys.revoke(key.id)
    assert await queue.api_keys.all() == []


async def test_a_key_ends_at_its_time_also_in_a_process_that_knows_it(
    client: httpx.AsyncClient, queue: JobQueue
) -> None:
    headers = await bearer(queue, expires_at_ms=int(time.time() * 1000) + 1500)
    assert (await client.get("/models", headers=headers)).status_code == 200
    await eventually(lambda: is_closed(client, headers))


async def test_redis_never_holds_a_secret(client: httpx.AsyncClient, queue: JobQueue) -> None:
    headers = await bearer(queue)
    await client.get("/models", headers=headers)
    stored = await queue._connection.command("HGETALL", queue._connection.keys.api_keys)
    secret = headers["Authorization"].rpartition("_")[2].encode()
    assert stored
    assert all(secret not in name + value for name, value in stored.items())


async def test_a_key_costs_no_round_trip_while_it_is_fresh(
    client: httpx.AsyncClient, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = await bearer(queue)
    monkeypatch.setattr("darkroom.queue.api_keys.CACHE_S", 60.0)
    await client.get("/models", headers=headers)

    async def num_commands() -> int:
        reply = await queue._connection.command("INFO", "commandstats")
        return int(reply.get("cmdstat_hget", {"calls": 0})["calls"])

    before = await num_commands()
    for _ in range(5):
        assert (await client.get("/models", headers=headers)).status_code == 200
    assert await num_commands() == before


async def test_while_redis_is_away_a_key_cannot_be_told_from_another(settings: Settings) -> None:
    async with in_process(settings.model_copy(update={"redis_url": "unix:///nowhere/redis.sock"})) as client:
        reply = await client.get("/models", headers={"Authorization": f"Bearer dk_{'0' * 12}_{'x' * 43}"})
        assert is_refused(reply, 503, "queue_unavailable")
        assert (await client.get("/health/live")).status_code == 200


async def test_a_surface_writes_its_errors_in_its_own_form(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(problems.SHAPES, "/generate", lambda problem: JSONResponse({"error": problem.code}, 401))
    reply = await client.post("/generate", json=FOX)
    assert (reply.status_code, reply.json()) == (401, {"error": "unauthorized"})
    assert is_refused(await client.get("/models"), 401, "unauthorized")


async def test_only_somebody_who_opens_an_address_is_asked_for_a_password(client: httpx.AsyncClient) -> None:
    """Were Basic offered to what the page fetches, the browser would ask beside the page."""
    opened = await client.get("/docs", headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert opened.headers["www-authenticate"].startswith("Basic ")
    assert (await client.get("/models", headers={"Accept": "*/*"})).headers["www-authenticate"].startswith("Bearer ")


# Scopes


async def test_a_scope_says_what_a_key_is_for(
    client: httpx.AsyncClient, queue: JobQueue, worker: InstantWorker
) -> None:
    read, generate, admin = [await bearer(queue, scope=scope) for scope in ("read", "generate", "admin")]
    assert is_refused(await client.post("/generate", json=FOX, headers=read), 403, "forbidden")
    for headers in (generate, admin):
        made = await client.post("/generate", json=FOX, headers=headers)
        assert made.status_code == 200
        job = f"/jobs/{made.json()['job_id']}"
        assert (await client.get(job, headers=read)).status_code == 200
        assert is_refused(await client.delete(job, headers=read), 403, "forbidden")
    for headers, status in ((read, 403), (generate, 403), (admin, 200)):
        assert (await client.get("/metrics", headers=headers)).status_code == status


async def test_a_key_may_be_bound_to_lower_classes(
    client: httpx.AsyncClient, queue: JobQueue, worker: InstantWorker
) -> None:
    headers = await bearer(queue, max_priority=Priority.NORMAL)
    assert (await client.post("/generate", json=FOX, headers=headers)).status_code == 200
    reply = await client.post("/generate", json={**FOX, "priority": "high"}, headers=headers)
    assert is_refused(reply, 422, "invalid_request")
    assert reply.json()["errors"][0]["accepted"] == "one of low, normal with this key"


# Ownership


async def test_a_tenant_meets_another_ones_jobs_as_if_there_were_none(
    client: httpx.AsyncClient, queue: JobQueue, worker: InstantWorker
) -> None:
    ann, bob, root = await bearer(queue, "ann"), await bearer(queue, "bob"), await bearer(queue, "root", "admin")
    second_of_ann = await bearer(queue, "ann", "read")
    made = (await client.post("/generate", json=FOX, headers=ann)).json()
    url = f"/jobs/{made['job_id']}"
    missing = f"/jobs/{'0' * 26}"
    for path in ("", "/images/0", "/images/7", "/events"):
        for method in ("GET", "DELETE") if not path else ("GET",):
            theirs = await client.request(method, url + path, headers=bob)
            none = await client.request(method, missing + path, headers=bob)
            assert is_refused(theirs, 404, "job_not_found")
            assert theirs.text.replace(made["job_id"], "0" * 26) == none.text
            assert set(theirs.headers) == set(none.headers)
    for headers in (ann, second_of_ann, root):
        assert (await client.get(url, headers=headers)).json()["state"] == "succeeded"
        assert (await client.get(f"{url}/images/0", headers=headers)).status_code == 200
        assert "succeeded" in (await client.get(f"{url}/events", headers=headers)).text


async def test_a_tenant_cannot_cancel_what_another_waits_for(client: httpx.AsyncClient, queue: JobQueue) -> None:
    await queue.register("idle", [card()])
    ann, bob, root = await bearer(queue, "ann"), await bearer(queue, "bob"), await bearer(queue, "root", "admin")
    urls = [
        (await client.post("/generate", json={**FOX, "mode": "async"}, headers=ann)).headers["location"]
        for _ in range(2)
    ]
    for url in urls:
        await client.delete(url, headers=bob)
        assert (await client.get(url, headers=ann)).json()["state"] == "queued"
    assert (await client.delete(urls[0], headers=ann)).json()["state"] == "cancelled"
    assert (await client.delete(urls[1], headers=root)).json()["state"] == "cancelled"


async def test_a_job_waits_with_the_weight_of_its_key(client: httpx.AsyncClient, queue: JobQueue) -> None:
    await queue.register("idle", [card()])
    reply = await client.post("/generate", json={**FOX, "mode": "async"}, headers=await bearer(queue, weight=3.0))
    record = queue._connection.keys.job(reply.json()["job_id"])
    assert await queue._connection.command("HMGET", record, "tenant", "weight") == [b"ann", b"3.0"]


async def test_two_tenants_may_choose_the_same_idempotency_key(
    client: httpx.AsyncClient, queue: JobQueue, worker: InstantWorker
) -> None:
    ids = []
    for tenant, body in (("ann", FOX), ("bob", {"prompt": "an owl"}), ("ann", FOX)):
        headers = {**await bearer(queue, tenant), "Idempotency-Key": "1"}
        reply = await client.post("/generate", json=body, headers=headers)
        assert reply.status_code == 200
        ids.append(reply.json()["job_id"])
    assert ids[0] == ids[2] != ids[1]


async def test_where_no_keys_are_asked_for_everybody_is_the_same_tenant(settings: Settings, queue: JobQueue) -> None:
    await queue.register("idle", [card()])
    async with in_process(settings.model_copy(update={"auth": "off"}), queue) as client:
        reply = await client.post("/generate", json={**FOX, "mode": "async"}, headers={"Authorization": "Bearer x"})
        assert reply.status_code == 202
    assert (await queue.status(reply.json()["job_id"])).job.tenant == "default"


# Limits


async def test_a_key_may_call_as_often_as_its_rate_says(
    client: httpx.AsyncClient, queue: JobQueue, worker: InstantWorker
) -> None:
    headers = await bearer(queue, rate=Rate(count=60, period_s=60, burst=2))
    first = await client.post("/generate", json=FOX, headers=headers)
    assert first.headers["ratelimit-policy"] == '"calls";q=60;w=60'
    assert first.headers["ratelimit"] == '"calls";r=1;t=1'
    # A call that is wrong was a call.
    second = await client.post("/generate", content=b"{", headers={**headers, "Content-Type": "application/json"})
    assert second.status_code == 400
    assert second.headers["ratelimit"].startswith('"calls";r=0;')
    third = await client.post("/generate", json=FOX, headers=headers)
    assert is_refused(third, 429, "rate_limited")
    assert third.headers["retry-after"] == "1"
    assert third.headers["ratelimit"].startswith('"calls";r=0;')
    # Looking is free, and others are not concerned.
    assert (await client.get(f"/jobs/{first.json()['job_id']}", headers=headers)).status_code == 200
    assert (await client.post("/generate", json=FOX, headers=await bearer(queue, "bob"))).status_code == 200


async def test_a_refused_call_may_come_when_it_was_told_to(queue: JobQueue) -> None:
    """An hour passes by moving what is kept of the rate, a time on Redis' clock, as far back."""
    rate, minute_us = Rate(count=1, period_s=3600, burst=3), 60 * 10**6
    taken = [await queue.api_keys.take("k", rate) for _ in range(4)]
    assert [one.is_allowed for one in taken] == [True, True, True, False]
    assert [one.remaining for one in taken] == [2, 1, 0, 0]
    retry_us = round(taken[3].retry_after_s * 1e6)
    assert minute_us < retry_us <= 60 * minute_us
    command, name = queue._connection.command, f"{queue._connection.keys.prefix}rate:k"
    assert 0 < await command("PTTL", name) <= 3 * 3600 * 1000
    whole_us = int(await command("GET", name))
    await command("SET", name, whole_us - retry_us + minute_us)
    assert not (await queue.api_keys.take("k", rate)).is_allowed
    await command("SET", name, whole_us - retry_us)
    assert (await queue.api_keys.take("k", rate)).is_allowed


async def budget(queue: JobQueue) -> dict[bytes, bytes]:
    held: dict[bytes, bytes] = await queue._connection.command("HGETALL", f"{queue._connection.keys.prefix}budget")
    return held


async def test_a_key_may_have_so_much_unfinished_and_no_more(client: httpx.AsyncClient, queue: JobQueue) -> None:
    await queue.register("idle", [card()])
    headers = await bearer(queue, max_cost=2 * FOX_COST)
    waiting = {**FOX, "mode": "async"}
    urls = [
        (await client.post("/generate", json=waiting, headers={**headers, "Idempotency-Key": str(index)})).headers[
            "location"
        ]
        for index in range(2)
    ]
    refused = await client.post("/generate", json=waiting, headers=headers)
    assert is_refused(refused, 429, "budget_exceeded")
    assert refused.json()["detail"] == (
        f"this key's unfinished jobs cost {2 * FOX_COST}; {FOX_COST} more is above its {2 * FOX_COST}"
    )
    assert int(refused.headers["retry-after"]) >= 1
    # A repeated call pays nothing, and others have budgets of their own.
    again = await client.post("/generate", json=waiting, headers={**headers, "Idempotency-Key": "0"})
    assert again.headers["location"] == urls[0]
    assert (await client.post("/generate", json=waiting, headers=await bearer(queue, "bob"))).status_code == 202
    await client.delete(urls[0], headers=headers)
    assert (await client.post("/generate", json=waiting, headers=headers)).status_code == 202


async def test_a_job_that_no_budget_could_ever_hold_is_not_to_be_tried_again(
    client: httpx.AsyncClient, queue: JobQueue
) -> None:
    await queue.register("idle", [card()])
    headers = await bearer(queue, max_cost=FOX_COST)
    reply = await client.post("/generate", json={**FOX, "num_images_per_prompt": 2}, headers=headers)
    assert is_refused(reply, 422, "invalid_request")
    assert reply.json()["errors"][0]["field"] == "cost"


async def test_every_end_of_a_job_gives_its_cost_back_once(settings: Settings, queue: JobQueue) -> None:
    """Succeeded, failed, cancelled (waiting and running), expired, dead letter, redelivered, and a damaged record."""
    await queue.register("w1", [card()])
    connection = queue._connection

    async def enqueue(**more: Any) -> str:
        async with in_process(settings, queue) as client:
            body = {**FOX, "mode": "async", **more}
            return str((await client.post("/generate", json=body, headers=headers)).json()["job_id"])

    async def lose(job_id: str) -> None:
        await end_lease(queue, (await queue.status(job_id)).job)
        await queue.reap()

    headers = await bearer(queue, max_cost=100 * FOX_COST)
    jobs = [await enqueue() for _ in range(6)]
    late = await enqueue(deadline_s=0.001)
    held = await budget(queue)
    assert list(held.values()) == [str(7 * FOX_COST).encode()]
    claimed = {job.id: job for job in await queue.claim("w1", ["test-world"], 5, 100)}
    assert set(claimed) == set(jobs[:5])
    assert await budget(queue) == held
    done, failed, cancelled, lost, damaged, waiting = jobs

    assert await queue.fail("w1", claimed[failed], Failure(code="non_finite", message="NaN"))
    await queue.cancel(cancelled)
    assert await queue.acknowledge_cancel("w1", claimed[cancelled])
    await queue.cancel(waiting)
    await queue.cancel(waiting)
    while (await queue.status(late)).state != "expired":
        await queue.reap()
    for _ in range(3):
        await lose(lost)
        await queue.claim("w1", ["test-world"], 1, 100)
    assert (await queue.status(lost)).failure.code == "dead_letter"  # type: ignore[union-attr]
    await connection.command("HSET", connection.keys.job(damaged), "rank", "nonsense")
    await lose(damaged)
    assert list((await budget(queue)).values()) == [str(FOX_COST).encode()]
    for _ in range(2):
        assert await queue.fail("w1", claimed[done], Failure(code="job_failed", message="at last"))
    assert await budget(queue) == {}


async def test_a_burst_of_calls_never_overdraws_a_budget(settings: Settings, queue: JobQueue) -> None:
    await queue.register("idle", [card()])
    headers = await bearer(queue, max_cost=5 * FOX_COST)
    async with served(settings, queue) as site:
        replies = await asyncio.gather(
            *(site.client.post("/generate", json={**FOX, "mode": "async"}, headers=headers) for _ in range(20))
        )
    assert sorted(reply.status_code for reply in replies) == [202] * 5 + [429] * 15
    assert list((await budget(queue)).values()) == [str(5 * FOX_COST).encode()]


# The door


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1", "darkroom.example"])
def test_other_machines_are_not_let_in_without_keys_unless_somebody_says_so(host: str) -> None:
    settings = load_settings(host=host)
    with pytest.raises(ConfigError, match=r"DARKROOM_AUTH=keys .* DARKROOM_ALLOW_ANONYMOUS=true"):
        settings.refuse_open_door()
    load_settings(host=host, auth="keys").refuse_open_door()
    load_settings(host=host, allow_anonymous=True).refuse_open_door()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_this_machine_needs_no_keys(host: str) -> None:
    load_settings(host=host).refuse_open_door()


async def test_up_refuses_before_it_starts_anything(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="DARKROOM_ALLOW_ANONYMOUS"):
        await run_up(load_settings(host="0.0.0.0", data_dir=tmp_path / "data"), [], None)
    assert not (tmp_path / "data").exists()


def test_the_first_request_shows_the_key_of_the_environment() -> None:
    assert '-H "authorization: Bearer $DARKROOM_API_KEY"' in first_request("http://x", [card()], asks_for_keys=True)
    assert "authorization" not in first_request("http://x", [card()])


# darkroom keys


async def darkroom(*arguments: str) -> tuple[int, str, str]:
    process = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-m", "darkroom", *arguments], capture_output=True, text=True, timeout=60
    )
    return process.returncode, process.stdout, process.stderr


async def test_a_key_made_on_the_command_line_opens_a_server_and_revoking_it_closes_it(
    settings: Settings, queue: JobQueue, worker: InstantWorker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DARKROOM_REDIS_URL", str(settings.redis_url))
    monkeypatch.setenv("DARKROOM_SHARD", settings.shard)
    options = "--tenant lab --weight 2 --rate 30/m --burst 5 --max-cost 1000000 --priority normal --expires 30d"
    code, out, err = await darkroom("keys", "create", "--name", "notebook", *options.split())
    token = out.strip()
    assert code == 0
    assert err.endswith("of tenant lab; it is shown this once:\n")
    _, listed, _ = await darkroom("keys", "list")
    assert token not in listed
    head, row = listed.splitlines()
    assert re.split("  +", head) == [
        "ID", "NAME", "TENANT", "SCOPES", "WEIGHT", "RATE", "MAX COST", "PRIORITY", "LAST USED", "EXPIRES",
    ]  # fmt: skip
    assert "notebook  lab     generate  2       30 in 60 s, 5 at once  1000000   normal    never" in row
    key_id = row.split()[0]
    assert token.startswith(f"dk_{key_id}_")
    monkeypatch.setenv("DARKROOM_API_KEY", token)
    async with served(settings, queue) as site:
        url = f"http://127.0.0.1:{site.port}"
        picture = tmp_path / "fox.png"
        assert (await darkroom("generate", "a fox", "-o", str(picture), "--url", url))[0] == 0
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert "test-world" in (await darkroom("models", "--url", url))[1]
        assert (await darkroom("keys", "revoke", key_id))[0] == 0
        await eventually(lambda: is_closed(site.client, {"X-API-Key": token}))
        code, _, err = await darkroom("models", "--url", url)
    assert (code, "no such key" in err) == (2, True)
    assert (await darkroom("keys", "revoke", key_id))[0] == 2


async def test_a_data_directory_that_is_named_comes_before_the_redis_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DARKROOM_REDIS_URL", "redis://127.0.0.1:1")
    there = ("--data-dir", str(tmp_path))
    code, out, _ = await darkroom("keys", "create", "--name", "here", *there)
    assert code == 0
    key_id = out.split("_")[1]
    assert (await darkroom("keys", "list", *there))[1].splitlines()[1].split()[:2] == [key_id, "here"]
    assert (await darkroom("keys", "revoke", key_id, *there))[0] == 0
    code, _, err = await darkroom("keys", "list", *there, "--redis-url", "redis://127.0.0.1:1")
    assert (code, "the queue cannot be reached" in err) == (1, True)


async def test_keys_of_a_data_directory_are_made_whether_or_not_its_server_runs(tmp_path: Path) -> None:
    there = ("--data-dir", str(tmp_path))
    code, _, err = await darkroom("keys", "create", "--name", "before", *there)
    assert (code, len(err.splitlines())) == (0, 1)
    with EmbeddedRedis(Settings(data_dir=tmp_path, redis_url=None)):
        assert (await darkroom("keys", "create", "--name", "during", *there))[0] == 0
        _, listed, _ = await darkroom("keys", "list", *there)
    assert [row.split()[1] for row in listed.splitlines()[1:]] == ["before", "during"]
    assert (await darkroom("keys", "list", *there))[1] == listed


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--name", "a b"),
        ("--tenant", "x/y"),
        ("--scope", "root"),
        ("--rate", "60"),
        ("--rate", "0/m"),
        ("--burst", "3"),
        ("--expires", "soon"),
        ("--expires", "2020-01-31"),
    ],
)
async def test_an_option_that_says_nothing_sensible_is_named(tmp_path: Path, option: str, value: str) -> None:
    from darkroom.errors import InvalidRequest
    from darkroom.keys import create

    options: dict[str, Any] = {
        "name": "a", "tenant": None, "scopes": ["read"], "weight": 1.0, "rate": None, "burst": None,
        "max_cost": None, "priority": Priority.HIGH, "expires": None,
    }  # fmt: skip
    given: Any = [value] if option == "--scope" else int(value) if option == "--burst" else value
    options["scopes" if option == "--scope" else option.removeprefix("--")] = given
    with pytest.raises(InvalidRequest, match=f"^{option}: "):
        await create(load_settings(data_dir=tmp_path, redis_url="redis://127.0.0.1:1"), **options)
