"""The noise level of a timestep, as the model was trained with it, whatever scheduler class the pipeline carries.

`scheduler.add_noise` is not used: a freshly made DPMSolver++, UniPC or DEIS gives t = 25 the level of t = 974, the
Euler family works in another scale, and flow matching's refuses timesteps off its grid.
"""

from typing import Any

from torch import Tensor

from ..provenance import NUM_TRAIN_TIMESTEPS

# what the ᾱ_t of a variance-preserving scheduler are made from, whatever its class
VP_SETTINGS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)
EDM_SETTINGS = ("sigma_min", "sigma_max", "sigma_data", "sigma_schedule", "rho", "num_train_timesteps")


def kind_of(scheduler: Any) -> str:
    """`vp`, `flow` or `edm`; raises for schedules that no closed form is known of here."""
    config = scheduler.config
    name = type(scheduler).__name__
    if config.get("timestep_type") == "continuous":
        raise ValueError(f"{name} with continuous timesteps has no timestep 0…999: such models are not supported.")
    is_flow = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    if is_flow or "FlowMatch" in name:
        return "flow"
    if "sigma_data" in config and hasattr(scheduler, "precondition_inputs"):
        return "edm"
    if getattr(scheduler, "alphas_cumprod", None) is not None:
        return "vp"
    raise ValueError(
        f"The noise levels of {name} are not known. Supported: schedulers with alphas_cumprod (DDPM, DDIM, PNDM, "
        "DPMSolver, UniPC, DEIS, Euler, LMS, Heun, …), EDM, and flow matching. Load the pipeline with the scheduler "
        "its model was trained with."
    )


class NoiseSchedule:
    """z_t = signal(t) · z + sigma(t) · ε, in the scale that the denoiser takes.

    | kind | signal | sigma | source |
    |---|---|---|---|
    | `vp` | √ᾱ_t | √(1 − ᾱ_t) | Ho et al. 2020, eq. 4 |
    | `flow` | 1 − t/1000 | t/1000 | Lipman et al. 2023; Esser et al. 2024, eq. 12 |
    | `edm` | 1/√(σ² + σ_data²) | σ/√(σ² + σ_data²) | Karras et al. 2022, table 1: c_in · (z + σ ε) |

    EDM's noise levels are continuous; t walks its training grid, from σ_min at 0 towards σ_max at 999.
    """

    def __init__(self, scheduler: Any) -> None:
        self.kind = kind_of(scheduler)
        self.scheduler_name = type(scheduler).__name__
        self.config = scheduler.config
        if self.kind == "vp":
            self._alphas_cumprod: Tensor = scheduler.alphas_cumprod.double()
        elif self.kind == "edm":
            # a scheduler in use holds the grid of its last sampling run, a fresh one that of the training
            self._sigmas: Tensor = type(scheduler).from_config(scheduler.config).sigmas[:-1].flip(0).double()

    def _check(self, timestep: int) -> None:
        known = {"vp": lambda: len(self._alphas_cumprod), "edm": lambda: len(self._sigmas)}
        length = known.get(self.kind, lambda: NUM_TRAIN_TIMESTEPS)()
        if not 0 <= timestep < length:
            raise ValueError(f"timestep must lie in 0…{length - 1} for this model, got {timestep}.")

    def level(self, timestep: int) -> tuple[float, float]:
        """(signal, sigma) of a timestep."""
        self._check(timestep)
        if self.kind == "flow":
            sigma = timestep / NUM_TRAIN_TIMESTEPS
            return 1 - sigma, sigma
        if self.kind == "edm":
            sigma = self._sigmas[timestep].item()
            scale = (sigma**2 + self.config["sigma_data"] ** 2) ** -0.5
            return scale, sigma * scale
        alpha = self._alphas_cumprod[timestep].item()
        return alpha**0.5, (1 - alpha) ** 0.5

    def scheduler_time(self, timestep: int) -> float:
        """The timestep in the scheduler's own units, which are the pipeline's: ¼ ln σ for EDM, else t."""
        if self.kind != "edm":
            return timestep
        self._check(timestep)
        return 0.25 * self._sigmas[timestep].log().item()

    def target(self, latents: Tensor, noise: Tensor, timestep: int) -> Tensor:
        """What the denoiser was trained to say of z_t, given z and ε in fp32.

        | kind | target | source |
        |---|---|---|
        | `vp`, epsilon | ε | Ho et al. 2020, eq. 14 |
        | `vp`, v_prediction | √ᾱ_t ε − √(1 − ᾱ_t) z | Salimans & Ho 2022, §4 |
        | `vp`, sample | z | |
        | `flow` | ε − z | Esser et al. 2024, eq. 13 |
        | `edm` | (z − c_skip (z + σ ε)) / c_out | Karras et al. 2022, eq. 8 |
        """
        signal, sigma = self.level(timestep)
        if self.kind == "flow":
            return noise - latents
        prediction = self.config.get("prediction_type", "epsilon")
        if self.kind == "edm":
            level, data = self._sigmas[timestep].item(), self.config["sigma_data"]
            total = level**2 + data**2
            c_out = level * data / total**0.5 * (-1 if prediction == "v_prediction" else 1)
            return (latents - data**2 / total * (latents + level * noise)) / c_out
        if prediction == "epsilon":
            return noise
        if prediction == "v_prediction":
            return signal * noise - sigma * latents
        if prediction == "sample":
            return latents
        raise ValueError(
            f"The target of prediction_type {prediction!r} is not known. Known: epsilon, v_prediction, sample, flow."
        )

    def settings(self) -> dict[str, Any]:
        """What decides the levels."""
        names = {"vp": VP_SETTINGS, "edm": EDM_SETTINGS, "flow": ()}[self.kind]
        return {"kind": self.kind} | {name: self.config.get(name) for name in names}


# how pipelines tell their denoiser the time, from the scheduler's
TIME_FORMS = {
    "t": lambda t: t,
    "t/1000": lambda t: t / 1000,
    "1 - t/1000": lambda t: 1 - t / 1000,
}


def time_form(told: float, scheduler_time: float) -> str:
    """The form by which a pipeline told its denoiser `told` when its scheduler was at `scheduler_time`."""
    for name, form in TIME_FORMS.items():
        expected = form(scheduler_time)
        if abs(told - expected) <= 0.01 * max(abs(expected), 1e-3):  # bf16 has three digits
            return name
    raise ValueError(
        f"The pipeline tells its denoiser the time {told:g} at timestep {scheduler_time:g}. Known are "
        f"{', '.join(TIME_FORMS)}: add a line to TIME_FORMS in extraction/schedule.py."
    )
