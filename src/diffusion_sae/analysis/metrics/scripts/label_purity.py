"""Share of the most common label among top images."""

from typing import Any

import evaluate

from diffusion_sae.analysis.metrics.interpretability import purity
from diffusion_sae.analysis.metrics.scripting import LABELS, info, labels, of_units

INPUTS = """
Args:
    predictions: class numbers of the top images of each unit.
"""


class LabelPurity(evaluate.Metric):
    """See `diffusion_sae.analysis.metrics.interpretability.purity`."""

    def _info(self) -> evaluate.MetricInfo:
        return info(purity, INPUTS, predictions=LABELS)

    def _compute(self, predictions: Any) -> dict[str, Any]:  # type: ignore[override]
        return of_units("label_purity", purity(labels(predictions))[0])
