"""Pairing of the latents of two SAEs by the cosine of their decoder rows."""

from typing import Any

import evaluate

from diffusion_sae.analysis.metrics.matching import match_decoders
from diffusion_sae.analysis.metrics.scripting import ROW, info, of_matching, rows

INPUTS = """
Args:
    predictions: the transposed decoder of one SAE, one row an input dimension: `W_dec.T`.
    references: that of the other, which may have another number of latents.
"""


class DecoderMatching(evaluate.Metric):
    """See `diffusion_sae.analysis.metrics.matching.match_decoders`."""

    def _info(self) -> evaluate.MetricInfo:
        return info(match_decoders, INPUTS, predictions=ROW, references=ROW)

    def _compute(self, predictions: Any, references: Any) -> dict[str, Any]:  # type: ignore[override]
        return of_matching(match_decoders(rows(predictions).T, rows(references).T))
