"""The Triton group norm: every way of dividing a row, on a GPU or, without one, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from darkroom_kernels import group_norm
from darkroom_kernels.group_norm import kernel
from darkroom_kernels.group_norm.reference import reference_group_norm

from tests.support.interpreter import bf16_as_on_a_device  # noqa: F401

pytestmark = pytest.mark.usefixtures("bf16_as_on_a_device")
LAST = torch.channels_last
# Every width of the Stable Diffusion UNets and autoencoders, 32 groups each.
WIDTHS = (128, 256, 320, 512, 640, 960, 1280, 1920, 2560)


def already_contiguous(tensor, memory_format=torch.contiguous_format):
    """In place of `Tensor.contiguous` where a copy would be a mistake."""
    assert tensor.is_contiguous(memory_format=memory_format)
    return tensor


@pytest.fixture(params=["whole", "in two"])
def division(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Rows in tests are small; this makes them be divided as large ones are: 16 places a chunk, in two blocks each."""
    if request.param == "in two":
        monkeypatch.setattr(kernel, "WHOLE_VALUES", 0)
        monkeypatch.setattr(kernel, "STATISTICS_PLACES", 16)
        monkeypatch.setattr(kernel, "RESULT_PLACES", 8)
        monkeypatch.setattr(kernel, "FEW_CHUNKS", 3)
        monkeypatch.setattr(kernel, "REPEATED_PLACES", 8)
    kernel.plan.cache_clear()
    yield request.param
    kernel.plan.cache_clear()


def inputs(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    x = (torch.randn(shape) * 2 + 3).contiguous(memory_format=LAST)
    return tuple(v.to(device, dtype) for v in (x, torch.randn(shape[1]), torch.randn(shape[1]), torch.randn(shape[:2])))


def exact(x, groups, weight, bias, **options):
    shift = options.pop("shift", None)
    shift = None if shift is None else shift.double()
    return reference_group_norm(x.double(), groups, weight.double(), bias.double(), 1e-5, shift=shift, **options)


@pytest.mark.parametrize("shape", [(2, 8, 4, 4), (1, 6, 1, 1), (3, 12, 5, 7), (2, 64, 9, 16), (1, 192, 8, 8)], ids=str)
@pytest.mark.parametrize("silu", [False, True], ids=["linear", "silu"])
def test_it_equals_the_reference(shape, silu, division, kernel_device):
    x, weight, bias, shift = inputs(shape, kernel_device)
    before = x.clone()
    for options in ({"silu": silu}, {"silu": silu, "shift": shift}):
        got = group_norm(x, 2, weight, bias, 1e-5, implementation="triton", **options)
        torch.testing.assert_close(got, reference_group_norm(x, 2, weight, bias, 1e-5, **options), rtol=1e-5, atol=2e-5)
        assert got.stride() == x.stride()
    assert torch.equal(x, before)


@pytest.mark.parametrize("channels", WIDTHS)
def test_every_width_of_the_networks_is_right_in_fp16(channels, division, kernel_device):
    x, weight, bias, shift = inputs((1, channels, 3, 7), kernel_device, torch.float16)
    expected = exact(x, 32, weight, bias, silu=True, shift=shift)
    rounding = (expected.half().double() - expected).abs().max()
    got = group_norm(x, 32, weight, bias, 1e-5, silu=True, shift=shift, implementation="triton")
    assert got.dtype is torch.float16
    assert (got.double() - expected).abs().max() <= rounding * 1.01 + 1e-4


@pytest.mark.parametrize("groups", [1, 3, 5, 15, 30])
def test_any_number_of_groups_will_do(groups, division, kernel_device):
    x, weight, bias, _ = inputs((2, 30, 5, 6), kernel_device)
    got = group_norm(x, groups, weight, bias, 1e-5, implementation="triton")
    torch.testing.assert_close(got.double(), exact(x, groups, weight, bias), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_loses_no_more_than_pytorch_does(dtype, division, kernel_device):
    x, weight, bias, shift = inputs((2, 64, 7, 9), kernel_device, dtype)
    expected = exact(x, 8, weight, bias, silu=True, shift=shift)
    theirs = F.silu(F.group_norm(x + shift[:, :, None, None], 8, weight, bias, 1e-5))
    budget = (theirs.double() - expected).abs().max()
    got = group_norm(x, 8, weight, bias, 1e-5, silu=True, shift=shift, implementation="triton")
    assert (got.double() - expected).abs().max() <= budget


def test_a_far_mean_does_not_drown_the_variance(division, kernel_device):
    """Sums of squares in fp32 would lose all of a variance of 1 beside a mean of 10 000."""
    x, weight, bias, shift = inputs((2, 8, 10, 10), kernel_device)
    x, shift = x + 1e4, shift * 100
    got = group_norm(x, 2, weight, bias, 1e-5, shift=shift, implementation="triton")
    torch.testing.assert_close(got.double(), exact(x, 2, weight, bias, shift=shift), rtol=1e-3, atol=3e-3)


def test_the_largest_half_precision_values_do_not_overflow(division, kernel_device):
    x, weight, bias, _ = inputs((1, 64, 6, 6), kernel_device, torch.float16)
    x = torch.where(x > 3, 65504.0, -65504.0).half().contiguous(memory_format=LAST)
    got = group_norm(x, 32, weight, bias, 1e-5, implementation="triton")
    assert (got.double() - exact(x, 32, weight, bias)).abs().max() <= 4e-3


def test_one_outlier_among_small_values_keeps_its_measure(division, kernel_device):
    """The first value is what a running sum of differences might take for the mean."""
    x, weight, bias, _ = inputs((1, 16, 20, 20), kernel_device)
    x = x * 1e-3
    x[0, :, 0, 0] = 1e4
    got = group_norm(x, 4, weight, bias, 1e-5, implementation="triton")
    torch.testing.assert_close(got.double(), exact(x, 4, weight, bias), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_a_row_is_normalised_alike_alone_and_in_any_batch(dtype, division, kernel_device):
    x, weight, bias, shift = inputs((5, 96, 6, 7), kernel_device, dtype)
    options = {"silu": True, "implementation": "triton"}
    crowd = group_norm(x, 32, weight, bias, 1e-5, shift=shift, **options)
    for row in range(5):
        one = slice(row, row + 1)
        alone = group_norm(
            x[one].contiguous(memory_format=LAST), 32, weight, bias, 1e-5, shift=shift[one].contiguous(), **options
        )
        assert torch.equal(crowd[one], alone)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_nan_stays_in_its_group(division, kernel_device):
    x, weight, bias, _ = inputs((2, 12, 6, 6), kernel_device)
    clean = group_norm(x, 4, weight, bias, 1e-5, implementation="triton")
    for bad in (torch.nan, torch.inf):
        x[1, 4, 5, 5] = bad
        got = group_norm(x, 4, weight, bias, 1e-5, implementation="triton")
        assert torch.equal(got[0], clean[0])
        assert torch.equal(got[1, [0, 1, 2, 6, 7, 8, 9, 10, 11]], clean[1, [0, 1, 2, 6, 7, 8, 9, 10, 11]])
        assert got[1, 3:6].isnan().all()


def test_every_value_of_the_result_is_written(division, kernel_device, monkeypatch):
    """Memory that comes poisoned, as a caching allocator's may."""
    x, weight, bias, _ = inputs((2, 24, 5, 9), kernel_device)
    plain = torch.empty

    def poisoned(*args, **kwargs):
        made = plain(*args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(
        torch,
        "empty_like",
        lambda t, **kwargs: poisoned(t.shape, dtype=t.dtype, device=t.device).to(memory_format=LAST),
    )
    got = group_norm(x, 4, weight, bias, 1e-5, implementation="triton")
    assert got.isfinite().all()


def test_channels_of_a_wider_picture_and_one_shift_for_all_rows_need_no_copy(division, kernel_device, monkeypatch):
    x, weight, bias, shift = inputs((3, 48, 5, 4), kernel_device)
    part, one = x[:, 16:40], shift[:1, 16:40].expand(3, -1)
    expected = reference_group_norm(part, 6, weight[16:40], bias[16:40], 1e-5, shift=one)
    monkeypatch.setattr(torch.Tensor, "contiguous", already_contiguous)
    got = group_norm(part, 6, weight[16:40], bias[16:40], 1e-5, shift=one, implementation="triton")
    monkeypatch.undo()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)
    assert got.is_contiguous(memory_format=LAST)


@pytest.mark.parametrize("change", [lambda x: x.contiguous(), lambda x: x.transpose(2, 3), lambda x: x[:, :, ::2]])
def test_other_layouts_are_taken_too(change, kernel_device):
    x, weight, bias, shift = inputs((2, 24, 6, 5), kernel_device)
    x = change(x)
    shift = shift.t().contiguous().t()
    got = group_norm(x, 4, weight, bias, 1e-5, shift=shift, implementation="triton")
    torch.testing.assert_close(got, reference_group_norm(x, 4, weight, bias, 1e-5, shift=shift), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("change", [lambda x: x.contiguous(), lambda x: x.transpose(2, 3), lambda x: x[:, :, ::2]])
def test_the_op_itself_takes_any_layout(change, division, kernel_device):
    """torch's compiler hands it NCHW where channels-last was traced; it read the wrong memory then."""
    x, weight, bias, shift = inputs((2, 24, 6, 5), kernel_device)
    x, shift = change(x), shift.t().contiguous().t()
    got = kernel.group_norm(x, 4, weight, bias, 1e-5, True, shift)
    expected = reference_group_norm(x, 4, weight, bias, 1e-5, silu=True, shift=shift)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)
    assert got.is_contiguous(memory_format=LAST)


def test_how_a_row_is_divided_depends_on_the_row_alone():
    small, middle, large = (kernel.plan(places, 320, 32, 2) for places in (64, 4096, 1 << 20))
    assert small.chunk == 0
    assert middle.chunk == 64
    assert large.chunk == 4096
    for places in (64, 256, 1024, 4096, 16384, 1 << 20):
        for channels in WIDTHS:
            chosen = kernel.plan(places, channels, 32, 2)
            assert 32 % chosen.groups == 0
            assert chosen.block_c >= chosen.groups * channels // 32
            assert chosen.chunk == 0 or chosen.chunk % chosen.block_p == 0


def test_one_large_picture_is_shared_by_enough_programs_to_fill_a_device():
    for places, channels, programs in ((1 << 18, 512, 1024), (1 << 20, 128, 512), (1 << 20, 256, 1024)):
        for itemsize in (2, 4):
            chosen = kernel.plan(places, channels, 32, itemsize)
            assert 32 // chosen.groups * (places // chosen.chunk) == programs
            assert chosen.block_p * chosen.block_c == 4096


def test_programs_grow_only_where_enough_of_them_remain():
    assert kernel.span_of(4096, 5 * 2) == 64
    assert kernel.span_of(4096, 5 * 32) == 512
    assert kernel.span_of(1 << 20, 2) == 512


def test_a_result_does_not_depend_on_the_places_that_share_a_program(kernel_device, monkeypatch):
    x, weight, bias, shift = inputs((2, 24, 9, 11), kernel_device, torch.float16)
    monkeypatch.setattr(kernel, "WHOLE_VALUES", 0)
    kernel.plan.cache_clear()
    results = []
    for span in (64, 128):
        monkeypatch.setattr(kernel, "span_of", lambda *_, span=span: span)
        results.append(group_norm(x, 4, weight, bias, 1e-5, silu=True, shift=shift, implementation="triton"))
    kernel.plan.cache_clear()
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("block", "per_group", "touched"), [(64, 10, 8), (64, 40, 3), (64, 4, 16), (64, 80, 2), (64, 128, 1), (8, 3, 4)]
)
def test_no_block_touches_more_groups_than_are_foreseen(block, per_group, touched):
    assert kernel.touched_groups(block, per_group) == touched
    most = max(len({c // per_group for c in range(s, s + block)}) for s in range(0, 64 * per_group * block, block))
    assert most <= touched


def test_the_op_keeps_the_rules_of_torch_library(division, kernel_device):
    x, weight, bias, shift = inputs((2, 12, 4, 5), kernel_device)
    for given in ((x, None), (x.half(), shift), (x[:, :12], shift[:1].expand(2, -1))):
        torch.library.opcheck(kernel.group_norm, (given[0], 4, weight, bias, 1e-5, True, given[1]))


def test_a_compiler_and_meta_tensors_see_through(kernel_device):
    x, weight, bias, shift = inputs((2, 12, 4, 5), kernel_device)

    def normalise(x, shift):
        return group_norm(x, 4, weight, bias, 1e-5, silu=True, shift=shift, implementation="triton") + 1

    traced = torch.compile(normalise, backend="eager", fullgraph=True)
    assert torch.equal(traced(x, shift), normalise(x, shift))
    meta = group_norm(x.to("meta"), 4, weight.to("meta"), bias.to("meta"), 1e-5, implementation="triton")
    assert meta.shape == x.shape
    assert meta.stride() == x.stride()


def test_what_makes_no_sense_is_refused(kernel_device):
    x, weight, bias, _ = inputs((2, 12, 4, 5), kernel_device)
    with pytest.raises(ValueError, match="not empty"):
        group_norm(x[:, :, :0], 4, weight, bias, 1e-5, implementation="triton")
    with pytest.raises(ValueError, match=r"weight and bias \[12\]"):
        group_norm(x, 4, weight[:6], bias, 1e-5, implementation="triton")
    with pytest.raises(ValueError, match="cudnn"):
        group_norm(x, 4, weight, bias, 1e-5, implementation="cudnn")
