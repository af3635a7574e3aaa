"""Cosine of a reconstruction with its features."""

from typing import Any

import evaluate

from diffusion_sae.analysis.metrics.reconstruction import cosine
from diffusion_sae.analysis.metrics.scripting import ROW, info, rows

INPUTS = """
Args:
    predictions: reconstructions, one row of numbers each.
    references: the features that they stand for.
"""


class Cosine(evaluate.Metric):
    """See `diffusion_sae.analysis.metrics.reconstruction.cosine`."""

    def _info(self) -> evaluate.MetricInfo:
        return info(cosine, INPUTS, predictions=ROW, references=ROW)

    def _compute(self, predictions: Any, references: Any) -> dict[str, Any]:  # type: ignore[override]
        return {"cosine": cosine(rows(predictions), rows(references)).item()}
