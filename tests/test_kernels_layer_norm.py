"""Layer norm in both forms; the Triton one on a GPU or, without one, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from darkroom_kernels import layer_norm
from darkroom_kernels.layer_norm.reference import reference_layer_norm

from tests.support.interpreter import bf16_as_on_a_device  # noqa: F401

pytestmark = pytest.mark.usefixtures("bf16_as_on_a_device")
FORMS = ["torch", "triton"]


def inputs(shape, device, dtype=torch.float32):
    """x, weight, bias, shift."""
    torch.manual_seed(0)
    values = torch.randn(shape) * 2 + 3, *torch.randn(3, shape[-1])
    return tuple(v.to(device, dtype) for v in values)


def already_contiguous(tensor, memory_format=torch.contiguous_format):
    """In place of `Tensor.contiguous` where a copy would be a mistake."""
    assert tensor.is_contiguous(memory_format=memory_format)
    return tensor


def exact(x, weight, bias, eps, shift=None):
    shift = None if shift is None else shift.double()
    return reference_layer_norm(x.double(), weight.double(), bias.double(), eps, shift=shift)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(2, 5, 8), (1, 1), (7, 3), (2, 3, 4, 33), (3, 320), (2, 640), (2, 1280), (1, 2560)])
def test_every_form_equals_the_reference(shape, form, kernel_device):
    x, weight, bias, shift = inputs(shape, kernel_device)
    before = x.clone()
    for added in (None, shift):
        got = layer_norm(x, weight, bias, 1e-5, shift=added, implementation=form)
        torch.testing.assert_close(got, reference_layer_norm(x, weight, bias, 1e-5, shift=added), rtol=1e-5, atol=2e-5)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("width", [320, 640, 1280])
def test_half_precision_loses_no_more_than_pytorch_does(width, dtype, kernel_device):
    x, weight, bias, shift = inputs((9, width), kernel_device, dtype)
    expected = exact(x, weight, bias, 1e-5, shift)
    budget = (layer_norm(x, weight, bias, 1e-5, shift=shift, implementation="torch").double() - expected).abs().max()
    got = layer_norm(x, weight, bias, 1e-5, shift=shift, implementation="triton")
    assert got.dtype is dtype
    assert (got.double() - expected).abs().max() <= budget


def test_a_far_mean_does_not_drown_the_variance(kernel_device):
    x, weight, bias, shift = inputs((4, 96), kernel_device)
    x = x + 1e4
    got = layer_norm(x, weight, bias, 1e-5, shift=shift, implementation="triton")
    torch.testing.assert_close(got.double(), exact(x, weight, bias, 1e-5, shift), rtol=1e-3, atol=3e-3)


def test_the_largest_half_precision_values_do_not_overflow(kernel_device):
    x, weight, bias, _ = inputs((4, 640), kernel_device, torch.float16)
    x = torch.where(x > 3, 65504.0, -65504.0).half()
    got = layer_norm(x, weight, bias, 1e-5, implementation="triton")
    assert (got.double() - exact(x, weight, bias, 1e-5)).abs().max() <= 4e-3


@pytest.mark.parametrize("width", [40, 320, 1280])
def test_a_row_is_normalised_alike_alone_and_in_any_batch(width, kernel_device):
    x, weight, bias, shift = inputs((21, width), kernel_device, torch.float16)
    crowd = layer_norm(x, weight, bias, 1e-5, shift=shift, implementation="triton")
    for row in (0, 1, 7, 20):
        alone = layer_norm(x[row : row + 1].clone(), weight, bias, 1e-5, shift=shift, implementation="triton")
        assert torch.equal(crowd[row : row + 1], alone)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_nan_stays_in_its_row(kernel_device):
    x, weight, bias, _ = inputs((9, 40), kernel_device)
    clean = layer_norm(x, weight, bias, 1e-5, implementation="triton")
    x[3, 7], x[6, 0] = torch.nan, torch.inf
    got = layer_norm(x, weight, bias, 1e-5, implementation="triton")
    others = [0, 1, 2, 4, 5, 7, 8]
    assert torch.equal(got[others], clean[others])
    assert got[[3, 6]].isnan().all()


def test_every_value_of_the_result_is_written(kernel_device, monkeypatch):
    x, weight, bias, _ = inputs((11, 72), kernel_device)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.nan))
    assert layer_norm(x, weight, bias, 1e-5, implementation="triton").isfinite().all()


@pytest.mark.parametrize("change", [lambda x: x[:, ::2], lambda x: x.transpose(0, 1), lambda x: x[..., 8:24]])
def test_strides_do_not_matter(change, kernel_device):
    x, *_ = inputs((3, 6, 32), kernel_device)
    x = change(x)
    _, weight, bias, shift = inputs(x.shape, kernel_device)
    got = layer_norm(x, weight, bias, 1e-5, shift=shift, implementation="triton")
    torch.testing.assert_close(got, reference_layer_norm(x, weight, bias, 1e-5, shift=shift), rtol=1e-5, atol=2e-5)
    assert got.is_contiguous()


def test_tokens_that_are_a_view_of_a_picture_need_no_copy(kernel_device, monkeypatch):
    picture = torch.randn(2, 8, 3, 5, device=kernel_device).contiguous(memory_format=torch.channels_last)
    tokens = picture.permute(0, 2, 3, 1).flatten(1, 2)
    _, weight, bias, _ = inputs((1, 8), kernel_device)
    expected = reference_layer_norm(tokens, weight, bias, 1e-5)
    monkeypatch.setattr(torch.Tensor, "contiguous", already_contiguous)
    got = layer_norm(tokens, weight, bias, 1e-5, implementation="triton")
    monkeypatch.undo()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)


def test_the_op_keeps_the_rules_of_torch_library_and_a_compiler_sees_through(kernel_device):
    from darkroom_kernels.layer_norm import kernel

    x, weight, bias, shift = inputs((2, 5, 24), kernel_device)
    torch.library.opcheck(kernel.layer_norm, (x, weight, bias, 1e-5, None))
    torch.library.opcheck(kernel.layer_norm, (x.half()[:, :, ::2], weight[:12], bias[:12], 1e-5, shift[:12]))

    def normalise(x):
        return layer_norm(x, weight, bias, 1e-5, shift=shift, implementation="triton") * 2

    assert torch.equal(torch.compile(normalise, backend="eager", fullgraph=True)(x), normalise(x))
    meta = layer_norm(x.to("meta"), weight.to("meta"), bias.to("meta"), 1e-5, implementation="triton")
    assert meta.shape == x.shape


@pytest.mark.parametrize("form", FORMS)
def test_what_makes_no_sense_is_refused(form, kernel_device):
    x, weight, bias, shift = inputs((2, 5, 24), kernel_device)
    with pytest.raises(ValueError, match="not empty"):
        layer_norm(x[:0], weight, bias, 1e-5, implementation=form)
    with pytest.raises(ValueError, match=r"\[23\]"):
        layer_norm(x, weight, bias, 1e-5, shift=shift[:23], implementation=form)
    with pytest.raises(ValueError, match="apex"):
        layer_norm(x, weight, bias, 1e-5, implementation="apex")


def test_a_row_too_wide_for_one_program_is_refused_by_name(kernel_device):
    with pytest.raises(ValueError, match="at most 32768"):
        layer_norm(*inputs((1, 40000), kernel_device)[:3], 1e-5, implementation="triton")
