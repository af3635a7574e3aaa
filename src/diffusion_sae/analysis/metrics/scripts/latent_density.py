"""Share of the rows in which each latent is active."""

from typing import Any

import evaluate

from diffusion_sae.analysis.metrics.scripting import LABELS, ROW, info, of_units, sparse_code
from diffusion_sae.analysis.metrics.sparsity import latent_density

INPUTS = """
Args:
    top_acts: the k activations of each row.
    top_indices: which latents they are.
    num_latents: of the SAE.
"""


class LatentDensity(evaluate.Metric):
    """See `diffusion_sae.analysis.metrics.sparsity.latent_density`."""

    def _info(self) -> evaluate.MetricInfo:
        return info(latent_density, INPUTS, top_acts=ROW, top_indices=LABELS)

    def _compute(self, top_acts: Any, top_indices: Any, *, num_latents: int) -> dict[str, Any]:  # type: ignore[override]
        return of_units("latent_density", latent_density(sparse_code(top_acts, top_indices), num_latents))
