"""The share of the squared length that a reconstruction explains, of Revelio."""

from typing import Any

import evaluate

from diffusion_sae.analysis.metrics.reconstruction import uncentred_explained_variance
from diffusion_sae.analysis.metrics.scripting import ROW, info, rows

INPUTS = """
Args:
    predictions: reconstructions, one row of numbers each.
    references: the features that they stand for.
"""


class UncentredExplainedVariance(evaluate.Metric):
    """See `diffusion_sae.analysis.metrics.reconstruction.uncentred_explained_variance`."""

    def _info(self) -> evaluate.MetricInfo:
        return info(uncentred_explained_variance, INPUTS, source="arXiv:2411.16725", predictions=ROW, references=ROW)

    def _compute(self, predictions: Any, references: Any) -> dict[str, Any]:  # type: ignore[override]
        return {
            "uncentred_explained_variance": uncentred_explained_variance(rows(predictions), rows(references)).item()
        }
