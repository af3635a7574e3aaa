"""Share of the variance that a reconstruction explains."""

from typing import Any

import evaluate

from diffusion_sae.analysis.metrics.reconstruction import explained_variance
from diffusion_sae.analysis.metrics.scripting import ROW, info, rows

INPUTS = """
Args:
    predictions: reconstructions, one row of numbers each.
    references: the features that they stand for.
"""


class ExplainedVariance(evaluate.Metric):
    """See `diffusion_sae.analysis.metrics.reconstruction.explained_variance`."""

    def _info(self) -> evaluate.MetricInfo:
        return info(explained_variance, INPUTS, predictions=ROW, references=ROW)

    def _compute(self, predictions: Any, references: Any) -> dict[str, Any]:  # type: ignore[override]
        return {"explained_variance": explained_variance(rows(predictions), rows(references)).item()}
