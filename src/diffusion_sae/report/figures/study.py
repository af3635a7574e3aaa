"""The figure of the study of k and expansion, drawn from its committed results alone."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .style import SMALL, new_figure, percent, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEIGHT = 6.6


class Series(NamedTuple):
    """How a method is drawn; colours are of Okabe & Ito, and no two series differ by colour alone."""

    label: str
    colour: str
    marker: str
    pursuit: bool = False
    """Coded by matching pursuit: dashed, with open markers."""


SAE_STUDY = {
    ("k-sae", "trained"): Series("k-SAE", "#0072B2", "o"),
    ("k-sae", "random-weights"): Series("k-SAE, untrained backbone", "#E69F00", "X"),
    ("k-means", "trained"): Series("k-means, top k", "#D55E00", "s"),
    ("random", "trained"): Series("random, top k", "#009E73", "^"),
    ("pca", "trained"): Series("PCA, k components", "#000000", "P"),
    ("k-sae-pursuit", "trained"): Series("k-SAE decoder, pursuit", "#0072B2", "o", True),
    ("k-means-pursuit", "trained"): Series("k-means, pursuit", "#D55E00", "s", True),
    ("random-pursuit", "trained"): Series("random, pursuit", "#009E73", "^", True),
    ("nmf-pursuit", "trained"): Series("NMF, pursuit", "#CC79A7", "D", True),
}
CONTROLS = {"features": ("features themselves", "-."), "pixels": ("raw pixels", ":")}  # of the probe; no k, no size
FLOOR = 1e-3  # the least FVU that is shown
TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


@styled
def sae_study_figure(result: Mapping[str, Any]) -> "Figure":
    """FVU, dead latents and probe accuracy (columns) against k and against the expansion (rows).

    Args:
        result: what `examples/sae_study.py` writes; its `summary`, `settings` and `controls` are drawn.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    settings = result["settings"]
    figure = new_figure(HEIGHT, layout=None)
    axes = figure.subplots(2, 3, gridspec_kw={"hspace": 0.32, "wspace": 0.34})
    figure.subplots_adjust(left=0.07, right=0.985, top=0.95, bottom=0.185)
    handles: dict[str, Any] = {}
    for (method, backbone), series in SAE_STUDY.items():
        lines = [e for e in result["summary"] if (e["method"], e["backbone"]) == (method, backbone)]
        of_k, of_expansion = _against_k(lines, settings), _against_expansion(lines, settings)
        for row, points in enumerate((of_k, of_expansion)):
            for column, metric in enumerate(("fvu", "dead_latents", "accuracy, mean")):
                drawn = _draw(axes[row, column], points, metric, series)
                if drawn is not None:
                    handles.setdefault(series.label, drawn)
    for row, ticks in enumerate((settings["ks"], settings["expansions"])):
        _label_row(axes[row], row, ticks, settings)
        for name, (label, style) in CONTROLS.items():
            value = result["controls"][name]["test"]
            handles[label] = axes[row, 2].axhline(value, color="#444444", linewidth=1.2, linestyle=style, zorder=2)
    figure.legend(
        handles.values(), handles.keys(), loc="lower center", ncols=4, fontsize=SMALL, frameon=False,
        bbox_to_anchor=(0.5, 0.0), handlelength=3.0, columnspacing=1.6,
    )  # fmt: skip
    return figure


Point = tuple[float, Mapping[str, Any]]


def _against_k(lines: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[Point]:
    """Of methods with one size only, which PCA and NMF are, that size."""
    sizes = {line["expansion"] for line in lines}
    size = settings["expansion"] if len(sizes) > 1 else next(iter(sizes), None)
    return sorted((line["k"], line) for line in lines if line["expansion"] == size)


def _against_expansion(lines: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[Point]:
    """PCA has none: its one value is a level over all of them."""
    points = [(line["expansion"], line) for line in lines if line["k"] == settings["k"]]
    if points and points[0][0] is None:
        line = points[0][1]
        return [(min(settings["expansions"]), line), (max(settings["expansions"]), line)]
    return sorted(points, key=lambda point: point[0])


def _draw(axis: "Axes", points: Sequence[Point], metric: str, series: Series) -> Any:
    points = [(x, line) for x, line in points if metric in line]
    if metric == "dead_latents" and series.marker == "P":  # PCA has no latents that could be dead
        return None
    if not points:
        return None
    values = [line[metric]["mean"] for _, line in points]
    deviations = [line[metric]["std"] or 0.0 for _, line in points]
    return axis.errorbar(
        [x for x, _ in points],
        values,
        yerr=deviations if any(deviations) else None,
        color=series.colour,
        marker=series.marker,
        markersize=5.5,
        markerfacecolor="white" if series.pursuit else series.colour,
        linestyle=(0, (3.5, 1.8)) if series.pursuit else "-",
        linewidth=1.5,
        capsize=2.5,
        zorder=4 if series.label == "k-SAE" else 3,
    )


def _label_row(axes: Sequence["Axes"], row: int, ticks: Sequence[int], settings: Mapping[str, Any]) -> None:
    fixed = f"expansion {settings['expansion']}" if row == 0 else f"k = {settings['k']}"
    names = ("FVU", "dead latents", "probe accuracy")
    for axis, name in zip(axes, names, strict=True):
        axis.set_title(f"{name}, {fixed}", fontsize=10, loc="left")
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.set_xlabel("k" if row == 0 else "expansion", fontsize=9.5, labelpad=2)
        axis.tick_params(labelsize=9)
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    _logarithmic(axes[0])
    axes[1].set_ylim(-0.03, 1.03)
    axes[1].yaxis.set_major_formatter(percent)
    axes[2].yaxis.set_major_formatter(percent)
    if row == 0 and min(ticks) < settings["d_in"] < max(ticks):
        axes[0].axvline(settings["d_in"], color="#888888", linewidth=0.9, linestyle=":", zorder=1)
        axes[0].annotate(
            f"d_in = {settings['d_in']}", (settings["d_in"], 0.98), xycoords=("data", "axes fraction"),
            xytext=(-4, 0), textcoords="offset points", fontsize=SMALL, ha="right", va="top", color="#555555",
        )  # fmt: skip


def _logarithmic(axis: "Axes") -> None:
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.set_ylim(max(low, FLOOR), high)
    shown = [tick for tick in TICKS if axis.get_ylim()[0] <= tick <= high]
    axis.set_yticks(shown, [f"{tick:g}" for tick in shown])
    axis.minorticks_off()
