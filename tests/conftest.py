"""One real redis-server for all tests, and a fresh shard of it for each."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
import structlog
import torch
from darkroom.config import Settings
from darkroom.queue import EmbeddedRedis, JobQueue

from tests.support.devices import KERNEL_DEVICES, interpret_without_a_gpu

interpret_without_a_gpu()
# structlog's own way prints every local variable of a traceback, which takes a minute where those are networks.
structlog.configure(
    processors=[
        structlog.processors.add_log_level,
        structlog.dev.set_exc_info,
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback),
    ]
)

_shards = itertools.count()


@pytest.fixture(params=KERNEL_DEVICES)
def kernel_device(request: pytest.FixtureRequest) -> torch.device:
    """Where a Triton kernel is run: a GPU, or the CPU under the interpreter."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def embedded_redis() -> Iterator[EmbeddedRedis]:
    with (
        tempfile.TemporaryDirectory(prefix="darkroom-test-") as directory,
        EmbeddedRedis(Settings(data_dir=Path(directory), redis_url=None)) as server,
    ):
        yield server


@pytest.fixture(scope="session")
def redis_url(embedded_redis: EmbeddedRedis) -> str:
    return embedded_redis.url


@pytest.fixture
def settings(redis_url: str, tmp_path: Path) -> Settings:
    """Settings of a shard that no other test touches."""
    return Settings(data_dir=tmp_path, redis_url=redis_url, shard=f"test-{next(_shards)}")


@pytest_asyncio.fixture
async def queue(settings: Settings, redis_url: str) -> AsyncIterator[JobQueue]:
    queue = await JobQueue.connect(settings, redis_url)
    yield queue
    await queue.close()
