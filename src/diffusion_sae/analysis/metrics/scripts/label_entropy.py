"""Entropy of the labels of top images over that of the base rate."""

from typing import Any

import evaluate

from diffusion_sae.analysis.metrics.interpretability import label_entropy
from diffusion_sae.analysis.metrics.scripting import LABELS, info, labels, numbers, of_units

INPUTS = """
Args:
    predictions: class numbers of the top images of each unit.
    base_rate: share of each class among all images.
"""


class LabelEntropy(evaluate.Metric):
    """See `diffusion_sae.analysis.metrics.interpretability.label_entropy`."""

    def _info(self) -> evaluate.MetricInfo:
        return info(label_entropy, INPUTS, predictions=LABELS)

    def _compute(self, predictions: Any, *, base_rate: list[float]) -> dict[str, Any]:  # type: ignore[override]
        return of_units("label_entropy", label_entropy(labels(predictions), numbers(base_rate)))
