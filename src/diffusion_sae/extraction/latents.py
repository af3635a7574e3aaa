"""Images to what the denoiser works on: the autoencoder's latents, scaled as in training, packed as it takes them."""

import inspect
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


class LatentSpace:
    """The autoencoder of a pipeline, or the pixels themselves where there is none."""

    def __init__(self, pipeline: Any, denoiser: Any) -> None:
        named = [getattr(pipeline, name, None) for name in ("vae", "vqvae")]
        # Any: an nn.Module of diffusers, which pyright sees no config of
        self.autoencoder: Any = next((module for module in named if module is not None), None)
        self._pack = getattr(pipeline, "_pack_latents", None)
        if self._pack is not None and list(inspect.signature(self._pack).parameters) != [
            "latents",
            "batch_size",
            "num_channels_latents",
            "height",
            "width",
        ]:
            raise ValueError(f"{type(pipeline).__name__} packs its latents in a way that is not supported.")
        self._pixel_channels = None if self.autoencoder is not None else denoiser.config.in_channels
        if self.autoencoder is None:
            self.stride, self.is_video = 1, False
            return
        # an autoencoder of videos takes (B, 3, frames, H, W); an image is a video of one frame
        self.is_video = any(isinstance(module, nn.Conv3d) for module in self.autoencoder.modules())
        self.stride = self._stride(pipeline)
        self.dtype: torch.dtype = self.autoencoder.dtype

    def _stride(self, pipeline: Any) -> int:
        for name in ("vae_scale_factor_spatial", "vae_scale_factor"):
            if isinstance(getattr(pipeline, name, None), int):
                return getattr(pipeline, name)
        return 2 ** (len(self.autoencoder.config.block_out_channels) - 1)

    @property
    def packing(self) -> int:
        """Side of the patches of latents that are packed into one token before the denoiser."""
        return 1 if self._pack is None else 2

    def scales(self) -> dict[str, Any]:
        """What decides the scale of the latents."""
        names = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
        return {} if self.autoencoder is None else {name: self.autoencoder.config.get(name) for name in names}

    @torch.no_grad()
    def encode(self, pixel_values: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B c ..."]:
        """Latents: the mode of the autoencoder's posterior, shifted and scaled as in training.

        The mode, not a sample: the only randomness of a feature is the noise of its timestep.
        """
        if self.autoencoder is None:
            return pixel_values.mean(1, keepdim=True) if self._pixel_channels == 1 else pixel_values
        images = pixel_values.to(dtype=self.dtype)
        encoded = self.autoencoder.encode(images.unsqueeze(2) if self.is_video else images)
        if hasattr(encoded, "latent_dist"):
            latents = encoded.latent_dist.mode()
        else:
            latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent
        scales = self.scales()
        factor = scales["scaling_factor"] if scales["scaling_factor"] is not None else 1.0
        if scales["latents_mean"] is None:
            return (latents - (scales["shift_factor"] or 0.0)) * factor
        per_channel = (1, -1, *[1] * (latents.ndim - 2))
        mean = torch.tensor(scales["latents_mean"], device=latents.device, dtype=latents.dtype).view(per_channel)
        std = torch.tensor(scales["latents_std"], device=latents.device, dtype=latents.dtype).view(per_channel)
        return (latents - mean) * factor / std

    def pack(self, latents: Float[Tensor, "B c ..."]) -> Tensor:
        """Latents as the denoiser takes them: (B, c, h, w), (B, c, 1, h, w), or (B, T, 4 c) where it wants tokens."""
        if self._pack is None:
            return latents
        return self._pack(latents, len(latents), latents.shape[1], *latents.shape[-2:])
