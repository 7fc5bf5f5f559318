"""Noise schedules read from scheduler_config.json, with diffusers as the measure."""

import diffusers
import numpy as np
import pytest
import torch
from darkroom.diffusion.schedule import NoiseSchedule
from darkroom.errors import ModelError

CONFIGS = {
    "scaled linear": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "linear": {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 400},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "trained betas": {"trained_betas": [0.001 * (i + 1) for i in range(30)], "num_train_timesteps": 30},
    "zero SNR": {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "rescale_betas_zero_snr": True,
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_signal_share_is_diffusers_to_the_last_bit(name):
    noise_scheduler = diffusers.DDPMScheduler.from_config(CONFIGS[name])
    schedule = NoiseSchedule.from_config(CONFIGS[name])
    assert schedule.num_train_timesteps == len(noise_scheduler.betas)
    assert np.array_equal(schedule.alphas_cumprod, noise_scheduler.alphas_cumprod.double().numpy())


@pytest.mark.parametrize("name", CONFIGS)
def test_noise_is_added_as_in_diffusers(name):
    noise_scheduler = diffusers.DDPMScheduler.from_config(CONFIGS[name])
    schedule = NoiseSchedule.from_config(CONFIGS[name])
    last = schedule.num_train_timesteps - 1
    timesteps = torch.tensor([0, 1, last // 2, last - 1, last])
    latents, noise = torch.randn(2, 5, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    expected = noise_scheduler.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(schedule.add_noise(latents, noise, timesteps), expected, rtol=1e-4, atol=1e-6)
    one = schedule.add_noise(latents[2:3], noise[2:3], last // 2)
    torch.testing.assert_close(one, expected[2:3], rtol=1e-4, atol=1e-6)


def test_noise_keeps_shape_and_dtype_of_the_latents():
    schedule = NoiseSchedule.from_config(CONFIGS["linear"])
    latents = torch.ones(3, 5, dtype=torch.float16)
    noisy = schedule.add_noise(latents, torch.zeros_like(latents), 10)
    assert noisy.dtype is torch.float16
    assert noisy.shape == (3, 5)


@pytest.mark.parametrize("timestep", [-1, 400])
def test_noise_at_a_timestep_that_does_not_exist_is_refused(timestep):
    with pytest.raises(ValueError, match="expected 0 to 399"):
        NoiseSchedule.from_config(CONFIGS["linear"]).add_noise(torch.ones(1, 1), torch.ones(1, 1), timestep)


def test_sigmas_ascend_and_stay_finite_at_zero_signal():
    schedule = NoiseSchedule.from_config(CONFIGS["zero SNR"])
    sigmas = schedule.sigmas()
    assert schedule.alphas_cumprod[-1] == 0
    assert sigmas[-1] == pytest.approx(4096, rel=1e-6)
    assert (np.diff(sigmas) > 0).all()
    assert schedule.sigmas(plain=True)[-1] == pytest.approx(14.6146, rel=1e-4)


def test_a_checkpoint_keeps_its_own_betas_whatever_samples_it():
    """A file may leave its betas to its class; they do not become those of the class that a request samples with."""
    schedule = NoiseSchedule.from_config({"_class_name": "LCMScheduler", "beta_schedule": "scaled_linear"})
    expected = diffusers.LCMScheduler().alphas_cumprod.double().numpy()
    assert np.array_equal(schedule.alphas_cumprod, expected)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"thresholding": True}, "thresholding=True"),
        ({"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid'"),
        ({"use_beta_sigmas": True}, "use_beta_sigmas"),
        ({"use_lu_lambdas": True}, "use_lu_lambdas"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas"),
        ({"use_karras_sigmas": True, "use_exponential_sigmas": True}, "use_exponential_sigmas"),
        ({"timestep_type": "continuous"}, "timestep_type='continuous'"),
        ({"timestep_spacing": "uniform"}, "timestep_spacing='uniform'"),
        ({"variance_type": "learned_range"}, "variance_type='learned_range'"),
        ({"final_sigmas_type": "one"}, "final_sigmas_type='one'"),
        ({"steps_offset": -1}, "steps_offset=-1"),
        ({"num_train_timesteps": 1}, "num_train_timesteps=1"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps='1000'"),
        ({"clip_sample": "yes"}, "clip_sample='yes'"),
        ({"clip_sample_range": 0}, "clip_sample_range=0"),
        ({"beta_end": float("nan")}, "beta_end=nan"),
        ({"beta_end": 1.5}, "every beta"),
        ({"trained_betas": [0.1, 0.2]}, "2 trained_betas"),
        ({"trained_betas": 0.1}, "trained_betas must be a list"),
        ({"disable_corrector": ["0"]}, "disable_corrector"),
        ({"lambda_min_clipped": -5.0, "timestep_spacing": "trailing"}, "lambda_min_clipped=-5.0"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(setting, named):
    with pytest.raises(ModelError) as caught:
        NoiseSchedule.from_config(setting)
    assert named in str(caught.value)


@pytest.mark.parametrize("class_name", ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"])
def test_a_file_without_betas_is_another_kind_of_model(class_name):
    with pytest.raises(ModelError, match="no beta schedule"):
        NoiseSchedule.from_config({"_class_name": class_name, "shift": 3.0})


def test_settings_of_null_mean_the_default():
    config = dict.fromkeys(
        ("trained_betas", "prediction_type", "variance_type", "clip_sample", "sigma_min", "solver_p")
    )
    schedule = NoiseSchedule.from_config(config)
    assert schedule.prediction_type == "epsilon"
    assert schedule.clip_sample is None
