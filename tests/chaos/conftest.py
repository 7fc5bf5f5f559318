"""One model for all cases, and a stack of its own for each."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.chaos.stack import Stack, write_model


@pytest.fixture(scope="session")
def chaos_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("chaos-model"))


@pytest_asyncio.fixture
async def stack(chaos_model: Path, tmp_path: Path) -> AsyncIterator[Stack]:
    """A running redis-server and nothing else yet."""
    async with Stack(tmp_path / "stack", chaos_model) as stack:
        yield stack
