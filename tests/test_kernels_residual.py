"""A residual and a bias added in place; the Triton form on a GPU or, without one, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from darkroom_kernels import add_residual_
from darkroom_kernels.residual.reference import reference_add_residual

from tests.support.interpreter import bf16_as_on_a_device  # noqa: F401

pytestmark = pytest.mark.usefixtures("bf16_as_on_a_device")
FORMS = ["torch", "triton"]
LAST = torch.channels_last


def inputs(shape, device, dtype=torch.float32):
    """y, residual, bias."""
    torch.manual_seed(0)
    y, residual = (v.to(device, dtype) for v in torch.randn(2, *shape))
    if len(shape) == 4:
        y, residual = y.contiguous(memory_format=LAST), residual.contiguous(memory_format=LAST)
    return y, residual, torch.randn(shape[1 if len(shape) == 4 else -1]).to(device, dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "shape", [(2, 320, 3, 5), (1, 3, 1, 1), (2, 1, 7, 9), (5, 37, 61), (3, 640), (2, 1280, 4, 4)], ids=str
)
def test_every_form_equals_the_reference(shape, form, kernel_device):
    y, residual, bias = inputs(shape, kernel_device)
    expected = reference_add_residual(y, residual, bias)
    strides, before = y.stride(), residual.clone()
    got = add_residual_(y, residual, bias, implementation=form)
    assert got is y
    assert y.stride() == strides
    assert torch.equal(residual, before)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_is_rounded_once(dtype, kernel_device):
    y, residual, bias = inputs((2, 96, 7, 9), kernel_device, dtype)
    expected = reference_add_residual(y, residual, bias)
    assert torch.equal(add_residual_(y, residual, bias, implementation="triton"), expected)


def test_a_sum_that_only_passes_through_infinity_is_finite(kernel_device):
    """65504 + 65504 overflows fp16, and the bias that brings it back comes too late for two passes."""
    y, residual, bias = (v.half().to(kernel_device) for v in (torch.full((2, 8), 65504.0),) * 2 + (torch.ones(8),))
    bias *= -65504.0
    assert torch.equal(add_residual_(y, residual, bias, implementation="triton"), torch.full_like(y, 65504.0))


@pytest.mark.parametrize("shape", [(3, 24, 31, 17), (3, 700, 24)], ids=str)
def test_a_row_is_summed_alike_alone_and_in_any_batch(shape, kernel_device):
    y, residual, bias = inputs(shape, kernel_device, torch.float16)
    alone = [
        add_residual_(y[i : i + 1].clone(), residual[i : i + 1].clone(), bias, implementation="triton")
        for i in range(3)
    ]
    assert torch.equal(add_residual_(y, residual, bias, implementation="triton"), torch.cat(alone))


def test_a_residual_that_lies_otherwise_in_memory_is_taken(kernel_device):
    y, residual, bias = inputs((2, 6, 5, 4), kernel_device)
    expected = reference_add_residual(y, residual, bias)
    for other in (residual.contiguous(), torch.cat((residual, residual), 1)[:, :6]):
        got = add_residual_(y.clone(), other, bias, implementation="triton")
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 6, 5, 4), (3, 7, 6)], ids=str)
def test_the_op_itself_takes_any_layout(shape, kernel_device):
    """torch's compiler may hand it other strides than it traced; memory would be added crosswise then."""
    from darkroom_kernels.residual import kernel

    y, residual, bias = inputs(shape, kernel_device)
    expected = reference_add_residual(y, residual, bias)
    other = y.contiguous() if len(shape) == 4 else y.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.cat((residual, residual), 1)[:, : shape[1]]
    for y_given, residual_given in ((other.clone(), residual), (y.clone(), wide), (other.clone(), wide)):
        strides = y_given.stride()
        kernel.add_residual_(y_given, residual_given, bias)
        torch.testing.assert_close(y_given, expected, rtol=1e-6, atol=1e-6)
        assert y_given.stride() == strides


def test_the_op_keeps_the_rules_of_torch_library_and_a_compiler_sees_through(kernel_device):
    from darkroom_kernels.residual import kernel

    y, residual, bias = inputs((2, 6, 5, 4), kernel_device)
    torch.library.opcheck(kernel.add_residual_, (y.clone(), residual, bias))

    def add(y):
        return add_residual_(y * 2, residual, bias, implementation="triton") + 1

    assert torch.equal(torch.compile(add, backend="eager", fullgraph=True)(y), add(y))
    meta = [v.to("meta") for v in (y, residual, bias)]
    assert add_residual_(*meta, implementation="triton") is meta[0]


@pytest.mark.parametrize("form", FORMS)
def test_what_makes_no_sense_is_refused(form, kernel_device):
    y, residual, bias = inputs((2, 6, 5, 4), kernel_device)
    with pytest.raises(ValueError, match=r"bias \[C\]"):
        add_residual_(y, residual, bias[:5], implementation=form)
    with pytest.raises(ValueError, match="not empty"):
        add_residual_(y[:0], residual[:0], bias, implementation=form)
    with pytest.raises(ValueError, match="channels_last"):
        add_residual_(y.contiguous(), residual, bias, implementation=form)
    with pytest.raises(ValueError, match="one dtype"):
        add_residual_(y, residual.half(), bias, implementation=form)
    with pytest.raises(ValueError, match="in_place"):
        add_residual_(y, residual, bias, implementation="in_place")
