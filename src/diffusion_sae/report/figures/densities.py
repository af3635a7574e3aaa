"""How often the latents of an SAE fire."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from .style import TITLE, WIDTH, legend_below, new_figure, percent, plain_text, series_style, shortened, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS_A_DECADE = 5
HATCHES = ("", "///", "...", "xx", "--", "||", "oo")


@styled
def density_histogram(
    densities: "Mapping[str, Float[np.ndarray, ' num_latents']] | Float[np.ndarray, ' num_latents']",
    *,
    title: str = "",
    of: str = "rows",
) -> "Figure":
    """How many latents fire how often: the histogram of log₁₀ of their densities, and the dead ones beside it.

    Of several SAEs the shares of their latents are drawn, as steps, so that SAEs of other sizes can be compared.

    Args:
        densities: share of rows or images in which each latent is active; a tensor or array, or several by name.
        title: above the histogram.
        of: what it is a share of.

    Raises:
        ValueError: for no latents, and for values outside of 0…1.
        ImportError: if matplotlib is not installed.
    """
    named: dict[str, Any] = dict(densities) if isinstance(densities, Mapping) else {"": densities}
    arrays = {name: np.asarray(values, np.float64).ravel() for name, values in named.items()}
    for name, values in arrays.items():
        if not values.size or not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"Densities{name and ' of ' + repr(name)} must be shares in 0…1 of one latent at least.")
    living = np.concatenate([values[values > 0] for values in arrays.values()])
    lowest = math.floor(math.log10(living.min())) if len(living) else -1
    edges = np.linspace(lowest, 0, -lowest * BINS_A_DECADE + 1) if lowest < 0 else np.linspace(-1, 0, 6)
    figure = new_figure(3.6)
    handles: dict[str, Any] = {}
    dead, axes = figure.subplots(1, 2, sharey=True, width_ratios=(1, 12))
    for number, (name, values) in enumerate(arrays.items()):
        style = series_style(number)
        scale = 1.0 if len(arrays) == 1 else 1 / len(values)
        alive = values[values > 0]
        heights = np.histogram(np.log10(alive), edges)[0] * scale
        no_fire = (values == 0).sum() * scale
        line = {"color": style["color"], "linestyle": style["linestyle"]}
        handles[name] = axes.stairs(heights, edges, fill=len(arrays) == 1, linewidth=1.8, **line)
        if len(alive):
            median = float(np.log10(np.median(alive)))
            axes.axvline(median, color="black" if len(arrays) == 1 else style["color"], linewidth=1.1, linestyle=":")
        width = 0.8 / len(arrays)
        look = {"color": style["color"], "hatch": HATCHES[number % len(HATCHES)], "edgecolor": "white"}
        dead.bar(number * width + width / 2 - 0.4, no_fire, width=0.9 * width, linewidth=0, **look)
    _label(dead, axes, lowest, of, several=len(arrays) > 1)
    shares = [f"{(v == 0).mean():.1%} of {len(v):,} latents are dead" for v in arrays.values()]
    line = title if len(arrays) > 1 else "; ".join(part for part in (title, shares[0]) if part)
    figure.suptitle(shortened(line, WIDTH - 0.4, TITLE), fontsize=TITLE, x=0.01, ha="left")
    legend_below(figure, handles if len(arrays) > 1 else {})
    return figure


def _label(dead: "Axes", axes: "Axes", lowest: int, of: str, *, several: bool) -> None:
    axes.set_xticks(range(lowest, 1), [_power(exponent) for exponent in range(lowest, 1)])
    axes.set_xlabel(plain_text(f"density: share of {of} in which a latent is active; dotted: the median"))
    dead.set_xticks([0], ["dead"])
    dead.set_xlim(-0.6, 0.6)
    dead.set_ylabel("share of the latents" if several else "latents")
    if several:
        dead.yaxis.set_major_formatter(percent)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    for each in (axes, dead):
        each.grid(axis="y", alpha=0.5)


def _power(exponent: int) -> str:
    """A share as percent, which needs no powers of ten down to a thousandth."""
    return f"{100 * 10.0**exponent:g} %"
