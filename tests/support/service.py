"""Fixtures of a service with a worker of known answers, for test files that name this one in `pytest_plugins`."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest_asyncio
from darkroom.config import Settings
from darkroom.queue import JobQueue

from tests.support.http import Served, in_process, served
from tests.support.instant_worker import InstantWorker


@pytest_asyncio.fixture
async def worker(queue: JobQueue) -> AsyncIterator[InstantWorker]:
    async with InstantWorker(queue).running() as worker:
        yield worker


@pytest_asyncio.fixture
async def client(settings: Settings, queue: JobQueue, worker: InstantWorker) -> AsyncIterator[httpx.AsyncClient]:
    async with in_process(settings, queue) as client:
        yield client


@pytest_asyncio.fixture
async def site(settings: Settings, queue: JobQueue, worker: InstantWorker) -> AsyncIterator[Served]:
    async with served(settings, queue) as site:
        yield site
