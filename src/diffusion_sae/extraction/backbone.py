"""A diffusers pipeline as something that turns images into activations.

What a family's denoiser wants beside the noisy latents (text states, class labels, added conditions) is learned from
the pipeline itself: its own `__call__` is run up to the denoiser, whose arguments are kept and replayed with our
latents.
"""

import copy
import hashlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .._files import fingerprint_of
from .hooks import catch_call, run_until_captured
from .layers import LayerInfo, canonical_layers, describe_layers, resolve_layer
from .noise import add_noise, noise_batch

# what the ᾱ_t of a variance-preserving scheduler are made from, whatever its class
SCHEDULE_SETTINGS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)


class DiffusionBackbone:
    """Encodes images, adds noise, runs the denoiser up to the wanted layers."""

    def __init__(self, pipeline: Any, *, prompt: str, image_size: int | None, guidance: float | None = None) -> None:
        self.pipeline = pipeline
        denoiser = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
        if denoiser is None or not canonical_layers(denoiser) or getattr(pipeline, "vae", None) is None:
            raise ValueError(
                f"{type(pipeline).__name__} is not supported yet: it needs a VAE and a `unet` or `transformer` "
                "(Stable Diffusion and DiT pipelines have these)."
            )
        if guidance is not None:
            raise ValueError(f"{type(denoiser).__name__} takes no guidance embedding; leave guidance unset.")
        # Any: nn.Modules of diffusers, which pyright sees no config of
        self.denoiser: Any = denoiser.eval().requires_grad_(False)
        self.vae: Any = pipeline.vae.eval().requires_grad_(False)
        if getattr(denoiser, "is_cache_enabled", False):
            denoiser.disable_cache()  # a cached block's hook would fire with another step's output
        self.vae_stride = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.image_size = image_size or self.vae_stride * denoiser.config.sample_size
        if self.image_size % self.vae_stride:
            raise ValueError(f"image_size must be a multiple of {self.vae_stride} for this VAE, got {self.image_size}.")
        self.alphas_cumprod = self._alphas_cumprod()
        self.conditioning = self._catch_conditioning(prompt)

    @property
    def device(self) -> torch.device:
        return self.denoiser.device

    @property
    def dtype(self) -> torch.dtype:
        return self.denoiser.dtype

    def _alphas_cumprod(self) -> Tensor:
        alphas_cumprod = getattr(self.pipeline.scheduler, "alphas_cumprod", None)
        if alphas_cumprod is None:
            raise ValueError(
                f"{type(self.pipeline.scheduler).__name__} has no alphas_cumprod: only variance-preserving schedules "
                "are supported yet, not flow matching."
            )
        return alphas_cumprod

    def _call_arguments(self, prompt: str) -> dict[str, Any]:
        parameters = inspect.signature(self.pipeline.__call__).parameters
        arguments: dict[str, Any] = {
            "guidance_scale": 1.0,
            "num_inference_steps": 2,
            "generator": torch.Generator().manual_seed(0),
        }
        if "class_labels" in parameters:
            return arguments | {"class_labels": [self._class_label(prompt)]}
        size = {"height": self.image_size, "width": self.image_size} if "height" in parameters else {}
        return arguments | size | {"prompt": [prompt], "output_type": "latent"}

    def _class_label(self, prompt: str) -> int:
        """Number of the class that the prompt names; for the empty prompt the null class, the row after the last."""
        if not prompt:
            return self.denoiser.config.num_embeds_ada_norm
        labels = self.pipeline.labels
        if prompt not in labels:
            raise ValueError(
                f"A class-conditional model's prompt is a class name, got {prompt!r}: {', '.join(labels)}."
            )
        return labels[prompt]

    @torch.no_grad()
    def _catch_conditioning(self, prompt: str) -> dict[str, Any]:
        """Arguments of the denoiser's forward by name, for a batch of one, without sample and timestep."""
        scheduler = self.pipeline.scheduler
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.scheduler = copy.deepcopy(scheduler)  # set_timesteps changes it; two steps, as one gives t = 0
        try:
            with catch_call(self.denoiser) as caught:
                self.pipeline(**self._call_arguments(prompt))
        finally:
            self.pipeline.scheduler = scheduler
        bound = inspect.signature(self.denoiser.forward).bind(*caught["args"], **caught["kwargs"]).arguments
        self._sample_name = next(iter(bound))
        return {k: v for k, v in bound.items() if k not in (self._sample_name, "timestep", "return_dict")}

    def conditioning_on(self, device: torch.device) -> dict[str, Any]:
        """The conditioning, moved."""
        return {name: _moved(value, device) for name, value in self.conditioning.items()}

    @torch.no_grad()
    def encode(self, pixel_values: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B c h w"]:
        """Latents: the mode of the VAE's posterior, shifted and scaled as in training.

        The mode, not a sample: the only randomness of a feature is the noise of its timestep.
        """
        config = self.vae.config
        posterior = self.vae.encode(pixel_values.to(self.vae.device, self.vae.dtype)).latent_dist
        shift = getattr(config, "shift_factor", None) or 0.0
        return ((posterior.mode() - shift) * config.scaling_factor).to(self.dtype)

    def add_noise(
        self, latents: Float[Tensor, "B c h w"], image_ids: list[str], *, seed: int, timestep: int
    ) -> Float[Tensor, "B c h w"]:
        noise = noise_batch(latents, image_ids, seed=seed, timestep=timestep).to(latents.device)
        return add_noise(latents.float(), noise, self.alphas_cumprod[timestep].item()).to(self.dtype)

    def _forward(
        self, denoiser: nn.Module, noisy_latents: Tensor, timestep: int, conditioning: Mapping[str, Any]
    ) -> object:
        batch = len(noisy_latents)
        arguments = {name: _for_batch(value, batch) for name, value in conditioning.items()}
        arguments[self._sample_name] = noisy_latents
        arguments["timestep"] = torch.full((batch,), timestep, device=noisy_latents.device)
        return denoiser(**arguments, return_dict=False)

    @torch.no_grad()
    def activations(
        self, noisy_latents: Float[Tensor, "B c h w"], timestep: int, module_paths: Mapping[str, str]
    ) -> dict[str, Tensor]:
        """{layer: (B, C, h', w') or (B, T, C)}; what comes after the last wanted layer is not computed."""
        return run_until_captured(
            self.denoiser,
            module_paths,
            lambda: self._forward(self.denoiser, noisy_latents, timestep, self.conditioning),
        )

    @torch.no_grad()
    def describe_layers(self, module_paths: Mapping[str, str]) -> list[LayerInfo]:
        """Widths and strides, read off a forward pass on the meta device: exact, and without computing anything."""
        with torch.device("meta"):
            shadow = type(self.denoiser).from_config(self.denoiser.config)
        # buffers made from numpy arrays ignore the default device; nn.Module's own `to`, as diffusers' warns in half
        nn.Module.to(shadow, "meta", self.dtype)
        side = self.image_size // self.vae_stride
        sample = torch.empty(1, self.denoiser.config.in_channels, side, side, device="meta", dtype=self.dtype)
        conditioning = self.conditioning_on(torch.device("meta"))
        return describe_layers(
            shadow, module_paths, lambda: self._forward(shadow, sample, 0, conditioning), self.image_size
        )

    def available_layers(self) -> list[LayerInfo]:
        return self.describe_layers(canonical_layers(self.denoiser))

    def resolve(self, layers: tuple[str, ...]) -> dict[str, str]:
        return {layer: resolve_layer(self.denoiser, layer) for layer in layers}

    def weights_hash(self) -> str:
        """16 hex digits of a SHA-256 over the tensors of every network that takes part, by name and content.

        With them the noise schedule and the scale of the latents, which decide the numbers as the weights do.
        """
        scales = {key: self.vae.config.get(key) for key in ("scaling_factor", "shift_factor")}
        schedule = {key: self.pipeline.scheduler.config.get(key) for key in SCHEDULE_SETTINGS}
        digest = hashlib.sha256(fingerprint_of(scales | schedule).encode())
        for component in ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
            module = getattr(self.pipeline, component, None)
            if not isinstance(module, nn.Module):
                continue
            for name, tensor in sorted(module.state_dict().items()):
                digest.update(f"{component}.{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:16]


def _for_batch(value: Any, batch: int) -> Any:
    """A captured argument of a batch of one, expanded; what is no tensor is passed through."""
    if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == 1:
        return value.expand(batch, *value.shape[1:])
    if isinstance(value, dict):
        return {key: _for_batch(item, batch) for key, item in value.items()}
    return value


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return value
