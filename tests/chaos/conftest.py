"""One small model for all cases."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from darkroom.diffusion.loader import DiffusionModel, load_model

from tests.support.tiny_models import write_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiffusionModel]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_model(write_tiny_model(tmp_path_factory.mktemp("tiny-model"), "sd1", seed=5))
    torch.set_num_threads(threads)
