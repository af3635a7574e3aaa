"""How good a classifier is: accuracy with its interval, by class, its confusions, and its calibration."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..._config import check_integer
from ...features import FeatureSet
from ...probes.modeling import DiffusionProbe
from ...sae.modeling import KSparseAutoencoder

_BLOCK = 2**22  # numbers drawn at a time


@dataclass(frozen=True)
class Interval:
    """A share with its bootstrap interval."""

    value: float
    low: float
    high: float


def bootstrap_mean(
    values: Float[Tensor, " N"], *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """The mean, with the percentile interval over resamples of N values with replacement (Efron & Tibshirani 1993).

    It follows from the seed; the values are sampled independently of one another, so give one an image.
    """
    if not 0 < confidence < 1 or resamples < 1 or values.ndim != 1 or not len(values):
        raise ValueError(
            f"A bootstrap needs (N,) values with N ≥ 1, a confidence in (0, 1) and at least one resample; got "
            f"{tuple(values.shape)}, {confidence}, {resamples}."
        )
    values = values.double()
    generator = torch.Generator().manual_seed(seed)
    means, block = [], max(1, _BLOCK // len(values))
    for start in range(0, resamples, block):
        size = (min(block, resamples - start), len(values))
        means.append(values[torch.randint(len(values), size, generator=generator)].mean(1))
    tail = (1 - confidence) / 2
    low, high = torch.cat(means).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(values.mean().item(), low, high)


def accuracy(predictions: Int[Tensor, " N"], labels: Int[Tensor, " N"], **bootstrap: float) -> Interval:
    """Share of right predictions, in [0, 1], with its bootstrap interval; chance is the largest base rate."""
    return bootstrap_mean(_right(predictions, labels).double(), **bootstrap)  # type: ignore[arg-type]


def confusion_matrix(
    predictions: Int[Tensor, " N"], labels: Int[Tensor, " N"], classes: int
) -> Int[Tensor, "classes classes"]:
    """How many rows of class i (row) were said to be of class j (column)."""
    _right(predictions, labels)
    _require_classes(torch.cat([predictions, labels]), classes)
    return torch.bincount(labels * classes + predictions, minlength=classes**2).reshape(classes, classes)


def per_class_accuracy(
    predictions: Int[Tensor, " N"], labels: Int[Tensor, " N"], classes: int
) -> Float[Tensor, " classes"]:
    """Share of right predictions among the rows of each class (recall), in [0, 1]; NaN for a class without rows."""
    counts = confusion_matrix(predictions, labels, classes).double()
    return counts.diagonal() / counts.sum(1)


def expected_calibration_error(
    probabilities: Float[Tensor, "N classes"], labels: Int[Tensor, " N"], bins: int = 15
) -> float:
    """Σ_b |B_b|/N · |accuracy(B_b) − confidence(B_b)| over bins of equal width of the largest probability, in [0, 1];
    0 is calibrated (Guo et al. 2017, eq. 3). Bin b is ((b − 1)/bins, b/bins].

    Raises:
        ValueError: if rows are no probabilities: give `logits.softmax(1)`; for labels outside the classes.
    """
    check_integer("bins", bins, 1)
    totals = probabilities.double().sum(1)
    if bool((probabilities < 0).any()) or not torch.allclose(totals, torch.ones_like(totals), atol=1e-4):
        raise ValueError("Rows must be probabilities, ≥ 0 with the sum 1. Give logits.softmax(1).")
    confidence, said = probabilities.double().max(1)
    number = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    gap = _right(said, labels).double() - confidence
    _require_classes(labels, probabilities.shape[1])
    return torch.zeros(bins, dtype=torch.float64).index_add_(0, number, gap).abs().sum().item() / len(labels)


def _right(predictions: Tensor, labels: Tensor) -> Bool[Tensor, " N"]:
    if predictions.shape != labels.shape or predictions.ndim != 1:
        raise ValueError(
            f"Predictions and labels must be class numbers (N,), got {tuple(predictions.shape)} and "
            f"{tuple(labels.shape)}. Give logits.argmax(1)."
        )
    return predictions == labels


def _require_classes(numbers: Int[Tensor, " N"], classes: int) -> None:
    if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < classes:
        raise ValueError(
            f"Classes must lie in 0…{classes - 1}, got {int(numbers.min())}…{int(numbers.max())}. Give labels and "
            "predictions of the same classes, numbered from 0."
        )


@dataclass(frozen=True)
class ReconstructedAccuracy:
    """A probe's accuracy on features and on an SAE's reconstructions of them."""

    original: Interval
    reconstructed: Interval
    difference: Interval
    """reconstructed − original, resampled by image, so that it is paired."""
    agreement: float
    """Share of the rows for which the probe says the same of both, in [0, 1]."""


def reconstructed_accuracy(
    original: Int[Tensor, " N"],
    reconstructed: Int[Tensor, " N"],
    labels: Int[Tensor, " N"],
    *,
    images: Int[Tensor, " N"] | None = None,
    **bootstrap: float,
) -> ReconstructedAccuracy:
    """From what the probe predicts of both; `images` says which image each is of, where several are of one."""
    before, after = _right(original, labels).double(), _right(reconstructed, labels).double()
    if images is not None:  # an image has as many rows as any other
        number = images.unique(return_inverse=True)[1]
        counts = torch.bincount(number)
        before, after = (torch.bincount(number, right) / counts for right in (before, after))
    values = (before, after, after - before)
    first, second, difference = (bootstrap_mean(value, **bootstrap) for value in values)  # type: ignore[arg-type]
    return ReconstructedAccuracy(first, second, difference, (original == reconstructed).double().mean().item())


@torch.no_grad()
def probe_reconstructions(
    probe: DiffusionProbe,
    sae: KSparseAutoencoder,
    features: FeatureSet,
    batch_size: int = 1024,
    *,
    allow_mismatch: bool = False,
    **bootstrap: float,
) -> ReconstructedAccuracy:
    """Downstream cost of an SAE: the accuracy of a probe on its reconstructions, beside that on the features.

    Of a probe that takes whole images the positions are reconstructed one by one. Intervals are over images, whose rows
    are not independent of one another.

    Args:
        probe: with any head but fusion's.
        sae: of the same features.
        features: with labels.
        batch_size: examples of the probe at a time.
        allow_mismatch: take features of another extraction.
        **bootstrap: arguments of `bootstrap_mean`.

    Raises:
        ValueError: for features without labels, or of another extraction than the probe's or the SAE's.
    """
    sae.require_features(features, allow_mismatch=allow_mismatch)
    probe.require_features(features, allow_mismatch=allow_mismatch)
    labels, examples = probe.labels_of(features), probe.examples(features)
    training, said = sae.training, ([], [])
    sae.eval()
    try:
        for numbers in torch.arange(len(examples)).split(batch_size):
            given: Tensor = examples.batch(numbers)  # type: ignore[assignment]
            at_once = given.shape[1] if given.ndim == 3 else 1
            timesteps = None
            if sae.config.timesteps is not None:
                timesteps = features.timesteps_of((numbers[:, None] * at_once + torch.arange(at_once)).flatten())
            rows = given.reshape(-1, given.shape[-1]).to(sae.device)
            rebuilt = sae(rows, timesteps=timesteps).reconstruction.cpu().view_as(given)
            for predictions, features_of_batch in zip(said, (given, rebuilt), strict=True):
                predictions.append(probe.predict(features_of_batch).argmax(1))
    finally:
        sae.train(training)
    before, after = (torch.cat(predictions) for predictions in said)
    return reconstructed_accuracy(before, after, labels, images=examples.image_index, **bootstrap)
