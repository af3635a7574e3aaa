"""What a denoiser wants beside the noisy latents (text states, class labels, added conditions), learned from the
pipeline itself: its own `__call__` is run up to the denoiser, whose arguments are kept and replayed with our latents.
"""

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .families import family_entry
from .hooks import catch_call
from .schedule import time_form

TIME_NAMES = ("timestep", "timesteps")


@dataclass(frozen=True)
class Conditioning:
    """The arguments of one call of the denoiser, for a batch of one."""

    arguments: dict[str, Any]
    """By name, without sample and time."""
    sample_name: str
    sample_shape: tuple[int, ...]
    """(1, …) of what the pipeline gave the denoiser at this image size."""
    time_name: str
    time_dtype: torch.dtype
    time_form: str
    """A key of TIME_FORMS: how the time is told."""

    def to(self, device: torch.device) -> "Conditioning":
        return Conditioning(**{**self.__dict__, "arguments": _moved(self.arguments, device)})

    def batch(self, size: int) -> dict[str, Any]:
        """The arguments, expanded to a batch."""
        return {name: _expanded(value, size) for name, value in self.arguments.items()}


def concatenate(conditionings: list[Conditioning]) -> dict[str, Any] | None:
    """Arguments of one call for several images with a conditioning each; None if their shapes differ."""
    arguments = [conditioning.arguments for conditioning in conditionings]
    try:
        return {name: _joined([given[name] for given in arguments]) for name in arguments[0]}
    except _ShapesDifferError:
        return None


class _ShapesDifferError(Exception):
    """Internal: these cannot stand in one batch."""


def _joined(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        if any(value.shape != first.shape for value in values):
            raise _ShapesDifferError
        if first.ndim > 0 and first.shape[0] == 1:
            return torch.cat(values)
        if any(not torch.equal(value, first) for value in values):
            raise _ShapesDifferError
        return first
    if isinstance(first, dict):
        return {key: _joined([value[key] for value in values]) for key in first}
    if isinstance(first, list) and len(first) == 1:
        return [item for value in values for item in value]
    if any(_differs(value, first) for value in values[1:]):
        raise _ShapesDifferError
    return first


def _differs(value: Any, other: Any) -> bool:
    if isinstance(value, Tensor):
        return not torch.equal(value, other)
    if isinstance(value, tuple | list):
        return len(value) != len(other) or any(_differs(a, b) for a, b in zip(value, other, strict=True))
    return value != other


def _expanded(value: Any, size: int) -> Any:
    """An argument of a batch of one for a batch of `size`; what has no batch dimension is passed through."""
    if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == 1:
        return value.repeat(size, *[1] * (value.ndim - 1))  # not expand: HunyuanDiT views it as one dimension
    if isinstance(value, dict):
        return {key: _expanded(item, size) for key, item in value.items()}
    if isinstance(value, list) and len(value) == 1:
        return value * size
    return value


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_moved(item, device) for item in value)
    return value


def takes_guidance(denoiser: Any) -> bool:
    """Whether the strength of guidance is an input of the denoiser: it was distilled into it."""
    config = denoiser.config
    return bool(config.get("guidance_embeds")) or config.get("time_cond_proj_dim") is not None


def is_class_conditional(pipeline: Any) -> bool:
    return "class_labels" in inspect.signature(pipeline.__call__).parameters


def is_conditional(pipeline: Any) -> bool:
    return "prompt" in inspect.signature(pipeline.__call__).parameters or is_class_conditional(pipeline)


def class_label(pipeline: Any, denoiser: Any, prompt: str) -> int:
    """Number of the class that the prompt names; for the empty prompt the null class, the row after the last."""
    if not prompt:
        return denoiser.config.num_embeds_ada_norm
    labels = getattr(pipeline, "labels", None) or {}
    if prompt.isdecimal() and int(prompt) < denoiser.config.num_embeds_ada_norm and prompt not in labels:
        return int(prompt)
    if prompt not in labels:
        known = ", ".join(labels) or "none are named"
        raise ValueError(f"A class-conditional model's prompt is a class name or number, got {prompt!r}: {known}.")
    return labels[prompt]


def _call_arguments(
    pipeline: Any, denoiser: Any, prompt: str, image_size: int, guidance: float | None
) -> dict[str, Any]:
    """Arguments of the pipeline's `__call__`, of those that it has; without classifier-free guidance."""
    parameters = inspect.signature(pipeline.__call__).parameters
    if prompt and not is_conditional(pipeline):
        raise ValueError(f"{type(pipeline).__name__} takes no prompt, got {prompt!r}. Leave it empty.")
    wanted: dict[str, Any] = {
        "num_inference_steps": 2,  # one would give t = 0 and then NaN in some schedulers
        "generator": torch.Generator().manual_seed(0),
        "prompt": [prompt],
        "height": image_size,
        "width": image_size,
        "num_frames": 1,
        "true_cfg_scale": 1.0,
        "clean_caption": False,  # else the text depends on which packages are installed
        "batch_size": 1,
    }
    if is_class_conditional(pipeline):
        wanted["class_labels"] = [class_label(pipeline, denoiser, prompt)]
    if "guidance_scale" in parameters:
        default = parameters["guidance_scale"].default
        if guidance is not None:
            wanted["guidance_scale"] = guidance
        elif takes_guidance(denoiser) and default is None:
            raise ValueError(
                f"{type(pipeline).__name__} needs its guidance embedding: pass guidance, for instance 1.0."
            )
        elif not takes_guidance(denoiser) and default is not None:
            wanted["guidance_scale"] = 1.0
    wanted |= family_entry(denoiser).call
    return {name: value for name, value in wanted.items() if name in parameters}


@torch.no_grad()
def catch_conditioning(
    pipeline: Any, denoiser: Any, *, prompt: str, image_size: int, latent_side: int, guidance: float | None
) -> Conditioning:
    """Run the pipeline up to its denoiser and keep what it was about to be called with."""
    if guidance is not None and not takes_guidance(denoiser):
        raise ValueError(f"{type(denoiser).__name__} takes no guidance embedding; leave guidance unset.")
    arguments = _call_arguments(pipeline, denoiser, prompt, image_size, guidance)
    scheduler = pipeline.scheduler
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = copy.deepcopy(scheduler)  # set_timesteps changes it
    try:
        with catch_call(denoiser) as caught:
            pipeline(**arguments)
        scheduler_time = float(pipeline.scheduler.timesteps[0])
    finally:
        pipeline.scheduler = scheduler
        if getattr(pipeline, "_all_hooks", None):
            pipeline.maybe_free_model_hooks()  # with offloading; the call that was stopped did not come to it
    bound = inspect.signature(denoiser.forward).bind(*caught["args"], **caught["kwargs"]).arguments
    sample_name = next(iter(bound))
    sample = bound[sample_name]
    time_name = next((name for name in TIME_NAMES if name in bound), None)
    if time_name is None or not isinstance(sample, Tensor) or sample.shape[0] != 1:
        kinds = {name: type(value).__name__ for name, value in bound.items()}
        raise ValueError(f"{type(denoiser).__name__} is not supported: its pipeline calls it with {kinds}.")
    sample_shape = tuple(sample.shape)
    if "height" not in arguments:  # a pipeline of one size, whose denoiser takes others as well
        sample_shape = (*sample_shape[:-2], latent_side, latent_side)
    told = torch.as_tensor(bound[time_name])
    left_out = {sample_name, time_name, "return_dict"}
    return Conditioning(
        arguments={name: value for name, value in bound.items() if name not in left_out},
        sample_name=sample_name,
        sample_shape=sample_shape,
        time_name=time_name,
        time_dtype=told.dtype,
        time_form=time_form(float(told.flatten()[0]), scheduler_time),
    )
