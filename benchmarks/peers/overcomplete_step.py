"""KempnerInstitute/overcomplete: `train_sae` over a data loader of one batch, on its `TopKSAE`."""

from collections.abc import Callable

import torch
from contenders import LEARNING_RATE, Shape
from stubs import import_overcomplete
from torch import Tensor

import_overcomplete()
from overcomplete.sae import TopKSAE, train_sae  # noqa: E402

DISTRIBUTION = "overcomplete"
COMPRISES = (
    "train_sae of one batch without monitoring: dictionary renormalised, dense codes (no b_dec), MSE, dead codes "
    "tracked, backward, gradients clipped to norm 1, torch Adam"
)


def build(shape: Shape, device: torch.device) -> Callable[[Tensor], float]:
    sae = TopKSAE(shape.d_in, shape.num_latents, top_k=shape.k, device=str(device))
    optimizer = torch.optim.Adam(sae.parameters(), lr=LEARNING_RATE)
    losses: list[Tensor] = []

    def mean_squared_error(x: Tensor, x_hat: Tensor, *_: Tensor) -> Tensor:
        """The reconstruction part of all of its losses."""
        loss = (x - x_hat).square().mean()
        losses[:] = [loss.detach()]
        return loss

    def step(batch: Tensor) -> float:
        train_sae(sae, [batch], mean_squared_error, optimizer, nb_epochs=1, monitoring=0, device=str(device))
        return float(losses[0])

    return step
