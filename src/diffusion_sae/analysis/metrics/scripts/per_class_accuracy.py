"""Accuracy among the rows of each class."""

from typing import Any

import evaluate

from diffusion_sae.analysis.metrics.probes import per_class_accuracy
from diffusion_sae.analysis.metrics.scripting import LABEL, info, labels

INPUTS = """
Args:
    predictions: the class number that each row was said to be of.
    references: the true ones.
    classes: how many there are.
"""


class PerClassAccuracy(evaluate.Metric):
    """See `diffusion_sae.analysis.metrics.probes.per_class_accuracy`."""

    def _info(self) -> evaluate.MetricInfo:
        return info(per_class_accuracy, INPUTS, predictions=LABEL, references=LABEL)

    def _compute(self, predictions: Any, references: Any, *, classes: int) -> dict[str, Any]:  # type: ignore[override]
        values = per_class_accuracy(labels(predictions), labels(references), classes)
        return {"per_class_accuracy": values.tolist()}
