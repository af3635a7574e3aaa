"""What an SAE gives: codes and the output of a forward pass."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.utils import ModelOutput

from .selection import pad_rows


class SparseCode(NamedTuple):
    """The active latents of each row."""

    top_acts: Float[Tensor, "N k"]
    """Activations, largest first; ≥ 0 but for `signed_topk`. Free places of a row hold 0."""
    top_indices: Int[Tensor, "N k"]
    """Which latents they are; 0 in free places. k is the config's, or with a threshold the most of any row."""

    @classmethod
    def of_dense(cls, latent_acts: Float[Tensor, "N num_latents"]) -> "SparseCode":
        """What of non-negative latents is not 0, in order of the latents."""
        row, column = torch.nonzero(latent_acts, as_tuple=True)
        acts, indices = pad_rows(row, len(latent_acts), latent_acts[row, column], column)
        return cls(acts.clamp_min(0), indices)

    def to_dense(self, num_latents: int) -> Float[Tensor, "N num_latents"]:
        """`latent_acts`, zero where a latent is not active."""
        dense = self.top_acts.new_zeros(len(self.top_acts), num_latents)
        return dense.scatter_add_(1, self.top_indices, self.top_acts)

    def active_counts(self, num_latents: int) -> Int[Tensor, " num_latents"]:
        """Rows in which each latent is active: its activation is other than 0."""
        return torch.bincount(self.top_indices[self.top_acts != 0], minlength=num_latents)


@dataclass
class KSparseAutoencoderOutput(ModelOutput):
    """Result of a forward pass."""

    loss: Float[Tensor, ""] | None = None
    """Normalised MSE plus what else the training asks for, each times its weight."""
    reconstruction: Float[Tensor, "N d_in"] | None = None
    top_acts: Float[Tensor, "N k"] | None = None
    """In no order, unlike `encode`'s."""
    top_indices: Int[Tensor, "N k"] | None = None
    fvu: Float[Tensor, ""] | None = None
    """Fraction of variance unexplained in this batch, Σ‖x − x̂‖² / Σ‖x − x̄‖²."""
    auxk_loss: Float[Tensor, ""] | None = None
    """0 where no latent is dead."""
    sparsity_loss: Float[Tensor, ""] | None = None
    """Penalty of `relu` and `jumprelu`; 0 for the others."""
