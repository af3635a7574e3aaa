"""Finding and loading what an extractor is made of: a diffusers pipeline, or an artifact that names one."""

import os
from dataclasses import dataclass
from typing import Any

import torch

from .._config import check, check_choice
from ..hub.lookup import find_file
from ..provenance import EXTRACTOR_CONFIG_NAME, ExtractorConfig, Provenance
from ..zoo import resolve_source
from .encoders import is_encoder, load_encoder
from .families import denoiser_name


def find_artifact(name: str, *, subfolder: str = "", **hub: Any) -> Provenance | None:
    """The extraction recorded in an artifact's `extractor_config.json`; None if `name` is a pipeline itself."""
    path = find_file(resolve_source(name), EXTRACTOR_CONFIG_NAME, subfolder=subfolder, **hub)
    return None if path is None else Provenance.load(path)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where and how a pipeline runs, by diffusers' own means.

    None of it decides the features beyond rounding, save tiling: large images get other latents at the tiles' seams.
    """

    device: str | torch.device | None = None
    """Default: CUDA, else MPS, else the CPU."""
    device_map: str | None = None
    """diffusers' `device_map`, such as balanced: the components spread over several accelerators."""
    offload: str | None = None
    """model, sequential: `enable_model_cpu_offload`, `enable_sequential_cpu_offload`; needs an accelerator."""
    vae_tiling: bool = False
    """The VAE encodes large images in overlapping tiles: less memory, and slightly other latents."""
    vae_slicing: bool = False
    """The VAE encodes one image after another: less memory."""
    attention_backend: str | None = None
    """Name that the denoiser's `set_attention_backend` takes, such as native or flash."""

    def __post_init__(self) -> None:
        check_choice("offload", self.offload, (None, "model", "sequential"))
        chosen = [name for name in ("device_map", "offload") if getattr(self, name) is not None]
        check(len(chosen) < 2, "device_map and offload exclude each other; give one.")
        check(
            self.device_map is None or self.device is None,
            "device_map decides the devices itself; leave out device.",
        )

    def apply(self, pipeline: Any) -> None:
        vae = getattr(pipeline, "vae", None)
        for wanted, method in ((self.vae_tiling, "enable_tiling"), (self.vae_slicing, "enable_slicing")):
            if wanted and not hasattr(vae, method):
                raise ValueError(f"{type(pipeline).__name__} has no VAE with {method}(); leave it out.")
            if wanted:
                getattr(vae, method)()
        if self.attention_backend is not None:
            getattr(pipeline, denoiser_name(pipeline)).set_attention_backend(self.attention_backend)
        if self.offload == "model":
            pipeline.enable_model_cpu_offload(device=self.device)
        elif self.offload == "sequential":
            pipeline.enable_sequential_cpu_offload(device=self.device)
        elif self.device_map is None:
            pipeline.to(self.device or default_device())


def load_model(config: ExtractorConfig, placement: Placement | None = None, **hub: Any) -> Any:
    """The diffusers pipeline of a config, or the vision encoder."""
    placement = placement or Placement()
    source = resolve_source(config.model)
    if is_encoder(source, revision=config.revision, **hub):
        return load_encoder(config, source, placement.device or default_device(), **hub)
    return load_pipeline(config, placement, **hub)


def load_pipeline(config: ExtractorConfig, placement: Placement, **hub: Any) -> Any:
    """The diffusers pipeline of a config in its dtype, from safetensors alone, without the parts that do not matter."""
    from diffusers import DiffusionPipeline

    source = resolve_source(config.model)
    index = DiffusionPipeline.load_config(source, revision=config.revision, **hub)
    unused = {name: None for name in ("safety_checker", "feature_extractor", "image_encoder") if name in index}
    if "requires_safety_checker" in index:
        unused["requires_safety_checker"] = False  # type: ignore[assignment]
    dtype = getattr(torch, config.dtype)
    spread = {} if placement.device_map is None else {"device_map": placement.device_map}
    pipeline = DiffusionPipeline.from_pretrained(
        source, dtype=dtype, revision=config.revision, use_safetensors=True, **spread, **unused, **hub
    )
    if config.random_weights:
        randomise_denoiser(pipeline, config.seed)
    vae = getattr(pipeline, "vae", None)
    placement.apply(pipeline)
    if dtype == torch.float16 and vae is not None and getattr(vae.config, "force_upcast", False):
        vae.to(torch.float32)  # SDXL's VAE overflows in fp16
    return pipeline


def randomise_denoiser(pipeline: Any, seed: int) -> None:
    """Replace the denoiser by one of the same architecture, initialised by its own constructor from `seed`."""
    name = denoiser_name(pipeline)
    trained = getattr(pipeline, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(trained).from_config(trained.config)
    # nn.Module's own `to`, as diffusers' warns whenever it is given a dtype
    setattr(pipeline, name, torch.nn.Module.to(fresh, trained.device, trained.dtype))


def default_device() -> str:
    """CUDA, the one of this process where `accelerate launch` or `torchrun` started several; else MPS, else the CPU."""
    if torch.cuda.is_available():
        return f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def first_settings(model: str) -> dict[str, Any]:
    """Settings that an extractor of the model surely takes: a canonical layer by its kind, and a timestep."""
    from diffusers import DiffusionPipeline

    source = resolve_source(model)
    if is_encoder(source):
        return {"layers": ("block0",), "timesteps": (0,)}
    return {"layers": ("bottleneck" if "unet" in DiffusionPipeline.load_config(source) else "block0",)}


def hide_loading_bars() -> None:
    """Turn off diffusers' own bars while components load; the command line shows its own."""
    from diffusers.utils import logging

    logging.disable_progress_bar()
