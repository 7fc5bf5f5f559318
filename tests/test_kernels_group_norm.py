"""Group norm agrees with the fp32 reference in every form, and keeps the memory format it was given."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from darkroom_kernels import group_norm
from darkroom_kernels.group_norm.reference import reference_group_norm

SHAPES = [(2, 8, 4, 4), (1, 6, 1, 1), (3, 12, 5, 7), (2, 64, 16, 16), (2, 192, 8, 8)]


def inputs(shape: tuple[int, ...], *, channels_last: bool) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    x = torch.randn(shape) * 2 + 3
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    return x, torch.randn(shape[1]), torch.randn(shape[1]), torch.randn(shape[:2])


def test_the_reference_is_pytorchs_group_norm() -> None:
    x, weight, bias, _ = inputs((3, 12, 5, 7), channels_last=False)
    expected = F.group_norm(x.double(), 4, weight.double(), bias.double(), 1e-5)
    torch.testing.assert_close(reference_group_norm(x, 4, weight, bias, 1e-5).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shifted", [False, True], ids=["plain", "shifted"])
@pytest.mark.parametrize("silu", [False, True], ids=["linear", "silu"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_form_equals_the_reference(
    shape: tuple[int, ...], channels_last: bool, silu: bool, shifted: bool
) -> None:
    x, weight, bias, shift = inputs(shape, channels_last=channels_last)
    before, groups = x.clone(), 2
    options = {"silu": silu, "shift": shift if shifted else None}
    got = group_norm(x, groups, weight, bias, 1e-5, **options)
    torch.testing.assert_close(
        got, reference_group_norm(x, groups, weight, bias, 1e-5, **options), rtol=1e-4, atol=1e-4
    )
    assert got.stride() == x.stride()
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bf16_loses_no_more_than_pytorch_does(shape: tuple[int, ...]) -> None:
    x, weight, bias, shift = (value.bfloat16() for value in inputs(shape, channels_last=True))
    exact = reference_group_norm(x.float(), 2, weight.float(), bias.float(), 1e-5, silu=True, shift=shift.float())
    theirs = F.silu(F.group_norm(x + shift[:, :, None, None], 2, weight, bias, 1e-5))
    budget = (theirs.float() - exact).abs().max()
    got = group_norm(x, 2, weight, bias, 1e-5, silu=True, shift=shift)
    assert got.dtype is torch.bfloat16
    assert (got.float() - exact).abs().max() <= budget * 1.01 + 1e-3


def test_a_far_mean_does_not_drown_the_variance() -> None:
    x, weight, bias, _ = inputs((2, 8, 4, 4), channels_last=True)
    x = x + 100.0
    exact = F.group_norm(x.double(), 2, weight.double(), bias.double(), 1e-5)
    torch.testing.assert_close(group_norm(x, 2, weight, bias, 1e-5).double(), exact, rtol=1e-3, atol=1e-3)


def test_shapes_that_do_not_fit_are_named() -> None:
    x, weight, bias, shift = inputs((2, 8, 4, 4), channels_last=False)
    with pytest.raises(ValueError, match="divisible by 3"):
        group_norm(x, 3, weight, bias, 1e-5)
    with pytest.raises(ValueError, match=r"shift \[2, 8\]"):
        group_norm(x, 2, weight, bias, 1e-5, shift=shift[:, :4])


@pytest.mark.parametrize("channels", [64, 128, 320])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_row_is_normalised_alike_alone_and_in_any_batch(channels: int, dtype: torch.dtype) -> None:
    """The form was once chosen by the whole batch's size, and pictures changed with their neighbours."""
    x = torch.randn(40, channels, 16, 16).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(channels), torch.randn(channels)
    alone = group_norm(x[:1].contiguous(memory_format=torch.channels_last), 32, weight, bias, 1e-5, silu=True)
    for rows in (2, 3, 8, 40):
        batch = x[:rows].contiguous(memory_format=torch.channels_last)
        assert torch.equal(group_norm(batch, 32, weight, bias, 1e-5, silu=True)[:1], alone)
