"""Multinomial logistic regression over a path of L2 strengths, for several subsets of the same rows at once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

MEMORY = 10
MAX_ITERATIONS = 500
# up to so many numbers the products are made in fp64, which costs nothing there
EXACT_BELOW = 2**20
TOLERANCE = 1e-12
"""Estimated distance from the smallest loss, in nats, at which a single probe's fit ends."""
SWEEP_TOLERANCE = 1e-5
"""The same for the many fits of a sweep. scikit-learn's default ends 1e-5 to 6e-3 away at strengths of 1e-2 to 1e-5."""


@dataclass(frozen=True)
class LogisticSolution:
    """S classifiers of one L2 strength: logits = W (x − μ)/σ + b, with the subset's own μ and σ."""

    l2: float
    mean: Float[Tensor, "S d"]
    std: Float[Tensor, "S d"]
    weight: Float[Tensor, "S K d"]
    bias: Float[Tensor, "S K"]
    loss: Float[Tensor, " S"]
    """Mean cross-entropy + l2 · ‖W‖² / 2 on the subset."""
    iterations: int

    def logits(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "S n K"]:
        """Of all S at once: one product, with μ and σ folded into the weights."""
        weight = self.weight / self.std[:, None]
        bias = self.bias - (weight * self.mean[:, None]).sum(2)
        logits = rows @ weight.flatten(0, 1).T.to(rows.dtype)
        return (logits.double() + bias.flatten()).unflatten(1, bias.shape).transpose(0, 1)


def moments(rows: Float[Tensor, "n d"]) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
    """μ and σ in fp64. Constant features carry nothing: with σ = 1 they stay 0 instead of becoming NaN."""
    largest, wide = rows.abs().amax(0), rows.double()
    std, mean = torch.std_mean(wide, 0, correction=0)
    return mean, torch.where(std > 1e-6 * largest, std, 1.0)


def logistic_path(
    rows: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    num_labels: int,
    strengths: Sequence[float],
    *,
    subsets: Bool[Tensor, "S n"] | None = None,
    tolerance: float = TOLERANCE,
) -> Iterator[LogisticSolution]:
    """The minimum of mean cross-entropy + l2 · ‖W‖² / 2 on standardised features, from the strongest L2 to the weakest.

    L-BFGS over all subsets together, each step of which is two products with the rows that all of them share. It starts
    from the solution of the strength before, and from the inverse of αG + l2·I instead of a multiple of the identity:
    G is the rows' covariance and α the mean curvature of the softmax, so that correlated features, which diffusion
    models have, do not slow it down (an upper bound of this kind: Böhning 1992).

    Args:
        rows, labels: shared by all subsets.
        num_labels: classes.
        strengths: the values of l2.
        subsets: which rows each of the S problems is fitted on; default one problem on all.
        tolerance: estimated distance from the smallest loss to stop at.

    Yields:
        A solution a strength. It is converged as far as `tolerance` and, above a million numbers, products in fp32 go.
    """
    if subsets is None:
        subsets = torch.ones(1, len(rows), dtype=torch.bool, device=rows.device)
    problem = _Problem(rows, labels, num_labels, subsets)
    weight = torch.zeros(len(subsets), num_labels, problem.width + 1, dtype=torch.float64, device=rows.device)
    for l2 in sorted(strengths, reverse=True):
        weight, loss, iterations = _minimise(problem, weight, l2, tolerance)
        yield problem.solution(weight, loss, l2, iterations)


@dataclass(frozen=True)
class _Point:
    """Where a search is, a problem each. Rows are last: sums over classes then go over whole vectors."""

    logits: Float[Tensor, "S K n"]
    probabilities: Float[Tensor, "S K n"]
    entropy: Float[Tensor, " S"]
    """Mean cross-entropy, fp64."""


class _Problem:
    """Losses and gradients of S problems; `weight` (S, K, width + 1) has the bias in its last column."""

    def __init__(self, rows: Tensor, labels: Tensor, num_labels: int, subsets: Tensor) -> None:
        mean, std = moments(rows)
        dtype = torch.float64 if rows.numel() <= EXACT_BELOW else torch.float32
        self.rows = ((rows.double() - mean) / std).to(dtype)
        # a subset's own standardisation, on top of the common one, is a scale of its weights and a part of its bias
        self.share = (subsets.double() / subsets.sum(1, keepdim=True)).to(dtype)  # (S, n): of a row
        own_mean = (self.share @ self.rows).double()
        own_square = (self.share @ self.rows.square()).double()
        own_std = (own_square - own_mean.square()).clamp(min=0).sqrt()
        own_std = torch.where(own_std > 1e-6, own_std, 1.0)
        self.own_mean, self.own_std = own_mean, own_std
        self.mean, self.std = mean + std * own_mean, std * own_std
        self.turned = None
        if rows.shape[1] > len(rows):
            if len(subsets) > 1:
                raise ValueError("Features wider than there are rows are fitted one subset at a time.")
            # the weights of the minimum lie in the span of the rows: as many columns as rows tell all there is
            self.turned, triangle = torch.linalg.qr((self.rows / own_std.to(dtype)).T)  # (d, n), (n, n)
            self.rows, self.own_std = triangle.T.contiguous(), torch.ones_like(own_std[:, : len(rows)])
            self.own_mean = (own_mean / own_std) @ self.turned.double()
        self.width = self.rows.shape[1]
        self.places = labels.expand(len(subsets), 1, -1)
        self.targets = nn.functional.one_hot(labels, num_labels).T.to(dtype)  # (K, n)
        self.covariance = self.rows.T @ self.rows / len(rows)

    def logits(self, weight: Tensor) -> Float[Tensor, "S K n"]:
        scaled = (weight[..., :-1] / self.own_std[:, None]).flatten(0, 1).to(self.rows.dtype)
        return (scaled @ self.rows.T).view(*weight.shape[:2], -1).add_(weight[..., -1:].to(self.rows.dtype))

    def at(self, logits: Float[Tensor, "S K n"]) -> _Point:
        top = logits.amax(1, keepdim=True)
        shares = (logits - top).exp_()
        total = shares.sum(1, keepdim=True)
        entropy = total.log().add_(top).sub_(self.of_label(logits))
        return _Point(logits, shares.div_(total), self.mean_over(entropy[:, 0]))

    def of_label(self, values: Float[Tensor, "S K n"]) -> Float[Tensor, "S 1 n"]:
        return values.gather(1, self.places)

    def gradient(self, point: _Point) -> Float[Tensor, "S K width+1"]:
        """Of the mean cross-entropy."""
        shared = (point.probabilities - self.targets).mul_(self.share[:, None])
        gradient = (shared.flatten(0, 1) @ self.rows).view(*shared.shape[:2], -1).double() / self.own_std[:, None]
        return torch.cat([gradient, shared.sum(2, keepdim=True, dtype=torch.float64)], 2)

    def mean_over(self, values: Float[Tensor, "S n"]) -> Float[Tensor, " S"]:
        return (values * self.share).sum(1, dtype=torch.float64)

    def preconditioner(self, l2: float, curvature: float) -> Tensor:
        """Cholesky factor of αG + l2·I, with as much more on the diagonal as its rounding needs."""
        identity = torch.eye(self.width, dtype=self.rows.dtype, device=self.rows.device)
        scaled = curvature * self.covariance
        extra = 1e-6 * max(float(scaled.diagonal().mean()), 1e-12)
        while True:
            factor, failed = torch.linalg.cholesky_ex(scaled + (l2 + extra) * identity)
            if not failed:
                return factor
            extra *= 10

    def solution(self, weight: Tensor, loss: Tensor, l2: float, iterations: int) -> LogisticSolution:
        matrix = weight[..., :-1]
        bias = weight[..., -1] + (matrix / self.own_std[:, None] * self.own_mean[:, None]).sum(2)
        if self.turned is not None:
            matrix = matrix @ self.turned.double().T
        return LogisticSolution(l2, self.mean, self.std, matrix, bias, loss, iterations)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2))


class _InverseHessian:
    """L-BFGS's two loops (Nocedal & Wright, algorithm 7.4), a problem each, around a preconditioner."""

    def __init__(self, factor: Tensor, curvature: float) -> None:
        self.factor, self.curvature = factor, curvature
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []

    def remember(self, step: Tensor, change: Tensor) -> None:
        product = _dot(step, change)
        # rounding can make it negative at the very end: such a pair is left out where it does
        inverse = torch.where(product > 0, 1 / product, 0.0)
        self.pairs = [*self.pairs, (step, change, inverse)][-MEMORY:]

    def times(self, gradient: Tensor) -> Tensor:
        result, shares = gradient.clone(), []
        for step, change, inverse in reversed(self.pairs):
            shares.append(_dot(step, result) * inverse)
            result -= shares[-1][:, None, None] * change
        flat = result[..., :-1].flatten(0, 1).to(self.factor.dtype)
        solved = torch.cholesky_solve(flat.T, self.factor).T.reshape(result[..., :-1].shape).double()
        result = torch.cat([solved, result[..., -1:] / self.curvature], 2)
        for (step, change, inverse), share in zip(self.pairs, reversed(shares), strict=True):
            result += (share - _dot(change, result) * inverse)[:, None, None] * step
        return result


def _minimise(problem: _Problem, weight: Tensor, l2: float, tolerance: float) -> tuple[Tensor, Tensor, int]:
    """(weight, loss, iterations)."""
    penalised = torch.ones_like(weight)
    penalised[..., -1] = 0

    def penalty(a: Tensor, b: Tensor) -> Tensor:
        return l2 * _dot(a * penalised, b)

    point = problem.at(problem.logits(weight))
    loss = point.entropy + penalty(weight, weight) / 2
    spread = point.probabilities * (1 - point.probabilities)
    curvature = max(float(spread.mean(dtype=torch.float64)), 1e-9)
    gradient = problem.gradient(point) + l2 * penalised * weight
    inverse = _InverseHessian(problem.preconditioner(l2, curvature), curvature)
    settled = torch.zeros_like(loss, dtype=torch.bool)
    for iteration in range(MAX_ITERATIONS):
        direction = -inverse.times(gradient)
        # ½ gᵀ H⁻¹ g: what a quadratic of this curvature would still lose
        if bool((settled | (-_dot(gradient, direction) / 2 <= tolerance)).all()):
            return weight, loss, iteration
        ridge = penalty(weight, direction), penalty(direction, direction)
        length, point = _line_search(problem, point, problem.logits(direction), ridge)
        step = length[:, None, None] * direction
        weight = weight + step
        before, loss = loss, point.entropy + penalty(weight, weight) / 2
        settled = before - loss <= tolerance / 100
        change = problem.gradient(point) + l2 * penalised * weight - gradient
        inverse.remember(step, change)
        gradient = gradient + change
    return weight, loss, MAX_ITERATIONS


def _line_search(
    problem: _Problem, start: _Point, along: Float[Tensor, "S K n"], ridge: tuple[Tensor, Tensor]
) -> tuple[Float[Tensor, " S"], _Point]:
    """Newton's method for the length of the step, a problem each; no product with the rows is needed.

    Args:
        along: the logits of the direction d.
        ridge: l2 · wᵀd and l2 · dᵀd.

    Returns:
        The lengths, and the point there.
    """

    def reach(length: Tensor) -> _Point:
        return problem.at(torch.addcmul(start.logits, along, length.to(along.dtype)[:, None, None]))

    length = torch.ones_like(start.entropy)
    point, of_label = reach(length), problem.of_label(along)[:, 0]
    for _ in range(5):
        weighted = point.probabilities * along
        mean = weighted.sum(1)
        slope = problem.mean_over(mean - of_label) + ridge[0] + length * ridge[1]
        bend = problem.mean_over(weighted.mul_(along).sum(1) - mean * mean) + ridge[1]
        newton = slope / bend.clamp(min=1e-300)
        if bool((newton.abs() <= 0.05 * length).all()):
            break
        length = (length - newton).clamp(min=0.05 * length, max=20 * length)
        point = reach(length)
    for _ in range(30):
        gain = start.entropy - point.entropy - length * ridge[0] - length.square() / 2 * ridge[1]
        worse = gain < -1e-7 * start.entropy
        if not bool(worse.any()):
            return length, point
        length = torch.where(worse, length / 4, length)
        point = reach(length)
    return torch.zeros_like(length), start
