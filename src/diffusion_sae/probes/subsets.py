"""Linear probes on several subsets of the same training rows: the many fits of a sweep, in shared products."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .logistic import SWEEP_TOLERANCE, LogisticSolution, logistic_path
from .results import ProbeMetrics
from .run import measure
from .tasks import SingleLabel

MAX_LOGITS = 2**25
"""Logits of one group of subsets; 128 MB in fp32, of which a step holds about six."""


@dataclass(frozen=True)
class SubsetFit:
    """The probe of one subset, of the L2 strength chosen on validation rows."""

    validation: ProbeMetrics
    solution: LogisticSolution
    """Of all subsets that were fitted with it."""
    position: int
    """Of this one among them."""

    def logits(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "n K"]:
        one = slice(self.position, self.position + 1)
        own = self.solution
        alone = LogisticSolution(
            own.l2, own.mean[one], own.std[one], own.weight[one], own.bias[one], own.loss[one], own.iterations
        )
        return alone.logits(rows)[0]


def fit_subsets(
    rows: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    subsets: Bool[Tensor, "S n"],
    validation: tuple[Float[Tensor, "m d"], Int[Tensor, " m"]],
    *,
    num_labels: int,
    strengths: Sequence[float],
    tolerance: float = SWEEP_TOLERANCE,
) -> list[SubsetFit]:
    """A linear probe a subset, as `ProbeTrainer` fits one: the strength is chosen by validation accuracy, ties by loss.

    Args:
        rows, labels: training rows of all subsets.
        subsets: which rows a probe is fitted on.
        validation: rows and labels that the strength is chosen on.
        num_labels: classes.
        strengths: the L2 path.
        tolerance: see `logistic_path`.
    """
    if rows.shape[1] > int(subsets.sum(1).min()):
        fits = []
        for subset in subsets:
            alone = (rows[subset], labels[subset], torch.ones(1, int(subset.sum()), dtype=torch.bool))
            fits += _fit_group(*alone, validation, num_labels, strengths, tolerance)
        return fits
    at_once = max(1, MAX_LOGITS // (len(rows) * num_labels))
    groups = [_fit_group(rows, labels, s, validation, num_labels, strengths, tolerance) for s in subsets.split(at_once)]
    return [fit for group in groups for fit in group]


def _fit_group(
    rows: Tensor,
    labels: Tensor,
    subsets: Tensor,
    validation: tuple[Tensor, Tensor],
    num_labels: int,
    strengths: Sequence[float],
    tolerance: float,
) -> list[SubsetFit]:
    best: list[SubsetFit | None] = [None] * len(subsets)
    for solution in logistic_path(rows, labels, num_labels, strengths, subsets=subsets, tolerance=tolerance):
        for position, logits in enumerate(solution.logits(validation[0])):
            metrics, old = measure(SingleLabel(), logits, validation[1]), best[position]
            if old is None or metrics.better_than(old.validation):
                best[position] = SubsetFit(metrics, solution, position)
    return [fit for fit in best if fit is not None]
