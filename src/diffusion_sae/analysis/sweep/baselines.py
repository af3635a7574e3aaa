"""Features of what goes into a denoiser: pixels, and the VAE's latents."""

import torch
from torch import Tensor

from ...extraction.extractor import DiffusionFeatureExtractor
from ...extraction.images import preprocess
from ...extraction.sources import ImageSource
from ..probing import latent_features
from .config import SweepConfig
from .specs import ModelSpec


def baseline_features(
    kind: str, model: ModelSpec, config: SweepConfig, images: dict[str, ImageSource]
) -> dict[str, Tensor]:
    """Of each split, one row an image. A model without an autoencoder has the pixels themselves as latents."""
    extractor = DiffusionFeatureExtractor.from_pretrained(
        model.model,
        device=config.device,
        layers=model.layers[:1],
        timesteps=model.timesteps[:1],
        **model.extraction,
    )
    if kind == "latents" and extractor.backbone.family != "encoder":
        return {role: latent_features(extractor, source).to_tensor() for role, source in images.items()}
    side = min(config.baseline_size, extractor.backbone.image_size)
    return {role: _pixels(source, side) for role, source in images.items()}


def _pixels(source: ImageSource, side: int) -> Tensor:
    """Flattened; of grey images one channel, as the other two say nothing new."""
    pixels = torch.stack([preprocess(source.read(i), side) for i in range(len(source))])
    grey = torch.equal(pixels, pixels[:, :1].expand_as(pixels))
    return (pixels[:, :1] if grey else pixels).flatten(1)
