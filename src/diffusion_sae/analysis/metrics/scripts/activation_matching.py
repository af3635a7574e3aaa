"""Pairing of the latents of two SAEs by the correlation of their activations."""

from typing import Any

import evaluate

from diffusion_sae.analysis.metrics.matching import activation_correlations, match
from diffusion_sae.analysis.metrics.scripting import ROW, info, of_matching, rows

INPUTS = """
Args:
    predictions: activations of all latents of one SAE, one row an image.
    references: those of the other on the same images; it may have another number of latents.
"""


class ActivationMatching(evaluate.Metric):
    """See `diffusion_sae.analysis.metrics.matching.match_activations`."""

    def _info(self) -> evaluate.MetricInfo:
        return info(activation_correlations, INPUTS, predictions=ROW, references=ROW)

    def _compute(self, predictions: Any, references: Any) -> dict[str, Any]:  # type: ignore[override]
        return of_matching(match(activation_correlations([(rows(predictions), rows(references))])))
