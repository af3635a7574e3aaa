"""How many rows of each class were said to be of each class."""

from typing import Any

import evaluate

from diffusion_sae.analysis.metrics.probes import confusion_matrix
from diffusion_sae.analysis.metrics.scripting import LABEL, info, labels

INPUTS = """
Args:
    predictions: the class number that each row was said to be of.
    references: the true ones.
    classes: how many there are.
"""


class ConfusionMatrix(evaluate.Metric):
    """See `diffusion_sae.analysis.metrics.probes.confusion_matrix`."""

    def _info(self) -> evaluate.MetricInfo:
        return info(confusion_matrix, INPUTS, predictions=LABEL, references=LABEL)

    def _compute(self, predictions: Any, references: Any, *, classes: int) -> dict[str, Any]:  # type: ignore[override]
        counts = confusion_matrix(labels(predictions), labels(references), classes)
        return {"confusion_matrix": counts.tolist()}
