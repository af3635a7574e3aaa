"""How sparse a code is, and which latents it leaves out. A latent is active where its activation is other than 0."""

from jaxtyping import Float
from torch import Tensor

from ...sae.code import SparseCode


def l0(code: SparseCode) -> float:
    """Mean number of active latents a row, in [0, k]; after the top-k and ReLU, unlike Revelio's own code."""
    return (code.top_acts != 0).sum().item() / len(code.top_acts)


def latent_density(code: SparseCode, num_latents: int) -> Float[Tensor, " num_latents"]:
    """Share of the rows in which each latent is active, in [0, 1]; the sum over latents is `l0`."""
    return code.active_counts(num_latents).double() / len(code.top_acts)


def dead_latents(code: SparseCode, num_latents: int) -> float:
    """Share of the latents that are active in no row, in [0, 1]; falls as rows are added."""
    return (code.active_counts(num_latents) == 0).double().mean().item()
