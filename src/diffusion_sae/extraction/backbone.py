"""A diffusers pipeline as something that turns images into activations: one adapter for every family."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .._weights import weights_hash
from .conditioning import Conditioning, catch_conditioning, concatenate
from .families import denoiser_name, family_entry
from .hooks import ImageStream, run_until_captured, tensors_of
from .latents import LatentSpace
from .layers import LayerInfo, canonical_layers, describe_layers, family_of, resolve_layer
from .noise import noise_batch
from .schedule import TIME_FORMS, NoiseSchedule

# components that have no part in an activation
UNUSED_COMPONENTS = ("safety_checker", "feature_extractor", "image_encoder", "image_processor")

# Flux's is 4 MB a prompt; a data set with a text an image must not fill the memory with them
MAX_PROMPTS = 256


class DiffusionBackbone:
    """Encodes images, adds noise, runs the denoiser up to the wanted layers."""

    def __init__(self, pipeline: Any, *, image_size: int | None = None, guidance: float | None = None) -> None:
        self.pipeline = pipeline
        denoiser = getattr(pipeline, denoiser_name(pipeline))
        if not canonical_layers(denoiser):
            raise ValueError(
                f"{type(pipeline).__name__} is not supported: it needs a denoiser, `unet` or `transformer`, made of "
                "blocks that extraction/families.py names."
            )
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.eval().requires_grad_(False)  # dropout in a text encoder would be noise in the features
        # Any: an nn.Module of diffusers, which pyright sees no config of
        self.denoiser: Any = denoiser
        self.family = family_of(denoiser)
        self.guidance = guidance
        if getattr(denoiser, "is_cache_enabled", False):
            denoiser.disable_cache()  # a cached block's hook would fire with another step's output
        self.schedule = NoiseSchedule(pipeline.scheduler)
        self.latent_space = LatentSpace(pipeline, denoiser)
        self.image_size = self._image_size(image_size)
        self._conditionings: dict[str, Conditioning] = {}
        self.stream = ImageStream(self._num_image_tokens(), family_entry(denoiser).text_in_sequence)

    # Both are kept: diffusers walks over all modules to find them, an eighth of tiny-sd's time for a batch of 32.
    @cached_property
    def device(self) -> torch.device:
        # with offloading the modules wait on the CPU, and run on the execution device
        return getattr(self.pipeline, "_execution_device", self.denoiser.device)

    @cached_property
    def dtype(self) -> torch.dtype:
        return self.denoiser.dtype

    def _image_size(self, image_size: int | None) -> int:
        space = self.latent_space
        size = image_size or self._trained_side() * space.stride
        step = space.stride * max(space.packing, self._patch_size())
        if size % step:
            raise ValueError(f"image_size must be a multiple of {step} for this model, got {size}.")
        return size

    def _trained_side(self) -> int:
        """Side of the latents that the model was trained on."""
        name = type(self.pipeline).__name__
        side = self.denoiser.config.get("sample_size") or getattr(self.pipeline, "default_sample_size", None)
        if side is None:
            raise ValueError(f"{name} does not say its image size: pass image_size.")
        sides = [side] if isinstance(side, int) else list(side)
        if len(set(sides)) > 1:
            raise ValueError(f"{name} was trained on {' × '.join(map(str, sides))} latents: pass image_size.")
        return sides[0]

    def _patch_size(self) -> int:
        """Side of the patches of its sample that a transformer makes into one token."""
        patch = self.denoiser.config.get("patch_size", 1) if self.family == "transformer" else 1
        return patch if isinstance(patch, int) else patch[-1]

    def _num_image_tokens(self) -> int | None:
        if self.family == "unet":
            return None
        packing = self.latent_space.packing
        # what is packed already has a patch size of 1, or of the packing, in its config
        patch = packing if packing > 1 else self._patch_size()
        return (self.image_size // self.latent_space.stride // patch) ** 2

    def conditioning(self, prompt: str) -> Conditioning:
        """What the denoiser is given for a prompt; computed once, as long as no more than MAX_PROMPTS are in use."""
        if prompt not in self._conditionings:
            if len(self._conditionings) >= MAX_PROMPTS:
                del self._conditionings[next(iter(self._conditionings))]  # the oldest
            caught = catch_conditioning(
                self.pipeline,
                self.denoiser,
                prompt=prompt,
                image_size=self.image_size,
                latent_side=self.image_size // self.latent_space.stride,
                guidance=self.guidance,
            )
            self._conditionings[prompt] = caught.to(self.device)
        return self._conditionings[prompt]

    def to(self, device: str | torch.device) -> None:
        self.pipeline.to(device)
        self.__dict__.pop("device", None)
        moved = {prompt: value.to(torch.device(device)) for prompt, value in self._conditionings.items()}
        self._conditionings = moved

    def encode(self, pixel_values: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B c ..."]:
        """Latents without noise, in the denoiser's dtype; see LatentSpace."""
        return self.latent_space.encode(pixel_values.to(self.device)).to(self.device, self.dtype)

    def add_noise(
        self, latents: Float[Tensor, "B c ..."], image_ids: list[str], *, seed: int, timestep: int, member: int = 0
    ) -> Float[Tensor, "B c ..."]:
        """signal · latents + sigma · ε at the level of the training schedule; see NoiseSchedule."""
        signal, sigma = self.schedule.level(timestep)
        noise = noise_batch(latents, image_ids, seed=seed, timestep=timestep, member=member).to(latents.device)
        return (signal * latents.float() + sigma * noise).to(self.dtype)

    def _told_time(self, timestep: int, conditioning: Conditioning, batch: int, device: torch.device) -> Tensor:
        told = TIME_FORMS[conditioning.time_form](self.schedule.scheduler_time(timestep))
        return torch.full((batch,), told, device=device, dtype=conditioning.time_dtype)

    def _forward(
        self,
        denoiser: nn.Module,
        sample: Tensor,
        timestep: int,
        conditioning: Conditioning,
        arguments: Mapping[str, Any],
    ) -> object:
        if sample.shape[1:] != conditioning.sample_shape[1:]:
            raise ValueError(
                f"{type(self.pipeline).__name__} gives its denoiser {conditioning.sample_shape[1:]} an image, "
                f"this library would give it {tuple(sample.shape[1:])}: the pipeline is not supported. Pipelines for "
                "inpainting and editing take more than noisy latents; load the text-to-image one."
            )
        given = {
            **arguments,
            conditioning.sample_name: sample,
            conditioning.time_name: self._told_time(timestep, conditioning, len(sample), sample.device),
        }
        return denoiser(**given, return_dict=False)

    @torch.no_grad()
    def activations(
        self,
        noisy_latents: Float[Tensor, "B c ..."],
        timestep: int,
        module_paths: Mapping[str, str],
        prompts: Sequence[str] | str = "",
    ) -> dict[str, Tensor]:
        """{layer: (B, C, h', w') or (B, T, C)}; what comes after the last wanted layer is not computed.

        `prompts`: one for all images, or one each.
        """

        def run(forward: Callable[[], object]) -> dict[str, Tensor]:
            return run_until_captured(self.denoiser, module_paths, forward, self.stream)

        return self._for_each_prompt(noisy_latents, timestep, prompts, run)

    @torch.no_grad()
    def predictions(
        self, noisy_latents: Float[Tensor, "B c ..."], timestep: int, prompts: Sequence[str] | str = ""
    ) -> Tensor:
        """What the whole denoiser says of each image, as it puts it out: packed, and with a variance if it learned one.

        `prompts`: as for `activations`.
        """

        def run(forward: Callable[[], object]) -> dict[str, Tensor]:
            return {"": tensors_of(forward())[0]}

        return self._for_each_prompt(noisy_latents, timestep, prompts, run)[""]

    def _for_each_prompt(
        self,
        noisy_latents: Tensor,
        timestep: int,
        prompts: Sequence[str] | str,
        run: Callable[[Callable[[], object]], dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """`run` of one forward pass, or of one a prompt where texts of different lengths cannot stand in one batch."""
        distinct = [prompts] if isinstance(prompts, str) else list(dict.fromkeys(prompts))
        conditioning = self.conditioning(distinct[0])
        arguments = None
        if len(distinct) == 1:
            arguments = conditioning.batch(len(noisy_latents))
        elif family_entry(self.denoiser).padded_text:
            arguments = concatenate([self.conditioning(prompt) for prompt in prompts])
        if arguments is not None:
            sample = self.latent_space.pack(noisy_latents)
            return run(lambda: self._forward(self.denoiser, sample, timestep, conditioning, arguments))
        rows = [torch.tensor([i for i, p in enumerate(prompts) if p == prompt]) for prompt in distinct]
        parts = [
            self._for_each_prompt(noisy_latents[mine.to(noisy_latents.device)], timestep, prompt, run)
            for mine, prompt in zip(rows, distinct, strict=True)
        ]
        order = torch.cat(rows).argsort().to(noisy_latents.device)
        return {name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}

    @torch.no_grad()
    def describe_layers(self, module_paths: Mapping[str, str]) -> list[LayerInfo]:
        """Widths and strides, read off a forward pass on the meta device: exact, and without computing anything.

        Denoisers that look at the values of their inputs cannot run there and compute one image's forward instead.
        """
        conditioning = self.conditioning("")
        try:
            activations = self._meta_activations(module_paths, conditioning.to(torch.device("meta")))
        except RuntimeError as error:
            # A forward that asks for a value, which a meta tensor does not have, ends in one of two errors: Lumina 2
            # reads the lengths of its texts. A real forward has the same shapes, so that the result does not change.
            # Any other error is the model's. By its text, as torch raises `.item()` on meta as a bare RuntimeError.
            if not isinstance(error, NotImplementedError) and "meta tensors" not in str(error):
                raise
            sample = torch.zeros(conditioning.sample_shape, device=self.device, dtype=self.dtype)
            activations = run_until_captured(
                self.denoiser,
                module_paths,
                lambda: self._forward(self.denoiser, sample, 0, conditioning, conditioning.batch(1)),
                self.stream,
            )
        return describe_layers(activations, module_paths, self.image_size, self.family)

    def _meta_activations(self, module_paths: Mapping[str, str], conditioning: Conditioning) -> dict[str, Tensor]:
        with torch.device("meta"):
            shadow = type(self.denoiser).from_config(self.denoiser.config)
        # buffers made from numpy arrays ignore the default device; nn.Module's own `to`, as diffusers' warns in half
        nn.Module.to(shadow, "meta", self.dtype)
        sample = torch.empty(conditioning.sample_shape, device="meta", dtype=self.dtype)
        return run_until_captured(
            shadow.eval(),
            module_paths,
            lambda: self._forward(shadow, sample, 0, conditioning, conditioning.batch(1)),
            self.stream,
        )

    def available_layers(self) -> list[LayerInfo]:
        return self.describe_layers(canonical_layers(self.denoiser))

    def resolve(self, layers: Sequence[str]) -> dict[str, str]:
        return {layer: resolve_layer(self.denoiser, layer) for layer in layers}

    def weights_hash(self) -> str:
        """Of every network that takes part, with the noise schedule and the scale of the latents."""
        networks = {
            name: component
            for name, component in self.pipeline.components.items()
            if isinstance(component, nn.Module) and name not in UNUSED_COMPONENTS
        }
        return weights_hash(networks, self.latent_space.scales() | self.schedule.settings())
