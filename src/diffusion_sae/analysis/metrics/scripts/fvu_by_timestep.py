"""Fraction of variance unexplained at each timestep."""

from typing import Any

import evaluate

from diffusion_sae.analysis.metrics.scripting import LABEL, ROW, info, labels, rows
from diffusion_sae.analysis.metrics.timesteps import fvu_by_timestep

INPUTS = """
Args:
    predictions: reconstructions, one row of numbers each.
    references: the features that they stand for.
    timesteps: of each row.
"""


class FVUByTimestep(evaluate.Metric):
    """See `diffusion_sae.analysis.metrics.timesteps.fvu_by_timestep`."""

    def _info(self) -> evaluate.MetricInfo:
        return info(fvu_by_timestep, INPUTS, predictions=ROW, references=ROW, timesteps=LABEL)

    def _compute(self, predictions: Any, references: Any, timesteps: Any) -> dict[str, Any]:  # type: ignore[override]
        return {"fvu_by_timestep": fvu_by_timestep(rows(predictions), rows(references), labels(timesteps))}
