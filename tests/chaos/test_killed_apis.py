"""kill -9 and SIGTERM of the API, clients that come back, and clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from typing import Any

import httpx
import pytest
from darkroom.jobs import JobState

from tests.chaos import shims
from tests.chaos.calls import body, ended, picture, stepped, submit
from tests.chaos.stack import Member, Stack
from tests.chaos.verdict import wait_until

KEY = "the-same"


async def test_an_api_killed_between_accepting_and_answering_has_accepted_once(stack: Stack) -> None:
    first, second = await stack.start("api-0"), await stack.start("api-1")
    await stack.start("worker-0")
    trap = first.link.trap(stack.script("enqueue"), "reply", "hold")
    async with stack.client(first) as client, stack.client(second) as other:
        asking = asyncio.ensure_future(submit(client, KEY))
        await asyncio.wait_for(trap.sprung.wait(), 20)
        await stack.kill(first)
        with pytest.raises(httpx.TransportError):
            await asking
        assert (await stack.queue.stats()).counters["accepted"] == 1
        job_id = await submit(other, KEY)
    assert (await ended(stack.queue, job_id)).state is JobState.SUCCEEDED
    assert (verdict := await stack.verdict([job_id])), verdict.wrong
    assert verdict.accepted == 1


async def test_an_enqueue_whose_reply_is_lost_is_sent_again_and_accepted_once(stack: Stack) -> None:
    """Without an Idempotency-Key: the API's own repetition is what must not double."""
    api = await stack.start("api-0")
    await stack.start("worker-0")
    trap = api.link.trap(stack.script("enqueue"), "reply", "reset")
    async with stack.client(api) as client:
        job_id = await submit(client)
    assert trap.sprung.is_set()
    assert (await ended(stack.queue, job_id)).state is JobState.SUCCEEDED
    assert (verdict := await stack.verdict([job_id])), verdict.wrong
    assert verdict.accepted == 1


async def read_events(
    client: httpx.AsyncClient, job_id: str, seen: list[tuple[str, str]], after: str | None = None
) -> None:
    """Append (id, event) of the job's stream to `seen` until it ends. Raises `httpx.TransportError` when it breaks."""
    headers = {} if after is None else {"Last-Event-ID": after}
    async with client.stream("GET", f"/jobs/{job_id}/events", headers=headers) as reply:
        assert reply.status_code == 200
        name = ""
        async for line in reply.aiter_lines():
            field, _, value = line.partition(": ")
            if field == "event":
                name = value
            elif field == "id":
                seen.append((value, name))


async def test_waits_and_streams_of_a_killed_api_are_taken_up_at_another(stack: Stack) -> None:
    first, second = await stack.start("api-0"), await stack.start("api-1")
    await stack.start("worker-0")
    seen: list[tuple[str, str]] = []
    async with stack.client(first) as client, stack.client(second) as other:
        request = body(mode="wait", num_inference_steps=200)
        headers = {"Idempotency-Key": KEY}
        waiting = asyncio.ensure_future(client.post("/generate", json=request, headers=headers))
        (job_id,) = await wait_until(lambda: [line["job_id"] for line in first.events("job_accepted")], what="the job")
        streaming = asyncio.ensure_future(read_events(client, job_id, seen))
        await wait_until(lambda: len(seen) >= 4, what="a stream under way")
        await stack.kill(first)
        for broken in (waiting, streaming):
            with pytest.raises(httpx.TransportError):
                await broken
        num_seen = len(seen)
        again, _ = await asyncio.gather(
            other.post("/generate", json=request, headers=headers), read_events(other, job_id, seen, seen[-1][0])
        )
    assert (again.status_code, again.json()["job_id"]) == (200, job_id)
    assert len(seen) > num_seen
    ids = [tuple(map(int, event_id.split("-"))) for event_id, _ in seen]
    assert ids == sorted(set(ids)), "nothing comes twice and nothing is left out"
    assert [name for _, name in seen if name != "progress"] == ["queued", "running", "succeeded"]
    assert (verdict := await stack.verdict([job_id])), verdict.wrong


async def hang_up(api: Member, sent: bytes) -> None:
    """Send bytes and leave without a word more."""
    _, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(api.url).port)
    writer.write(sent)
    await writer.drain()
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


def raw_request(**fields: Any) -> bytes:
    content = json.dumps({"prompt": "a cat", "mode": "wait", **fields}).encode()
    return b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (
        len(content),
        content,
    )


async def test_clients_that_leave_take_their_jobs_along_and_no_others(stack: Stack) -> None:
    """One leaves in the middle of its body, one while its job waits, one while it runs."""
    api = await stack.start("api-0")
    await stack.start("worker-0")
    async with stack.client(api) as client:
        mate = await submit(client, num_inference_steps=120, guidance_scale=1.0)
        alone = await submit(client, num_inference_steps=120, guidance_scale=1.0)
        whole = await ended(stack.queue, alone)
        assert whole.state is JobState.SUCCEEDED

        await hang_up(api, raw_request()[:-5])
        accepted = (await stack.queue.stats()).counters["accepted"]
        assert accepted == 2

        mate = await submit(client, num_inference_steps=120, guidance_scale=1.0)
        _, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(api.url).port)
        writer.write(raw_request(num_inference_steps=200, guidance_scale=1.0))
        running = (await wait_until(lambda: api.events("job_accepted")[3:], what="the job"))[0]["job_id"]
        await stepped(stack.queue, running, 5)
        writer.close()
        assert (await ended(stack.queue, running)).state is JobState.CANCELLED

        crowd = [await submit(client, num_inference_steps=60, num_images_per_prompt=2) for _ in range(3)]
        _, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(api.url).port)
        writer.write(raw_request(num_inference_steps=200))
        waiting = (await wait_until(lambda: api.events("job_accepted")[7:], what="the job"))[0]["job_id"]
        writer.close()
        assert (await ended(stack.queue, waiting)).state is JobState.CANCELLED
    for job_id in (mate, *crowd):
        assert (await ended(stack.queue, job_id)).state is JobState.SUCCEEDED
    assert await picture(stack.queue, mate) == await picture(stack.queue, alone)
    assert (verdict := await stack.verdict([mate, alone, running, waiting, *crowd])), verdict.wrong


@pytest.mark.chaos
async def test_a_thousand_idle_connections_and_a_reader_of_a_byte_a_time_hold_nobody_up(stack: Stack) -> None:
    api = await stack.start("api-0")
    await stack.start("worker-0")
    port = httpx.URL(api.url).port
    assert port is not None
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(1000)]
    try:
        async with stack.client(api) as client:
            watched = await submit(client, num_inference_steps=100)
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
            writer.write(b"GET /jobs/%s/events HTTP/1.1\r\nHost: x\r\n\r\n" % watched.encode())
            assert await reader.readexactly(1) == b"H"
            job_id = await submit(client)
            assert (await ended(stack.queue, job_id)).state is JobState.SUCCEEDED
            assert (await ended(stack.queue, watched)).state is JobState.SUCCEEDED
            writer.close()
    finally:
        for connection in idle:
            connection.close()
    assert (verdict := await stack.verdict([watched, job_id])), verdict.wrong


@pytest.mark.parametrize("shim", [shims.one_hour_ahead, shims.one_hour_behind])
async def test_clocks_an_hour_off_change_no_deadline_and_no_lease(stack: Stack, shim: Any) -> None:
    api = await stack.start("api-0", prepare=shim)
    await stack.start("worker-0", prepare=shim)
    async with stack.client(api) as client:
        # Nothing is known of how long a job takes, so none is refused.
        missed = await submit(client, num_inference_steps=200, num_images_per_prompt=4, deadline_s=0.3)
        kept = await submit(client, deadline_s=60)
    assert (await ended(stack.queue, kept)).state is JobState.SUCCEEDED
    assert (await ended(stack.queue, missed)).state is JobState.EXPIRED
    assert (await stack.queue.status(kept)).job.attempt == 1
    assert (verdict := await stack.verdict([kept, missed])), verdict.wrong
