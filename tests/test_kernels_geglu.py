"""GEGLU agrees with the fp32 reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from darkroom_kernels import geglu
from darkroom_kernels.geglu.reference import reference_geglu


def inputs(*shape: int, width: int = 12) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return torch.randn(*shape), torch.randn(2 * width, shape[-1]) / shape[-1] ** 0.5, torch.randn(2 * width)


@pytest.mark.parametrize("shape", [(2, 5, 8), (1, 1, 3), (7, 6), (4, 64, 32)], ids=str)
def test_it_equals_the_reference(shape: tuple[int, ...]) -> None:
    x, weight, bias = inputs(*shape)
    got = geglu(x, weight, bias)
    assert got.shape == (*shape[:-1], 12)
    torch.testing.assert_close(got, reference_geglu(x, weight, bias), rtol=1e-4, atol=1e-5)


def test_tokens_that_are_a_view_of_a_picture_need_no_copy() -> None:
    picture = torch.randn(2, 8, 3, 5).contiguous(memory_format=torch.channels_last)
    tokens = picture.permute(0, 2, 3, 1).flatten(1, 2)
    _, weight, bias = inputs(1, 8)
    torch.testing.assert_close(geglu(tokens, weight, bias), reference_geglu(tokens, weight, bias), rtol=1e-4, atol=1e-5)


def test_bf16_loses_no_more_than_pytorch_does() -> None:
    x, weight, bias = (value.bfloat16() for value in inputs(4, 64, 32))
    exact = reference_geglu(x.float(), weight.float(), bias.float())
    value, gate = F.linear(x, weight, bias).chunk(2, -1)
    budget = (value * F.gelu(gate) - exact).abs().max()
    assert (geglu(x, weight, bias) - exact).abs().max() <= budget * 1.01


def test_shapes_that_do_not_fit_are_named() -> None:
    x, weight, bias = inputs(2, 5, 8)
    with pytest.raises(ValueError, match=r"\[23, 8\]"):
        geglu(x, weight[:23], bias[:23])
