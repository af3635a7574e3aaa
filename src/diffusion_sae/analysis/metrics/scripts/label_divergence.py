"""Divergence in bits of the labels of top images from the base rate."""

from typing import Any

import evaluate

from diffusion_sae.analysis.metrics.interpretability import label_divergence
from diffusion_sae.analysis.metrics.scripting import LABELS, info, labels, numbers, of_units

INPUTS = """
Args:
    predictions: class numbers of the top images of each unit.
    base_rate: share of each class among all images.
"""


class LabelDivergence(evaluate.Metric):
    """See `diffusion_sae.analysis.metrics.interpretability.label_divergence`."""

    def _info(self) -> evaluate.MetricInfo:
        return info(label_divergence, INPUTS, predictions=LABELS)

    def _compute(self, predictions: Any, *, base_rate: list[float]) -> dict[str, Any]:  # type: ignore[override]
        return of_units("label_divergence", label_divergence(labels(predictions), numbers(base_rate)))
