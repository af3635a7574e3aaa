"""KempnerInstitute/overcomplete: `train_sae` over a data loader of one batch, on its `TopKSAE`."""

import torch
from contenders import FOR_SPEED, LEARNING_RATE, Learned, Recipe, Shape, Training
from stubs import import_overcomplete
from torch import Tensor

import_overcomplete()
from overcomplete.sae import TopKSAE, train_sae  # noqa: E402

DISTRIBUTION = "overcomplete"
COMPRISES = (
    "train_sae of one batch without monitoring: dictionary renormalised, dense codes (no b_dec), MSE, dead codes "
    "tracked, backward, gradients clipped to norm 1, torch Adam"
)


def build(shape: Shape, device: torch.device, recipe: Recipe = FOR_SPEED) -> Training:
    sae = TopKSAE(shape.d_in, shape.num_latents, top_k=shape.k, device=str(device))
    optimizer = torch.optim.Adam(
        sae.parameters(), lr=recipe.learning_rate or LEARNING_RATE
    )  # it has no rate of its own
    losses: list[Tensor] = []

    def mean_squared_error(x: Tensor, x_hat: Tensor, *_: Tensor) -> Tensor:
        """The reconstruction part of all of its losses."""
        loss = (x - x_hat).square().mean()
        losses[:] = [loss.detach()]
        return loss

    def step(batch: Tensor) -> float:
        train_sae(sae, [batch], mean_squared_error, optimizer, nb_epochs=1, monitoring=0, device=str(device))
        return float(losses[0])

    return Training(step, lambda: Learned(sae.get_dictionary(), lambda rows: sae.encode(rows)[1], sae.decode))
