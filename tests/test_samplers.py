"""Compiled samplers against diffusers' schedulers, which are the definition of what each must do.

A cheap denoiser with a nonlinearity stands in for the UNet; both sides draw initial and fresh noise from a generator
of the same seed. Every table runs through `darkroom_kernels.step`.
"""

import importlib
import logging
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import structlog
import torch
from darkroom.diffusion.samplers import SamplerTable, compile_sampler, default_sampler
from darkroom.diffusion.schedule import NoiseSchedule
from darkroom.errors import InvalidRequest
from darkroom.sampling import (
    SAMPLERS,
    SIGMA_SCHEDULES,
    check_sampling,
    first_step,
    num_evaluations,
    sampler_info,
    supported_sigma_schedules,
)
from darkroom_kernels.step import scale_input, step_
from torch import Tensor

# diffusers and numpy 2 disagree on a keyword of `__array__`; nothing of ours is involved.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHAPE = (1, 4, 4, 4)
STEPS = (1, 2, 3, 5, 20)
COMBINATIONS = [(sampler, sigmas) for sampler in SAMPLERS for sigmas in supported_sigma_schedules(sampler)]
SIGMA_SPACE = ("euler", "euler_a", "heun")
WHEN_GENERATOR = ("ddpm", "euler_a", "dpmpp_2m_sde", "lcm")

# What the table in samplers.py says: class, constructor arguments.
ORACLES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpmpp_2m": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"},
    ),
    "dpmpp_2m_sde": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 2, "solver_type": "midpoint"},
    ),
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 2, "solver_type": "bh2"}),
    "lcm": ("LCMScheduler", {}),
}

STABLE_DIFFUSION = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}

MIXING = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)) * 0.5


@pytest.fixture(autouse=True)
def one_thread_and_quiet_oracle():
    """Each class warns of every setting that it does not know, which is the point of these configurations."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    yield
    torch.set_num_threads(threads)


def denoiser(x: Tensor, timestep: Tensor) -> Tensor:
    mixed = torch.einsum("oc,bchw->bohw", MIXING.to(x.dtype), x)
    return torch.tanh(mixed + 0.3 * torch.cos(timestep.to(x.dtype) / 300))


def oracle_trajectory(
    sampler: str, config: dict[str, Any], steps: int, sigma_schedule: str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Any]:
    class_name, arguments = ORACLES[sampler]
    if sigma_schedule != "simple":
        arguments = arguments | {f"use_{other}_sigmas": other == sigma_schedule for other in SIGMA_SCHEDULES[1:]}
    noise_scheduler = getattr(diffusers, class_name).from_config(config, **arguments)
    noise_scheduler.set_timesteps(steps)
    if hasattr(noise_scheduler, "set_begin_index"):
        # Rounding can make the first two timesteps equal; the classes that look the index up then crash.
        noise_scheduler.set_begin_index(0)
    if dtype is torch.float64:
        noise_scheduler.sigmas = noise_scheduler.sigmas.double()
    generator = torch.Generator().manual_seed(7)
    extra: dict[str, Any] = {"generator": generator} if sampler in WHEN_GENERATOR else {}
    if sampler == "ddim":
        extra = {"use_clipped_model_output": True}
    x = (torch.randn(SHAPE, generator=generator) * noise_scheduler.init_noise_sigma).to(dtype)
    for timestep in noise_scheduler.timesteps:
        model_output = denoiser(noise_scheduler.scale_model_input(x, timestep), timestep)
        x = noise_scheduler.step(model_output, timestep, x, **extra).prev_sample
    return x, noise_scheduler


def run_table(table: SamplerTable) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(SHAPE, generator=generator) * table.initial_scale
    previous = torch.zeros(1, 2, *SHAPE[1:])
    row, no_guidance, is_finite = torch.zeros(1, dtype=torch.int64), torch.ones(1), torch.zeros(1, dtype=torch.bool)
    for i in range(table.num_evaluations):
        line = table.coefficients[i : i + 1]
        noise = torch.randn(SHAPE, generator=generator) if table.needs_noise[i] else None
        model_output = denoiser(scale_input(x, line, row, row, torch.float32), table.timesteps[i])
        step_(x, previous, model_output, row, row, row, no_guidance, line, noise, is_finite)
        assert is_finite.all()
    return x


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def assert_equals_diffusers(
    sampler: str, config: dict[str, Any], steps: int, sigma_schedule: str, tolerance: float
) -> None:
    expected, noise_scheduler = oracle_trajectory(sampler, config, steps, sigma_schedule)
    table = compile_sampler(sampler, NoiseSchedule.from_config(config), steps, sigma_schedule)
    case = (sampler, sigma_schedule, steps, config)
    assert table.num_evaluations == num_evaluations(sampler, steps) == len(noise_scheduler.timesteps), case
    assert torch.allclose(table.timesteps, noise_scheduler.timesteps.float(), rtol=0, atol=1e-3), case
    error = relative_error(run_table(table), expected)
    assert error < tolerance, (error, *case)


@pytest.mark.parametrize(
    ("sampler", "sigma_schedule", "prediction_type"),
    [
        (*combination, prediction_type)
        for combination in COMBINATIONS
        for prediction_type in ("epsilon", "v_prediction", "sample")
        # diffusers' EulerAncestralDiscreteScheduler does not implement sample.
        if (combination[0], prediction_type) != ("euler_a", "sample")
    ],
)
def test_a_trajectory_equals_diffusers(sampler, sigma_schedule, prediction_type):
    for spacing in ("leading", "linspace", "trailing"):
        config = STABLE_DIFFUSION | {"prediction_type": prediction_type, "timestep_spacing": spacing}
        for steps in STEPS:
            assert_equals_diffusers(sampler, config, steps, sigma_schedule, tolerance=1e-4)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize(("sampler", "sigma_schedule"), COMBINATIONS)
def test_a_trajectory_that_starts_later_equals_diffusers(sampler, sigma_schedule, masked):
    """As in image-to-image: clean latents are noised to the first step; with a mask, what is kept is put back after
    every evaluation at the noise of the next one."""
    for prediction_type in ("epsilon", "v_prediction"):
        config = STABLE_DIFFUSION | {"prediction_type": prediction_type, "timestep_spacing": "leading"}
        for steps, strength in ((1, 1.0), (4, 0.3), (5, 0.6), (20, 0.75)):
            expected = late_oracle_trajectory(sampler, config, steps, sigma_schedule, strength, masked=masked)
            first = first_step(steps, strength)
            table = compile_sampler(sampler, NoiseSchedule.from_config(config), steps, sigma_schedule, first)
            assert table.num_evaluations == num_evaluations(sampler, steps, strength)
            assert len(table.levels) == table.num_evaluations + 1
            error = relative_error(run_late_table(table, masked=masked), expected)
            assert error < 1e-4, (error, steps, strength, prediction_type)


CLEAN = 0.5 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
KEPT = torch.rand(SHAPE[2:], generator=torch.Generator().manual_seed(4)) < 0.4


def late_oracle_trajectory(
    sampler: str, config: dict[str, Any], steps: int, sigma_schedule: str, strength: float, *, masked: bool
) -> Tensor:
    class_name, arguments = ORACLES[sampler]
    if sigma_schedule != "simple":
        arguments = arguments | {f"use_{other}_sigmas": other == sigma_schedule for other in SIGMA_SCHEDULES[1:]}
    noise_scheduler = getattr(diffusers, class_name).from_config(config, **arguments)
    noise_scheduler.set_timesteps(steps)
    first = (steps - min(int(steps * strength), steps)) * noise_scheduler.order
    if hasattr(noise_scheduler, "set_begin_index"):
        noise_scheduler.set_begin_index(first)
    timesteps = noise_scheduler.timesteps[first:]
    generator = torch.Generator().manual_seed(7)
    extra: dict[str, Any] = {"generator": generator} if sampler in WHEN_GENERATOR else {}
    if sampler == "ddim":
        extra = {"use_clipped_model_output": True}
    drawn = torch.randn(SHAPE, generator=generator)
    x = noise_scheduler.add_noise(CLEAN, drawn, timesteps[:1])
    for i, timestep in enumerate(timesteps):
        model_output = denoiser(noise_scheduler.scale_model_input(x, timestep), timestep)
        x = noise_scheduler.step(model_output, timestep, x, **extra).prev_sample
        if masked:
            kept = CLEAN
            if i + 1 < len(timesteps):
                kept = noise_scheduler.add_noise(CLEAN, drawn, timesteps[i + 1 : i + 2])
            x = torch.where(KEPT, kept, x)
    return x


def run_late_table(table: SamplerTable, *, masked: bool) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    drawn = torch.randn(SHAPE, generator=generator)
    x = table.levels[0][0] * CLEAN + table.levels[0][1] * drawn
    previous = torch.zeros(1, 2, *SHAPE[1:])
    row, no_guidance, is_finite = torch.zeros(1, dtype=torch.int64), torch.ones(1), torch.zeros(1, dtype=torch.bool)
    for i, (signal, level) in enumerate(table.levels[1:]):
        line = table.coefficients[i : i + 1]
        noise = torch.randn(SHAPE, generator=generator) if table.needs_noise[i] else None
        model_output = denoiser(scale_input(x, line, row, row, torch.float32), table.timesteps[i])
        step_(x, previous, model_output, row, row, row, no_guidance, line, noise, is_finite)
        if masked:
            x = torch.where(KEPT, signal * CLEAN + level * drawn, x)
    return x


@pytest.mark.parametrize(("steps", "strength", "least"), [(4, 0.2, "0.25"), (49, 0.02, "0.0205"), (1, 0.99, "1")])
def test_a_strength_that_leaves_no_step_is_refused_with_the_least_that_does(steps, strength, least):
    with pytest.raises(InvalidRequest, match=f"strength: got {strength}, expected a number from {least} to 1 with"):
        first_step(steps, strength)
    assert first_step(steps, float(least)) == steps - 1


# Settings that published files carry, each laid over a Stable Diffusion file unless it starts afresh.
VARIANTS: dict[str, dict[str, Any]] = {
    "no sampling settings at all": {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
    },
    "clipped to 0.7": STABLE_DIFFUSION | {"clip_sample": True, "clip_sample_range": 0.7},
    "clipped v-prediction": STABLE_DIFFUSION | {"clip_sample": True, "prediction_type": "v_prediction"},
    "zero SNR": STABLE_DIFFUSION
    | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    "ends at sigma_min": STABLE_DIFFUSION | {"final_sigmas_type": "sigma_min"},
    "ends at sigma_min in second order": STABLE_DIFFUSION
    | {"final_sigmas_type": "sigma_min", "lower_order_final": False},
    "ends at sigma_min with euler": STABLE_DIFFUSION | {"final_sigmas_type": "sigma_min", "euler_at_final": True},
    "own sigma range": STABLE_DIFFUSION | {"sigma_min": 0.05, "sigma_max": 9.0},
    "log-linear interpolation": STABLE_DIFFUSION | {"interpolation_type": "log_linear", "timestep_spacing": "leading"},
    "own karras sigmas": STABLE_DIFFUSION | {"use_karras_sigmas": True},
    "own exponential sigmas": STABLE_DIFFUSION | {"use_exponential_sigmas": True},
    "50 trained betas": {
        "trained_betas": [0.0001 + 0.004 * i for i in range(50)],
        "num_train_timesteps": 50,
        "clip_sample": False,
    },
    "linear betas": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "clip_sample": False},
    "large variance": STABLE_DIFFUSION | {"variance_type": "fixed_large"},
    "ends at alpha 1": STABLE_DIFFUSION | {"set_alpha_to_one": True, "steps_offset": 0},
    "some correctors off": STABLE_DIFFUSION | {"disable_corrector": [0, 2]},
    "another solver's settings": STABLE_DIFFUSION | {"solver_order": 3, "solver_type": "heun"},
    "lcm distilled on 25": STABLE_DIFFUSION | {"original_inference_steps": 25, "timestep_scaling": 5.0},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_setting_of_a_file_is_honoured_as_diffusers_would(variant):
    config = VARIANTS[variant]
    for sampler, sigma_schedule in COMBINATIONS:
        # From a zero-SNR schedule's sigma of 4096, or where Heun divides by a tiny next sigma, diffusers itself keeps
        # four digits (x + slope·dt cancels); the float64 test below shows which side is off.
        tolerance = 5e-4 if sampler in SIGMA_SPACE else 1e-5
        for steps in (1, 2, 5, 16):
            assert_equals_diffusers(sampler, config, steps, sigma_schedule, tolerance)


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s not in SIGMA_SPACE])
def test_a_cosine_schedule_equals_diffusers(sampler):
    for config in (
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "clip_sample": False},
        {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1, "clip_sample": False},
    ):
        for sigma_schedule in supported_sigma_schedules(sampler):
            for steps in (1, 3, 8, 20):
                assert_equals_diffusers(sampler, config, steps, sigma_schedule, tolerance=1e-4)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize("sigma_schedule", SIGMA_SCHEDULES)
def test_huge_sigmas_cost_no_precision(sigma_schedule, sampler):
    """A cosine schedule starts at sigma 20000. diffusers run in float64 is the measure: its fp32 run loses 4 %."""
    config = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "clip_sample": False}
    for steps in (3, 8, 20):
        expected, _ = oracle_trajectory(sampler, config, steps, sigma_schedule, torch.float64)
        table = compile_sampler(sampler, NoiseSchedule.from_config(config), steps, sigma_schedule)
        assert relative_error(run_table(table).double(), expected) < 1e-4


def test_long_trajectories_keep_their_digits():
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION)
    for sampler, steps in (("dpmpp_2m", 200), ("unipc", 200), ("euler", 200), ("ddpm", 250)):
        expected, _ = oracle_trajectory(sampler, STABLE_DIFFUSION, steps, "simple")
        assert relative_error(run_table(compile_sampler(sampler, schedule, steps)), expected) < 1e-4


def test_trailing_spacing_never_takes_a_step_too_many():
    """Rounding gives diffusers 62 timesteps for 61 steps, the last one at −1; the row would outlive its count."""
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION | {"timestep_spacing": "trailing"})
    for sampler in SAMPLERS[:-1]:
        table = compile_sampler(sampler, schedule, 61)
        assert table.num_evaluations == num_evaluations(sampler, 61)
        assert float(table.timesteps.min()) >= 0


def test_a_batch_of_strangers_equals_each_alone():
    """Nine rows, nine samplers, nine step indices, three of them without guidance."""
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION)
    generator = torch.Generator().manual_seed(3)
    rows = len(SAMPLERS)
    lines = torch.stack([compile_sampler(s, schedule, 12).coefficients[i + 1] for i, s in enumerate(SAMPLERS)])
    latents, noise = torch.randn(2, rows, 4, 8, 8, generator=generator)
    previous = torch.randn(rows, 2, 4, 8, 8, generator=generator)
    model_output = torch.randn(2 * rows, 4, 8, 8, generator=generator)
    cond = torch.arange(rows)
    guided = cond % 3 > 0
    uncond = torch.where(guided, cond + rows, cond)
    guidance_scale = torch.where(guided, 1.5 + cond, torch.ones(rows))
    per_row = (cond, uncond, guidance_scale, lines, noise)

    def stepped(some: slice) -> tuple[Tensor, Tensor]:
        after = latents.clone(), previous.clone()
        chosen = [values[some] for values in per_row]
        step_(*after, model_output, cond[some], *chosen, torch.zeros(len(chosen[0]), dtype=torch.bool))
        return after

    together = stepped(slice(None))
    for row in range(rows):
        for crowd, single in zip(together, stepped(slice(row, row + 1)), strict=True):
            torch.testing.assert_close(crowd[row], single[row], rtol=1e-6, atol=1e-6)


def test_needs_noise_says_where_diffusers_draws(monkeypatch):
    config = STABLE_DIFFUSION | {"timestep_spacing": "leading", "steps_offset": 0}
    for sampler in SAMPLERS:
        module = importlib.import_module(getattr(diffusers, ORACLES[sampler][0]).__module__)
        draws: list[int] = []
        if hasattr(module, "randn_tensor"):
            monkeypatch.setattr(module, "randn_tensor", _counting(module.randn_tensor, draws))
        oracle_trajectory(sampler, config, 6, "simple")
        table = compile_sampler(sampler, NoiseSchedule.from_config(config), 6)
        assert sum(table.needs_noise) == len(draws), sampler
        assert any(table.needs_noise) == sampler_info(sampler).draws_noise


def _counting(function: Callable[..., Tensor], draws: list[int]) -> Callable[..., Tensor]:
    def counted(*args: Any, **kwargs: Any) -> Tensor:
        draws.append(1)
        return function(*args, **kwargs)

    return counted


def test_tables_are_cached_per_checkpoint():
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION)
    assert compile_sampler("unipc", schedule, 8) is compile_sampler("unipc", schedule, 8)
    assert compile_sampler("unipc", schedule, 8) is not compile_sampler(
        "unipc", NoiseSchedule.from_config(STABLE_DIFFUSION), 8
    )


@pytest.mark.parametrize(
    ("sampler", "steps", "sigma_schedule", "field", "accepted"),
    [
        ("plms", 20, "simple", "sampler", "one of ddpm, ddim"),
        ("euler", 20, "polyexponential", "sigma_schedule", "one of simple, karras, exponential"),
        ("ddim", 20, "karras", "sigma_schedule", "one of simple with sampler ddim"),
        ("euler_a", 20, "exponential", "sigma_schedule", "one of simple with sampler euler_a"),
        ("euler", 0, "simple", "num_inference_steps", "1 to 1000"),
        ("euler", 1001, "simple", "num_inference_steps", "1 to 1000"),
        ("lcm", 51, "simple", "num_inference_steps", "1 to 50 with sampler lcm"),
        ("dpmpp_2m", 1000, "simple", "num_inference_steps", "fewer"),
        ("unipc", 1000, "simple", "num_inference_steps", "fewer"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_by_field(sampler, steps, sigma_schedule, field, accepted):
    with pytest.raises(InvalidRequest) as caught:
        compile_sampler(sampler, NoiseSchedule.from_config(STABLE_DIFFUSION), steps, sigma_schedule)
    assert caught.value.field == field
    assert accepted in caught.value.accepted


def test_a_sampler_that_would_divide_by_zero_is_refused():
    """No noise can be told from a signal of 0: an epsilon model with zero SNR, from its last timestep on."""
    config = STABLE_DIFFUSION | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    schedule = NoiseSchedule.from_config(config)
    for sampler in ("ddim", "ddpm", "lcm"):
        with pytest.raises(InvalidRequest, match="divide by zero"):
            compile_sampler(sampler, schedule, 10)
    assert compile_sampler("euler", schedule, 10).initial_scale == pytest.approx(4096)


def test_steps_that_start_after_the_last_training_timestep_are_refused():
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION | {"timestep_spacing": "leading"})
    with pytest.raises(InvalidRequest, match="fewer"):
        compile_sampler("ddim", schedule, 1000)


def test_what_the_api_knows_agrees_with_the_tables():
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION)
    for sampler in SAMPLERS:
        assert sampler_info(sampler).description
        for sigma_schedule in SIGMA_SCHEDULES:
            if sigma_schedule in supported_sigma_schedules(sampler):
                check_sampling(sampler, sigma_schedule)
                table = compile_sampler(sampler, schedule, 7, sigma_schedule)
                assert table.num_evaluations == num_evaluations(sampler, 7)
            else:
                with pytest.raises(InvalidRequest):
                    check_sampling(sampler, sigma_schedule)
    with pytest.raises(InvalidRequest):
        num_evaluations("euler", 0)


@pytest.mark.parametrize(
    ("class_name", "sampler"),
    [
        ("DDPMScheduler", "ddpm"),
        ("DDIMScheduler", "ddim"),
        ("EulerDiscreteScheduler", "euler"),
        ("EulerAncestralDiscreteScheduler", "euler_a"),
        ("HeunDiscreteScheduler", "heun"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m"),
        ("UniPCMultistepScheduler", "unipc"),
        ("LCMScheduler", "lcm"),
    ],
)
def test_a_checkpoint_is_sampled_as_its_file_says(class_name, sampler):
    assert default_sampler({"_class_name": class_name}) == sampler


def test_a_stochastic_dpm_solver_file_is_sampled_stochastically():
    config = {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}
    assert default_sampler(config) == "dpmpp_2m_sde"


def test_a_sampler_we_do_not_offer_becomes_dpmpp_2m_and_is_logged():
    with structlog.testing.capture_logs() as logs:
        assert default_sampler({"_class_name": "PNDMScheduler"}) == "dpmpp_2m"
    assert "PNDMScheduler" in str(logs)
