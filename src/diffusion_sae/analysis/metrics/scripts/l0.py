"""Mean number of active latents a row."""

from typing import Any

import evaluate

from diffusion_sae.analysis.metrics.scripting import LABELS, ROW, info, sparse_code
from diffusion_sae.analysis.metrics.sparsity import l0

INPUTS = """
Args:
    top_acts: the k activations of each row.
    top_indices: which latents they are.
"""


class L0(evaluate.Metric):
    """See `diffusion_sae.analysis.metrics.sparsity.l0`."""

    def _info(self) -> evaluate.MetricInfo:
        return info(l0, INPUTS, top_acts=ROW, top_indices=LABELS)

    def _compute(self, top_acts: Any, top_indices: Any) -> dict[str, Any]:  # type: ignore[override]
        return {"l0": l0(sparse_code(top_acts, top_indices))}
