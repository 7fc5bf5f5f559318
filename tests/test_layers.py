"""Weights laid out for oneDNN: right at every size, and held no more often than there are layouts."""

from __future__ import annotations

import pytest
import torch
from darkroom.diffusion import layers
from darkroom.diffusion.layers import Conv2d, Form, load_onednn
from torch import nn

pytestmark = pytest.mark.skipif(load_onednn() is None, reason="this build of torch has no oneDNN")

SIZES = [(8, 8), (16, 16), (32, 32), (12, 20), (64, 64), (24, 16), (8, 8), (40, 40)]


def convolution(channels: int, dtype: torch.dtype, *, stride: int = 1) -> tuple[Conv2d, nn.Conv2d]:
    """Ours, prepared, and torch's, with the same weights."""
    theirs = nn.Conv2d(channels, channels, 3, stride=stride, padding=1).requires_grad_(False).to(dtype)
    ours = Conv2d(channels, channels, stride=stride)
    ours.load_state_dict({name: value.clone() for name, value in theirs.state_dict().items()}, assign=True)
    ours.prepare(Form(load_onednn()))
    return ours, theirs


def num_held(layer: Conv2d) -> int:
    """Copies of the weight. Their size is the processor's business: some layouts are padded."""
    held = {id(weight) for weight in (*layer._packed.values(), *layer._layouts.values())}
    return len(held) + (layer._weight is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_many_sizes_share_a_weight_where_its_layout_is_the_same(dtype: torch.dtype, stride: int) -> None:
    ours, theirs = convolution(64, dtype, stride=stride)
    for size in SIZES:
        x = torch.randn(2, 64, *size, dtype=dtype).contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(ours(x), theirs(x), atol=0.02, rtol=0.02)
    # A processor without bf16 keeps such a weight as it is.
    is_packed = ours._onednn is not None
    assert is_packed or dtype is torch.bfloat16
    assert set(ours._packed) == ({torch.Size(size) for size in SIZES} if is_packed else set())
    assert num_held(ours) <= layers.MAX_LAYOUTS


def test_layouts_beyond_the_limit_make_room_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should every size want a layout of its own, the oldest goes, and results stay right."""
    monkeypatch.setattr(layers, "LAYOUT_PADDING", slice(0, 0))
    ours, theirs = convolution(64, torch.float32)
    for size in SIZES * 2:
        x = torch.randn(1, 64, *size).contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-3, rtol=1e-3)
        assert num_held(ours) <= layers.MAX_LAYOUTS


def test_the_number_of_sizes_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "MAX_SIZES", 3)
    ours, _ = convolution(16, torch.float32)
    for size in range(4, 14):
        ours(torch.randn(1, 16, size, size).contiguous(memory_format=torch.channels_last))
        assert len(ours._packed) <= 3
