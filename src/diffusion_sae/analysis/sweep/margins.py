"""What is best, by how much, and whether that exceeds the noise."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .cells import CellResult

RESAMPLES = 2000
LEVEL = 0.95
AT_ONCE = 2**22
"""Numbers of the resamples that are held at a time."""
Key = tuple[str, str, str]


@dataclass(frozen=True)
class Point:
    """A cell over all its draws."""

    results: list[CellResult]

    @property
    def validation(self) -> float:
        return statistics.mean(result.validation for result in self.results)

    @property
    def accuracies(self) -> list[float]:
        """On test images, of validation where there are none: a fit each."""
        return [
            seed.validation_accuracy if seed.test_accuracy is None else seed.test_accuracy
            for result in self.results
            for seed in result.seeds
        ]

    def hits(self) -> Bool[Tensor, "fits n"]:
        return torch.cat([result.hits() for result in self.results])

    def summary(self) -> dict[str, Any]:
        cell, accuracies = self.results[0].cell, self.accuracies
        return {
            **{
                name: getattr(cell, name)
                for name in ("model", "weights", "prompt", "layer", "timestep", "head", "label")
            },
            "validation_accuracy": self.validation,
            "accuracy": statistics.mean(accuracies),
            "accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        }


def points(results: Iterable[CellResult]) -> list[Point]:
    """Cells that differ in the draw alone, together."""
    grouped: dict[tuple, list[CellResult]] = defaultdict(list)
    for result in results:
        cell = result.cell
        key = (cell.kind, cell.model, cell.weights, cell.prompt, cell.layer, cell.timestep, cell.head, cell.label)
        grouped[key].append(result)
    return [Point(group) for group in grouped.values()]


def best_of(candidates: Sequence[Point]) -> Point:
    """By validation accuracy; the first of equals."""
    return max(candidates, key=lambda point: point.validation)


def _eligible(point: Point, weights: str) -> bool:
    cell = point.results[0].cell
    return cell.kind == "cell" and cell.weights == weights and not cell.prompt_of


def model_groups(results: Iterable[CellResult], weights: str = "trained") -> dict[Key, list[Point]]:
    """(model, head, label) → the cells that a best one is chosen from: those whose prompts need no label."""
    groups: dict[Key, list[Point]] = defaultdict(list)
    for point in points(results):
        if _eligible(point, weights):
            cell = point.results[0].cell
            groups[cell.model, cell.head, cell.label].append(point)
    return dict(groups)


def margin(mine: Point, other: Point, *, seed: int = 0) -> dict[str, Any]:
    """Difference of two accuracies on the same images with a 95 % interval, by a paired bootstrap.

    A resample draws images and fits with replacement, so that the interval holds both what the images and what the
    seeds leave open.
    """
    return interval_of(difference_of(mine, other), seed=seed)


def difference_of(mine: Point, other: Point) -> Float[Tensor, "fits n"]:
    """1 where the first alone was right, −1 where the second was, else 0; fits are paired where both have as many."""
    first, second = mine.hits().double(), other.hits().double()
    if len(first) != len(second):
        first, second = first.mean(0, keepdim=True), second.mean(0, keepdim=True)
    return first - second


def interval_of(difference: Float[Tensor, "fits n"], *, seed: int = 0) -> dict[str, Any]:
    """The mean with the interval of `margin`."""
    generator = torch.Generator().manual_seed(seed)
    fits, images = difference.shape
    means, at_once = [], max(1, AT_ONCE // images)
    for start in range(0, RESAMPLES, at_once):
        count = min(at_once, RESAMPLES - start)
        rows = torch.randint(fits, (count, fits), generator=generator)
        columns = torch.randint(images, (count, images), generator=generator)
        share = torch.nn.functional.one_hot(rows, fits).double().mean(1)  # (count, fits)
        means.append((share @ difference).gather(1, columns).mean(1))
    tail = (1 - LEVEL) / 2
    low, high = torch.cat(means).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return {
        "difference": difference.mean().item(),
        "low": low,
        "high": high,
        "exceeds_noise": low > 0 or high < 0,
    }


def best_cells(results: Sequence[CellResult]) -> list[dict[str, Any]]:
    """The best cell of each model, head and label with its margins: to the second best, the baselines, other models."""
    groups, untrained = model_groups(results), model_groups(results, "random")
    winners = {key: best_of(group) for key, group in groups.items()}
    inputs = {
        (point.results[0].cell.kind, *(getattr(point.results[0].cell, n) for n in ("model", "label"))): point
        for point in points(results)
        if point.results[0].cell.kind in ("pixels", "latents")
    }
    shuffled = {
        tuple(getattr(point.results[0].cell, n) for n in ("model", "head", "label")): point
        for point in points(results)
        if point.results[0].cell.kind == "shuffled"
    }
    found = []
    for key, best in winners.items():
        model, head, label = key
        against: dict[str, Point] = {}
        others = [point for point in groups[key] if point is not best]
        if others:
            against["second best"] = best_of(others)
        if key in untrained:
            against["random weights"] = best_of(untrained[key])
        against |= {
            kind: inputs[kind, model, label] for kind in ("pixels", "latents") if (kind, model, label) in inputs
        }
        if key in shuffled:
            against["shuffled labels"] = shuffled[key]
        rivals = [point for other, point in winners.items() if other != key and other[1:] == (head, label)]
        against |= {f"best of {point.results[0].cell.model}": point for point in rivals}
        margins = {name: {**point.summary(), **margin(best, point)} for name, point in against.items()}
        chosen = best.results[0]
        measured = "test" if chosen.seeds[0].test_accuracy is not None else "validation"
        found.append(
            {
                **best.summary(),
                "measured_on": measured,
                "images": chosen.rows[measured],
                "num_labels": chosen.num_labels,
                "margins": margins,
            }
        )
    return found
