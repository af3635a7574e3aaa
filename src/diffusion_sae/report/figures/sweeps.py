"""Figures of a sweep, drawn from its table of results alone."""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .curves import Curve, curves, draw_curves
from .grids import heat_map
from .style import TITLE, WIDTH, legend_below, new_figure, shortened, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
Place = tuple[str, int]
"""Layer and timestep."""
AXES: dict[str, Any] = {"x_label": "timestep", "y_label": "accuracy (%)", "x_scale": "even"}


def accuracy(row: Row) -> float:
    """On test images; of validation where there are none."""
    return row["validation_accuracy"] if row["test_accuracy"] is None else row["test_accuracy"]


def pick(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval over the fits (Student's t)."""
    if len(values) < 2:
        return statistics.mean(values), 0.0
    # two-sided 97.5 % points of Student's t for 1…9 degrees of freedom; beyond, the normal's is near
    points = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
    factor = points[len(values) - 2] if len(values) - 2 < len(points) else 2.1
    return statistics.mean(values), factor * statistics.stdev(values) / math.sqrt(len(values))


def ordered(values: Iterable[Any]) -> list[Any]:
    """Distinct, in the order in which they come."""
    return list(dict.fromkeys(values))


def _cells(rows: Iterable[Row], *names: str, value: Callable[[Row], float] = accuracy) -> dict[tuple, list[float]]:
    grouped: dict[tuple, list[float]] = defaultdict(list)
    for row in rows:
        grouped[tuple(row[name] for name in names)].append(value(row))
    return dict(grouped)


def validation_means(rows: Iterable[Row]) -> dict[Place, float]:
    """Mean validation accuracy over the fits of each (layer, timestep): what everything is chosen by."""
    cells = _cells(rows, "layer", "timestep", value=lambda row: row["validation_accuracy"])
    return {(layer, timestep): statistics.mean(values) for (layer, timestep), values in cells.items()}


def _chosen(cells: Sequence[Place], validation: Mapping[Place, float]) -> Place:
    """Of the cells the best one on validation images."""
    return max(cells, key=lambda cell: validation.get(cell, -1.0))


def accuracy_map(rows: Sequence[Row], *, title: str = "", chosen: tuple[str, int] | None = None) -> "Figure":
    """Accuracy of layers (rows) by timesteps (columns), as colour and number; the mean over all given fits of a cell.

    Args:
        rows: fits of one model, prompt, head and label.
        title: above the map.
        chosen: a layer and timestep to outline: the one chosen on validation images.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    layers, timesteps = ordered(row["layer"] for row in rows), sorted({row["timestep"] for row in rows})
    cells = _cells(rows, "layer", "timestep")
    table = [[statistics.mean(cells.get((layer, t), [math.nan])) for t in timesteps] for layer in layers]
    return heat_map(table, layers, timesteps, title=title, chosen=chosen, label="accuracy")


def _curves(rows: Sequence[Row], series: Callable[[Row], str], names: Sequence[str]) -> dict[str, Curve]:
    """Accuracy in percent against the timestep with 95 % intervals over the fits, a line a series."""
    drawn = {}
    for name in names:
        cells = _cells((row for row in rows if series(row) == name), "timestep")
        timesteps = sorted(t for (t,) in cells)
        values = [mean_and_interval(cells[t,]) for t in timesteps]
        low, high = [100 * (v - half) for v, half in values], [100 * (v + half) for v, half in values]
        drawn[name] = Curve(timesteps, [100 * value for value, _ in values], low, high)
    return drawn


def layer_curves(
    rows: Sequence[Row], *, title: str = "", levels: dict[str, float] | None = None, most: int = 6
) -> "Figure":
    """Accuracy of the layers against the timestep with 95 % intervals over the fits; the best layers, in forward order.

    Where layers are left out, the label of the timesteps says how many of them are drawn.

    Args:
        rows: fits of one model, prompt, head and label.
        title: above the curves.
        levels: horizontal lines, such as baselines, by name.
        most: layers that are drawn; of more, those whose best cell is best on validation images.
    """
    best: dict[str, float] = {}
    for (layer, _), value in validation_means(rows).items():
        best[layer] = max(best.get(layer, 0.0), value)
    kept = set(sorted(best, key=lambda layer: -best[layer])[:most])
    layers = [layer for layer in best if layer in kept]
    percents = {name: 100 * value for name, value in (levels or {}).items()}
    left_out = f" (of {len(best)} layers the best {most} on validation images)" if len(best) > most else ""
    axes = AXES | {"x_label": AXES["x_label"] + left_out}
    return curves(_curves(rows, lambda row: row["layer"], layers), title=title, levels=percents, **axes)


def _best_layer_each(rows: Sequence[Row], *names: str) -> list[Row]:
    """For each value of `names`, the fits of the layer whose best mean validation accuracy is highest."""
    kept = []
    for key in ordered(tuple(row[name] for name in names) for row in rows):
        own = [row for row in rows if tuple(row[name] for name in names) == key]
        validation = validation_means(own)
        layer, _ = _chosen(list(validation), validation)
        kept += [row for row in own if row["layer"] == layer]
    return kept


@styled
def prompt_comparison(rows: Sequence[Row], *, title: str = "") -> "Figure":
    """Accuracy of each prompt against the timestep, at the layer that is best for that prompt, a panel a model.

    Args:
        rows: fits of one head and label with several prompts.
        title: above the panels.
    """
    models, prompts = ordered(row["model"] for row in rows), ordered(row["prompt"] for row in rows)
    figure = new_figure(4.2)
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    chosen = _best_layer_each(rows, "model", "prompt")
    handles: dict[str, Any] = {}
    for axes, model in zip(panels, models, strict=True):
        own = pick(chosen, model=model)
        named = _curves(own, lambda row: row["prompt"], [p for p in prompts if pick(own, prompt=p)])
        # a prompt looks the same in every panel, also where a panel has not all of them
        handles |= draw_curves(axes, named, x_scale="even", numbers={p: prompts.index(p) for p in named})
        axes.set_title(shortened(f"{title}{model}", (WIDTH - 0.8) / len(models) - 0.2, TITLE))
        axes.set_xlabel("timestep")
    panels[0].set_ylabel("accuracy (%)")
    legend_below(figure, handles)
    return figure


def architecture_comparison(rows: Sequence[Row], *, title: str = "") -> "Figure":
    """Accuracy of each model, trained and with random weights, against the timestep, at the layer best for it.

    Args:
        rows: fits of one prompt, head and label, of several models or weights.
        title: above the curves.
    """

    def name(row: Row) -> str:
        return row["model"] if row["weights"] == "trained" else f"{row['model']}, random"

    chosen = _best_layer_each(rows, "model", "weights")
    return curves(_curves(chosen, name, ordered(map(name, chosen))), title=title, **AXES)


def relative_accuracy(rows: Sequence[Row], base_rate: float | None = None) -> dict[Place, tuple[float, float]]:
    """(accuracy − base rate) / (best accuracy − base rate) of each cell: what a label loses away from its best place.

    The best cell is the one chosen on validation images, so that another may exceed 1.

    Args:
        rows: fits of one model, prompt, head and label.
        base_rate: the accuracy of one who does not look at the image; default 1 / classes, which is too low for
            classes of unequal size.

    Returns:
        Of each (layer, timestep) the mean over the fits and half of its 95 % interval, best and base rate taken as
        fixed; NaN if the best cell is not above the base rate.
    """
    cells = {
        (layer, timestep): mean_and_interval(values)
        for (layer, timestep), values in _cells(rows, "layer", "timestep").items()
    }
    validation = validation_means(rows)
    base = 1 / rows[0]["num_labels"] if base_rate is None else base_rate
    span = cells[_chosen(list(validation), validation)][0] - base
    if span <= 0:
        return dict.fromkeys(cells, (math.nan, math.nan))
    return {key: ((value - base) / span, half / span) for key, (value, half) in cells.items()}


def _share_curve(x: Sequence[float], chosen: Sequence[Place], share: Mapping[Place, tuple[float, float]]) -> Curve:
    shares = [share.get(cell, (math.nan, math.nan)) for cell in chosen]
    low, high = [100 * (v - half) for v, half in shares], [100 * (v + half) for v, half in shares]
    return Curve(x, [100 * value for value, _ in shares], low, high)


@styled
def granularity_profile(
    rows: Sequence[Row], *, title: str = "", base_rates: Mapping[str, float] | None = None
) -> "Figure":
    """Coarse against fine labels by layer and by timestep, each relative to its own best cell and base rate.

    Left: the best timestep of each layer. Right: the best layer of each timestep. Both are chosen on validation images,
    as is the best cell; test accuracies are drawn, with 95 % intervals over the fits. Where the coarse label keeps more
    of its best than the fine one, only coarse semantics is left. The legend says each label's base rate.

    Args:
        rows: fits of one model, prompt and head with several labels.
        title: above the panels.
        base_rates: of labels, the test accuracy of a probe fitted on shuffled labels; 1 / classes for those without.
    """
    labels = sorted(ordered(row["label"] for row in rows), key=lambda name: pick(rows, label=name)[0]["num_labels"])
    layers, timesteps = ordered(row["layer"] for row in rows), sorted({row["timestep"] for row in rows})
    figure = new_figure(4.4)
    left, right = figure.subplots(1, 2, sharey=True)
    by_layer, by_timestep = {}, {}
    for label in labels:
        own = pick(rows, label=label)
        classes, base_rate = own[0]["num_labels"], (base_rates or {}).get(label)
        share, validation = relative_accuracy(own, base_rate), validation_means(own)
        base = f"1/classes: {100 / classes:.1f} %" if base_rate is None else f"shuffled: {100 * base_rate:.1f} %"
        name = f"{label} ({classes} classes, {base})"
        chosen = [_chosen([(x, t) for t in timesteps], validation) for x in layers]
        by_layer[name] = _share_curve(range(len(layers)), chosen, share)
        chosen = [_chosen([(x, t) for x in layers], validation) for t in timesteps]
        by_timestep[name] = _share_curve(timesteps, chosen, share)
    legend_below(figure, draw_curves(left, by_layer))
    draw_curves(right, by_timestep, x_scale="even")
    left.set_xticks(range(len(layers)), [shortened(x, 1.5, end=True) for x in layers], rotation=40, ha="right")
    left.set_title(shortened(f"{title}by layer, best timestep", WIDTH / 2 - 0.8, TITLE))
    left.set_ylabel("share of the label's best (%)")
    right.set(title="by timestep, best layer", xlabel="timestep")
    return figure
