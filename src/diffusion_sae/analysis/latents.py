"""SAE latents and the images that activate them most, with the purity of those images' labels."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..features import FeatureSet
from ..sae.code import SparseCode
from ..sae.modeling import KSparseAutoencoder


@dataclass(frozen=True)
class LatentStatistics:
    """Per latent, over the images of a set; an image's activation is its largest over positions and timesteps."""

    top_images: Int[Tensor, "num_latents n"]
    """Images that activate the latent most, best first; meaningless where `top_acts` is 0."""
    top_acts: Float[Tensor, "num_latents n"]
    density: Float[Tensor, " num_latents"]
    """Share of images in which the latent is active."""
    num_images: int

    @property
    def max_acts(self) -> Float[Tensor, " num_latents"]:
        return self.top_acts[:, 0]

    @property
    def measurable(self) -> Int[Tensor, " m"]:
        """Latents with n active images; purity of fewer says little."""
        return torch.nonzero(self.top_acts[:, -1] > 0).flatten()


def image_activations(
    sae: KSparseAutoencoder, features: FeatureSet, images_per_batch: int = 256
) -> Iterator[Float[Tensor, "b num_latents"]]:
    """The largest activation of each latent in each image, a batch of images at a time."""
    for rows in features.image_batches(images_per_batch):
        images = len(rows)
        code = sae.encode(rows.flatten(0, 1).to(sae.W_dec.device))  # (images · T, k)
        acts = torch.zeros(images, sae.config.num_latents, device=code.top_acts.device)
        # (images · T, k) -> (images, T · k): each image's rows beside one another
        by_image = SparseCode(code.top_acts.reshape(images, -1), code.top_indices.reshape(images, -1))
        yield acts.scatter_reduce_(1, by_image.top_indices, by_image.top_acts.float(), "amax").cpu()


@torch.no_grad()
def latent_statistics(sae: KSparseAutoencoder, features: FeatureSet, n: int = 16) -> LatentStatistics:
    """Top images and density of every latent, in memory that does not grow with the number of images.

    Args:
        sae: the autoencoder; the features must come from its extraction.
        features: pooled or token features.
        n: images kept a latent.
    """
    sae.require_features(features)
    num_latents = sae.config.num_latents
    top_acts, top_images = torch.zeros(n, num_latents), torch.zeros(n, num_latents, dtype=torch.long)
    active, first = torch.zeros(num_latents), 0
    for acts in image_activations(sae, features):
        numbers = torch.arange(first, first + len(acts))[:, None].expand(-1, num_latents)
        candidates, images = torch.cat([top_acts, acts]), torch.cat([top_images, numbers])
        top_acts, chosen = candidates.topk(n, dim=0)
        top_images = images.gather(0, chosen)
        active += (acts > 0).sum(0)
        first += len(acts)
    return LatentStatistics(top_images.T, top_acts.T, active / first, first)


@dataclass(frozen=True)
class LabelPurity:
    """How far the labels of a latent's top images agree."""

    latents: Int[Tensor, " m"]
    """The latents it was measured for: those with n active images."""
    purity: Float[Tensor, " m"]
    """Share of the n top images that have the most common label among them."""
    label: Int[Tensor, " m"]
    """That label."""

    @property
    def mean(self) -> float | None:
        """Over the measured latents; None where there is none."""
        return self.purity.mean().item() if len(self.purity) else None


def label_purity(statistics: LatentStatistics, labels: Int[Tensor, " images"]) -> LabelPurity:
    """Purity of the top images' labels, for each latent that n images activate."""
    latents = statistics.measurable
    of_top = labels[statistics.top_images[latents]]  # (m, n)
    counts = torch.zeros(len(latents), int(labels.max()) + 1, dtype=torch.long)
    counts.scatter_add_(1, of_top, torch.ones_like(of_top))
    most, label = counts.max(1)
    return LabelPurity(latents, most / of_top.shape[1], label)


def shuffled_labels(labels: Int[Tensor, " images"], seed: int = 0) -> Int[Tensor, " images"]:
    """The baseline of purity: the same labels on other images."""
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
