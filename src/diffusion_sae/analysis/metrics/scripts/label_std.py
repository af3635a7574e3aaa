"""Standard deviation of the class numbers of top images, of Revelio."""

from typing import Any

import evaluate

from diffusion_sae.analysis.metrics.interpretability import label_std
from diffusion_sae.analysis.metrics.scripting import LABELS, info, labels, of_units

INPUTS = """
Args:
    predictions: class numbers of the top images of each unit.
"""


class LabelStd(evaluate.Metric):
    """See `diffusion_sae.analysis.metrics.interpretability.label_std`."""

    def _info(self) -> evaluate.MetricInfo:
        return info(label_std, INPUTS, source="arXiv:2411.16725", predictions=LABELS)

    def _compute(self, predictions: Any) -> dict[str, Any]:  # type: ignore[override]
        return of_units("label_std", label_std(labels(predictions)))
