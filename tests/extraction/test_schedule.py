"""The noise level of a timestep is that of the training, whatever scheduler class the pipeline carries."""

import math

import diffusers
import numpy as np
import pytest
import torch

from diffusion_sae.extraction.schedule import NoiseSchedule, kind_of, time_form

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # numpy, in diffusers' constructors

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
VARIANCE_PRESERVING = (
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
TIMESTEPS = (0, 1, 25, 100, 500, 998, 999)


def make(name: str, **settings) -> object:
    return getattr(diffusers, name)(**settings)


def alphas_cumprod(beta_start: float, beta_end: float, beta_schedule: str) -> np.ndarray:
    """∏ (1 − β), from the definition (Ho et al. 2020, §2; Rombach et al. 2022 interpolate √β)."""
    if beta_schedule == "scaled_linear":
        beta = np.linspace(beta_start**0.5, beta_end**0.5, 1000) ** 2
    else:
        beta = np.linspace(beta_start, beta_end, 1000)
    return np.cumprod(1 - beta)


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
@pytest.mark.parametrize("settings", [SD, {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}])
def test_variance_preserving_levels_are_the_closed_form(name, settings):
    scheduler = make(name, **settings)
    schedule = NoiseSchedule(scheduler)
    expected = alphas_cumprod(**settings)
    assert schedule.kind == "vp"
    for t in TIMESTEPS:
        signal, sigma = schedule.level(t)
        assert signal == pytest.approx(math.sqrt(expected[t]), abs=1e-5)
        assert sigma == pytest.approx(math.sqrt(1 - expected[t]), abs=1e-5)
        assert schedule.scheduler_time(t) == t
    scheduler.set_timesteps(7)  # a scheduler in use has the same levels
    assert NoiseSchedule(scheduler).level(25) == schedule.level(25)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_levels_are_those_of_add_noise_where_diffusers_is_right(name, prediction):
    scheduler = make(name, **SD, prediction_type=prediction)
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in TIMESTEPS:
        signal, sigma = NoiseSchedule(scheduler).level(t)
        expected = scheduler.add_noise(latents, noise, torch.tensor([t] * 3))
        torch.testing.assert_close(signal * latents + sigma * noise, expected, atol=1e-6, rtol=0)


def test_zero_terminal_snr():
    schedule = NoiseSchedule(make("DDIMScheduler", **SD, rescale_betas_zero_snr=True))
    assert schedule.level(999) == pytest.approx((0, 1), abs=1e-3)


def test_euler_is_the_variance_preserving_level_after_its_own_input_scaling():
    """(z + σ ε)/√(σ² + 1), what Euler's `scale_model_input` makes, with σ = √((1 − ᾱ)/ᾱ)."""
    scheduler = make("EulerDiscreteScheduler", **SD)
    sigmas = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()
    for t in TIMESTEPS:
        scale = (sigmas[t] ** 2 + 1).rsqrt().item()
        signal, sigma = NoiseSchedule(scheduler).level(t)
        assert signal == pytest.approx(scale, abs=1e-6)
        assert sigma == pytest.approx(sigmas[t].item() * scale, abs=1e-5)


FLOWS = [
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
    ("FlowMatchHeunDiscreteScheduler", {}),
    ("FlowMatchLCMScheduler", {}),
    ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
]


@pytest.mark.parametrize(("name", "settings"), FLOWS)
def test_flow_matching_is_linear_in_time_whatever_the_sampler_shifts(name, settings):
    schedule = NoiseSchedule(make(name, **settings))
    assert schedule.kind == "flow"
    for t in TIMESTEPS:
        assert schedule.level(t) == (1 - t / 1000, t / 1000)


@pytest.mark.parametrize(("name", "grid"), [("EDMEulerScheduler", 1000), ("EDMDPMSolverMultistepScheduler", 999)])
def test_edm_levels(name, grid):
    """Karras et al. 2022: σ = (σ_max^⅐ + r (σ_min^⅐ − σ_max^⅐))⁷ on the training grid; c_in scales what is put in."""
    schedule = NoiseSchedule(make(name, sigma_min=0.002, sigma_max=80.0, sigma_data=0.5))
    assert schedule.kind == "edm"
    for t in TIMESTEPS:
        ramp = 1 - t / grid
        sigma = (80.0 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80.0 ** (1 / 7))) ** 7
        c_in = 1 / math.sqrt(sigma**2 + 0.25)
        assert schedule.level(t) == pytest.approx((c_in, sigma * c_in), rel=1e-3)
        assert schedule.scheduler_time(t) == pytest.approx(0.25 * math.log(sigma), rel=1e-3, abs=1e-3)


def test_edm_levels_do_not_depend_on_a_run_of_the_sampler():
    scheduler = make("EDMEulerScheduler")
    before = NoiseSchedule(scheduler).level(500)
    scheduler.set_timesteps(7)
    assert NoiseSchedule(scheduler).level(500) == before


@pytest.mark.parametrize("kind", ["vp", "flow", "edm"])
def test_noise_grows_with_the_timestep(kind):
    name = {"vp": "PNDMScheduler", "flow": "FlowMatchEulerDiscreteScheduler", "edm": "EDMEulerScheduler"}[kind]
    schedule = NoiseSchedule(make(name))
    ratios = [sigma / signal for signal, sigma in map(schedule.level, range(0, 1000, 37))]
    assert ratios == sorted(ratios)


@pytest.mark.parametrize("name", ["IPNDMScheduler", "ScoreSdeVeScheduler", "CMStochasticIterativeScheduler"])
def test_unknown_schedules_are_refused(name):
    with pytest.raises(
        ValueError, match=rf"The noise levels of {name} are not known. Supported: schedulers with alphas"
    ):
        kind_of(make(name))


def test_continuous_timesteps_are_refused():
    scheduler = make("EulerDiscreteScheduler", timestep_type="continuous", prediction_type="v_prediction")
    with pytest.raises(ValueError, match=r"EulerDiscreteScheduler with continuous timesteps has no timestep 0…999"):
        kind_of(scheduler)


def test_a_shorter_schedule_says_where_it_ends():
    schedule = NoiseSchedule(make("DDPMScheduler", num_train_timesteps=100))
    assert schedule.level(99)
    with pytest.raises(ValueError, match=r"timestep must lie in 0…99 for this model, got 100"):
        schedule.level(100)


def test_how_pipelines_tell_the_time():
    assert time_form(981.0, 981.0) == "t"
    assert time_form(1.0, 1000.0) == "t/1000"
    assert time_form(0.0, 1000.0) == "1 - t/1000"
    assert time_form(1.0953, 1.0953) == "t"  # EDM's ¼ ln σ
    with pytest.raises(ValueError, match=r"tells its denoiser the time 7 at timestep 1000.*TIME_FORMS"):
        time_form(7.0, 1000.0)
