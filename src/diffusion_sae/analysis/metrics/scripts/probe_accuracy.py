"""Accuracy of a classifier with its bootstrap interval."""

from typing import Any

import evaluate

from diffusion_sae.analysis.metrics.probes import accuracy
from diffusion_sae.analysis.metrics.scripting import LABEL, info, labels, of_interval

INPUTS = """
Args:
    predictions: the class number that each row was said to be of.
    references: the true ones.
    confidence, resamples, seed: of the bootstrap.
"""


class ProbeAccuracy(evaluate.Metric):
    """See `diffusion_sae.analysis.metrics.probes.accuracy`."""

    def _info(self) -> evaluate.MetricInfo:
        return info(accuracy, INPUTS, predictions=LABEL, references=LABEL)

    def _compute(self, predictions: Any, references: Any, **bootstrap: Any) -> dict[str, Any]:  # type: ignore[override]
        return of_interval("accuracy", accuracy(labels(predictions), labels(references), **bootstrap))
