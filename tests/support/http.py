"""Ways to reach the API in tests: in process, and over a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx
import uvicorn
from darkroom.api.app import create_app
from darkroom.api.server import DrainingServer, bind
from darkroom.config import Settings
from darkroom.queue import JobQueue
from fastapi import FastAPI


@contextlib.asynccontextmanager
async def in_process(settings: Settings, queue: JobQueue | None = None) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application in this process, lifespan included. Replies come whole, not as streams."""
    app = create_app(settings, queue)
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://darkroom") as client,
    ):
        yield client


@dataclass
class Served:
    """A running server: its client, its application, and how to stop it."""

    client: httpx.AsyncClient
    app: FastAPI
    server: DrainingServer
    port: int
    finished: asyncio.Task[None]


@contextlib.asynccontextmanager
async def served(settings: Settings, queue: JobQueue | None = None) -> AsyncIterator[Served]:
    """The application behind real uvicorn on a free loopback port, in this event loop."""
    app = create_app(settings, queue)
    config = uvicorn.Config(
        app, log_config=None, log_level=logging.WARNING, access_log=False, ws="none", timeout_graceful_shutdown=1
    )
    listening = asyncio.Event()
    server = DrainingServer(config, app.state.service, listening.set)
    with contextlib.closing(bind("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        finished = asyncio.ensure_future(server.serve(sockets=[listener]))
        await listening.wait()
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            try:
                yield Served(client, app, server, port, finished)
            finally:
                await client.aclose()
                server.should_exit = True
                await finished
