"""The step: guidance, network output → denoised, solver update, per row."""

import pytest
import torch
from darkroom_kernels.step import (
    A_D,
    A_D1,
    A_D2,
    A_NOISE,
    A_X,
    C_OUT,
    C_SKIP,
    CLAMP,
    NUM_COLUMNS,
    StepUnavailable,
    step,
)
from darkroom_kernels.step.reference import step_reference


def arguments(rows=5, channels=4, height=7, width=3, dtype=torch.float32, noise=True):
    """A batch in which rows 0 and 3 are not guided, and rows 1 and 3 are clamped."""
    generator = torch.Generator().manual_seed(rows)
    plane = (channels, height, width)
    rows_cond = torch.arange(rows)
    is_guided = rows_cond % 3 > 0
    coefficients = torch.randn(rows, NUM_COLUMNS, generator=generator)
    coefficients[:, CLAMP] = (rows_cond % 2) * 0.8
    return {
        "latents": torch.randn(rows, *plane, generator=generator),
        "model_output": torch.randn(2 * rows, *plane, generator=generator).to(dtype),
        "rows_cond": rows_cond,
        "rows_uncond": torch.where(is_guided, rows_cond + rows, rows_cond),
        "guidance_scale": torch.where(is_guided, torch.tensor(7.5), torch.tensor(1.0)),
        "coefficients": coefficients,
        "previous": torch.randn(rows, 2, *plane, generator=generator),
        "noise": torch.randn(rows, *plane, generator=generator) if noise else None,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("noise", [True, False], ids=["noise", "no noise"])
@pytest.mark.parametrize("rows", [1, 5])
def test_the_lean_step_equals_the_written_out_one(rows, noise, dtype):
    given = arguments(rows=rows, noise=noise, dtype=dtype)
    for got, expected in zip(step(**given), step_reference(**given), strict=True):
        assert got.dtype is torch.float32
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_strides_do_not_matter():
    given = arguments(channels=8)
    expected = step(**given)
    strided = given | {
        "latents": given["latents"].to(memory_format=torch.channels_last),
        "model_output": given["model_output"].to(memory_format=torch.channels_last),
        "previous": given["previous"].transpose(0, 1).contiguous().transpose(0, 1),
    }
    for got, wanted in zip(step(**strided), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


def test_one_number_worked_by_hand():
    line = torch.zeros(1, NUM_COLUMNS)
    for column, value in ((C_SKIP, 2.0), (C_OUT, -1.0), (CLAMP, 4.0), (A_X, 0.5), (A_D, 3.0)):
        line[:, column] = value
    for column, value in ((A_D1, 10.0), (A_D2, 100.0), (A_NOISE, 1000.0)):
        line[:, column] = value
    latents_next, denoised = step(
        latents=torch.full((1, 1, 1, 1), 1.0),
        model_output=torch.tensor([-1.0, 0.5]).reshape(2, 1, 1, 1),
        rows_cond=torch.tensor([0]),
        rows_uncond=torch.tensor([1]),
        guidance_scale=torch.tensor([3.0]),
        coefficients=line,
        previous=torch.tensor([0.1, 0.02]).reshape(1, 2, 1, 1, 1),
        noise=torch.full((1, 1, 1, 1), 0.003),
    )
    # noise_pred = 0.5 + 3·(−1 − 0.5) = −4; denoised = 2·1 + 4 = 6, clamped to 4.
    assert denoised.item() == 4.0
    assert latents_next.item() == pytest.approx(0.5 + 12 + 1 + 2 + 3)


def test_a_row_without_guidance_sees_the_network_output_exactly():
    given = arguments(rows=4)
    given["coefficients"] = torch.zeros(4, NUM_COLUMNS)
    given["coefficients"][:, C_OUT] = 1
    _, denoised = step(**given)
    for row in (0, 3):
        assert torch.equal(denoised[row], given["model_output"][row])


def test_inputs_are_left_alone():
    given = arguments()
    before = {name: value.clone() for name, value in given.items()}
    step(**given)
    assert all(torch.equal(given[name], before[name]) for name in given)


def test_a_nan_is_passed_on_and_not_clamped_away():
    """A row that went wrong must be seen to have; its neighbours must not notice."""
    given = arguments()
    given["model_output"][1, 0, 0, 0] = torch.nan
    latents_next, denoised = step(**given)
    assert not denoised[1].isfinite().all()
    assert not latents_next[1].isfinite().all()
    others = torch.tensor([0, 2, 3, 4])
    assert latents_next[others].isfinite().all()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("latents", torch.zeros(5, 4, 7)),
        ("latents", torch.zeros(5, 4, 7, 3, dtype=torch.float64)),
        ("model_output", torch.zeros(10, 4, 7, 4)),
        ("model_output", torch.zeros(10, 4, 7, 3, dtype=torch.int64)),
        ("rows_cond", torch.zeros(5, dtype=torch.int32)),
        ("rows_uncond", torch.zeros(4, dtype=torch.int64)),
        ("guidance_scale", torch.zeros(5, 1)),
        ("coefficients", torch.zeros(5, NUM_COLUMNS - 1)),
        ("previous", torch.zeros(5, 1, 4, 7, 3)),
        ("noise", torch.zeros(1, 4, 7, 3)),
    ],
)
def test_a_wrong_argument_is_named(name, wrong):
    with pytest.raises(ValueError, match=name):
        step(**arguments() | {name: wrong})


def test_validation_never_waits_for_the_device():
    """Meta tensors have no values, so reading one would fail here as it would stall on a GPU."""
    given = {name: value.to("meta") for name, value in arguments().items()}
    latents_next, denoised = step(**given)
    assert latents_next.shape == denoised.shape == given["latents"].shape


def test_a_choice_that_cannot_run_says_why():
    assert step(**arguments(), implementation="torch")[0].isfinite().all()
    with pytest.raises(StepUnavailable, match="no Triton kernel"):
        step(**arguments(), implementation="triton")
    with pytest.raises(ValueError, match="cuda_graph"):
        step(**arguments(), implementation="cuda_graph")
