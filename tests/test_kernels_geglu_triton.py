"""GEGLU's Triton forms, on a GPU or, without one, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from darkroom_kernels import geglu
from darkroom_kernels.backend import KernelUnavailable
from darkroom_kernels.geglu import kernel, tiles
from darkroom_kernels.geglu.reference import reference_geglu
from torch.utils.flop_counter import FlopCounterMode

from tests.support.interpreter import bf16_as_on_a_device  # noqa: F401

pytestmark = pytest.mark.usefixtures("bf16_as_on_a_device")
FORMS = ["gate", "triton"]


def inputs(shape, device, dtype=torch.float32, width=12):
    """x, weight, bias; products of about unit size."""
    torch.manual_seed(0)
    inner = shape[-1]
    values = torch.randn(shape), torch.randn(2 * width, inner) / inner**0.5, torch.randn(2 * width)
    return tuple(v.to(device, dtype) for v in values)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("shape", "width"), [((2, 5, 8), 12), ((1, 1, 3), 1), ((7, 6), 300), ((131, 70), 40), ((3, 64, 32), 128)], ids=str
)
def test_every_form_equals_the_reference(shape, width, form, kernel_device):
    x, weight, bias = inputs(shape, kernel_device, width=width)
    got = geglu(x, weight, bias, implementation=form)
    assert got.shape == (*shape[:-1], width)
    torch.testing.assert_close(got, reference_geglu(x, weight, bias), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_loses_no_more_than_pytorch_does(form, dtype, kernel_device):
    x, weight, bias = inputs((70, 96), kernel_device, dtype, width=72)
    exact = reference_geglu(x.double(), weight.double(), bias.double())
    value, gate = F.linear(x, weight, bias).chunk(2, -1)
    budget = ((value * F.gelu(gate)).double() - exact).abs().max()
    got = geglu(x, weight, bias, implementation=form)
    assert got.dtype is dtype
    assert (got.double() - exact).abs().max() <= budget


@pytest.mark.parametrize("inner_past", [6, 8], ids=["pointers", "descriptors where the tile has them"])
@pytest.mark.parametrize("capability", tiles.TILES)
def test_every_tile_of_the_table_is_right_past_its_edges(capability, inner_past, kernel_device, monkeypatch):
    """More groups of rows than one, the last of them short; columns and inner width end within a tile.

    Rows of an odd number of 4-byte words cannot be described to the copy engine.
    """
    if kernel_device.type == "cuda":
        pytest.skip("a device compiles its own tile only")
    tile = tiles.TILES[capability]
    monkeypatch.setattr(kernel, "tile_for", lambda *_: tile)
    monkeypatch.setattr(kernel, "GROUP_M", 2)
    rows, inner, width = 2 * tile.block_m + 5, tile.block_k + inner_past, tile.block_n + 3
    x, weight, bias = inputs((rows, inner), kernel_device, torch.float16, width=width)
    assert kernel._can_be_described(x) is (inner_past == 8)
    got = geglu(x, weight, bias, implementation="triton")
    torch.testing.assert_close(got, reference_geglu(x, weight, bias), rtol=2e-3, atol=2e-3)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("form", FORMS)
def test_large_gates_neither_overflow_nor_underflow_to_nan(form, kernel_device):
    """gelu of −60000 is 0 and of 60000 itself; a product past 65504 is infinite, as PyTorch's is."""
    weight = torch.tensor([[1.0], [1.0], [1.0], [1.0]])
    x = torch.tensor([[-60000.0], [-30.0], [0.0], [200.0], [300.0]])
    given = [v.half().to(kernel_device) for v in (x, weight, torch.zeros(4))]
    got = geglu(*given, implementation=form)
    expected = torch.tensor([0.0, 0.0, 0.0, 40000.0, torch.inf])[:, None].expand(5, 2)
    assert torch.equal(got.float().cpu(), expected)


def test_a_row_of_one_kernel_is_alike_alone_and_in_any_batch(kernel_device):
    x, weight, bias = inputs((150, 40), kernel_device, torch.float16, width=24)
    crowd = geglu(x, weight, bias, implementation="triton")
    for row in (0, 63, 149):
        assert torch.equal(crowd[row : row + 1], geglu(x[row : row + 1].clone(), weight, bias, implementation="triton"))


def test_the_gate_of_a_row_is_alike_alone_and_in_any_batch(kernel_device):
    product, bias = torch.randn(37, 600, device=kernel_device).half(), torch.randn(600, device=kernel_device).half()
    crowd = kernel.geglu_gate(product, bias)
    for row in (0, 15, 16, 36):
        assert torch.equal(crowd[row : row + 1], kernel.geglu_gate(product[row : row + 1].clone(), bias))


@pytest.mark.parametrize("form", FORMS)
def test_every_value_of_the_result_is_written(form, kernel_device, monkeypatch):
    x, weight, bias = inputs((19, 33), kernel_device, width=270)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.nan))
    assert geglu(x, weight, bias, implementation=form).isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", [lambda x: x[:, ::2], lambda x: x.transpose(0, 1), lambda x: x[..., 8:24]])
def test_strides_do_not_matter(change, form, kernel_device):
    x = change(inputs((3, 6, 32), kernel_device)[0])
    _, weight, bias = inputs(x.shape, kernel_device)
    weight = weight.t().contiguous().t()
    got = geglu(x, weight, bias, implementation=form)
    torch.testing.assert_close(got, reference_geglu(x, weight, bias), rtol=1e-4, atol=1e-5)


def test_the_ops_keep_the_rules_of_torch_library_and_a_compiler_sees_through(kernel_device):
    x, weight, bias = inputs((2, 5, 8), kernel_device)
    torch.library.opcheck(kernel.geglu, (x, weight, bias))
    torch.library.opcheck(kernel.geglu_gate, (torch.randn(2, 5, 24, device=kernel_device).half(), bias.half()))
    for form in FORMS:

        def feed(x, form=form):
            return geglu(x, weight, bias, implementation=form) * 2

        assert torch.equal(torch.compile(feed, backend="eager", fullgraph=True)(x), feed(x))
        meta = geglu(*(v.to("meta") for v in (x, weight, bias)), implementation=form)
        assert meta.shape == (2, 5, 12)


@pytest.mark.parametrize("form", ["torch", *FORMS])
def test_every_form_counts_the_same_work(form):
    x, weight, bias = inputs((2, 5, 8), torch.device("meta"))
    with FlopCounterMode(display=False) as counter:
        geglu(x, weight, bias, implementation=form)
    assert counter.get_total_flops() == 2 * 10 * 8 * 24


def test_a_device_takes_the_tile_of_its_own_or_the_next_older_capability():
    assert tiles.tile_for(90, 2) == tiles.TILES[90]
    assert tiles.tile_for(89, 2) == tiles.TILES[80]
    assert tiles.tile_for(103, 2) == tiles.TILES[100]
    assert tiles.tile_for(121, 2) == tiles.TILES[120]
    assert tiles.tile_for(90, 4) == tiles.FP32_TILE


@pytest.mark.parametrize("form", ["auto", "torch", *FORMS])
def test_what_makes_no_sense_is_refused(form, kernel_device):
    x, weight, bias = inputs((2, 5, 8), kernel_device)
    with pytest.raises(ValueError, match="at least one row"):
        geglu(x[:0], weight, bias, implementation=form)
    with pytest.raises(ValueError, match=r"\[23, 8\]"):
        geglu(x, weight[:23], bias[:23], implementation=form)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'auto', 'torch', 'gate', 'triton'"):
        geglu(*inputs((2, 5, 8), torch.device("cpu")), implementation="cutlass")


@pytest.mark.parametrize("form", FORMS)
def test_a_named_form_never_gives_way_to_another(form, monkeypatch):
    from darkroom_kernels import backend

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backend.forget_decisions()
    with pytest.raises(KernelUnavailable, match="TRITON_INTERPRET"):
        geglu(*inputs((2, 5, 8), torch.device("cpu")), implementation=form)
    backend.forget_decisions()
