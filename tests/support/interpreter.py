"""Where Triton's interpreter computes otherwise than a device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from darkroom_kernels.backend import interprets


@pytest.fixture
def bf16_as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 is rounded to the nearest and multiplied by value.

    The interpreter of Triton 3.9 cuts bits off fp32 values, and takes the bits of bf16 ones for whole numbers in a dot.
    """
    if not interprets():
        return
    from triton import language
    from triton.runtime import interpreter

    convert: Any = interpreter._convert_float
    dot: Any = interpreter.InterpreterBuilder.create_dot

    def rounded(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) != (language.float32, language.bfloat16):
            return convert(values, source, target, mode)
        floats = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
        return floats.bfloat16().view(torch.uint16).numpy().reshape(np.shape(values))

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != language.bfloat16:
            return handle
        floats = torch.from_numpy(np.ascontiguousarray(handle.data)).view(torch.bfloat16).float()
        return interpreter.TensorHandle(floats.numpy(), language.float32)

    def product(builder: Any, a: Any, b: Any, *more: Any) -> Any:
        return dot(builder, widened(a), widened(b), *more)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", product)
