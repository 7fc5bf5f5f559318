"""Where Triton's interpreter computes otherwise than a device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from darkroom_kernels.backend import interprets


@pytest.fixture
def rounds_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 becomes bf16 by rounding to the nearest, as on a device; the interpreter of Triton 3.9 cuts bits off."""
    if not interprets():
        return
    from triton import language
    from triton.runtime import interpreter

    convert: Any = interpreter._convert_float

    def rounded(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) != (language.float32, language.bfloat16):
            return convert(values, source, target, mode)
        floats = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
        return floats.bfloat16().view(torch.uint16).numpy().reshape(np.shape(values))

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
