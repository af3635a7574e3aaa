"""Vision encoders of transformers through the backbone's interface, as baselines for what a denoiser sees."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .._files import read_json
from .._weights import weights_hash
from ..hub.lookup import find_file
from ..provenance import ExtractorConfig
from .hooks import ImageStream, run_until_captured
from .layers import LayerInfo, canonical_layers, describe_layers, resolve_layer


class EncoderBackbone:
    """DINOv2, DINOv3, CLIP, SigLIP, ViT, …: patches of the clean image in, hidden states of its blocks out.

    There is no noise, no prompt and no timestep: `timesteps` must be (0,). Features are those of the patches; class and
    register tokens are left out.
    """

    family = "encoder"

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float], config: ExtractorConfig) -> None:
        """Wrap a loaded model; `mean` and `std` normalise pixels in [0, 1], as its image processor does."""
        inert = {
            "prompt": config.prompt != "",
            "prompt_from": config.prompt_from != "config",
            "classifier_free_pair": config.classifier_free_pair,
            "guidance": config.guidance is not None,
            "ensemble": config.ensemble != 1,
            "timesteps": config.timesteps != (0,),
        }
        if any(inert.values()):
            named = ", ".join(name for name, given in inert.items() if given)
            raise ValueError(
                f"{config.model!r} is a vision encoder: it sees the clean image, without text or noise. Give "
                f"timesteps=(0,) and leave out everything of prompt, guidance and ensemble; got other {named}."
            )
        # Any: an nn.Module of transformers, whose vision part has a config of its own
        self.denoiser: Any = getattr(model, "vision_model", model)
        self.denoiser.eval().requires_grad_(False)
        if not canonical_layers(self.denoiser):
            raise ValueError(
                f"{type(model).__name__} is not supported: it has no list of blocks that extraction/families.py names."
            )
        self.patch_size = self._square("patch_size")
        self.image_size = config.image_size or self._square("image_size")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size must be a multiple of {self.patch_size}, got {self.image_size}.")
        self.mean = torch.tensor(list(mean)).view(3, 1, 1)
        self.std = torch.tensor(list(std)).view(3, 1, 1)
        # class and register tokens stand before the patches
        self.stream = ImageStream((self.image_size // self.patch_size) ** 2, "first")

    def _square(self, name: str) -> int:
        value = getattr(self.denoiser.config, name, None)
        sides = [value] if isinstance(value, int) else list(value or ())
        if len(set(sides)) != 1:
            raise ValueError(f"{type(self.denoiser).__name__} has {name} {value!r}; a square one is needed.")
        return sides[0]

    @property
    def device(self) -> torch.device:
        return self.denoiser.device

    @property
    def dtype(self) -> torch.dtype:
        return self.denoiser.dtype

    def to(self, device: str | torch.device) -> None:
        self.denoiser.to(device)

    def conditioning(self, prompt: str) -> None:
        """Nothing: an encoder is given the image alone."""

    def encode(self, pixel_values: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """Pixels normalised as the encoder was trained: ((x + 1)/2 − mean)/std."""
        return (((pixel_values.float() + 1) / 2 - self.mean) / self.std).to(self.device, self.dtype)

    def add_noise(self, latents: Tensor, image_ids: list[str], *, seed: int, timestep: int, member: int = 0) -> Tensor:
        """The clean image: at t = 0 there is no noise."""
        return latents

    def _forward(self, model: nn.Module, normalised: Tensor) -> object:
        # ViTs of one size interpolate their position embeddings for another when they are told to; DINO always does
        other_size = self.image_size != self._square("image_size")
        takes_it = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        return model(pixel_values=normalised, **({"interpolate_pos_encoding": True} if other_size and takes_it else {}))

    @torch.no_grad()
    def activations(
        self, noisy_latents: Tensor, timestep: int, module_paths: Mapping[str, str], prompts: Sequence[str] | str = ""
    ) -> dict[str, Tensor]:
        """{layer: (B, T, C)} over the T patches; blocks after the last wanted one are not computed."""
        model = self.denoiser
        return run_until_captured(model, module_paths, lambda: self._forward(model, noisy_latents), self.stream)

    def describe_layers(self, module_paths: Mapping[str, str]) -> list[LayerInfo]:
        pixels = torch.zeros(1, 3, self.image_size, self.image_size)
        captured = self.activations(self.encode(pixels), 0, module_paths)
        return describe_layers(captured, module_paths, self.image_size, self.family)

    def available_layers(self) -> list[LayerInfo]:
        return self.describe_layers(canonical_layers(self.denoiser))

    def resolve(self, layers: Sequence[str]) -> dict[str, str]:
        return {layer: resolve_layer(self.denoiser, layer) for layer in layers}

    def weights_hash(self) -> str:
        """Of all tensors, with the normalisation of the pixels."""
        scales = {"mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist()}
        return weights_hash({"encoder": self.denoiser}, scales)


def is_encoder(source: str, **hub: Any) -> bool:
    """Whether a folder or repository holds a transformers model and no diffusers pipeline."""
    if find_file(source, "model_index.json", **hub) is not None:
        return False
    config = find_file(source, "config.json", **hub)
    return config is not None and "model_type" in read_json(config)


def load_encoder(config: ExtractorConfig, source: str, device: Any, **hub: Any) -> EncoderBackbone:
    """A transformers vision model with the normalisation of its image processor, from safetensors alone."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    dtype = getattr(torch, config.dtype)
    kwargs = {"revision": config.revision, **hub}
    if config.random_weights:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = AutoModel.from_config(AutoConfig.from_pretrained(source, **kwargs)).to(dtype)
    else:
        model = AutoModel.from_pretrained(source, dtype=dtype, use_safetensors=True, **kwargs)
    processor: Any = AutoImageProcessor.from_pretrained(source, backend="pil", **kwargs)
    return EncoderBackbone(model.to(device), processor.image_mean, processor.image_std, config)
