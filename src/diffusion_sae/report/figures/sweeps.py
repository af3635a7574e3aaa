"""Figures of a sweep, drawn from its table of results alone. matplotlib is imported when one is drawn."""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..._optional import missing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
WIDTH, DPI = 9.0, 200  # inches: text of 9 points is 12 pixels high where the figure is 900 pixels wide
SMALL = 8.5
# Okabe & Ito; no two series differ by colour alone
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "X", "v", "P")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))


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


def _cells(rows: Iterable[Row], *names: str) -> dict[tuple, list[float]]:
    grouped: dict[tuple, list[float]] = defaultdict(list)
    for row in rows:
        grouped[tuple(row[name] for name in names)].append(accuracy(row))
    return dict(grouped)


def _figure(height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing("matplotlib", "plots", "A figure") from error
    return Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white", layout="constrained")


def _short(layer: str) -> str:
    """Long module paths by their end."""
    return layer if len(layer) <= 22 else "…" + layer[-21:]


def _plain(axes: "Axes", title: str, x: str = "", y: str = "") -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=SMALL)
    axes.spines[["top", "right"]].set_visible(False)


def heat_map(rows: Sequence[Row], *, title: str = "", chosen: tuple[str, int] | None = None) -> "Figure":
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
    figure = _figure(1.4 + 0.36 * len(layers))
    axes = figure.subplots()
    table = [[statistics.mean(cells.get((layer, t), [math.nan])) for t in timesteps] for layer in layers]
    image = axes.imshow(table, cmap="cividis", aspect="auto")
    low, high = image.get_clim()
    for i, line in enumerate(table):
        for j, value in enumerate(line):
            if not math.isnan(value):
                dark = value < low + 0.55 * (high - low)
                text = f"{100 * value:.1f}"
                axes.text(j, i, text, ha="center", va="center", fontsize=SMALL, color="white" if dark else "black")
    if chosen is not None and chosen[0] in layers and chosen[1] in timesteps:
        from matplotlib.patches import Rectangle

        corner = (timesteps.index(chosen[1]) - 0.48, layers.index(chosen[0]) - 0.46)
        axes.add_patch(Rectangle(corner, 0.96, 0.92, fill=False, edgecolor="#D55E00", linewidth=2.4))
    axes.set_xticks(range(len(timesteps)), [str(t) for t in timesteps])
    axes.set_yticks(range(len(layers)), [_short(layer) for layer in layers])
    _plain(axes, title, "timestep")
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, pad=0.015)
    bar.ax.tick_params(labelsize=SMALL)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    bar.outline.set_visible(False)
    return figure


def _curves(axes: "Axes", rows: Sequence[Row], series: Callable[[Row], str], names: Sequence[str]) -> None:
    """Accuracy against the timestep with 95 % intervals over the fits, a line a series."""
    timesteps = sorted({row["timestep"] for row in rows})
    for number, name in enumerate(names):
        own = [row for row in rows if series(row) == name]
        cells = _cells(own, "timestep")
        known = [t for t in timesteps if (t,) in cells]
        values = [mean_and_interval(cells[t,]) for t in known]
        style = number % len(COLOURS)
        x, y = [timesteps.index(t) for t in known], [100 * value for value, _ in values]
        half = [100 * interval for _, interval in values]
        axes.plot(
            x,
            y,
            color=COLOURS[style],
            marker=MARKERS[style],
            linestyle=LINES[style],
            markersize=4.5,
            label=_short(name),
        )
        low, high = [v - h for v, h in zip(y, half, strict=True)], [v + h for v, h in zip(y, half, strict=True)]
        axes.fill_between(x, low, high, color=COLOURS[style], alpha=0.15, linewidth=0)
    axes.set_xticks(range(len(timesteps)), [str(t) for t in timesteps])
    axes.grid(axis="y", alpha=0.3, linewidth=0.6)


def _legend(figure: "Figure", axes: "Axes", names: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(names, 5), fontsize=SMALL, frameon=False)


def layer_curves(
    rows: Sequence[Row], *, title: str = "", levels: dict[str, float] | None = None, most: int = 6
) -> "Figure":
    """Accuracy of the layers against the timestep with 95 % intervals over the fits; the best layers, in forward order.

    Args:
        rows: fits of one model, prompt, head and label.
        title: above the curves.
        levels: horizontal lines, such as baselines, by name.
        most: layers that are drawn; of more, those whose best cell is best.
    """
    best: dict[str, float] = {}
    for (layer, _), values in _cells(rows, "layer", "timestep").items():
        best[layer] = max(best.get(layer, 0.0), statistics.mean(values))
    kept = set(sorted(best, key=lambda layer: -best[layer])[:most])
    layers = [layer for layer in best if layer in kept]
    figure = _figure(4.6)
    axes = figure.subplots()
    _curves(axes, rows, lambda row: row["layer"], layers)
    for number, (name, value) in enumerate((levels or {}).items()):
        axes.axhline(100 * value, color="#555555", linestyle=LINES[number % 4], linewidth=1.2, label=name)
    _plain(axes, title, "timestep", "accuracy (%)")
    _legend(figure, axes, len(layers) + len(levels or {}))
    return figure


def _best_layer_each(rows: Sequence[Row], *names: str) -> list[Row]:
    """For each value of `names`, the fits of the layer whose best mean validation accuracy is highest."""
    kept = []
    for key in ordered(tuple(row[name] for name in names) for row in rows):
        own = [row for row in rows if tuple(row[name] for name in names) == key]
        validation: dict[tuple, list[float]] = defaultdict(list)
        for row in own:
            validation[row["layer"], row["timestep"]].append(row["validation_accuracy"])
        layer, _ = max(validation, key=lambda cell: statistics.mean(validation[cell]))
        kept += [row for row in own if row["layer"] == layer]
    return kept


def prompt_comparison(rows: Sequence[Row], *, title: str = "") -> "Figure":
    """Accuracy of each prompt against the timestep, at the layer that is best for that prompt, a panel a model.

    Args:
        rows: fits of one head and label with several prompts.
        title: above the panels.
    """
    models, prompts = ordered(row["model"] for row in rows), ordered(row["prompt"] for row in rows)
    figure = _figure(4.2)
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    chosen = _best_layer_each(rows, "model", "prompt")
    for axes, model in zip(panels, models, strict=True):
        own = pick(chosen, model=model)
        _curves(axes, own, lambda row: row["prompt"], [p for p in prompts if pick(own, prompt=p)])
        _plain(axes, f"{title}{model}", "timestep", "accuracy (%)" if axes is panels[0] else "")
    _legend(figure, panels[0], len(prompts))
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
    names = ordered(map(name, chosen))
    figure = _figure(4.2)
    axes = figure.subplots()
    _curves(axes, chosen, name, names)
    _plain(axes, title, "timestep", "accuracy (%)")
    _legend(figure, axes, len(names))
    return figure


def relative_accuracy(rows: Sequence[Row]) -> dict[tuple[str, int], float]:
    """(accuracy − chance) / (best accuracy − chance) of each cell: what a label loses away from its best place."""
    cells = {key: statistics.mean(values) for key, values in _cells(rows, "layer", "timestep").items()}
    chance, best = 1 / rows[0]["num_labels"], max(cells.values())
    return {key: (value - chance) / max(best - chance, 1e-9) for key, value in cells.items()}


def granularity_profile(rows: Sequence[Row], *, title: str = "") -> "Figure":
    """Coarse against fine labels by layer and by timestep, each relative to its own best cell and to chance.

    Left: the best timestep of each layer. Right: the best layer of each timestep. Where the coarse label keeps more of
    its best than the fine one, only coarse semantics is left.

    Args:
        rows: fits of one model, prompt and head with several labels.
        title: above the panels.
    """
    labels = sorted(ordered(row["label"] for row in rows), key=lambda name: pick(rows, label=name)[0]["num_labels"])
    layers, timesteps = ordered(row["layer"] for row in rows), sorted({row["timestep"] for row in rows})
    figure = _figure(4.4)
    left, right = figure.subplots(1, 2, sharey=True)
    for number, label in enumerate(labels):
        own = pick(rows, label=label)
        share = relative_accuracy(own)
        style = {"color": COLOURS[number], "marker": MARKERS[number], "linestyle": LINES[number], "markersize": 4.5}
        name = f"{label} ({own[0]['num_labels']} classes)"
        by_layer = [max(share.get((layer, t), math.nan) for t in timesteps) for layer in layers]
        by_timestep = [max(share.get((layer, t), math.nan) for layer in layers) for t in timesteps]
        left.plot([100 * v for v in by_layer], label=name, **style)
        right.plot([100 * v for v in by_timestep], **style)
    left.set_xticks(range(len(layers)), [_short(layer) for layer in layers], rotation=40, ha="right")
    right.set_xticks(range(len(timesteps)), [str(t) for t in timesteps])
    for axes in (left, right):
        axes.grid(axis="y", alpha=0.3, linewidth=0.6)
    _plain(left, f"{title}by layer, best timestep", "", "share of the label's best (%)")
    _plain(right, "by timestep, best layer", "timestep")
    _legend(figure, left, len(labels))
    return figure
