"""Share of what an ablation costs the denoising loss that a reconstruction recovers."""

from typing import Any

import evaluate

from diffusion_sae.analysis.metrics.scripting import NUMBER, info, numbers
from diffusion_sae.analysis.metrics.splicing import loss_recovered

INPUTS = """
Args:
    predictions: denoising loss of each image with the reconstruction in the forward.
    originals: with the activations themselves.
    ablated: with zeros, or with the mean activation.
"""


class LossRecovered(evaluate.Metric):
    """See `diffusion_sae.analysis.metrics.splicing.loss_recovered`."""

    def _info(self) -> evaluate.MetricInfo:
        return info(loss_recovered, INPUTS, predictions=NUMBER, originals=NUMBER, ablated=NUMBER)

    def _compute(self, predictions: Any, originals: Any, ablated: Any) -> dict[str, Any]:  # type: ignore[override]
        losses = (numbers(originals), numbers(predictions), numbers(ablated))
        return {"loss_recovered": loss_recovered(*losses), "increase": (losses[1].mean() - losses[0].mean()).item()}
