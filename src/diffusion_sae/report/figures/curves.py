"""Curves with intervals, and the curves of a training."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._config import check_choice
from ..._files import parse_json, read_json
from .style import LINES, QUIET, TITLE, WIDTH, legend_below, new_figure, plain_text, series_style, shortened, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCALES = ("linear", "log", "even")
MOST_MARKERS = 30


@dataclass(frozen=True)
class Curve:
    """A line, and the interval about it."""

    x: Sequence[float]
    y: Sequence[float]
    """NaN where there is nothing: the line is broken there."""
    low: Sequence[float] | None = None
    """Lower ends of an interval; None for none."""
    high: Sequence[float] | None = None


@styled
def curves(
    series: Mapping[str, Curve],
    *,
    title: str = "",
    x_label: str = "",
    y_label: str = "",
    x_scale: str = "linear",
    y_scale: str = "linear",
    levels: Mapping[str, float] | None = None,
) -> "Figure":
    """Curves by name with bands for their intervals, and levels, such as baselines, as horizontal lines.

    Args:
        series: the curves.
        title: above them.
        x_label, y_label: of the axes, with the units.
        x_scale: `linear`, `log`, or `even`: the values of x stand side by side at even distances, as timesteps may.
        y_scale: `linear` or `log`.
        levels: values of y by name.

    Raises:
        ValueError: for no curve, and for one whose numbers are not as many as its values of x.
        ImportError: if matplotlib is not installed.
    """
    figure = new_figure(4.4)
    axes = figure.subplots()
    handles = draw_curves(axes, series, x_scale=x_scale, levels=levels)
    axes.set_yscale(y_scale)
    axes.set_title(shortened(title, WIDTH - 1.0, TITLE))
    axes.set_xlabel(plain_text(x_label))
    axes.set_ylabel(plain_text(y_label))
    legend_below(figure, handles)
    return figure


def draw_curves(
    axes: "Axes",
    series: Mapping[str, Curve],
    *,
    x_scale: str = "linear",
    levels: Mapping[str, float] | None = None,
    numbers: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The curves of `curves` in an axes that is there already; returns what a legend shows, by name.

    Args:
        axes: where to draw.
        series, x_scale, levels: as in `curves`.
        numbers: which of the styles each curve has; default the first is the first.
    """
    check_choice("x_scale", x_scale, SCALES)
    if not series:
        raise ValueError("There is no curve to draw: series is empty.")
    for name, curve in series.items():
        lengths = {len(part) for part in (curve.x, curve.y, curve.low, curve.high) if part is not None}
        if len(lengths) > 1 or (curve.low is None) != (curve.high is None):
            raise ValueError(f"The curve {name!r} must have as many x as y, and as many low and high or neither.")
    ticks = sorted({x for curve in series.values() for x in curve.x})
    place = {x: number for number, x in enumerate(ticks)} if x_scale == "even" else {x: x for x in ticks}
    handles: dict[str, Any] = {}
    for number, (name, curve) in enumerate(series.items()):
        style = series_style(number if numbers is None else numbers[name])
        x = [place[value] for value in curve.x]
        markers: dict[str, Any] = {} if len(x) <= MOST_MARKERS else {"markevery": math.ceil(len(x) / 12)}
        (handles[name],) = axes.plot(x, curve.y, **style, **markers)
        if curve.low is not None and curve.high is not None:
            axes.fill_between(x, curve.low, curve.high, color=style["color"], alpha=0.15, linewidth=0)
    for number, (name, value) in enumerate((levels or {}).items()):
        style = {"color": QUIET, "linestyle": LINES[number % 4], "linewidth": 1.2}
        handles[name] = axes.axhline(value, **style)
    if x_scale == "even":
        step = math.ceil(len(ticks) / 16)
        axes.set_xticks(range(0, len(ticks), step), [f"{tick:g}" for tick in ticks[::step]])
    else:
        axes.set_xscale(x_scale)
    axes.grid(axis="y", alpha=0.5)
    return handles


History = Sequence[Mapping[str, float]]


@styled
def training_curves(
    histories: Mapping[str, History] | History, *, metrics: Sequence[str] | None = None, title: str = ""
) -> "Figure":
    """What a training logged against its steps, a panel a metric; measured on held-out rows dashed.

    A value `eval_x` is drawn beside `x`. Several trainings are drawn in the same panels.

    Args:
        histories: the log of a training (`SAETrainingResult.history`, or what `read_history` gives), or several by
            name.
        metrics: which; default all that have a number.
        title: above the panels.

    Raises:
        ValueError: if nothing was logged, or not one of `metrics`.
        ImportError: if matplotlib is not installed.
    """
    runs = dict(histories) if isinstance(histories, Mapping) else {"": histories}
    logged = list(dict.fromkeys(key for history in runs.values() for entry in history for key in entry))
    names = list(dict.fromkeys(key.removeprefix("eval_") for key in logged if key not in ("step", "epoch", "stage")))
    unknown = [name for name in metrics or () if name not in names]
    if unknown or not names:
        raise ValueError(f"The log has no {', '.join(unknown) or 'metrics'}. It has: {', '.join(names) or 'nothing'}.")
    names = names if metrics is None else list(metrics)
    columns = 2 if len(names) == 4 else min(3, len(names))
    lines = math.ceil(len(names) / columns)
    figure = new_figure(0.9 + 2.5 * lines)
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    handles: dict[str, Any] = {}
    for axes, name in zip(panels, names, strict=False):
        handles |= _draw_metric(axes, runs, name)
        axes.set_title(plain_text(name.replace("_", " ")))
        axes.set_xlabel("step")
    for axes in panels[len(names) :]:
        axes.remove()
    if title:
        figure.suptitle(
            shortened(title, WIDTH - 0.4, TITLE, weight="bold"), fontsize=TITLE, x=0.01, ha="left", weight="bold"
        )
    legend_below(figure, handles)
    return figure


def _draw_metric(axes: "Axes", runs: Mapping[str, History], metric: str) -> dict[str, Any]:
    values: list[float] = []
    handles: dict[str, Any] = {}
    for number, (run, history) in enumerate(runs.items()):
        colour, marker = series_style(number)["color"], series_style(number)["marker"]
        for key, line, kind in ((metric, "-", "training"), (f"eval_{metric}", "--", "held out")):
            found = [(entry["step"], entry[key]) for entry in history if key in entry]
            if not found:
                continue
            x, y = zip(*found, strict=True)
            few: dict[str, Any] = {"marker": marker, "markevery": max(1, math.ceil(len(x) / 8))}
            name = f"{run}, {kind}" if run else kind
            (handles[name],) = axes.plot(x, y, color=colour, linestyle=line, **few)
            values += y
    positive = [value for value in values if value > 0]
    if len(positive) == len(values) and max(positive) > 30 * min(positive):
        axes.set_yscale("log")
    axes.ticklabel_format(axis="x", style="plain")
    axes.locator_params(axis="x", nbins=4)
    axes.grid(alpha=0.5)
    return handles


def read_history(path: str | Path) -> list[dict[str, Any]]:
    """The log of a training: `training_history.json` of its folder, a JSON file with a list, or a file of JSON lines.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged.
    """
    path = Path(path)
    path = path / "training_history.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"There is no log of a training at {str(path)!r}. Give the output_dir of a training.")
    if path.suffix == ".jsonl":
        return [parse_json(line, f"{path}, line {i}") for i, line in enumerate(path.read_bytes().splitlines(), 1)]
    return read_json(path)
