"""Accuracy of a classifier on reconstructed features beside that on the features."""

from typing import Any

import evaluate

from diffusion_sae.analysis.metrics.probes import reconstructed_accuracy
from diffusion_sae.analysis.metrics.scripting import LABEL, info, labels, of_interval

INPUTS = """
Args:
    predictions: what a probe says of the reconstructions.
    originals: what it says of the features.
    references: the true class numbers.
    confidence, resamples, seed: of the bootstrap.
"""


class ReconstructedAccuracyMetric(evaluate.Metric):
    """See `diffusion_sae.analysis.metrics.probes.reconstructed_accuracy`."""

    def _info(self) -> evaluate.MetricInfo:
        return info(reconstructed_accuracy, INPUTS, predictions=LABEL, originals=LABEL, references=LABEL)

    def _compute(self, predictions: Any, originals: Any, references: Any, **bootstrap: Any) -> dict[str, Any]:  # type: ignore[override]
        found = reconstructed_accuracy(labels(originals), labels(predictions), labels(references), **bootstrap)
        intervals = of_interval("original", found.original) | of_interval("reconstructed", found.reconstructed)
        return intervals | of_interval("difference", found.difference) | {"agreement": found.agreement}
