"""What the paper reports, asked of a sweep: inner layers, small timesteps, prompts, coarse and fine classes.

Each answer is a difference of test accuracies on the same images with the interval of `margins.margin`. Which cells are
compared is chosen on validation images.
"""

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from .cells import CellResult
from .margins import Key, Point, best_of, difference_of, interval_of, margin, model_groups, points

Answer = dict[str, Any]


def compared(mine: Point, other: Point) -> Answer:
    """Both cells, and the first one's accuracy less the second one's."""
    return {"mine": mine.summary(), "other": other.summary(), **margin(mine, other)}


def observations(results: Sequence[CellResult]) -> list[Answer]:
    """For each model, head and label: `best` and what it is compared with.

    - `first layer`, `last layer`: the best cell of the outermost layers, each at its own best timestep.
    - `timesteps`: the best layer at every other timestep of the grid.
    - `tied`: how many of the grid's cells the images and fits do not tell from the best one.
    - `prompts`: the best layer and timestep under every other prompt, those that are made of a class among them.
    - `prompts over the grid`: the same of the mean over all layers and timesteps that both prompts have; and prompts
      made of a class against every other that is not.
    - `finer`, `coarser`: for every other label, its accuracy at its own best cell against that at this label's.
    """
    groups = model_groups(results)
    return [_answers(key, groups, results) for key in groups]


def _answers(key: Key, groups: dict[Key, list[Point]], results: Sequence[CellResult]) -> Answer:
    model, head, label = key
    group = groups[key]
    best = best_of(group)
    chosen = best.results[0].cell
    layers = list(dict.fromkeys(point.results[0].cell.layer for point in group))
    of_layer = {name: [p for p in group if p.results[0].cell.layer == name] for name in layers}
    answer: Answer = {
        **best.summary(),
        "num_labels": best.results[0].num_labels,
        "fits": len(best.accuracies),
        "cells": len(group),
        "tied": sum(not margin(best, point)["exceeds_noise"] for point in group if point is not best),
        "timesteps": [
            compared(best, point)
            for point in sorted(of_layer[chosen.layer], key=lambda p: p.results[0].cell.timestep)
            if point.results[0].cell.timestep != chosen.timestep and point.results[0].cell.prompt == chosen.prompt
        ],
        "prompts": [compared(point, best) for point in _same_place(results, best)],
        "prompts over the grid": _over_the_grid(results, best),
        "labels": _labels(key, groups),
    }
    for name, layer in (("first layer", layers[0]), ("last layer", layers[-1])):
        if layer != chosen.layer:
            answer[name] = compared(best, best_of(of_layer[layer]))
    return {"model": model, "head": head, "label": label, **answer}


def _same_place(results: Sequence[CellResult], best: Point) -> list[Point]:
    """The same model, layer, timestep, head and label under other prompts."""
    chosen = best.results[0].cell
    return [
        point
        for point in _alike(results, best)
        if (point.results[0].cell.layer, point.results[0].cell.timestep) == (chosen.layer, chosen.timestep)
        and point.results[0].cell.prompt != chosen.prompt
    ]


def _alike(results: Sequence[CellResult], best: Point) -> list[Point]:
    """All layers, timesteps and prompts of the same model, weights, head and label."""
    chosen, same = best.results[0].cell, ("kind", "model", "weights", "head", "label")
    return [
        point
        for point in points(results)
        if all(getattr(point.results[0].cell, name) == getattr(chosen, name) for name in same)
    ]


def _over_the_grid(results: Sequence[CellResult], best: Point) -> list[Answer]:
    """Every other prompt against that of the best cell, and those made of a class against every other prompt that is
    not, by the mean over the places that both have.
    """
    by_prompt: dict[str, dict[tuple[str, int], Point]] = {}
    made_of_class = {}
    for point in _alike(results, best):
        cell = point.results[0].cell
        by_prompt.setdefault(cell.prompt, {})[cell.layer, cell.timestep] = point
        made_of_class[cell.prompt] = bool(cell.prompt_of)
    chosen, answers = best.results[0].cell.prompt, []
    for reference, own in sorted(by_prompt.items(), key=lambda item: item[0] != chosen):
        if made_of_class[reference]:
            continue
        for prompt, others in by_prompt.items():
            pairs = [(others[place], own[place]) for place in own if place in others]
            if prompt != reference and pairs and (reference == chosen or made_of_class[prompt]):
                answers.append(_mean_of(prompt, reference, pairs))
    return answers


def _mean_of(prompt: str, reference: str, pairs: Sequence[tuple[Point, Point]]) -> Answer:
    differences = [difference_of(*pair) for pair in pairs]
    accuracies = zip(*((statistics.mean(p.accuracies) for p in pair) for pair in pairs), strict=True)
    mine, other = (statistics.mean(of_side) for of_side in accuracies)
    return {
        "mine": {"prompt": prompt, "accuracy": mine},
        "other": {"prompt": reference, "accuracy": other},
        "cells": len(pairs),
        "lower": sum(difference.mean().item() < 0 for difference in differences),
        **interval_of(torch.stack(differences).mean(0)),
    }


def _labels(key: Key, groups: dict[Key, list[Point]]) -> list[Answer]:
    """Of every other label of the model: its best cell against the cell that is best for this label."""
    model, head, label = key
    here = best_of(groups[key]).results[0].cell
    place = (here.layer, here.timestep, here.prompt)
    answers = []
    for other, group in groups.items():
        if other[:2] == (model, head) and other[2] != label:
            own = best_of(group)
            cells = {(p.results[0].cell.layer, p.results[0].cell.timestep, p.results[0].cell.prompt): p for p in group}
            if place in cells and cells[place] is not own:
                answers.append(compared(own, cells[place]))
    return answers
