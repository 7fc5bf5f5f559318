"""What a client may ask of a sampler, known without torch: names, descriptions, costs and valid combinations.

The mathematics is in `darkroom.diffusion.samplers`. This file is what the API, the cost model and the model cards read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from darkroom.errors import InvalidRequest

SIGMA_SCHEDULES: tuple[str, ...] = ("simple", "karras", "exponential")
"""`simple` is the checkpoint's own spacing; the others replace it, as `use_karras_sigmas` etc. do in diffusers."""

LCM_ORIGINAL_STEPS = 50
"""Steps of the schedule that latent consistency models are distilled on, unless a checkpoint says otherwise."""


@dataclass(frozen=True)
class SamplerInfo:
    """One sampler as a client sees it.

    `draws_noise`: fresh noise enters after the first evaluation, so pictures keep changing as steps are added.
    `sigma_schedules`: the accepted values of `sigma_schedule`.
    """

    description: str
    sigma_schedules: tuple[str, ...] = ("simple",)
    draws_noise: bool = False


_SAMPLER_INFOS: dict[str, SamplerInfo] = {
    "ddpm": SamplerInfo("The ancestral sampler a model is trained for; wants many steps.", draws_noise=True),
    "ddim": SamplerInfo("Deterministic, first order (eta 0); the classic baseline."),
    "euler": SamplerInfo("Deterministic, first order; dependable at 20 to 30 steps.", SIGMA_SCHEDULES),
    "euler_a": SamplerInfo("Euler with fresh noise at each step; lively, never settles.", draws_noise=True),
    "heun": SamplerInfo("Deterministic, second order; two evaluations per step.", SIGMA_SCHEDULES),
    "dpmpp_2m": SamplerInfo("DPM-Solver++ 2M: second order at one evaluation per step; 15 to 25.", SIGMA_SCHEDULES),
    "dpmpp_2m_sde": SamplerInfo(
        "DPM-Solver++ 2M with fresh noise at each step; rich detail from 20 steps.", SIGMA_SCHEDULES, draws_noise=True
    ),
    "unipc": SamplerInfo("UniPC: predictor and corrector, second order; good from 8 steps.", SIGMA_SCHEDULES),
    "lcm": SamplerInfo("For latent consistency models only: 1 to 8 steps.", draws_noise=True),
}

SAMPLERS: tuple[str, ...] = tuple(_SAMPLER_INFOS)


def sampler_info(sampler: str) -> SamplerInfo:
    """Look a sampler up. Raises `InvalidRequest` on an unknown name."""
    try:
        return _SAMPLER_INFOS[sampler]
    except KeyError:
        raise InvalidRequest("sampler", sampler, f"one of {', '.join(SAMPLERS)}") from None


def supported_sigma_schedules(sampler: str) -> tuple[str, ...]:
    """The sigma schedules a sampler accepts. Raises `InvalidRequest` on an unknown name."""
    return sampler_info(sampler).sigma_schedules


def num_evaluations(sampler: str, num_inference_steps: int, strength: float = 1.0) -> int:
    """UNet evaluations of one image, of N steps 2N − 1 for heun (its last step is first order), N for all others; with
    a `strength` below 1 of the last N·strength steps.

    Raises `InvalidRequest` on an unknown sampler, `num_inference_steps` below 1, or a `strength` that leaves no step.
    """
    sampler_info(sampler)
    if num_inference_steps < 1:
        raise InvalidRequest("num_inference_steps", num_inference_steps, "at least 1")
    steps = num_inference_steps - first_step(num_inference_steps, strength)
    return 2 * steps - 1 if sampler == "heun" else steps


def first_step(num_inference_steps: int, strength: float) -> int:
    """The step, from 0, at which an image noised with `strength` in (0, 1] enters a trajectory.

    Raises `InvalidRequest` when no step is left. Source: diffusers `StableDiffusionImg2ImgPipeline.get_timesteps`.
    """
    steps = min(int(num_inference_steps * strength), num_inference_steps)
    if steps < 1:
        least = math.ceil(10_000 / num_inference_steps) / 10_000
        accepted = f"a number from {least:g} to 1 with {num_inference_steps} steps, so that one of them is left"
        raise InvalidRequest("strength", strength, accepted)
    return num_inference_steps - steps


def check_sampling(sampler: str, sigma_schedule: str) -> None:
    """Raise `InvalidRequest` unless the sampler exists and accepts the sigma schedule."""
    accepted = supported_sigma_schedules(sampler)
    if sigma_schedule not in accepted:
        raise InvalidRequest("sigma_schedule", sigma_schedule, f"one of {', '.join(accepted)} with sampler {sampler}")
