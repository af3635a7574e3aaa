"""Share of the rows of each timestep in which each latent is active."""

from typing import Any

import evaluate

from diffusion_sae.analysis.metrics.scripting import LABEL, LABELS, ROW, info, labels, sparse_code
from diffusion_sae.analysis.metrics.timesteps import density_by_timestep

INPUTS = """
Args:
    top_acts: the k activations of each row.
    top_indices: which latents they are.
    timesteps: of each row.
    num_latents: of the SAE.
"""


class DensityByTimestep(evaluate.Metric):
    """See `diffusion_sae.analysis.metrics.timesteps.density_by_timestep`."""

    def _info(self) -> evaluate.MetricInfo:
        return info(density_by_timestep, INPUTS, top_acts=ROW, top_indices=LABELS, timesteps=LABEL)

    def _compute(self, top_acts: Any, top_indices: Any, timesteps: Any, *, num_latents: int) -> dict[str, Any]:  # type: ignore[override]
        density = density_by_timestep(sparse_code(top_acts, top_indices), num_latents, labels(timesteps))
        return {"density_by_timestep": {t: values.tolist() for t, values in density.items()}}
