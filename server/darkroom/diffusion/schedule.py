"""The noise schedule of a checkpoint, as its `scheduler_config.json` describes it.

Betas and their cumulative products are computed in fp32 with the operations diffusers uses, because those fp32 values
are what a checkpoint was trained with; everything after them is float64. A setting that the file leaves out takes the
default of the diffusers class that a sampler equals (`samplers.py`), so it is kept here as None where those differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from darkroom.errors import ModelError, shorten

Float64Array = NDArray[np.float64]

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")
FINAL_SIGMAS_TYPES = ("zero", "sigma_min")
INTERPOLATION_TYPES = ("linear", "log_linear")

# Fixed noise variances of DDPM; a learned one would be further output channels, which no solver here reads.
_FIXED_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large")

# beta_schedule, beta_start, beta_end of a file that names none: each class's own defaults.
_BETA_DEFAULTS = ("linear", 0.0001, 0.02)
_BETA_DEFAULTS_OF_CLASS = {
    "LCMScheduler": ("scaled_linear", 0.00085, 0.012),
    "TCDScheduler": ("scaled_linear", 0.00085, 0.012),
    "HeunDiscreteScheduler": ("linear", 0.00085, 0.012),
    "KDPM2DiscreteScheduler": ("linear", 0.00085, 0.012),
    "KDPM2AncestralDiscreteScheduler": ("linear", 0.00085, 0.012),
    "DPMSolverSDEScheduler": ("linear", 0.00085, 0.012),
}
_BETA_KEYS = ("beta_schedule", "beta_start", "beta_end", "trained_betas")

# Settings that change the mathematics in ways no solver here follows. The value is the harmless one.
_REFUSED_UNLESS: dict[str, Any] = {
    "thresholding": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "use_dynamic_shifting": False,
    "timestep_type": "discrete",
    "solver_p": None,
    "shift_terminal": None,
}

SMALLEST_ALPHA_CUMPROD = 2.0**-24
"""Stands in for an alphas_cumprod of 0 (zero terminal SNR) where its sigma must be finite."""


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """How a checkpoint was noised in training, and how its file wants it sampled.

    `alphas_cumprod` `[num_train_timesteps]` float64, descending; index t is the signal's share of the variance at
    timestep t. `plain_alphas_cumprod` is the same before any zero-SNR rescaling. `own_sigmas` is the sigma schedule
    that `simple` stands for. A field that is None takes the default of the sampler at hand.
    """

    prediction_type: str
    alphas_cumprod: Float64Array
    plain_alphas_cumprod: Float64Array
    beta_schedule: str
    rescale_betas_zero_snr: bool
    timestep_spacing: str | None
    steps_offset: int
    clip_sample: bool | None
    clip_sample_range: float
    set_alpha_to_one: bool
    own_sigmas: str
    interpolation_type: str
    sigma_min: float | None
    sigma_max: float | None
    final_sigmas_type: str
    lower_order_final: bool
    euler_at_final: bool
    lambda_min_clipped: float
    disable_corrector: tuple[int, ...]
    variance_type: str
    original_inference_steps: int
    timestep_scaling: float

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Read a parsed `scheduler_config.json`. Raises `ModelError`, naming the key, on what cannot be honoured."""
        settings = _Settings(config)
        settings.refuse_what_changes_the_mathematics()
        betas = _betas(settings)
        rescale = settings.boolean("rescale_betas_zero_snr", False)
        plain = torch.cumprod(1.0 - betas, dim=0)
        alphas_cumprod = torch.cumprod(1.0 - _rescale_to_zero_terminal_snr(betas), dim=0) if rescale else plain
        return cls(
            prediction_type=settings.choice("prediction_type", PREDICTION_TYPES, "epsilon"),
            alphas_cumprod=_read_only(alphas_cumprod),
            plain_alphas_cumprod=_read_only(plain),
            beta_schedule=settings.choice("beta_schedule", BETA_SCHEDULES, settings.beta_defaults[0]),
            rescale_betas_zero_snr=rescale,
            timestep_spacing=settings.optional_choice("timestep_spacing", TIMESTEP_SPACINGS),
            steps_offset=settings.integer("steps_offset", 0, 0),
            clip_sample=None if config.get("clip_sample") is None else settings.boolean("clip_sample", False),
            clip_sample_range=settings.positive("clip_sample_range", 1.0),
            set_alpha_to_one=settings.boolean("set_alpha_to_one", True),
            own_sigmas=settings.own_sigmas(),
            interpolation_type=settings.choice("interpolation_type", INTERPOLATION_TYPES, "linear"),
            sigma_min=settings.optional_positive("sigma_min"),
            sigma_max=settings.optional_positive("sigma_max"),
            final_sigmas_type=settings.choice("final_sigmas_type", FINAL_SIGMAS_TYPES, "zero"),
            lower_order_final=settings.boolean("lower_order_final", True),
            euler_at_final=settings.boolean("euler_at_final", False),
            lambda_min_clipped=settings.number("lambda_min_clipped", -math.inf),
            disable_corrector=settings.integers("disable_corrector"),
            variance_type=settings.choice("variance_type", _FIXED_VARIANCES, "fixed_small"),
            original_inference_steps=settings.integer("original_inference_steps", 50, 1),
            timestep_scaling=settings.positive("timestep_scaling", 10.0),
        )

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: Tensor | int) -> Tensor:
        """Noise clean latents to a timestep: √ᾱ·latents + √(1−ᾱ)·noise.

        `latents`, `noise` `[B, ...]` of one floating dtype; `timestep` an int or `[B]` int64,
        0 ≤ t < num_train_timesteps. Returns the same shape, dtype and device.
        Source: Ho et al. 2020, equation 4.
        """
        index = torch.as_tensor(timestep, dtype=torch.int64, device="cpu")
        if bool(((index < 0) | (index >= self.num_train_timesteps)).any()):
            raise ValueError(f"timestep: expected 0 to {self.num_train_timesteps - 1}, got {timestep}")
        alphas_cumprod = torch.from_numpy(self.alphas_cumprod.copy())[index]
        alphas_cumprod = alphas_cumprod.reshape(-1, *[1] * (latents.ndim - 1))
        signal = alphas_cumprod.sqrt().to(latents)
        return signal * latents + (1 - alphas_cumprod).sqrt().to(latents) * noise

    def sigmas(self, *, plain: bool = False) -> NDArray[np.float32]:
        """Noise-to-signal ratio √((1−ᾱ)/ᾱ) of each training timestep, `[num_train_timesteps]` fp32, ascending.

        Always finite: the zero ᾱ that zero-SNR rescaling leaves at the end is `SMALLEST_ALPHA_CUMPROD` here. `plain`
        is the schedule before that rescaling.
        """
        values = torch.from_numpy((self.plain_alphas_cumprod if plain else self.alphas_cumprod).astype(np.float32))
        if self.rescale_betas_zero_snr and not plain:
            values[-1] = SMALLEST_ALPHA_CUMPROD
        sigmas: NDArray[np.float32] = (((1 - values) / values) ** 0.5).numpy()
        return sigmas


class _Settings:
    """Typed reads of a config; every failure is one `ModelError` that names key, value and what is accepted."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        name = config.get("_class_name")
        self.beta_defaults = _BETA_DEFAULTS_OF_CLASS.get(str(name), _BETA_DEFAULTS)
        if name is not None and not any(key in config for key in _BETA_KEYS):
            raise ModelError(
                f"scheduler_config.json: {shorten(name)} describes no beta schedule; "
                "expected one of the discrete variance-preserving classes (DDIMScheduler, EulerDiscreteScheduler, ...)"
            )

    def refuse_what_changes_the_mathematics(self) -> None:
        for key, harmless in _REFUSED_UNLESS.items():
            if self.config.get(key) not in (None, harmless):
                raise self._error(key, str(harmless))
        if (
            self.number("lambda_min_clipped", -math.inf) > -math.inf
            and self.config.get("timestep_spacing") == "trailing"
        ):
            # There the number of timesteps would differ from the number of steps asked for.
            raise self._error("lambda_min_clipped", "-Infinity, with trailing timestep spacing")

    def _get(self, key: str, default: Any) -> Any:
        value = self.config.get(key)
        return default if value is None else value

    def _error(self, key: str, accepted: str) -> ModelError:
        return ModelError(f"scheduler_config.json: {key}={shorten(self.config.get(key))}; supported: {accepted}")

    def boolean(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._error(key, "true or false")
        return value

    def number(self, key: str, default: float) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
            raise self._error(key, "a number")
        return float(value)

    def positive(self, key: str, default: float) -> float:
        value = self.number(key, default)
        if not 0 < value < math.inf:
            raise self._error(key, "a positive number")
        return value

    def optional_positive(self, key: str) -> float | None:
        return None if self.config.get(key) is None else self.positive(key, 1.0)

    def integer(self, key: str, default: int, minimum: int) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self._error(key, f"a whole number of at least {minimum}")
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        value = self._get(key, [])
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise self._error(key, "a list of whole numbers")
        return tuple(value)

    def choice(self, key: str, accepted: tuple[str, ...], default: str) -> str:
        value = self._get(key, default)
        if value not in accepted:
            raise self._error(key, ", ".join(accepted))
        return str(value)

    def optional_choice(self, key: str, accepted: tuple[str, ...]) -> str | None:
        return None if self.config.get(key) is None else self.choice(key, accepted, accepted[0])

    def own_sigmas(self) -> str:
        karras = self.boolean("use_karras_sigmas", False)
        exponential = self.boolean("use_exponential_sigmas", False)
        if karras and exponential:
            raise self._error("use_exponential_sigmas", "false beside use_karras_sigmas=true")
        return "karras" if karras else "exponential" if exponential else "simple"


def _betas(settings: _Settings) -> Tensor:
    """Noise variances `[num_train_timesteps]` fp32."""
    count = settings.integer("num_train_timesteps", 1000, 2)
    trained = settings.config.get("trained_betas")
    if trained is not None:
        if not isinstance(trained, list) or not all(type(beta) in (int, float) for beta in trained):
            raise ModelError("scheduler_config.json: trained_betas must be a list of numbers")
        betas = torch.tensor(trained, dtype=torch.float32)
        if len(betas) != count:
            raise ModelError(f"scheduler_config.json: {len(betas)} trained_betas, but num_train_timesteps={count}")
    else:
        name, start, end = settings.beta_defaults
        name = settings.choice("beta_schedule", BETA_SCHEDULES, name)
        start, end = settings.positive("beta_start", start), settings.positive("beta_end", end)
        if name == "linear":
            betas = torch.linspace(start, end, count, dtype=torch.float32)
        elif name == "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2
        else:
            betas = _cosine_betas(count)
    if not bool(((betas > 0) & (betas < 1)).all()):
        raise ModelError("scheduler_config.json: every beta must be above 0 and below 1")
    return betas


def _cosine_betas(count: int) -> Tensor:
    """Betas whose ᾱ follows cos²; at most 0.999 each. Source: Nichol and Dhariwal 2021, equation 17."""
    edges = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
    ratios = [after / before for before, after in pairwise(edges)]
    return torch.tensor([min(1 - ratio, 0.999) for ratio in ratios], dtype=torch.float32)


def _rescale_to_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and scale √ᾱ so that its last value is 0 and its first is kept. Source: Lin et al. 2023, Algorithm 1."""
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    alphas_cumprod = ((root - last) * (first / (first - last))) ** 2
    alphas = torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    return 1 - alphas


def _read_only(values: Tensor) -> Float64Array:
    array: Float64Array = values.numpy().astype(np.float64)
    array.setflags(write=False)
    return array


def spaced_timesteps(
    schedule: NoiseSchedule,
    num_inference_steps: int,
    spacing: str,
    *,
    drop_last: bool,
    fractional: bool,
    clipped: bool = False,
) -> Float64Array:
    """Timesteps to visit, descending, `[num_inference_steps]`.

    `drop_last` spaces one more point and leaves the last out (the DPM-Solver classes); `fractional` keeps linspace
    points between training timesteps (the Euler classes); `clipped` honours `lambda_min_clipped`.
    Source of the three spacings: Lin et al. 2023, table 2.
    """
    total = _last_unclipped_timestep(schedule) if clipped else schedule.num_train_timesteps
    points = num_inference_steps + 1 if drop_last else num_inference_steps
    if spacing == "linspace":
        if fractional:
            ascending = np.linspace(0, total - 1, points, dtype=np.float32).astype(np.float64)
        else:
            ascending = np.linspace(0, total - 1, points).round()
        timesteps = ascending[::-1]
    elif spacing == "leading":
        timesteps = np.arange(points, dtype=np.float64)[::-1] * (total // points) + schedule.steps_offset
    else:
        # Rounding can put one point too many at the end, below timestep 0; the slice below drops it.
        timesteps = np.arange(total, 0, -schedule.num_train_timesteps / num_inference_steps).round() - 1
    return np.ascontiguousarray(timesteps[:num_inference_steps], dtype=np.float64)


def _last_unclipped_timestep(schedule: NoiseSchedule) -> int:
    """One past the noisiest timestep whose log signal-to-noise is at least `lambda_min_clipped`."""
    log_snr_ascending = -np.log(schedule.sigmas())[::-1]
    return schedule.num_train_timesteps - int(np.searchsorted(log_snr_ascending, schedule.lambda_min_clipped))


def karras_sigmas(sigma_max: float, sigma_min: float, count: int) -> Float64Array:
    """Sigmas evenly spaced in σ^(1/7), `[count]`, descending. Source: Karras et al. 2022, equation 5."""
    low, high = sigma_min ** (1 / 7), sigma_max ** (1 / 7)
    sigmas: Float64Array = (high + np.linspace(0, 1, count) * (low - high)) ** 7.0
    return sigmas


def exponential_sigmas(sigma_max: float, sigma_min: float, count: int) -> Float64Array:
    """Sigmas evenly spaced in log σ, `[count]`, descending."""
    sigmas: Float64Array = np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), count))
    return sigmas


def timesteps_of(sigmas: Float64Array, training_sigmas: NDArray[np.float32]) -> Float64Array:
    """Fractional training timesteps at which the sigmas occur, linear in log σ; same shape as `sigmas`."""
    # The mix of fp32 and float64 is diffusers': some of its classes truncate the result to whole timesteps, so a
    # difference in the last bit would be a different timestep.
    log_training = np.log(training_sigmas)
    log_sigmas = np.log(np.maximum(sigmas, 1e-10))
    low = np.clip(np.searchsorted(log_training, log_sigmas, side="right") - 1, 0, len(log_training) - 2)
    weight = (log_training[low] - log_sigmas) / (log_training[low] - log_training[low + 1])
    weight = np.clip(weight, 0, 1)
    timesteps: Float64Array = (1 - weight) * low + weight * (low + 1)
    return timesteps
