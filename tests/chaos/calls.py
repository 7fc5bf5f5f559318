"""Small requests to a stack's API, for cases."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
from darkroom.jobs import JobStatus
from darkroom.queue import JobQueue

from tests.chaos.verdict import wait_until


def body(**fields: Any) -> dict[str, Any]:
    return {"prompt": "a cat", "seed": 7, "sampler": "euler", "mode": "async", **fields}


async def submit(client: httpx.AsyncClient, key: str | None = None, **fields: Any) -> str:
    """Have a job accepted and return its id."""
    headers = {} if key is None else {"Idempotency-Key": key}
    reply = await client.post("/generate", json=body(**fields), headers=headers)
    assert reply.status_code == 202, reply.text
    return str(reply.json()["job_id"])


async def ended(queue: JobQueue, job_id: str, timeout_s: float = 30.0) -> JobStatus:
    status = await queue.wait(job_id, timeout_s)
    assert status.state.is_terminal, f"{job_id} is still {status.state.value}"
    return status


async def stepped(queue: JobQueue, job_id: str, step: int, timeout_s: float = 30.0) -> None:
    """Wait until the job has told of this step in the attempt that runs now."""

    async def far_enough() -> bool:
        status = await queue.status(job_id)
        assert not status.state.is_terminal, f"{job_id} has ended as {status.state.value}"
        return status.state.value == "running" and status.step >= step

    await wait_until(far_enough, timeout_s, f"step {step} of {job_id}")


async def picture(queue: JobQueue, job_id: str) -> bytes:
    return (await queue.images(job_id))[0]


async def together(*calls: Any, timeout_s: float = 60.0) -> list[Any]:
    async with asyncio.timeout(timeout_s):
        return list(await asyncio.gather(*calls))
