"""The same metrics of an SAE's latents and of what needs no SAE: neurons, PCA, random directions, shuffled labels."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...features import FeatureSet
from ...sae.modeling import KSparseAutoencoder
from ..latents import image_activations, shuffled_labels, unit_statistics
from .interpretability import (
    Monosemanticity,
    base_rate_of,
    hierarchical_agreement,
    label_divergence,
    label_entropy,
    label_std,
    purity,
)

_BLOCK = 2**22  # activations at a time: 16 MB, and six times that for their order
RANDOM_DIRECTIONS = 1024


@dataclass(frozen=True)
class Units:
    """Things that images activate: `activations()` gives all images in order, a block at a time, from the start."""

    name: str
    activations: Callable[[], Iterator[Float[Tensor, "b units"]]]


def latent_units(sae: KSparseAutoencoder, features: FeatureSet) -> Units:
    """The SAE's latents; an image's activation is its largest over positions and timesteps."""
    sae.require_features(features)
    return Units("SAE latents", lambda: image_activations(sae, features))


def direction_units(name: str, directions: Float[Tensor, "u d_in"], features: FeatureSet) -> Units:
    """Both ends of each direction v: max(0, ±(x − x̄)·v), the largest over an image's rows; 2 u units, first all +.

    The mean row is taken off, as every image activates one end of a direction from 0.
    """
    mean = features.mean()
    images = max(1, _BLOCK // (features.rows_per_image * len(directions)))

    def activations() -> Iterator[Tensor]:
        for rows in features.image_batches(images):
            along = (rows - mean) @ directions.T.to(rows.dtype)  # (b, rows_per_image, u)
            yield torch.cat([along.amax(1), -along.amin(1)], 1).clamp_min(0)

    return Units(name, activations)


def neuron_units(features: FeatureSet) -> Units:
    """The coordinates of the features."""
    return direction_units("raw neurons", torch.eye(features.d_in), features)


def pca_units(features: FeatureSet) -> Units:
    """All principal axes."""
    return direction_units("PCA directions", principal_axes(features), features)


def random_units(features: FeatureSet, count: int = RANDOM_DIRECTIONS, seed: int = 0) -> Units:
    """Directions without any meaning."""
    drawn = torch.randn(count, features.d_in, generator=torch.Generator().manual_seed(seed))
    return direction_units("random directions", torch.nn.functional.normalize(drawn, dim=1), features)


def principal_axes(features: FeatureSet) -> Float[Tensor, "d_in d_in"]:
    """Eigenvectors of the covariance of the rows, of the largest variance first; summed in fp64, batch by batch."""
    mean = features.mean()
    covariance = torch.zeros(features.d_in, features.d_in, dtype=torch.float64)
    for batch in features.batches(8192):
        centred = batch - mean
        covariance += (centred.T @ centred).double()
    return torch.linalg.eigh(covariance).eigenvectors.T.flip(0).float()


@dataclass(frozen=True)
class UnitScores:
    """Means over the units that were measured: those that at least n images activate."""

    measured: int
    num_units: int
    means: dict[str, float]
    """By metric: label_std, label_purity, label_entropy, label_divergence, and hierarchical_agreement and
    monosemanticity where coarse labels and embeddings were given. NaN if no unit was measured."""


@torch.no_grad()
def score_units(
    units: Units,
    labels: Int[Tensor, " images"],
    *,
    coarse: Int[Tensor, " images"] | None = None,
    embeddings: Float[Tensor, "images e"] | None = None,
    n: int = 16,
) -> UnitScores:
    """All metrics of one kind of units, in one pass over their activations and in bounded memory.

    Args:
        units: what is judged.
        labels: one an image.
        coarse: the coarse label of each image, for the hierarchical agreement.
        embeddings: of each image under an encoder that has nothing to do with the units, for the monosemanticity.
        n: top images a unit.
    """
    score = Monosemanticity()

    def watched() -> Iterator[Tensor]:
        first = 0
        for acts in units.activations():
            if embeddings is not None:
                score.update(acts, embeddings[first : first + len(acts)])
            first += len(acts)
            yield acts

    statistics = unit_statistics(watched(), n)
    if statistics.num_images != len(labels):
        raise ValueError(f"{units.name} have activations of {statistics.num_images} images, got {len(labels)} labels.")
    measured = statistics.measurable
    top_images = statistics.top_images[measured]
    top, base_rate = labels[top_images], base_rate_of(labels)
    values = {
        "label_std": label_std(top),
        "label_purity": purity(top)[0],
        "label_entropy": label_entropy(top, base_rate),
        "label_divergence": label_divergence(top, base_rate),
    }
    if coarse is not None:
        values["hierarchical_agreement"] = hierarchical_agreement(coarse[top_images], top)
    if embeddings is not None:
        values["monosemanticity"] = score.compute()[measured]
    means = {name: value.double().mean().item() for name, value in values.items()}
    return UnitScores(len(measured), len(statistics.density), means)


def compare_with_baselines(
    sae: KSparseAutoencoder,
    features: FeatureSet,
    *,
    coarse: Int[Tensor, " classes"] | None = None,
    embeddings: Float[Tensor, "images e"] | None = None,
    n: int = 16,
    seed: int = 0,
) -> dict[str, UnitScores]:
    """`score_units` of the latents, raw neurons, PCA directions and random directions, and of the latents with labels
    and embeddings shuffled over the images.

    Args:
        sae, features: the features must be of the SAE's extraction, with labels.
        coarse: the coarse class of each class.
        embeddings, n: see `score_units`.
        seed: of the random directions and of the shuffle.
    """
    labels = features.image_labels
    if labels is None:
        raise ValueError("Latents are judged by labelled images: extract from class folders or a labelled data set.")
    latents = latent_units(sae, features)
    every = [latents, neuron_units(features), pca_units(features), random_units(features, seed=seed)]

    def scores(units: Units, order: Tensor) -> UnitScores:
        given = labels[order]
        fine_to_coarse = None if coarse is None else coarse[given]
        return score_units(
            units, given, coarse=fine_to_coarse, embeddings=None if embeddings is None else embeddings[order], n=n
        )

    in_order = torch.arange(len(labels))
    found = {units.name: scores(units, in_order) for units in every}
    return found | {"shuffled labels": scores(latents, shuffled_labels(in_order, seed))}
