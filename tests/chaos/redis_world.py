"""An API and a worker, each on a link of its own to a real redis-server that a test may do anything to."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from darkroom.config import Settings
from darkroom.diffusion.loader import DiffusionModel
from darkroom.engine.engine import Engine
from darkroom.jobs import JobState, JobStatus
from darkroom.queue import JobQueue
from darkroom.worker.main import _connect
from darkroom.worker.worker import Worker

from tests.chaos.link import Link
from tests.chaos.verdict import Verdict, come_to_rest, judge
from tests.support.http import served
from tests.support.redis_servers import RedisServer

SETTINGS: dict[str, Any] = {
    "lease_s": 1.5,
    "checkpoint_interval_s": 0.3,
    "batching": "reproducible",
    "reproducible_rows": 4,
    "num_threads": 1,
    "encode_threads": 1,
    "result_ttl_s": 7200,
    "job_ttl_s": 7200,
}


@dataclass
class World:
    """`look` is a way to the server that no link breaks; it goes where `server` is."""

    settings: Settings
    server: RedisServer
    api: Link
    worker: Link
    client: httpx.AsyncClient
    look: JobQueue
    gate: threading.Event

    async def submit(self, key: str | None = None, **fields: Any) -> httpx.Response:
        headers = {} if key is None else {"Idempotency-Key": key}
        body = {"prompt": "a cat", "seed": 7, "sampler": "euler", "num_inference_steps": 3, "mode": "async", **fields}
        return await self.client.post("/generate", json=body, headers=headers)

    async def accept(self, count: int, **fields: Any) -> list[str]:
        """Have that many jobs accepted; their ids."""
        replies = [await self.submit(**fields) for _ in range(count)]
        assert {reply.status_code for reply in replies} <= {202}, [reply.text for reply in replies]
        return [reply.json()["job_id"] for reply in replies]

    async def accept_soon(self, **fields: Any) -> str:
        """Ask until a job is accepted: what a client does that is answered 503. With one key, so that it is one job."""
        reply: httpx.Response = await soon(lambda: self._accepted(**fields))
        return str(reply.json()["job_id"])

    async def _accepted(self, **fields: Any) -> httpx.Response | None:
        reply = await self.submit(**fields)
        assert reply.status_code in (202, 503), reply.text
        return reply if reply.status_code == 202 else None

    async def refused(self, accepted: list[str]) -> httpx.Response:
        """Ask until a job is refused; those that are accepted before are added to `accepted`."""
        reply: httpx.Response = await soon(lambda: self._refused(accepted))
        return reply

    async def _refused(self, accepted: list[str]) -> httpx.Response | None:
        reply = await self.submit()
        if reply.status_code == 202:
            accepted.append(reply.json()["job_id"])
        return reply if reply.status_code == 503 else None

    async def state(self, job_id: str) -> str:
        """The state by the API: a `JobState`, or the code of the problem."""
        reply = (await self.client.get(f"/jobs/{job_id}")).json()
        return str(reply.get("state") or reply["code"])

    async def is_ready(self) -> bool:
        return (await self.client.get("/health/ready")).status_code == 200

    async def ends(self, job_id: str) -> JobStatus:
        status = await self.look.wait(job_id, 30)
        assert status.state.is_terminal, f"{job_id} is still {status.state.value}"
        return status

    async def runs(self, job_id: str) -> None:
        async def is_running() -> bool:
            return (await self.look.status(job_id)).state is JobState.RUNNING

        await soon(is_running)

    async def look_at(self, server: RedisServer) -> None:
        """From now on `look` is for this server."""
        await self.look.close()
        self.server, self.look = server, await JobQueue.connect(self.settings, server.url)

    async def verdict(self, accepted: list[str]) -> Verdict:
        await come_to_rest(self.look, 60)
        return await judge(self.look, self.settings, accepted)


async def soon(found: Callable[[], Awaitable[Any]], timeout_s: float = 30.0) -> Any:
    """Ask until the answer is true, and return it."""
    ends_at = time.monotonic() + timeout_s
    while not (value := await found()):
        assert time.monotonic() < ends_at, "it never became true"
        await asyncio.sleep(0.05)
    return value


@contextlib.asynccontextmanager
async def world(
    model: DiffusionModel, server: RedisServer, directory: Path, *, num_workers: int = 1, **changes: Any
) -> AsyncIterator[World]:
    """Both processes' real code, in this process. Ticks stand still while the world's `gate` is closed."""
    settings = Settings(data_dir=directory, redis_url=server.url, shard="redis", **{**SETTINGS, **changes})
    gate = threading.Event()
    gate.set()

    def gated_engine(*arguments: Any, **keywords: Any) -> Engine:
        engine = Engine(*arguments, **keywords)
        tick = engine._tick

        def gated(*rest: Any) -> None:
            gate.wait(60)
            tick(*rest)

        engine._tick = gated  # type: ignore[method-assign, assignment]
        return engine

    async def work(link: Link, drain: asyncio.Event) -> None:
        queue = await _connect(settings, link.url)
        worker = Worker(settings, queue, functools.partial(gated_engine, {model.id: model}, settings))
        running = asyncio.create_task(worker.run())
        await asyncio.wait([running, asyncio.create_task(drain.wait())], return_when=asyncio.FIRST_COMPLETED)
        worker.drain()
        await asyncio.wait_for(running, 20)
        await queue.close()

    async with contextlib.AsyncExitStack() as stack:
        api_link = await stack.enter_async_context(Link(server.address).opened())
        worker_link = await stack.enter_async_context(Link(server.address).opened())
        drain = asyncio.Event()
        workers = [asyncio.create_task(work(worker_link, drain)) for _ in range(num_workers)]
        api = await stack.enter_async_context(served(settings.model_copy(update={"redis_url": api_link.url})))
        look = await JobQueue.connect(settings, server.url)
        all_ = World(settings, server, api_link, worker_link, api.client, look, gate)

        try:
            await soon(all_.is_ready)
            yield all_
        finally:
            gate.set()
            drain.set()
            await asyncio.gather(*workers)
            await all_.look.close()
