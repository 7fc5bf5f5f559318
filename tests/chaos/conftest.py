"""One model for all cases, and a stack of its own for each."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from darkroom.diffusion.loader import DiffusionModel, load_model

from tests.chaos.stack import Stack, write_model
from tests.support.tiny_models import write_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiffusionModel]:
    """For workers within this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_model(write_tiny_model(tmp_path_factory.mktemp("tiny-model"), "sd1", seed=5))
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def chaos_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For workers that are processes."""
    return write_model(tmp_path_factory.mktemp("chaos-model"))


@pytest_asyncio.fixture
async def stack(chaos_model: Path, tmp_path: Path) -> AsyncIterator[Stack]:
    """A running redis-server and nothing else yet."""
    async with Stack(tmp_path / "stack", chaos_model) as stack:
        yield stack
