"""Fraction of variance unexplained by a reconstruction."""

from typing import Any

import evaluate

from diffusion_sae.analysis.metrics.reconstruction import fvu
from diffusion_sae.analysis.metrics.scripting import ROW, info, rows

INPUTS = """
Args:
    predictions: reconstructions, one row of numbers each.
    references: the features that they stand for.
"""


class FVU(evaluate.Metric):
    """See `diffusion_sae.analysis.metrics.reconstruction.fvu`."""

    def _info(self) -> evaluate.MetricInfo:
        return info(fvu, INPUTS, predictions=ROW, references=ROW)

    def _compute(self, predictions: Any, references: Any) -> dict[str, Any]:  # type: ignore[override]
        return {"fvu": fvu(rows(predictions), rows(references)).item()}
