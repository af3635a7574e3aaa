"""How good an SAE is on features: reconstruction, sparsity, dead latents."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..features import FeatureSet, as_feature_set
from .modeling import KSparseAutoencoder


@dataclass(frozen=True)
class SAEMetrics:
    """Measured on `rows` rows."""

    fvu: float
    """Σ‖x − x̂‖² / Σ‖x − x̄‖²."""
    l0: float
    """Mean number of latents with an activation above 0."""
    dead_latents: float
    """Share of latents that are active in no row."""
    rows: int


@torch.no_grad()
def evaluate_sae(sae: KSparseAutoencoder, features: FeatureSet | Tensor, batch_size: int = 8192) -> SAEMetrics:
    """Metrics over all rows, in batches, sums in fp64.

    Raises:
        ValueError: for features of another width or extraction.
    """
    features = as_feature_set(features)
    sae.require_features(features)
    mean = features.mean().to(sae.W_dec.device)
    error = variance = active = 0.0
    alive = torch.zeros(sae.config.num_latents, dtype=torch.bool, device=sae.W_dec.device)
    for batch in features.batches(batch_size):
        batch = batch.to(sae.W_dec.device)
        code = sae.encode(batch)
        error += (batch.double() - sae.decode(code).double()).pow(2).sum().item()
        variance += (batch.double() - mean.double()).pow(2).sum().item()
        active += (code.top_acts > 0).sum().item()
        alive[code.top_indices[code.top_acts > 0]] = True
    if variance == 0:
        raise ValueError("All rows are equal, so that there is no variance to explain. Evaluate on more images.")
    return SAEMetrics(error / variance, active / len(features), 1 - alive.float().mean().item(), len(features))
