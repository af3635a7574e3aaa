"""The logistic path: against scikit-learn at the same strength, many subsets at once, and hard cases."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from sklearn.linear_model import LogisticRegression

from diffusion_sae.features import FeatureSet
from diffusion_sae.probes import logistic
from diffusion_sae.probes.logistic import LogisticSolution, logistic_path, moments
from diffusion_sae.probes.subsets import fit_subsets

Labelled = Callable[..., FeatureSet]
STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4)


def draw(rows: int, width: int = 48, classes: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated features, as those of a network are, in which classes overlap."""
    shared = torch.Generator().manual_seed(5)
    turn = torch.linalg.qr(torch.randn(width, width, generator=shared))[0]
    scales = torch.arange(1, width + 1) ** -1.0
    centres = 1.2 * torch.randn(classes, width, generator=shared) * scales
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    return (centres[labels] + torch.randn(rows, width, generator=generator) * scales) @ turn, labels


def loss_of(rows: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, l2: float) -> float:
    return (F.cross_entropy(rows @ weight.T + bias, labels) + l2 / 2 * weight.square().sum()).item()


@pytest.mark.parametrize("single", [False, True], ids=["fp64", "fp32"])
def test_the_optimum_is_scikit_learns(single: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if single:
        monkeypatch.setattr(logistic, "EXACT_BELOW", 0)
    rows, labels = draw(800)
    new, new_labels = draw(2000, seed=1)
    mean, std = moments(rows)
    standardised = ((rows.double() - mean) / std).numpy()
    for solution in logistic_path(rows, labels, 5, STRENGTHS, tolerance=1e-7 if single else 1e-12):
        reference = LogisticRegression(C=1 / (len(rows) * solution.l2), tol=1e-9, max_iter=20_000)
        reference.fit(standardised, labels.numpy())
        weight, bias = torch.tensor(reference.coef_), torch.tensor(reference.intercept_)
        near = 2e-2 if single else 1e-3
        torch.testing.assert_close(solution.weight[0], weight, atol=near * float(weight.abs().max()), rtol=0)
        ours = (solution.logits(new)[0].argmax(1) == new_labels).double().mean().item()
        theirs = reference.score(((new.double() - mean) / std).numpy(), new_labels.numpy())
        assert ours >= theirs - 2e-3, solution.l2
        expected = loss_of(torch.tensor(standardised), labels, weight, bias, solution.l2)
        assert solution.loss.item() == pytest.approx(expected, abs=1e-6)


def test_a_sweeps_tolerance_is_no_worse_than_scikit_learn_as_it_comes() -> None:
    rows, labels = draw(1500, 64)
    new, new_labels = draw(4000, 64, seed=1)
    mean, std = moments(rows)
    standardised, new_standardised = ((rows.double() - mean) / std), ((new.double() - mean) / std)
    for solution in logistic_path(rows, labels, 5, STRENGTHS, tolerance=logistic.SWEEP_TOLERANCE):
        reference = LogisticRegression(C=1 / (len(rows) * solution.l2), max_iter=1000)
        reference.fit(standardised.numpy(), labels.numpy())
        ours = (solution.logits(new)[0].argmax(1) == new_labels).double().mean().item()
        # three rows of 4,000 decide nothing
        assert ours >= reference.score(new_standardised.numpy(), new_labels.numpy()) - 7.5e-4, solution.l2


def alone(rows: torch.Tensor, labels: torch.Tensor, subset: torch.Tensor) -> list[LogisticSolution]:
    return list(logistic_path(rows[subset], labels[subset], 5, STRENGTHS[:3]))


@pytest.mark.parametrize("width", [12, 90], ids=["more_rows_than_features", "more_features_than_rows"])
def test_many_subsets_are_each_as_if_alone(width: int) -> None:
    """Also with a feature that is constant in one of the subsets."""
    rows, labels = draw(80, width)
    subsets = torch.rand(3, 80, generator=torch.Generator().manual_seed(0)) < 0.8
    rows[:, 3] = (~subsets[1]).float()
    validation = draw(300, width, seed=2)
    fits = fit_subsets(rows, labels, subsets, validation, num_labels=5, strengths=STRENGTHS[:3], tolerance=1e-12)
    for fit, subset in zip(fits, subsets, strict=True):
        path = alone(rows, labels, subset)
        accuracy = [(s.logits(validation[0])[0].argmax(1) == validation[1]).double().mean().item() for s in path]
        assert fit.validation.accuracy == max(accuracy)
        same = next(s for s in path if s.l2 == fit.solution.l2)
        torch.testing.assert_close(fit.logits(validation[0]), same.logits(validation[0])[0], atol=5e-3, rtol=1e-3)


def test_subsets_are_fitted_in_groups_that_fit_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, labels = draw(100, 8)
    subsets = torch.rand(5, 100, generator=torch.Generator().manual_seed(0)) < 0.8
    given = {"num_labels": 5, "strengths": (1e-2,), "tolerance": 1e-12}
    whole = fit_subsets(rows, labels, subsets, (rows, labels), **given)
    monkeypatch.setattr("diffusion_sae.probes.subsets.MAX_LOGITS", 1100)  # two subsets
    groups = fit_subsets(rows, labels, subsets, (rows, labels), **given)
    assert [len(fit.solution.loss) for fit in groups] == [2, 2, 2, 2, 1]
    for one, other in zip(whole, groups, strict=True):
        torch.testing.assert_close(one.logits(rows), other.logits(rows), atol=1e-3, rtol=1e-3)


def test_without_a_penalty_on_separable_rows_it_still_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no smallest loss: the weights grow for ever."""
    monkeypatch.setattr(logistic, "MAX_ITERATIONS", 20)
    labels = torch.arange(40) % 2
    (solution,) = logistic_path(labels[:, None] + torch.rand(40, 3) / 9, labels, 2, (0.0,))
    assert torch.isfinite(solution.weight).all()
    assert solution.loss.item() < 1e-3


def test_wide_features_of_several_subsets_at_once_are_refused() -> None:
    rows, labels = draw(20, 30)
    with pytest.raises(ValueError, match="wider than there are rows are fitted one subset at a time"):
        next(logistic_path(rows, labels, 5, (1.0,), subsets=torch.ones(2, 20, dtype=torch.bool)))


def test_a_point_has_torchs_softmax_and_cross_entropy() -> None:
    rows, labels = draw(40, 6)
    chosen = torch.rand(3, 40, generator=torch.Generator().manual_seed(1)) < 0.6
    problem = logistic._Problem(rows, labels, 5, chosen)
    logits = 300 * torch.randn(3, 5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    point = problem.at(logits)
    torch.testing.assert_close(point.probabilities, logits.softmax(1), rtol=1e-12, atol=1e-15)
    for subset, own, found in zip(chosen, logits, point.entropy, strict=True):
        torch.testing.assert_close(found, torch.nn.functional.cross_entropy(own.T[subset], labels[subset]))
