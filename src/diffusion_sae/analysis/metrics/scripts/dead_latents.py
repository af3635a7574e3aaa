"""Share of latents that are active in no row."""

from typing import Any

import evaluate

from diffusion_sae.analysis.metrics.scripting import LABELS, ROW, info, sparse_code
from diffusion_sae.analysis.metrics.sparsity import dead_latents

INPUTS = """
Args:
    top_acts: the k activations of each row.
    top_indices: which latents they are.
    num_latents: of the SAE.
"""


class DeadLatents(evaluate.Metric):
    """See `diffusion_sae.analysis.metrics.sparsity.dead_latents`."""

    def _info(self) -> evaluate.MetricInfo:
        return info(dead_latents, INPUTS, top_acts=ROW, top_indices=LABELS)

    def _compute(self, top_acts: Any, top_indices: Any, *, num_latents: int) -> dict[str, Any]:  # type: ignore[override]
        return {"dead_latents": dead_latents(sparse_code(top_acts, top_indices), num_latents)}
