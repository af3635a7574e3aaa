"""An SAE over the timesteps: how well it reconstructs each, which latents it uses there, and how they drift."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...features import FeatureSet
from ...sae.code import SparseCode
from ...sae.evaluation import SAEMetrics, measure_rows
from ...sae.modeling import KSparseAutoencoder
from .reconstruction import fvu
from .sparsity import latent_density

T = TypeVar("T")


def by_timestep(timesteps: Int[Tensor, " N"], metric: Callable[[Tensor], T]) -> dict[int, T]:
    """{t: metric(mask of the rows of t)}, ascending."""
    return {t: metric(timesteps == t) for t in sorted(set(timesteps.tolist()))}


def fvu_by_timestep(
    reconstruction: Float[Tensor, "N d_in"], target: Float[Tensor, "N d_in"], timesteps: Int[Tensor, " N"]
) -> dict[int, float]:
    """`fvu` of the rows of each timestep against their own mean, which moves with the noise: in [0, ∞)."""
    return by_timestep(timesteps, lambda rows: fvu(reconstruction[rows], target[rows]).item())


def density_by_timestep(
    code: SparseCode, num_latents: int, timesteps: Int[Tensor, " N"]
) -> dict[int, Float[Tensor, " num_latents"]]:
    """`latent_density` of the rows of each timestep."""

    def density(rows: Tensor) -> Tensor:
        return latent_density(SparseCode(code.top_acts[rows], code.top_indices[rows]), num_latents)

    return by_timestep(timesteps, density)


class Drift:
    """How far each latent's activations move between two timesteps of the same images (and positions):

        drift = 1 − Σ_n z_n z'_n / √(Σ z_n² Σ z'_n²)

    in [0, 1] for activations ≥ 0: 0 if it is active in the same rows in the same proportions, 1 if in none of them at
    both; NaN if at neither. Invariant under a scale of all activations of one timestep.
    """

    def __init__(self, num_latents: int) -> None:
        self._both, self._first, self._second = torch.zeros(3, num_latents, dtype=torch.float64)

    def update(self, first: SparseCode, second: SparseCode) -> None:
        """The codes of the same rows at the two timesteps."""
        for total, code in ((self._first, first), (self._second, second)):
            total.index_add_(0, code.top_indices.flatten().cpu(), code.top_acts.flatten().double().cpu().square())
        # (N, k, 1) == (N, 1, k'): which places of a row are of one latent; free places hold 0 and add nothing
        same = first.top_indices[:, :, None] == second.top_indices[:, None, :]
        row, i, j = same.nonzero(as_tuple=True)
        products = first.top_acts[row, i].double() * second.top_acts[row, j].double()
        self._both.index_add_(0, first.top_indices[row, i].cpu(), products.cpu())

    def compute(self) -> Float[Tensor, " num_latents"]:
        scale = (self._first * self._second).sqrt()
        drift = 1 - self._both / scale.clamp_min(1e-300)
        return torch.where((self._first > 0) | (self._second > 0), drift, torch.nan)


def latent_drift(first: SparseCode, second: SparseCode, num_latents: int) -> Float[Tensor, " num_latents"]:
    """See `Drift`."""
    drift = Drift(num_latents)
    drift.update(first, second)
    return drift.compute()


@dataclass(frozen=True)
class TimestepMetrics:
    sae: SAEMetrics
    """FVU, L0 and dead latents of the rows of this timestep alone."""
    density: Float[Tensor, " num_latents"]
    drift: Float[Tensor, " num_latents"] | None
    """From the timestep before it in the order of the features; None for the first."""


@torch.no_grad()
def evaluate_timesteps(
    sae: KSparseAutoencoder, features: FeatureSet, batch_size: int = 8192, *, allow_mismatch: bool = False
) -> dict[int, TimestepMetrics]:
    """Metrics of an SAE at each timestep of features of several, in batches.

    Raises:
        ValueError: for features whose timesteps are not known, or of another extraction.
    """
    sae.require_features(features, allow_mismatch=allow_mismatch)
    if not features.of_timesteps:
        raise ValueError("These features do not say which timesteps they are of. Take them with FeatureStore.select.")
    found: dict[int, TimestepMetrics] = {}
    before: int | None = None
    for t in features.of_timesteps:
        metrics, counts = measure_rows(sae, features, features.rows_at(t), batch_size)
        drift = None if before is None else _drift(sae, features, before, t, batch_size)
        found[t] = TimestepMetrics(metrics, counts.double().cpu() / metrics.rows, drift)
        before = t
    return found


def _drift(sae: KSparseAutoencoder, features: FeatureSet, first: int, second: int, batch_size: int) -> Tensor:
    drift = Drift(sae.config.num_latents)
    for offset in range(0, features.rows_per_timestep, batch_size):
        both = []
        for t in (first, second):
            rows = features.rows_at(t)[offset : offset + batch_size]
            timesteps = None if sae.config.timesteps is None else t
            both.append(sae.encode(features[rows.start : rows.stop].to(sae.device), timesteps))
        drift.update(*both)
    return drift.compute()
