"""Activation-weighted similarity of images under an independent encoder."""

from typing import Any

import evaluate

from diffusion_sae.analysis.metrics.interpretability import Monosemanticity, monosemanticity
from diffusion_sae.analysis.metrics.scripting import ROW, info, of_units, rows

INPUTS = """
Args:
    predictions: activations of all units, one row an image.
    embeddings: of the same images under an independent encoder.
"""


class MonosemanticityScore(evaluate.Metric):
    """See `diffusion_sae.analysis.metrics.interpretability.monosemanticity`."""

    def _info(self) -> evaluate.MetricInfo:
        return info(Monosemanticity, INPUTS, source="arXiv:2504.02821", predictions=ROW, embeddings=ROW)

    def _compute(self, predictions: Any, embeddings: Any) -> dict[str, Any]:  # type: ignore[override]
        return of_units("monosemanticity", monosemanticity(rows(predictions), rows(embeddings)))
