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
    """Mean number of latents with an activation other than 0."""
    dead_latents: float
    """Share of latents that are active in no row."""
    rows: int


@torch.no_grad()
def evaluate_sae(
    sae: KSparseAutoencoder, features: FeatureSet | Tensor, batch_size: int = 8192, *, allow_mismatch: bool = False
) -> SAEMetrics:
    """Metrics over all rows as `encode` sees them, each by itself, in batches, sums in fp64.

    Raises:
        ValueError: for features of another width or extraction.
    """
    features = as_feature_set(features)
    sae.require_features(features, allow_mismatch=allow_mismatch)
    mean = features.mean().to(sae.device).double()
    error = variance = active = 0.0
    alive = torch.zeros(sae.config.num_latents, dtype=torch.bool, device=sae.device)
    training = sae.training
    sae.eval()  # a row's latents must not depend on the others, nor all of them be held
    try:
        for start, batch in zip(range(0, len(features), batch_size), features.batches(batch_size), strict=True):
            timesteps = None
            if sae.config.timesteps is not None:
                timesteps = features.timesteps_of(torch.arange(start, start + len(batch)))
            batch = batch.to(sae.device)
            output = sae(batch, timesteps=timesteps)
            error += (batch.double() - output.reconstruction.double()).pow(2).sum().item()
            variance += (batch.double() - mean).pow(2).sum().item()
            active += (output.top_acts != 0).sum().item()
            alive[output.top_indices[output.top_acts != 0]] = True
    finally:
        sae.train(training)
    if variance == 0:
        raise ValueError("All rows are equal, so that there is no variance to explain. Evaluate on more images.")
    return SAEMetrics(error / variance, active / len(features), 1 - alive.float().mean().item(), len(features))
