"""Principal components of many rows, dense or sparse, in memory that does not grow with their number."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .._config import check_integer
from ..features import FeatureSet

Rows = FeatureSet | Tensor | Any
"""(N, d): a FeatureSet, a tensor, or a sparse array of scipy."""
EXACT_WIDTH = 2048
"""Up to this width the covariance is formed; beyond it, and for sparse rows, a subspace is iterated."""
_BATCH, _MORE, _ITERATIONS = 8192, 10, 12


@dataclass(frozen=True)
class PrincipalComponents:
    """x ≈ mean + Σ z_i components[i],   z = components (x − mean).

    Of each component the entry that is largest in size is positive: which way a component points is arbitrary, and so
    it is the same in every run.
    """

    mean: Float[Tensor, " d"]
    components: Float[Tensor, "n d"]
    """Orthonormal, the largest variance first."""
    explained: Float[Tensor, " n"]
    """Share of the variance of the rows that each explains."""

    def project(self, rows: Rows) -> Float[Tensor, "N n"]:
        """Coordinates of rows, batch by batch."""
        offset = self.components.double() @ self.mean.double()
        basis = self.components.double().T
        return torch.cat([(_times(batch, basis) - offset).float() for batch in _batches(rows)])


@torch.no_grad()
def principal_components(rows: Rows, n: int, seed: int = 0) -> PrincipalComponents:
    """The n directions of largest variance.

    Up to `EXACT_WIDTH` from the covariance, in fp64. Of wider and of sparse rows by subspace iteration from random
    directions (Halko, Martinsson & Tropp 2011, §4.5), which reads the rows as often as it iterates; a sparse array is
    not made dense.

    Args:
        rows: (N, d) with N ≥ 2.
        n: components; at most min(N, d).
        seed: of the random directions.

    Raises:
        ValueError: for too few rows or other shapes, and for rows that are all equal.
    """
    shape = tuple(rows.shape) if not isinstance(rows, FeatureSet) else (len(rows), *rows.row_shape)
    if len(shape) != 2 or shape[0] < 2:
        raise ValueError(f"Principal components need rows (N, d) with N ≥ 2, got the shape {shape}.")
    check_integer("n", n, 1, min(shape))
    mean = torch.stack([_total(batch) for batch in _batches(rows)]).sum(0) / shape[0]
    exact = shape[1] <= EXACT_WIDTH and not _is_sparse(rows)
    found = _from_covariance(rows, mean, n) if exact else _from_subspace(rows, mean, n, seed)
    components, variances, total = found
    if not total > 0:
        raise ValueError(f"All {shape[0]} rows are equal: there is no direction in which they differ.")
    largest = components.abs().argmax(1, keepdim=True)
    components = components * components.gather(1, largest).sign()
    return PrincipalComponents(mean.float(), components.float(), (variances / total).float())


def _from_covariance(rows: Rows, mean: Tensor, n: int) -> tuple[Tensor, Tensor, float]:
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for batch in _batches(rows):
        centred = batch.double() - mean
        covariance += centred.T @ centred
    values, vectors = torch.linalg.eigh(covariance)
    return vectors.T.flip(0)[:n], values.flip(0)[:n].clamp_min(0), covariance.trace().item()


def _from_subspace(rows: Rows, mean: Tensor, n: int, seed: int) -> tuple[Tensor, Tensor, float]:
    """Q ← orth(Σ (x − mean)(x − mean)ᵀ Q), then the components within the span of Q."""
    width = min(n + _MORE, len(mean))
    basis = torch.randn(len(mean), width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis = torch.linalg.qr(basis).Q
    for _ in range(_ITERATIONS):
        image = torch.zeros_like(basis)
        for batch in _batches(rows):
            coordinates = _times(batch, basis) - mean @ basis
            image += _transposed_times(batch, coordinates) - torch.outer(mean, coordinates.sum(0))
        basis = torch.linalg.qr(image).Q
    inner, total = torch.zeros(width, width, dtype=torch.float64), 0.0
    for batch in _batches(rows):
        coordinates = _times(batch, basis) - mean @ basis
        inner += coordinates.T @ coordinates
        total += _squares(batch)
    count = sum(batch.shape[0] for batch in _batches(rows))
    values, vectors = torch.linalg.eigh(inner)
    total -= count * mean.square().sum().item()
    return (basis @ vectors).T.flip(0)[:n], values.flip(0)[:n].clamp_min(0), total


def _is_sparse(rows: Rows) -> bool:
    return hasattr(rows, "tocsr")


def _batches(rows: Rows) -> Any:
    if isinstance(rows, FeatureSet):
        return rows.batches(_BATCH)
    return (rows[start : start + _BATCH] for start in range(0, rows.shape[0], _BATCH))


def _total(batch: Any) -> Float[Tensor, " d"]:
    return torch.as_tensor(np.asarray(batch.sum(0))).double().flatten() if _is_sparse(batch) else batch.double().sum(0)


def _squares(batch: Any) -> float:
    return (
        float(np.square(batch.data, dtype=np.float64).sum())
        if _is_sparse(batch)
        else batch.double().square().sum().item()
    )


def _times(batch: Any, other: Tensor) -> Tensor:
    return torch.from_numpy(batch @ other.numpy()) if _is_sparse(batch) else batch.double() @ other


def _transposed_times(batch: Any, other: Tensor) -> Tensor:
    return torch.from_numpy(batch.T @ other.numpy()) if _is_sparse(batch) else batch.double().T @ other
