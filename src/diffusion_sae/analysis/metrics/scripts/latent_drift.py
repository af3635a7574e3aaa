"""How far the activations of each latent move from one timestep to another."""

from typing import Any

import evaluate

from diffusion_sae.analysis.metrics.scripting import LABELS, ROW, info, of_units, sparse_code
from diffusion_sae.analysis.metrics.timesteps import Drift, latent_drift

INPUTS = """
Args:
    top_acts: the k activations of each row.
    top_indices: which latents they are.
    other_top_acts, other_top_indices: of the same rows at the other timestep.
    num_latents: of the SAE.
"""


class LatentDrift(evaluate.Metric):
    """See `diffusion_sae.analysis.metrics.timesteps.latent_drift`."""

    def _info(self) -> evaluate.MetricInfo:
        return info(Drift, INPUTS, top_acts=ROW, top_indices=LABELS, other_top_acts=ROW, other_top_indices=LABELS)

    def _compute(  # type: ignore[override]
        self, top_acts: Any, top_indices: Any, other_top_acts: Any, other_top_indices: Any, *, num_latents: int
    ) -> dict[str, Any]:
        first, second = sparse_code(top_acts, top_indices), sparse_code(other_top_acts, other_top_indices)
        return of_units("latent_drift", latent_drift(first, second, num_latents))
