"""What a dictionary makes of a set of features: its error and sparsity, and the images' pooled codes for a probe."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from ..features import FeatureSet
from ..sae.code import SparseCode
from ..sae.evaluation import SAEMetrics
from .latents import shuffled_labels
from .probing import ProbeScore, fit_linear

POOLINGS = ("mean", "max", "reconstruction")


class Dictionary(Protocol):
    """A KSparseAutoencoder or a SparseDictionary."""

    @property
    def W_dec(self) -> Tensor: ...  # noqa: N802

    def encode(self, features: Tensor) -> SparseCode: ...

    def decode(self, code: SparseCode) -> Tensor: ...


@dataclass(frozen=True)
class Readout:
    """Of a dictionary on features of some images."""

    metrics: SAEMetrics
    pooled: Mapping[str, FeatureSet]
    """One row an image: `mean` and `max`, its latents' mean and largest activation over its positions (num_latents),
    where a latent that is not active counts as 0; `reconstruction`, the mean reconstructed row (d_in)."""


@torch.no_grad()
def read_out(dictionary: Dictionary, features: FeatureSet, images_per_batch: int = 256) -> Readout:
    """FVU = Σ‖x − x̂‖² / Σ‖x − x̄‖² with x̄ the mean of these rows, L0, dead latents and pooled codes, in one pass.

    Args:
        dictionary: the k-SAE or baseline.
        features: pooled or token features; labels are passed on to the pooled ones.
        images_per_batch: images that are encoded at a time.

    Raises:
        ValueError: if all rows are equal.
    """
    num_latents = len(dictionary.W_dec)
    center = features.mean().double()
    alive = torch.zeros(num_latents, dtype=torch.bool)
    pooled: dict[str, list[Tensor]] = {name: [] for name in POOLINGS}
    error = variance = active = 0.0
    for rows in features.image_batches(images_per_batch):  # (b, T, d_in)
        flat = rows.flatten(0, 1)
        code = dictionary.encode(flat)
        reconstruction = dictionary.decode(code)
        error += (flat.double() - reconstruction.double()).pow(2).sum().item()
        variance += (flat.double() - center).pow(2).sum().item()
        active += (code.top_acts != 0).sum().item()
        alive[code.top_indices[code.top_acts != 0]] = True
        pooled["mean"].append(pool_code(code, len(rows), num_latents, "mean"))
        pooled["max"].append(pool_code(code, len(rows), num_latents, "max"))
        pooled["reconstruction"].append(reconstruction.unflatten(0, rows.shape[:2]).mean(1))
    if variance == 0:
        raise ValueError("All rows are equal, so that there is no variance to explain. Read out more images.")
    metrics = SAEMetrics(error / variance, active / len(features), 1 - alive.float().mean().item(), len(features))
    return Readout(metrics, {name: _per_image(features, torch.cat(parts)) for name, parts in pooled.items()})


def _per_image(features: FeatureSet, rows: Tensor) -> FeatureSet:
    return FeatureSet([rows], labels=features.image_labels, class_names=features.class_names)


def pool_code(code: SparseCode, images: int, num_latents: int, pooling: str) -> Float[Tensor, "images num_latents"]:
    """Mean or largest activation of each latent over an image's rows, which stand together in the code.

    No array of rows × latents is made.
    """
    acts = code.top_acts.reshape(images, -1)  # (images · T, k) -> (images, T · k)
    indices = code.top_indices.reshape(images, -1)
    out = acts.new_zeros(images, num_latents)
    if pooling == "max":
        return out.scatter_reduce_(1, indices, acts, "amax")
    return out.scatter_add_(1, indices, acts) / (len(code.top_acts) / images)


def mean_features(features: FeatureSet) -> FeatureSet:
    """The features themselves, mean-pooled over each image's positions: the baseline of every code."""
    return _per_image(features, torch.cat([rows.mean(1) for rows in features.image_batches(512)]))


def with_shuffled_labels(splits: Mapping[str, FeatureSet]) -> dict[str, FeatureSet]:
    """Control: the labels that a probe is fitted and chosen by are those of other images; `test` keeps its own."""
    return {
        split: features if split == "test" else _shuffled(features, seed)
        for seed, (split, features) in enumerate(splits.items())
    }


def _shuffled(features: FeatureSet, seed: int) -> FeatureSet:
    if features.image_labels is None:
        raise ValueError("There are no labels to shuffle. Extract from class folders or labelled data.")
    labels = shuffled_labels(features.image_labels, seed)
    return FeatureSet([features[:]], labels=labels, class_names=features.class_names)


def probe_splits(splits: Mapping[str, FeatureSet], **args: Any) -> ProbeScore:
    """A linear probe of `train`, whose L2 strength is chosen on `validation`; `test` is measured once."""
    return fit_linear(splits["train"], splits["validation"], splits["test"], **args)
