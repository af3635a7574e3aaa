"""How far down the hierarchy of labels top images agree."""

from typing import Any

import evaluate

from diffusion_sae.analysis.metrics.interpretability import hierarchical_agreement
from diffusion_sae.analysis.metrics.scripting import LABELS, info, labels, of_units

INPUTS = """
Args:
    predictions: class numbers of the top images of each unit.
    coarse: coarse class numbers of the same images.
"""


class HierarchicalAgreement(evaluate.Metric):
    """See `diffusion_sae.analysis.metrics.interpretability.hierarchical_agreement`."""

    def _info(self) -> evaluate.MetricInfo:
        return info(hierarchical_agreement, INPUTS, source="arXiv:2504.02821", predictions=LABELS, coarse=LABELS)

    def _compute(self, predictions: Any, coarse: Any) -> dict[str, Any]:  # type: ignore[override]
        return of_units("hierarchical_agreement", hierarchical_agreement(labels(coarse), labels(predictions)))
