"""How good an SAE is on features: reconstruction, sparsity, dead latents."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from ..features import FeatureSet, as_feature_set
from .code import SparseCode
from .configuration import TOP_K
from .modeling import KSparseAutoencoder, Timesteps
from .penalised import LOOKED_AT
from .rows import rows_of


@dataclass(frozen=True)
class SAEMetrics:
    """Measured on `rows` rows."""

    fvu: float
    """Σ‖x − x̂‖² / Σ‖x − x̄‖²."""
    l0: float
    """Mean number of latents with an activation other than 0."""
    dead_latents: float
    """Share of latents that are active in no row."""
    rows: int


def evaluate_sae(
    sae: KSparseAutoencoder,
    features: FeatureSet | Tensor,
    batch_size: int = 8192,
    *,
    allow_mismatch: bool = False,
    scale: Tensor | None = None,
) -> SAEMetrics:
    """Metrics over all rows as `encode` sees them, each by itself, in batches, sums in fp64.

    Args:
        sae, features: the SAE, and rows (N, d_in) of its extraction.
        batch_size: rows that are encoded at a time; fewer, where codes have no fixed k and are long.
        allow_mismatch: take features of another extraction.
        scale: () or (d_in,), what rows are divided by before; None: nothing.

    Raises:
        ValueError: for features of another width or extraction.
    """
    features = as_feature_set(features)
    sae.require_features(features, allow_mismatch=allow_mismatch)
    return measure_rows(sae, features, range(len(features)), batch_size, scale)[0]


CODE_BYTES = 2**28
"""Of the codes that are made at a time."""
BYTES_OF_ACTIVE = 40
"""Of an active latent, while it is looked for and put into its row."""


@torch.no_grad()
def rows_at_a_time(sae: KSparseAutoencoder, rows: Tensor, at_most: int, timesteps: Timesteps = None) -> int:
    """How many rows may be encoded at a time, by the longest code of the first of them.

    Without a fixed k any number of latents may be active, and half of them are before the training.
    """
    if sae.config.activation in TOP_K or not len(rows):
        return at_most
    first = slice(0, LOOKED_AT)
    longest = sae.encode(rows[first].to(sae.device), rows_of(timesteps, first)).top_acts.shape[1]
    return max(1, min(at_most, CODE_BYTES // (BYTES_OF_ACTIVE * max(1, longest))))


@torch.no_grad()
def measure_rows(
    sae: KSparseAutoencoder, features: FeatureSet, rows: range, batch_size: int = 8192, scale: Tensor | None = None
) -> tuple[SAEMetrics, Int[Tensor, " num_latents"]]:
    """Metrics of a range of rows, against their own mean, and in how many of them each latent is active."""
    divisor = torch.ones((), device=sae.device) if scale is None else scale.to(sae.device)
    mean = features.mean(rows).to(sae.device).double() / divisor
    error = variance = 0.0
    counts = torch.zeros(sae.config.num_latents, dtype=torch.long, device=sae.device)
    training = sae.training
    sae.eval()  # a row's latents must not depend on the others, nor all of them be held
    first = torch.arange(rows.start, min(rows.start + LOOKED_AT, rows.stop))
    of_first = None if sae.config.timesteps is None else features.timesteps_of(first)
    batch_size = rows_at_a_time(sae, features[first].to(sae.device) / divisor, batch_size, of_first)
    try:
        for start in range(rows.start, rows.stop, batch_size):
            index = torch.arange(start, min(start + batch_size, rows.stop))
            timesteps = None if sae.config.timesteps is None else features.timesteps_of(index)
            batch = features[start : start + len(index)].to(sae.device)
            if scale is not None:
                batch = batch / divisor
            output = sae(batch, timesteps=timesteps)
            error += (batch.double() - output.reconstruction.double()).pow(2).sum().item()
            variance += (batch.double() - mean).pow(2).sum().item()
            counts += SparseCode(output.top_acts, output.top_indices).active_counts(len(counts))
    finally:
        sae.train(training)
    if variance == 0:
        raise ValueError("All rows are equal, so that there is no variance to explain. Evaluate on more images.")
    dead = (counts == 0).float().mean().item()
    return SAEMetrics(error / variance, counts.sum().item() / len(rows), dead, len(rows)), counts
