"""SAE latents and the images that activate them most, with the purity of those images' labels."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..features import FeatureSet
from ..sae.code import SparseCode
from ..sae.latent_table import in_turns
from ..sae.modeling import KSparseAutoencoder
from .metrics.interpretability import purity


@dataclass(frozen=True)
class LatentStatistics:
    """Per latent, over the images of a set; an image's activation is its largest over positions and timesteps."""

    top_images: Int[Tensor, "num_latents n"]
    """Images that activate the latent most, best first; meaningless where `top_acts` is 0."""
    top_acts: Float[Tensor, "num_latents n"]
    density: Float[Tensor, " num_latents"]
    """Share of images in which the latent is active."""
    mean_acts: Float[Tensor, " num_latents"]
    """Mean over the images in which it is active; 0 if it is active in none."""
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
    timesteps = None
    if sae.config.timesteps is not None:  # of an image's rows, which are timestep by timestep
        timesteps = torch.tensor(features.of_timesteps).repeat_interleave(features.positions_per_image)
    for rows in features.image_batches(images_per_batch):
        images = len(rows)
        of_rows = None if timesteps is None else timesteps.repeat(images)
        code = sae.encode(rows.flatten(0, 1).to(sae.W_dec.device), of_rows)  # (images · T, k)
        acts = torch.zeros(images, sae.config.num_latents, device=code.top_acts.device)
        # (images · T, k) -> (images, T · k): each image's rows beside one another
        by_image = SparseCode(code.top_acts.reshape(images, -1), code.top_indices.reshape(images, -1))
        yield acts.scatter_reduce_(1, by_image.top_indices, by_image.top_acts.float(), "amax").cpu()


def latent_statistics(sae: KSparseAutoencoder, features: FeatureSet, n: int = 16) -> LatentStatistics:
    """Top images and density of every latent, in memory that does not grow with the number of images.

    Args:
        sae: the autoencoder; the features must come from its extraction.
        features: pooled or token features.
        n: images kept a latent.
    """
    sae.require_features(features)
    return unit_statistics(image_activations(sae, features), n)


@torch.no_grad()
def unit_statistics(activations: Iterable[Float[Tensor, "b units"]], n: int = 16) -> LatentStatistics:
    """Top images and density of any units (latents, neurons, directions) from all images in order, batch by batch.

    Holds n images and one batch a unit. A unit is active where its activation is above 0.
    """
    top_acts = top_images = active = total = None
    first = 0
    for acts in activations:
        if top_acts is None or top_images is None or active is None or total is None:
            top_acts, active = acts.new_zeros(n, acts.shape[1]), acts.new_zeros(acts.shape[1])
            total = torch.zeros(acts.shape[1], dtype=torch.float64)
            top_images = torch.zeros(n, acts.shape[1], dtype=torch.long)
        numbers = torch.arange(first, first + len(acts))[:, None].expand(-1, acts.shape[1])
        candidates, images = torch.cat([top_acts, acts]), torch.cat([top_images, numbers])
        top_acts, chosen = candidates.topk(n, dim=0)
        top_images = images.gather(0, chosen)
        active += (acts > 0).sum(0)
        total += acts.clamp_min(0).double().sum(0)
        first += len(acts)
    if top_acts is None or top_images is None or active is None or total is None:
        raise ValueError("There are no activations: the features have no images.")
    return LatentStatistics(top_images.T, top_acts.T, active / first, (total / active.clamp_min(1)).float(), first)


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
    return LabelPurity(latents, *purity(labels[statistics.top_images[latents]]))


def purest_latents(statistics: LatentStatistics, purity: LabelPurity, count: int) -> list[int]:
    """Places in `purity.latents` of the purest latents, of equally pure ones the strongest, in turns over the labels:
    one frequent label does not take all places.
    """
    acts = statistics.max_acts[purity.latents].tolist()
    best = sorted(range(len(acts)), key=lambda i: (-purity.purity[i].item(), -acts[i]))
    return in_turns(best, purity.label[best].tolist(), count)


def shuffled_labels(labels: Int[Tensor, " images"], seed: int = 0) -> Int[Tensor, " images"]:
    """The baseline of purity: the same labels on other images."""
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
