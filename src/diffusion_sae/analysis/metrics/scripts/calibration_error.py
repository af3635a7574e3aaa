"""Expected calibration error of a classifier."""

from typing import Any

import evaluate

from diffusion_sae.analysis.metrics.probes import expected_calibration_error
from diffusion_sae.analysis.metrics.scripting import LABEL, ROW, info, labels, rows

INPUTS = """
Args:
    predictions: probabilities of all classes, one row each.
    references: the true class numbers.
    bins: of the largest probability.
"""


class CalibrationError(evaluate.Metric):
    """See `diffusion_sae.analysis.metrics.probes.expected_calibration_error`."""

    def _info(self) -> evaluate.MetricInfo:
        return info(expected_calibration_error, INPUTS, source="arXiv:1706.04599", predictions=ROW, references=LABEL)

    def _compute(self, predictions: Any, references: Any, *, bins: int = 15) -> dict[str, Any]:  # type: ignore[override]
        error = expected_calibration_error(rows(predictions), labels(references), bins)
        return {"calibration_error": error}
