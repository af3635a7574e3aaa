"""Convex problems: a linear classifier on a fixed design, with an L2 or L1 penalty."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .run import Run

logger = logging.getLogger(__name__)
Loss = Callable[[Tensor], Tensor]
"""From logits to the mean loss."""
MAX_ITERATIONS = 5000
TOLERANCE = 1e-2
"""Of the L1 problem's optimality conditions, as a share of the penalty."""


class SparseMatrix:
    """A matrix of which most is 0, by rows and by columns, so that products with it and its transpose are sums of the
    rows of the other factor. (torch's sparse product sorts the transpose anew at every gradient.)
    """

    def __init__(self, row: Tensor, column: Tensor, values: Tensor, shape: tuple[int, int]) -> None:
        """Entries in order of the rows."""
        order = column.sort(stable=True).indices
        self.shape = shape
        self.by_row = (column, _offsets(row, shape[0]), values)
        self.by_column = (row[order], _offsets(column[order], shape[1]), values[order])

    def product(self, dense: Tensor, *, transposed: bool = False) -> Tensor:
        """X dense, or Xᵀ dense."""
        places, offsets, values = self.by_column if transposed else self.by_row
        return nn.functional.embedding_bag(
            places, dense.contiguous(), offsets, mode="sum", per_sample_weights=values, include_last_offset=True
        )


def _offsets(sorted_places: Tensor, count: int) -> Tensor:
    return torch.searchsorted(sorted_places, torch.arange(count + 1, device=sorted_places.device))


class SparseLogits(torch.autograd.Function):
    """X Wᵀ of a SparseMatrix, with the gradient in W."""

    @staticmethod
    def forward(ctx: Any, matrix: SparseMatrix, weight: Tensor) -> Tensor:
        ctx.matrix = matrix
        return matrix.product(weight.detach().T)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, ctx.matrix.product(gradients[0], transposed=True).T


class Design:
    """The matrix X (rows × inputs) that a classifier is fitted on, in fp64.

    Latents of an SAE are kept sparse, and divided by their root mean square s, so that a penalty treats rare and
    frequent, large and small ones alike: W z = (W s)(z / s). Standardised features have s = 1.
    """

    def __init__(self, matrix: Tensor | SparseMatrix, scale: Tensor) -> None:
        self.matrix, self.scale = matrix, scale

    @classmethod
    def of(cls, run: "Run") -> "Design":
        head = run.probe.head
        if head.name == "linear":
            matrix = torch.cat([head.design(batch).double() for batch in run.batches()])
            return cls(matrix, matrix.new_ones(matrix.shape[1]))
        rows, columns, values, first, latents = [], [], [], 0, 0
        for batch in run.batches():
            latent_acts = head.design(batch)
            row, column = torch.nonzero(latent_acts, as_tuple=True)
            rows, columns = [*rows, row + first], [*columns, column]
            values.append(latent_acts[row, column].double())
            first, latents = first + len(latent_acts), latent_acts.shape[1]
        return cls.scaled_by_rms(torch.cat(rows), torch.cat(columns), torch.cat(values), (first, latents))

    @classmethod
    def scaled_by_rms(cls, row: Tensor, column: Tensor, values: Tensor, shape: tuple[int, int]) -> "Design":
        """Of a sparse matrix's entries, in order of the rows; columns that are all 0 keep s = 1."""
        squares = values.new_zeros(shape[1]).index_add_(0, column, values.square())
        rms = (squares / shape[0]).sqrt()
        scale = torch.where(rms > 0, rms, 1.0)
        return cls(SparseMatrix(row, column, values / scale[column], shape), scale)

    def logits(self, weight: Tensor, bias: Tensor) -> Tensor:
        if isinstance(self.matrix, SparseMatrix):
            return SparseLogits.apply(self.matrix, weight) + bias  # type: ignore[operator]
        return nn.functional.linear(self.matrix, weight, bias)

    def scaled(self, classifier: Any) -> tuple[Tensor, Tensor]:
        """The classifier's weights for this design, in fp64."""
        return classifier.weight.detach().double() * self.scale, classifier.bias.detach().double()

    @torch.no_grad()
    def write(self, classifier: Any, weight: Tensor, bias: Tensor) -> None:
        classifier.weight.copy_(weight / self.scale)
        classifier.bias.copy_(bias)


def minimise_l2(design: Design, loss: Loss, weight: Tensor, bias: Tensor, l2: float) -> tuple[Tensor, Tensor, float]:
    """min loss(X Wᵀ + b) + l2 ‖W‖² / 2, by L-BFGS to convergence."""
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=500, tolerance_grad=1e-6, tolerance_change=1e-10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(design.logits(weight, bias)) + l2 / 2 * weight.pow(2).sum()
        value.backward()
        return value

    optimizer.step(closure)
    return weight.detach(), bias.detach(), closure().item()  # `step` returns the loss before the first update


def smallest_l1(design: Design, loss: Loss, weight: Tensor, bias: Tensor) -> float:
    """The smallest strength at which all weights are 0: max |∂loss/∂W| at W = 0 and the best b (Friedman et al. 2010,
    §2.5).
    """
    _, bias, _ = minimise_l1(design, loss, torch.zeros_like(weight), bias, float("inf"))
    _, gradient = _value_and_gradient(design, loss, torch.cat([torch.zeros_like(weight), bias[:, None]], 1))
    return gradient[:, :-1].abs().max().item()


def minimise_l1(design: Design, loss: Loss, weight: Tensor, bias: Tensor, l1: float) -> tuple[Tensor, Tensor, float]:
    """min loss(X Wᵀ + b) + l1 Σ|W|, b free, by FISTA with backtracking (Beck & Teboulle 2009, §4) and restarts
    (O'Donoghue & Candès 2015, §3.2), until the optimality conditions hold.
    """
    tolerance = TOLERANCE * l1 if l1 < float("inf") else 1e-8
    current = point = torch.cat([weight, bias[:, None]], 1)  # (num_labels, inputs + 1)
    momentum, curvature = 1.0, 1.0
    violation = float("inf")
    for step in range(MAX_ITERATIONS):
        value, gradient = _value_and_gradient(design, loss, point)
        curvature, new = _proximal_step(design, loss, point, value, gradient, l1, curvature * 0.9)
        if ((point - new) * (new - current)).sum() > 0:
            momentum = 1.0  # the momentum leads uphill
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        point = new + (momentum - 1) / following * (new - current)
        current, momentum = new, following
        if step % 10 == 9:
            violation = _violation(_value_and_gradient(design, loss, current)[1], current, l1)
            if violation <= tolerance:
                break
    else:
        logger.warning(
            "The L1 problem was stopped after %d steps at %.2g of %.2g.", MAX_ITERATIONS, violation, tolerance
        )
    weight, bias = current[:, :-1], current[:, -1]
    penalty = l1 * weight.abs().sum().item() if l1 < float("inf") else 0.0
    return weight, bias, loss(design.logits(weight, bias)).item() + penalty


def _proximal_step(
    design: Design, loss: Loss, point: Tensor, value: Tensor, gradient: Tensor, l1: float, curvature: float
) -> tuple[float, Tensor]:
    """Soft-thresholding after a gradient step of length 1 / curvature, which rises until the quadratic bound holds."""
    while True:
        new = point - gradient / curvature
        new[:, :-1] = new[:, :-1].sign() * (new[:, :-1].abs() - l1 / curvature).clamp_min(0)
        change = new - point
        bound = value + (gradient * change).sum() + curvature / 2 * change.square().sum()
        with torch.no_grad():
            reached = loss(design.logits(new[:, :-1], new[:, -1]))
        if reached <= bound + 1e-12 * value.abs() or not torch.isfinite(value):
            return curvature, new
        curvature *= 2


def _violation(gradient: Tensor, current: Tensor, l1: float) -> float:
    """How far the subgradient nearest to 0 is from it: |g + l1 sign W| where W ≠ 0, max(|g| − l1, 0) where it is 0."""
    weight, of_weight, of_bias = current[:, :-1], gradient[:, :-1], gradient[:, -1]
    if l1 == float("inf"):
        return of_bias.abs().max().item()
    at_zero = (of_weight.abs() - l1).clamp_min(0)
    elsewhere = (of_weight + l1 * weight.sign()).abs()
    return max(torch.where(weight == 0, at_zero, elsewhere).max().item(), of_bias.abs().max().item())


def _value_and_gradient(design: Design, loss: Loss, point: Tensor) -> tuple[Tensor, Tensor]:
    leaf = point.detach().requires_grad_()
    value = loss(design.logits(leaf[:, :-1], leaf[:, -1]))
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient
