"""Resampling of dead latents: the alternative to AuxK."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .configuration import PENALISED
from .evaluation import rows_at_a_time
from .modeling import KSparseAutoencoder, Timesteps
from .rows import rows_of


@torch.no_grad()
def resample_(
    sae: KSparseAutoencoder,
    optimizer: torch.optim.Optimizer,
    dead: Bool[Tensor, " num_latents"],
    features: Float[Tensor, "N d_in"],
    generator: torch.Generator,
    timesteps: Timesteps = None,
) -> int:
    """Point dead latents at what is reconstructed worst; returns how many.

    Bricken et al. 2023 (Towards Monosemanticity, "Neuron Resampling"): rows are drawn with a probability that grows
    with the square of their loss; a dead latent's decoder row becomes the row's residual at unit length, its encoder
    column the same direction at 0.2 of the living columns' mean length, its bias 0, and its moments are forgotten. With
    a TopK the length is the living columns' own: a shorter column is never among the k largest, and stays dead.
    """
    places = torch.nonzero(dead).flatten()
    if not len(places):
        return 0
    residual = _residual(sae, features.to(sae.dtype), timesteps)
    weights = residual.pow(2).sum(1).pow(2).double().cpu()
    rows = torch.multinomial(weights + 1e-30, len(places), replacement=True, generator=generator).to(residual.device)
    directions = torch.nn.functional.normalize(residual[rows], dim=1)
    alive = sae.W_enc[:, ~dead]
    length = alive.norm(dim=0).mean() if alive.shape[1] else sae.W_enc.new_ones(())
    sae.W_dec[places] = directions
    share = 0.2 if sae.config.activation in PENALISED else 1.0
    sae.W_enc[:, places] = share * length * directions.T
    sae.b_enc[places] = 0
    for parameter in (sae.W_enc, sae.W_dec, sae.b_enc):
        for name, value in optimizer.state[parameter].items():
            if name != "step" and torch.is_tensor(value):
                (value.T if parameter is sae.W_enc else value)[places] = 0
    return len(places)


def _residual(sae: KSparseAutoencoder, features: Tensor, timesteps: Timesteps) -> Float[Tensor, "N d_in"]:
    """By the codes of `encode`, whether the SAE has just been evaluated or not."""
    training, size = sae.training, rows_at_a_time(sae, features, len(features), timesteps)
    sae.eval()
    parts = [slice(low, low + size) for low in range(0, len(features), size)]
    residual = [features[p] - sae(features[p], timesteps=rows_of(timesteps, p)).reconstruction for p in parts]
    sae.train(training)
    return torch.cat(residual)
