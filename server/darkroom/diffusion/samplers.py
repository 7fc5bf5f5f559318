"""Samplers compiled to coefficient tables: one line is one UNet evaluation.

Every sampler here is linear in (x, denoised, the two denoised before it, fresh noise), so a whole trajectory is a
table that `darkroom_kernels.step` reads a line of. Each equals a diffusers class, built by
`Class.from_config(scheduler_config, ...)` with the arguments below; whatever else the checkpoint's file says (spacing,
steps_offset, clip_sample, final_sigmas_type, lower_order_final ...) is honoured as that class would honour it.

sampler       diffusers class                   arguments
ddpm          DDPMScheduler                     none (a fixed variance_type of the file is honoured)
ddim          DDIMScheduler                     step(eta=0.0, use_clipped_model_output=True)
euler         EulerDiscreteScheduler            none
euler_a       EulerAncestralDiscreteScheduler   none
heun          HeunDiscreteScheduler             none
dpmpp_2m      DPMSolverMultistepScheduler       algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint"
dpmpp_2m_sde  DPMSolverMultistepScheduler       algorithm_type="sde-dpmsolver++", solver_order=2, solver_type="midpoint"
unipc         UniPCMultistepScheduler           solver_order=2, solver_type="bh2", predict_x0=True
lcm           LCMScheduler                      none

`sigma_schedule` karras and exponential are `use_karras_sigmas=True` and `use_exponential_sigmas=True`; simple passes
neither, so the file decides. euler, euler_a and heun keep latents as x = x₀ + σ·noise and scale the network's input;
the others keep the variance preserved, x = √ᾱ·x₀ + √(1−ᾱ)·noise.

On purpose not as there: N steps are always N steps (trailing spacing yields one more there for some N, at timestep −1);
equal neighbouring timesteps do not confuse the step count; betas that a file leaves out are its own class's, never
the sampler's; what would come out as NaN is refused by name; euler_a takes prediction_type sample.
A table may start at a later step, as image-to-image does: solvers then begin there without a history, as there.
As there, though odd: heun knows no zero-SNR rescaling; ddim strides evenly whatever the spacing; dpmpp_2m and unipc
truncate exponential sigmas' timesteps; clip_sample left out means clipping for ddpm and ddim, and only for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import structlog
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
    INPUT_SCALE,
    NUM_COLUMNS,
)
from numpy.typing import NDArray
from torch import Tensor

from darkroom.diffusion.schedule import (
    Float64Array,
    NoiseSchedule,
    exponential_sigmas,
    karras_sigmas,
    spaced_timesteps,
    timesteps_of,
)
from darkroom.errors import InvalidRequest, shorten
from darkroom.sampling import SAMPLERS, SIGMA_SCHEDULES, check_sampling, num_evaluations, supported_sigma_schedules

__all__ = [
    "SAMPLERS",
    "SIGMA_SCHEDULES",
    "SamplerTable",
    "compile_sampler",
    "default_sampler",
    "num_evaluations",
]

log = structlog.get_logger("darkroom.diffusion")


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """A compiled trajectory of E evaluations. Tables are cached and shared: read only.

    `coefficients` `[E, NUM_COLUMNS]` fp32 on the CPU; `timesteps` `[E]` fp32, what the network embeds, fractional for
    some samplers. Initial latents are standard noise times `initial_scale`. `levels[i]` is (a, b) such that clean
    latents x₀ are at evaluation i as a·x₀ + b·noise; there are E + 1, the last one (1, 0). `needs_noise[i]`: evaluation
    i consumes one draw of the latents' shape from the row's generator, in this order, after the initial latents' draw;
    a draw may have coefficient 0 (it keeps the generator where diffusers' would be).
    """

    coefficients: Tensor
    timesteps: Tensor
    initial_scale: float
    levels: tuple[tuple[float, float], ...]
    needs_noise: tuple[bool, ...]

    @property
    def num_evaluations(self) -> int:
        return len(self.needs_noise)


@lru_cache(maxsize=1024)
def compile_sampler(
    sampler: str,
    schedule: NoiseSchedule,
    num_inference_steps: int,
    sigma_schedule: str = "simple",
    first_step: int = 0,
) -> SamplerTable:
    """Compile a sampler for a checkpoint's noise schedule. Cached by (schedule object, other arguments).

    The trajectory has the steps from `first_step` (0 ≤ first_step < num_inference_steps) on. Raises `InvalidRequest` on
    an unknown name, an invalid combination, or a step count that the schedule or the sampler cannot take.
    """
    check_sampling(sampler, sigma_schedule)
    if not 1 <= num_inference_steps <= schedule.num_train_timesteps:
        raise InvalidRequest("num_inference_steps", num_inference_steps, f"1 to {schedule.num_train_timesteps}")
    if not 0 <= first_step < num_inference_steps:
        raise ValueError(f"first_step: expected 0 to {num_inference_steps - 1}, got {first_step}")
    if sigma_schedule == "simple" and schedule.own_sigmas != "simple":
        own = schedule.own_sigmas
        sigma_schedule = own if own in supported_sigma_schedules(sampler) else "simple"
    # A zero or a huge signal-to-noise ratio can overflow; `_finish` turns that into one clear refusal.
    with np.errstate(all="ignore"):
        if sampler in ("ddim", "ddpm"):
            return _compile_ancestral(sampler, schedule, num_inference_steps, first_step)
        if sampler == "lcm":
            return _compile_lcm(schedule, num_inference_steps, first_step)
        if sampler in ("euler", "euler_a", "heun"):
            return _compile_sigma_space(sampler, schedule, num_inference_steps, sigma_schedule, first_step)
        return _compile_log_snr(sampler, schedule, num_inference_steps, sigma_schedule, first_step)


def default_sampler(scheduler_config: Mapping[str, Any]) -> str:
    """The sampler that a checkpoint's `scheduler_config.json` names, else dpmpp_2m, which is logged."""
    name = str(scheduler_config.get("_class_name"))
    if name == "DPMSolverMultistepScheduler":
        stochastic = str(scheduler_config.get("algorithm_type")).startswith("sde-")
        return "dpmpp_2m_sde" if stochastic else "dpmpp_2m"
    if name in _SAMPLER_OF_CLASS:
        return _SAMPLER_OF_CLASS[name]
    log.info("sampler_not_offered", noise_scheduler=shorten(name), default_sampler="dpmpp_2m")
    return "dpmpp_2m"


_SAMPLER_OF_CLASS = {
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "HeunDiscreteScheduler": "heun",
    "UniPCMultistepScheduler": "unipc",
    "LCMScheduler": "lcm",
}


def _compile_ancestral(
    sampler: str, schedule: NoiseSchedule, num_inference_steps: int, first_step: int
) -> SamplerTable:
    """ddim and ddpm: from ᾱ at one timestep to ᾱ at another. Source: Song et al. 2020; Ho et al. 2020."""
    total = schedule.num_train_timesteps
    timesteps = spaced_timesteps(
        schedule, num_inference_steps, schedule.timestep_spacing or "leading", drop_last=False, fractional=False
    ).astype(np.int64)
    if timesteps[0] >= total:
        raise InvalidRequest("num_inference_steps", num_inference_steps, f"fewer, with {sampler} on this checkpoint")
    if sampler == "ddim":
        # Equal strides whatever the spacing is, as in diffusers; the last lands before timestep 0.
        next_timesteps = timesteps - total // num_inference_steps
        final = 1.0 if schedule.set_alpha_to_one else schedule.alphas_cumprod[0]
    else:
        next_timesteps = np.append(timesteps[1:], -1)
        final = 1.0
    now = schedule.alphas_cumprod[timesteps]
    after = np.where(next_timesteps >= 0, schedule.alphas_cumprod[next_timesteps], final)

    table = _network_columns(schedule, np.sqrt(now), np.sqrt(1 - now))
    table[:, CLAMP] = _clamp(schedule, by_default=True)
    if sampler == "ddim":
        table[:, A_X] = np.sqrt((1 - after) / (1 - now))
        table[:, A_D] = np.sqrt(after) - table[:, A_X] * np.sqrt(now)
        draws = np.zeros(num_inference_steps, dtype=bool)
    else:
        kept = now / after
        table[:, A_X] = np.sqrt(kept) * (1 - after) / (1 - now)
        table[:, A_D] = np.sqrt(after) * (1 - kept) / (1 - now)
        large = schedule.variance_type == "fixed_large"
        variance = 1 - kept if large else np.maximum((1 - after) / (1 - now) * (1 - kept), 1e-20)
        draws = timesteps > 0
        table[:, A_NOISE] = np.where(draws, np.sqrt(variance), 0)
    return _finish(sampler, table, timesteps, 1.0, np.sqrt(now), np.sqrt(1 - now), draws, first_step)


def _compile_lcm(schedule: NoiseSchedule, num_inference_steps: int, first_step: int) -> SamplerTable:
    """Jump to the consistency function's x₀, noise it to the next timestep. Source: Luo et al. 2023, Algorithm 3."""
    original_steps = schedule.original_inference_steps
    if original_steps > schedule.num_train_timesteps:
        raise InvalidRequest("sampler", "lcm", "another one: this checkpoint has too few training timesteps for it")
    if num_inference_steps > original_steps:
        raise InvalidRequest("num_inference_steps", num_inference_steps, f"1 to {original_steps} with sampler lcm")
    stride = schedule.num_train_timesteps // original_steps
    distilled = (np.arange(1, original_steps + 1) * stride - 1)[::-1]
    chosen = np.floor(np.linspace(0, original_steps, num_inference_steps, endpoint=False)).astype(np.int64)
    timesteps = distilled[chosen]
    now = schedule.alphas_cumprod[timesteps]
    after = np.append(now[1:], 1.0)

    table = _network_columns(schedule, np.sqrt(now), np.sqrt(1 - now))
    table[:, CLAMP] = _clamp(schedule, by_default=False)
    # Boundary condition: the function is the identity at timestep 0. 0.5 is the data's assumed standard deviation.
    scaled = timesteps * schedule.timestep_scaling
    table[:, A_X] = np.sqrt(after) * 0.25 / (scaled**2 + 0.25)
    table[:, A_D] = np.sqrt(after) * scaled / np.sqrt(scaled**2 + 0.25)
    table[:, A_NOISE] = np.sqrt(1 - after)
    draws = np.arange(num_inference_steps) < num_inference_steps - 1
    return _finish("lcm", table, timesteps, 1.0, np.sqrt(now), np.sqrt(1 - now), draws, first_step)


def _compile_sigma_space(
    sampler: str, schedule: NoiseSchedule, num_inference_steps: int, sigma_schedule: str, first_step: int
) -> SamplerTable:
    """euler, euler_a and heun, on x = x₀ + σ·noise. Source: Karras et al. 2022, Algorithm 1 without churn."""
    spacing = schedule.timestep_spacing or "linspace"
    timesteps = spaced_timesteps(schedule, num_inference_steps, spacing, drop_last=False, fractional=True)
    # diffusers' Heun knows no zero-SNR rescaling and takes the schedule as it was.
    training = schedule.sigmas(plain=sampler == "heun")
    visited = np.interp(timesteps, np.arange(len(training)), training)
    final = 0.0
    if sampler == "euler":
        final = training[0] if schedule.final_sigmas_type == "sigma_min" else 0.0
        if schedule.interpolation_type == "log_linear":
            high, low = np.log(training[-1]), np.log(training[0])
            visited = torch.linspace(high, low, num_inference_steps + 1).exp().numpy().astype(np.float64)
            if sigma_schedule == "simple":
                visited, final = visited[:-1], visited[-1]
    if sigma_schedule != "simple":
        visited = _respaced(schedule, sigma_schedule, visited[0], visited[-1], num_inference_steps)
        timesteps = timesteps_of(visited, training)
    sigmas = _ladder(visited, final, num_inference_steps)

    initial_scale = sigmas[0] if spacing in ("linspace", "trailing") else math.hypot(sigmas[0], 1)
    now, after = sigmas[:-1], sigmas[1:]
    if sampler == "heun":
        # Evaluations 1, 3, 5 ... are the second stage of the step before them, at the sigma it arrived at.
        evaluations = np.repeat(np.arange(num_inference_steps), 2)[1:]
        now, timesteps = now[evaluations], timesteps[evaluations]
    alpha = 1 / np.sqrt(now**2 + 1)
    table = _network_columns(schedule, alpha, now * alpha)
    table[:, INPUT_SCALE] = alpha
    table[:, C_SKIP] *= alpha
    if sampler == "euler":
        table[:, A_X] = after / now
        table[:, A_D] = 1 - after / now
    elif sampler == "euler_a":
        down = after**2 / now
        table[:, A_X] = down / now
        table[:, A_D] = 1 - down / now
        table[:, A_NOISE] = np.sqrt(np.maximum(after**2 - down**2, 0))
    else:
        table[:, CLAMP] = _clamp(schedule, by_default=False)
        ratio = sigmas[1:] / sigmas[:-1]
        table[0::2, A_X] = ratio
        table[0::2, A_D] = 1 - ratio
        # The average of both slopes over the step, written as a correction of the first stage's result: putting
        # x = (x' − (1−r)·d') / r into Heun's rule leaves x' with coefficient 1, so nothing is divided by a small r.
        table[1::2, A_X] = 1
        table[1::2, A_D] = (1 - ratio[:-1]) / (2 * ratio[:-1])
        table[1::2, A_D1] = -table[1::2, A_D]
    draws = np.full(len(table), sampler == "euler_a")
    # Each step but the first has two evaluations, and the first of both is where a trajectory may start.
    first = 2 * first_step if sampler == "heun" else first_step
    return _finish(sampler, table, timesteps, float(initial_scale), np.ones_like(now), now, draws, first)


def _compile_log_snr(
    sampler: str, schedule: NoiseSchedule, num_inference_steps: int, sigma_schedule: str, first_step: int
) -> SamplerTable:
    """dpmpp_2m, dpmpp_2m_sde and unipc: exact in the linear part, in steps of λ = log(√ᾱ/√(1−ᾱ)) = −log σ.

    Source: Lu et al. 2022 (DPM-Solver++), Algorithm 2 and its SDE variant; Zhao et al. 2023 (UniPC), Algorithms 1, 2.
    """
    training = schedule.sigmas()
    final = training[0]
    if sigma_schedule == "simple":
        spacing = schedule.timestep_spacing or "linspace"
        clipped = sampler != "unipc"
        timesteps = spaced_timesteps(
            schedule, num_inference_steps, spacing, drop_last=True, fractional=False, clipped=clipped
        )
        visited = np.interp(timesteps, np.arange(len(training)), training)
    else:
        visited = _respaced(schedule, sigma_schedule, training[-1], training[0], num_inference_steps)
        timesteps = timesteps_of(visited, training)
        # diffusers' classes store whole timesteps: some roundings are explicit, the others truncate.
        cosine = schedule.beta_schedule == "squaredcos_cap_v2"
        rounds = sigma_schedule == "karras" and (sampler == "unipc" or not cosine)
        timesteps = np.round(timesteps) if rounds else np.trunc(timesteps)
        if sampler == "unipc":
            final = visited[-1]
    sigmas = _ladder(visited, final if schedule.final_sigmas_type == "sigma_min" else 0.0, num_inference_steps)

    alpha = 1 / np.sqrt(sigmas**2 + 1)
    table = _network_columns(schedule, alpha[:-1], (sigmas * alpha)[:-1])
    if sampler == "unipc":
        _fill_unipc(table, schedule, sigmas, alpha, first_step)
    else:
        _fill_dpmpp_2m(table, schedule, sigmas, alpha, first_step, stochastic=sampler == "dpmpp_2m_sde")
    draws = np.full(num_inference_steps, sampler == "dpmpp_2m_sde")
    return _finish(sampler, table, timesteps, 1.0, alpha[:-1], (sigmas * alpha)[:-1], draws, first_step)


def _fill_dpmpp_2m(
    table: Float64Array,
    schedule: NoiseSchedule,
    sigmas: Float64Array,
    alpha: Float64Array,
    first_step: int,
    *,
    stochastic: bool,
) -> None:
    steps = len(table)
    ratio = sigmas[1:] / sigmas[:-1]  # e^(−h)
    if stochastic:
        table[:, A_X] = ratio**2 * alpha[1:] / alpha[:-1]
        gain = alpha[1:] * (1 - ratio**2)
        table[:, A_NOISE] = sigmas[1:] * alpha[1:] * np.sqrt(1 - ratio**2)
    else:
        table[:, A_X] = ratio * alpha[1:] / alpha[:-1]
        gain = alpha[1:] * (1 - ratio)
    slope = 0.5 * gain * _step_ratios(sigmas)
    slope[first_step] = 0
    short = schedule.lower_order_final and steps < 15
    if schedule.euler_at_final or short or schedule.final_sigmas_type == "zero":
        slope[-1] = 0
    table[:, A_D] = gain + slope
    table[:, A_D1] = -slope


def _fill_unipc(
    table: Float64Array, schedule: NoiseSchedule, sigmas: Float64Array, alpha: Float64Array, first_step: int
) -> None:
    steps = len(table)
    ratio = sigmas[1:] / sigmas[:-1]
    step_ratios = _step_ratios(sigmas)
    order = np.where(np.arange(steps) > first_step, 2, 1)
    if schedule.lower_order_final:
        order[-1] = 1
    for i in range(first_step, steps):
        # The corrected sample, in terms of what the step holds: x, denoised, and the two denoised before it.
        corrected = np.array([1.0, 0.0, 0.0, 0.0])
        if i > first_step and i - 1 not in schedule.disable_corrector:
            corrected += _unipc_correction(
                alpha[i] * (ratio[i - 1] - 1), math.log(ratio[i - 1]), step_ratios[i - 1], int(order[i - 1])
            )
        gain = alpha[i + 1] * (1 - ratio[i])
        slope = 0.5 * gain * step_ratios[i] if order[i] == 2 else 0.0
        update = ratio[i] * alpha[i + 1] / alpha[i] * corrected + np.array([0.0, gain + slope, -slope, 0.0])
        table[i, [A_X, A_D, A_D1, A_D2]] = update


def _unipc_correction(scale: float, log_ratio: float, step_ratio: float, order: int) -> Float64Array:
    """What UniC adds to the predicted sample, as coefficients of (x, denoised, denoised before, the one before that).

    Predictor and corrector share the terms in the last sample, so their difference needs it not. `scale` is
    α·B(h) with B(h) = e^(−h) − 1; `log_ratio` is −h of the step that led here; `step_ratio` h over the h before it.
    """
    if order == 1:
        return np.array([0.0, -0.5 * scale, 0.5 * scale, 0.0])
    growth = math.expm1(log_ratio)
    phi_2 = growth / log_ratio - 1
    phi_3 = phi_2 / log_ratio - 0.5
    position = -1 / step_ratio
    older, newest = np.linalg.solve([[1.0, 1.0], [position, 1.0]], [phi_2 / growth, 2 * phi_3 / growth])
    slope = (0.5 - older) / position
    return np.array([0.0, -newest * scale, (newest - slope) * scale, slope * scale])


def _step_ratios(sigmas: Float64Array) -> Float64Array:
    """Each step's length in log σ over the length of the one before it, `[steps]`; the first is not meaningful."""
    lengths = np.log(sigmas[:-1] / sigmas[1:])
    ratios: Float64Array = lengths / np.append(np.inf, lengths[:-1])
    return ratios


def _network_columns(schedule: NoiseSchedule, alpha: Float64Array, sigma: Float64Array) -> Float64Array:
    """A zero table `[E, NUM_COLUMNS]` with network output → denoised filled in, for x = alpha·x₀ + sigma·noise."""
    table = np.zeros((len(alpha), NUM_COLUMNS))
    table[:, INPUT_SCALE] = 1
    if schedule.prediction_type == "epsilon":
        table[:, C_SKIP], table[:, C_OUT] = 1 / alpha, -sigma / alpha
    elif schedule.prediction_type == "v_prediction":
        table[:, C_SKIP], table[:, C_OUT] = alpha, -sigma
    else:
        table[:, C_OUT] = 1
    return table


def _clamp(schedule: NoiseSchedule, *, by_default: bool) -> float:
    clip = by_default if schedule.clip_sample is None else schedule.clip_sample
    return schedule.clip_sample_range if clip else 0.0


def _respaced(
    schedule: NoiseSchedule, sigma_schedule: str, sigma_max: float, sigma_min: float, count: int
) -> Float64Array:
    """The karras or exponential sigmas of a range; the file's own sigma_min and sigma_max win."""
    high = float(sigma_max) if schedule.sigma_max is None else schedule.sigma_max
    low = float(sigma_min) if schedule.sigma_min is None else schedule.sigma_min
    return karras_sigmas(high, low, count) if sigma_schedule == "karras" else exponential_sigmas(high, low, count)


def _ladder(visited: Float64Array, final: float, num_inference_steps: int) -> Float64Array:
    """Sigmas `[num_inference_steps + 1]`, the last one `final`, rounded to fp32 as diffusers keeps them."""
    sigmas = np.append(visited, final).astype(np.float32).astype(np.float64)
    if np.any(np.diff(sigmas[:-1]) >= 0) or sigmas[-1] > sigmas[-2]:
        raise InvalidRequest(
            "num_inference_steps", num_inference_steps, "fewer, for this checkpoint's timestep spacing"
        )
    return sigmas


def _finish(
    sampler: str,
    table: Float64Array,
    timesteps: NDArray[Any],
    initial_scale: float,
    signal: Float64Array,
    noise: Float64Array,
    draws: NDArray[np.bool_],
    first: int,
) -> SamplerTable:
    """The evaluations from the `first` on; clean latents x₀ are at each as signal·x₀ + noise·ε."""
    coefficients = torch.from_numpy(table[first:].astype(np.float32))
    levels = np.column_stack([signal, noise])[first:]
    if not bool(coefficients.isfinite().all()) or not np.isfinite(levels).all():
        raise InvalidRequest(
            "sampler", sampler, "another one: this checkpoint's noise schedule makes it divide by zero"
        )
    return SamplerTable(
        coefficients=coefficients,
        timesteps=torch.from_numpy(np.asarray(timesteps[first:], dtype=np.float32)),
        initial_scale=initial_scale,
        levels=(*((float(a), float(b)) for a, b in levels), (1.0, 0.0)),
        needs_noise=tuple(bool(draw) for draw in draws[first:]),
    )
