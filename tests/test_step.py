"""The step: input scaling, guidance, network output → denoised, solver update, per row and in place in the pools."""

import pytest
import torch
from darkroom_kernels.backend import KernelUnavailable, interprets
from darkroom_kernels.step import (
    A_D,
    A_D1,
    A_D2,
    A_NOISE,
    A_X,
    C_OUT,
    C_SKIP,
    CLAMP,
    INPUT_SCALE,
    NUM_COLUMNS,
    scale_input,
    step_,
)
from darkroom_kernels.step.reference import step_reference
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.interpreter import bf16_as_on_a_device  # noqa: F401

pytestmark = pytest.mark.usefixtures("bf16_as_on_a_device")
SLOTS = 9
IN_PLACE = ("latents", "previous", "is_finite")
FORMS = ["auto", "torch", "triton"]


@pytest.fixture
def arguments(kernel_device):
    """Makes arguments of a step on the device under test."""

    def make(**options):
        given = batch_of(**options)
        return {name: None if value is None else value.to(kernel_device) for name, value in given.items()}

    return make


def batch_of(rows=5, channels=4, height=7, width=3, dtype=torch.float32, noise=True):
    """A batch in which rows 0 and 3 are not guided, rows 1 and 3 are clamped, and the slots are in no order."""
    generator = torch.Generator().manual_seed(rows)
    plane = (channels, height, width)
    rows_cond = torch.arange(rows)
    is_guided = rows_cond % 3 > 0
    coefficients = torch.randn(rows, NUM_COLUMNS, generator=generator)
    coefficients[:, CLAMP] = (rows_cond % 2) * 0.8
    model_output = torch.randn(2 * rows, *plane, generator=generator).to(dtype)
    model_output = model_output.contiguous(memory_format=torch.channels_last)
    return {
        "latents": torch.randn(SLOTS, *plane, generator=generator),
        "previous": torch.randn(SLOTS, 2, *plane, generator=generator),
        "model_output": model_output,
        "slots": torch.tensor([8, 2, 7, 1, 4, 3])[:rows],
        "rows_cond": rows_cond,
        "rows_uncond": torch.where(is_guided, rows_cond + rows, rows_cond),
        "guidance_scale": torch.where(is_guided, torch.tensor(7.5), torch.tensor(1.0)),
        "coefficients": coefficients,
        "noise": torch.randn(rows, *plane, generator=generator) if noise else None,
        "is_finite": torch.zeros(rows, dtype=torch.bool),
    }


def stepped(given, form):
    """`given` after the step, on copies of what is changed in place."""
    device = given["latents"].device
    given = {name: value if value is None else value.to(device) for name, value in given.items()}
    given |= {name: given[name].clone() for name in IN_PLACE}
    step_(**given, implementation=form)
    return given


def row_results(after):
    """(latents_next, denoised) of each row that has a slot."""
    slots = after["slots"]
    return after["latents"][slots], after["previous"][slots, 0]


def expected_results(given):
    slots = given["slots"]
    names = ("model_output", "rows_cond", "rows_uncond", "guidance_scale", "coefficients", "noise")
    return step_reference(
        latents=given["latents"][slots], previous=given["previous"][slots], **{name: given[name] for name in names}
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("noise", [True, False], ids=["noise", "no noise"])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_equals_the_written_out_one(arguments, form, rows, noise, dtype):
    given = arguments(rows=rows, noise=noise, dtype=dtype)
    after = stepped(given, form)
    for got, expected in zip(row_results(after), expected_results(given), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    slots = given["slots"]
    assert torch.equal(after["previous"][slots, 1], given["previous"][slots, 0])
    assert after["is_finite"].all()


@pytest.mark.parametrize("plane", [(4, 16, 40), (1, 1, 1), (3, 5, 1), (16, 33, 9), (4, 1, 700)], ids=str)
def test_the_kernel_takes_any_plane_with_one_or_many_programs_to_a_row(arguments, plane):
    given = arguments(rows=3, channels=plane[0], height=plane[1], width=plane[2])
    for got, expected in zip(row_results(stepped(given, "triton")), expected_results(given), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_slots_of_others_are_left_alone(arguments, form):
    given = arguments()
    after = stepped(given, form)
    others = [slot for slot in range(SLOTS) if slot not in given["slots"]]
    for name in ("latents", "previous"):
        assert torch.equal(after[name][others], given[name][others])
    for name in set(given) - set(IN_PLACE):
        assert torch.equal(after[name], given[name])


@pytest.mark.parametrize("is_row", [[True, False, True, False], [False, True, True, True], [False] * 4], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_row_without_a_slot_changes_nothing(arguments, form, is_row):
    """Not even when all about it is NaN, and not the row whose slot is 0."""
    given = arguments(rows=4)
    given["slots"] = given["slots"].new_tensor([0, 5, 3, 8])
    full = stepped(given, form)
    is_row = given["is_finite"].new_tensor(is_row)
    slots, absent = given["slots"][is_row], torch.nonzero(~is_row)[:, 0]
    given["model_output"][absent] = torch.nan
    given["noise"][absent] = torch.nan
    given["coefficients"][absent] = torch.nan
    given["slots"] = torch.where(is_row, given["slots"], -1)
    after = stepped(given, form)
    assert after["is_finite"].all()
    for name in ("latents", "previous"):
        assert torch.equal(after[name][slots], full[name][slots])
        others = [slot for slot in range(SLOTS) if slot not in slots]
        assert torch.equal(after[name][others], given[name][others])


class OutOfMemoryAt(TorchDispatchMode):
    """Lets the n-th operator (from 0) that makes a tensor find no memory."""

    def __init__(self, n):
        super().__init__()
        self.left = n

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func._schema.is_mutable:
            self.left -= 1
            if self.left == -1:
                raise torch.OutOfMemoryError("no")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bad", [False, True], ids=["finite", "not finite"])
@pytest.mark.parametrize("slots", [[8, 2, 7], [4, 5, 6]], ids=["scattered", "side by side"])
@pytest.mark.parametrize("form", ["auto", "torch"])
def test_a_step_that_finds_no_memory_has_changed_nothing(form, slots, bad):
    """Rows side by side were stepped in place, and half way through memory was asked for."""
    given = batch_of(rows=3)
    given["slots"] = torch.tensor(slots)
    given["coefficients"][0, [A_D1, A_D2, A_NOISE]] = 0.0
    if bad:
        given["model_output"][0] = torch.nan
    before = {name: given[name].clone() for name in ("latents", "previous")}
    num_failed = 0
    while True:
        mode = OutOfMemoryAt(num_failed)
        try:
            with mode:
                step_(**given, implementation=form)
            break
        except torch.OutOfMemoryError:
            num_failed += 1
            for name, value in before.items():
                assert torch.equal(given[name], value), num_failed
    assert num_failed > 10
    assert not torch.equal(given["latents"], before["latents"])


@pytest.mark.parametrize("form", FORMS)
def test_strides_of_the_network_output_and_the_noise_do_not_matter(arguments, form):
    given = arguments(channels=8, height=6, width=5)
    expected = stepped(given, form)
    output = given["model_output"]
    padded = output.new_full((10, 8, 6, 9), torch.nan)
    padded[..., :5] = output
    for strided in (output.contiguous(), output.transpose(2, 3).contiguous().transpose(2, 3), padded[..., :5]):
        noise = given["noise"].contiguous(memory_format=torch.channels_last)
        after = stepped(given | {"model_output": strided, "noise": noise}, form)
        for name in IN_PLACE:
            assert torch.equal(after[name], expected[name])


@pytest.mark.parametrize("form", FORMS)
def test_one_number_worked_by_hand(form, kernel_device):
    line = torch.zeros(1, NUM_COLUMNS)
    for column, value in ((C_SKIP, 2.0), (C_OUT, -1.0), (CLAMP, 4.0), (A_X, 0.5), (A_D, 3.0)):
        line[:, column] = value
    for column, value in ((A_D1, 10.0), (A_D2, 100.0), (A_NOISE, 1000.0)):
        line[:, column] = value
    given = {
        "latents": torch.full((1, 1, 1, 1), 1.0),
        "previous": torch.tensor([0.1, 0.02]).reshape(1, 2, 1, 1, 1),
        "model_output": torch.tensor([-1.0, 0.5]).reshape(2, 1, 1, 1),
        "slots": torch.tensor([0]),
        "rows_cond": torch.tensor([0]),
        "rows_uncond": torch.tensor([1]),
        "guidance_scale": torch.tensor([3.0]),
        "coefficients": line,
        "noise": torch.full((1, 1, 1, 1), 0.003),
        "is_finite": torch.zeros(1, dtype=torch.bool),
    }
    after = stepped({name: value.to(kernel_device) for name, value in given.items()}, form)
    # noise_pred = 0.5 + 3·(−1 − 0.5) = −4; denoised = 2·1 + 4 = 6, clamped to 4.
    assert after["previous"].flatten().tolist() == pytest.approx([4.0, 0.1])
    assert after["latents"].item() == pytest.approx(0.5 + 12 + 1 + 2 + 3)


@pytest.mark.parametrize("form", FORMS)
def test_a_row_without_guidance_sees_the_network_output_exactly(arguments, form):
    given = arguments(rows=4)
    given["coefficients"].zero_()
    given["coefficients"][:, C_OUT] = 1
    _, denoised = row_results(stepped(given, form))
    for row in (0, 3):
        assert torch.equal(denoised[row], given["model_output"][row])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("form", FORMS)
def test_a_row_that_went_wrong_is_flagged_and_its_neighbours_do_not_notice(arguments, form, bad):
    """A NaN is passed on and not clamped away; an infinity may be clamped, but not where no clamp is asked for."""
    given = arguments(height=40, width=33)
    expected = stepped(given, form)
    given["coefficients"][1, CLAMP] = 0
    given["model_output"][1, 3, 39, 32] = bad
    after = stepped(given, form)
    assert after["is_finite"].tolist() == [True, False, True, True, True]
    latents_next, denoised = row_results(after)
    assert not denoised[1].isfinite().all()
    assert not latents_next[1].isfinite().all()
    others = given["slots"][[0, 2, 3, 4]]
    for name in ("latents", "previous"):
        assert torch.equal(after[name][others], expected[name][others])


@pytest.mark.parametrize("form", FORMS)
def test_a_clamp_does_not_hide_a_nan(arguments, form):
    given = arguments()
    assert given["coefficients"][1, CLAMP] > 0
    given["model_output"][1] = torch.nan
    assert stepped(given, form)["is_finite"].tolist() == [True, False, True, True, True]


@pytest.mark.parametrize("form", FORMS)
def test_flags_are_written_anew_by_every_step(arguments, form):
    given = arguments(height=30, width=30)
    for bad_row in (2, 0, None):
        broken = given | {"model_output": given["model_output"].clone()}
        if bad_row is not None:
            broken["model_output"][bad_row] = torch.nan
        after = stepped(broken | {"is_finite": torch.tensor([True, False, True, False, True])}, form)
        assert after["is_finite"].tolist() == [row != bad_row for row in range(5)]


@pytest.mark.parametrize(
    ("column", "name", "index"), [(A_D1, "previous", 0), (A_D2, "previous", 1), (A_NOISE, "noise", 0)]
)
@pytest.mark.parametrize("form", FORMS)
def test_a_zero_coefficient_leaves_out_whatever_is_there(arguments, form, column, name, index):
    """A fresh slot's history is what its last owner left, maybe NaN; stale noise is no better."""
    given = arguments(rows=2)
    given["coefficients"][0, column] = 0
    expected = row_results(stepped(given, form))
    if name == "previous":
        given["previous"][given["slots"][0], index] = torch.nan
    else:
        given["noise"][0] = torch.inf
    after = stepped(given, form)
    assert after["is_finite"].all()
    for got, wanted in zip(row_results(after), expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("form", FORMS)
def test_a_row_is_stepped_alike_alone_and_in_any_batch(arguments, form):
    given = arguments(rows=6, height=32, width=20, dtype=torch.float16)
    together = stepped(given, form)
    per_row = ("slots", "rows_cond", "rows_uncond", "guidance_scale", "coefficients", "noise", "is_finite")
    for row in range(6):
        alone = stepped(given | {name: given[name][row : row + 1] for name in per_row}, form)
        slot = given["slots"][row]
        for name in ("latents", "previous"):
            assert torch.equal(alone[name][slot], together[name][slot])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("form", FORMS)
def test_the_network_sees_scaled_latents_in_its_own_layout(arguments, form, dtype):
    given = arguments(rows=3, height=31, width=17)
    row_of = given["slots"].new_tensor([0, 1, 2, 1, 2, 0, 0, 0])
    got = scale_input(given["latents"], given["coefficients"], given["slots"], row_of, dtype, implementation=form)
    scale = given["coefficients"][:, INPUT_SCALE, None, None, None]
    assert torch.equal(got, (given["latents"][given["slots"]] * scale)[row_of].to(dtype))
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_every_value_of_the_scaled_input_is_written(arguments, monkeypatch):
    """Into memory that comes poisoned, as a caching allocator's may."""
    given = arguments(rows=3, height=31, width=17)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.nan))
    row_of = given["slots"].new_tensor([2, 0, 1, 1])
    got = scale_input(
        given["latents"], given["coefficients"], given["slots"], row_of, torch.float16, implementation="triton"
    )
    assert got.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_a_model_row_of_no_row_is_zero_whatever_the_pool_and_the_coefficients_hold(arguments, form):
    given = arguments(rows=3)
    given["coefficients"][0], given["coefficients"][2] = torch.nan, torch.inf
    latents = torch.full_like(given["latents"], torch.nan)
    latents[2] = 1.0
    slots, row_of = given["slots"].new_tensor([-1, 2, -1]), given["slots"].new_tensor([0, 1, 2, 0])
    got = scale_input(latents, given["coefficients"], slots, row_of, torch.float16, implementation=form)
    assert got[[0, 2, 3]].eq(0).all()
    assert got[1].isfinite().all()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("latents", torch.zeros(9, 4, 7)),
        ("latents", torch.zeros(9, 4, 7, 3, dtype=torch.float64)),
        ("latents", torch.zeros(9, 4, 7, 3).contiguous(memory_format=torch.channels_last)),
        ("previous", torch.zeros(9, 1, 4, 7, 3)),
        ("previous", torch.zeros(2, 9, 4, 7, 3).transpose(0, 1)),
        ("model_output", torch.zeros(10, 4, 7, 4)),
        ("model_output", torch.zeros(10, 4, 7, 3, dtype=torch.int64)),
        ("slots", torch.zeros(5, dtype=torch.int32)),
        ("rows_cond", torch.zeros(5, dtype=torch.int32)),
        ("rows_uncond", torch.zeros(4, dtype=torch.int64)),
        ("guidance_scale", torch.zeros(5, 1)),
        ("coefficients", torch.zeros(5, NUM_COLUMNS - 1)),
        ("noise", torch.zeros(1, 4, 7, 3)),
        ("is_finite", torch.zeros(5)),
    ],
)
def test_a_wrong_argument_is_named(arguments, name, wrong):
    given = arguments()
    wrong = wrong.to(given["latents"].device)
    with pytest.raises(ValueError, match=name):
        step_(**given | {name: wrong})


def test_a_wrong_argument_of_the_input_scaling_is_named(arguments):
    given = arguments()
    latents, coefficients, slots = given["latents"], given["coefficients"], given["slots"]
    row_of = torch.zeros_like(slots[:3])
    with pytest.raises(ValueError, match="row_of"):
        scale_input(latents, coefficients, slots, row_of.int(), torch.float16)
    with pytest.raises(ValueError, match="dtype"):
        scale_input(latents, coefficients, slots, row_of, torch.float64)
    with pytest.raises(ValueError, match="coefficients"):
        scale_input(latents, coefficients[:3], slots, row_of, torch.float16)


def test_no_rows_are_refused(arguments):
    empty = arguments(rows=0)
    with pytest.raises(ValueError, match="at least one"):
        step_(**empty)
    with pytest.raises(ValueError, match="at least one"):
        scale_input(empty["latents"], empty["coefficients"], empty["slots"], empty["slots"], torch.float16)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_waits_for_the_device(arguments, form):
    """Meta tensors have no values, so reading one would fail here as it would stall on a GPU."""
    given = {name: value.to("meta") for name, value in arguments().items()}
    step_(**given, implementation=form)
    got = scale_input(
        given["latents"], given["coefficients"], given["slots"], given["slots"], torch.float16, implementation=form
    )
    assert got.shape == (5, 4, 7, 3)
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_the_ops_keep_the_rules_of_torch_library(arguments):
    from darkroom_kernels.step import kernel

    given = arguments(rows=2)
    # Without its counters' own memory, which is no argument; they are zero before and after.
    torch.library.opcheck(kernel.step_, tuple(given.values()))
    torch.library.opcheck(
        kernel.scale_input,
        (given["latents"], given["coefficients"], given["slots"], given["slots"].new_tensor([1, 0, 1]), torch.bfloat16),
    )


def test_a_compiler_sees_through(arguments):
    given = arguments(rows=3)

    def tick(latents, previous, is_finite):
        given_now = given | {"latents": latents, "previous": previous, "is_finite": is_finite}
        step_(**given_now, implementation="triton")
        slots, coefficients = given["slots"], given["coefficients"]
        return scale_input(latents, coefficients, slots, slots[:1] * 0, torch.float16, implementation="triton") + 1

    eager, traced = ([given[name].clone() for name in IN_PLACE] for _ in range(2))
    expected = tick(*eager)
    assert torch.equal(torch.compile(tick, backend="eager", fullgraph=True)(*traced), expected)
    assert all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["torch", "triton"])
def test_a_graph_steps_again_and_again_with_flags_of_its_own(form):
    """Capture holds no look at a value, and each replay starts from clean flags."""
    given = {name: value.cuda() for name, value in batch_of(height=64, width=64).items()}
    eager = stepped(given, form)
    state = {name: given[name].clone() for name in IN_PLACE}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step_(**given | state, implementation=form)
    for bad_row in (None, 2, None):
        for name in IN_PLACE:
            state[name].copy_(given[name])
        output = given["model_output"].clone()
        if bad_row is not None:
            given["model_output"][bad_row] = torch.nan
        graph.replay()
        given["model_output"].copy_(output)
        assert state["is_finite"].tolist() == [row != bad_row for row in range(5)]
    for name in IN_PLACE:
        assert torch.equal(state[name], eager[name])


def test_a_choice_that_cannot_run_says_why(monkeypatch):
    with pytest.raises(ValueError, match="cuda_graph"):
        step_(**batch_of(), implementation="cuda_graph")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    from darkroom_kernels import backend

    backend.triton_problem.cache_clear()
    backend.uses_triton.cache_clear()
    assert not interprets()
    with pytest.raises(KernelUnavailable, match="TRITON_INTERPRET"):
        step_(**batch_of(), implementation="triton")
    backend.triton_problem.cache_clear()
    backend.uses_triton.cache_clear()
