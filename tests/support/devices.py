"""The device that kernel tests run on: a GPU by its marker, Triton's interpreter on CPU tensors where there is none."""

from __future__ import annotations

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()

KERNEL_DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(HAS_GPU, reason="make test-gpu runs this on the device")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def interpret_without_a_gpu() -> None:
    """Turn Triton's interpreter on where there is no GPU. Triton reads the variable when a kernel is defined."""
    if not HAS_GPU:
        os.environ["TRITON_INTERPRET"] = "1"
