"""How sparse a code is, and which latents it leaves out. A latent is active where its activation is other than 0."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...sae.code import SparseCode


def l0(code: SparseCode) -> float:
    """Mean number of active latents a row, in [0, k]; after the top-k and ReLU, unlike Revelio's own code."""
    _require_distinct(code)
    return (code.top_acts != 0).sum().item() / len(code.top_acts)


def latent_density(code: SparseCode, num_latents: int) -> Float[Tensor, " num_latents"]:
    """Share of the rows in which each latent is active, in [0, 1]; the sum over latents is `l0`."""
    return _active_counts(code, num_latents).double() / len(code.top_acts)


def dead_latents(code: SparseCode, num_latents: int) -> float:
    """Share of the latents that are active in no row, in [0, 1]; falls as rows are added."""
    return (_active_counts(code, num_latents) == 0).double().mean().item()


def _active_counts(code: SparseCode, num_latents: int) -> Int[Tensor, " num_latents"]:
    _require_distinct(code)
    active = code.top_indices[code.top_acts != 0]
    if len(active) and not 0 <= int(active.min()) <= int(active.max()) < num_latents:
        raise ValueError(
            f"Latents must lie in 0…{num_latents - 1}, got {int(active.min())}…{int(active.max())}. Give the "
            "num_latents of the SAE that the code is of."
        )
    return code.active_counts(num_latents)


def _require_distinct(code: SparseCode) -> None:
    """Raise if a row names an active latent twice; in free places, which hold 0, an index may repeat."""
    # no latent has the number of a free place: -1, -2, … along the row
    free = -1 - torch.arange(code.top_indices.shape[1], device=code.top_indices.device)
    ordered = torch.where(code.top_acts != 0, code.top_indices, free).sort(1).values
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).nonzero()
    if len(twice):
        row, place = twice[0].tolist()
        raise ValueError(
            f"Each active latent of a row must have one place, got latent {int(ordered[row, place])} more than once in "
            f"row {row}. Add its activations up, e.g. by SparseCode.of_dense(code.to_dense(num_latents))."
        )
