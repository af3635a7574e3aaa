"""Where on an image an SAE latent fires: its activations over the grid of positions."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..features import FeatureSet, ImageSubset
from ..sae.modeling import KSparseAutoencoder


def grid_side(features: FeatureSet) -> int:
    """Positions along one side of an image's square grid.

    Raises:
        ValueError: for features that are not of a square grid, such as pooled ones.
    """
    side = math.isqrt(features.positions_per_image)
    if side < 2 or side * side != features.positions_per_image:
        raise ValueError(
            f"Where a latent fires is read off a square grid of positions; these features have "
            f"{features.positions_per_image} an image and timestep. Extract with pooling='tokens'."
        )
    return side


@torch.no_grad()
def activation_maps(
    sae: KSparseAutoencoder,
    features: FeatureSet,
    latents: Int[Tensor, " m"],
    images: Int[Tensor, "m n"],
    images_per_batch: int = 64,
) -> Float[Tensor, "m n side side"]:
    """Activations of each latent at each position of its own images, 0 where it is not among a row's active latents.

    Of several timesteps the largest. Each image is encoded once, however many latents want it; no array of rows ×
    latents is made.

    Args:
        sae: the autoencoder; the features must come from its extraction.
        features: token features of square images.
        latents: which latents.
        images: of each latent the images to look at, such as `LatentStatistics.top_images[latents]`.
        images_per_batch: images that are encoded at a time.

    Raises:
        ValueError: for features without a grid, of another width or extraction, or an image that is not there.
    """
    sae.require_features(features)
    side = grid_side(features)
    if images.shape[:1] != latents.shape or images.ndim != 2:
        raise ValueError(
            f"images must have one row a latent, got the shapes {tuple(latents.shape)} and {tuple(images.shape)}."
        )
    wanted, pair_of = images.flatten().unique(return_inverse=True)
    maps = torch.zeros(images.numel(), features.positions_per_image)
    latent_of = latents.repeat_interleave(images.shape[1])
    for first in range(0, len(wanted), images_per_batch):
        batch = wanted[first : first + images_per_batch]
        pairs = torch.nonzero((pair_of >= first) & (pair_of < first + len(batch))).flatten()
        acts, indices = _encoded(sae, ImageSubset(features, batch))  # (T, images, positions, k)
        for pair in pairs.tolist():
            image = int(pair_of[pair]) - first
            own = torch.where(indices[:, image] == latent_of[pair], acts[:, image], 0.0)
            maps[pair] = own.sum(-1).amax(0)
    return maps.unflatten(1, (side, side)).unflatten(0, tuple(images.shape))


def _encoded(sae: KSparseAutoencoder, features: FeatureSet) -> tuple[Tensor, Tensor]:
    """Activations and indices of all rows, by timestep, image and position."""
    timesteps = features.timesteps if sae.config.timesteps is not None else None
    code = sae.encode(features[:].to(sae.W_dec.device), timesteps)
    shape = (features.num_timesteps, features.num_images, features.positions_per_image)
    return code.top_acts.float().cpu().unflatten(0, shape), code.top_indices.cpu().unflatten(0, shape)
