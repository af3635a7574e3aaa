"""Heat maps of a value over layers and timesteps."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from .style import (
    EMPHASIS,
    QUIET,
    SCALE,
    SMALL,
    TITLE,
    WIDTH,
    ink_on,
    new_figure,
    percent,
    shortened,
    significant,
    styled,
    text_width,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

Format = Callable[[float], str]
MOST_HEIGHT = 11.0  # inches: a page
ROW = 0.36  # inches of a row, where there is room
NAMES = 2.0  # inches that names of layers may take


def points(share: float) -> str:
    """A share in 0…1 as percent with one digit and no sign, which the title or scale has."""
    return f"{100 * share:.1f}"


@styled
def heat_map(
    values: Float[np.ndarray, "layers timesteps"] | Sequence[Sequence[float]],
    layers: Sequence[str],
    timesteps: Sequence[int | str],
    *,
    title: str = "",
    chosen: tuple[str, int | str] | None = None,
    label: str = "",
    share: bool = True,
) -> "Figure":
    """A value of layers (rows) by timesteps (columns), as colour and, where there is room, as a number.

    Args:
        values: NaN where nothing was measured; these cells are hatched.
        layers: names of the rows, from the first; long ones are shown by their end.
        timesteps: of the columns.
        title: above the map.
        chosen: the layer and timestep of a cell to outline.
        label: what the values are, beside the scale.
        share: the values are shares in 0…1, shown in percent; else they are shown as they are.

    Raises:
        ValueError: if the shape is not that of the names, or there is no cell.
        ImportError: if matplotlib is not installed.
    """
    table = np.asarray(values, np.float64)
    if table.shape != (len(layers), len(timesteps)) or not table.size:
        raise ValueError(
            f"values must be one row a layer and one column a timestep: {len(layers)} layers, {len(timesteps)} "
            f"timesteps, values of the shape {table.shape}."
        )
    row = min(ROW, MOST_HEIGHT / len(layers))
    figure = new_figure(1.4 + row * len(layers))
    axes = figure.subplots()
    image = axes.imshow(np.ma.masked_invalid(table), cmap=SCALE, aspect="auto")
    _hatch(axes, table)
    names = [shortened(layer, NAMES, end=True) for layer in layers]
    _ticks(axes, names, timesteps, row)
    write = points if share else significant
    column = (WIDTH - 1.4 - max(map(text_width, names))) / len(timesteps)
    _write_cells(axes, image, table, write, column, row)
    if chosen is not None:
        _outline(axes, layers, timesteps, chosen)
    axes.set_title(shortened(title, WIDTH - 1.2 - max(map(text_width, names)), TITLE))
    axes.set_xlabel("timestep")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if np.isfinite(table).any():
        bar = figure.colorbar(image, ax=axes, pad=0.015, aspect=max(8.0, 24 * row * len(layers) / 6))
        bar.outline.set_visible(False)  # type: ignore[operator]
        bar.set_label(shortened(label, max(1.0, row * len(layers))))
        if share:
            bar.ax.yaxis.set_major_formatter(percent)
    return figure


def _ticks(axes: "Axes", names: Sequence[str], timesteps: Sequence[int | str], row: float) -> None:
    """Every name that has room; of more, each second, third, ….."""
    widest = max(text_width(str(t)) for t in timesteps) + 0.1
    room = (WIDTH - 1.4 - max(map(text_width, names))) / len(timesteps)
    step = max(1, math.ceil(widest / room))
    axes.set_xticks(range(0, len(timesteps), step), [str(t) for t in timesteps[::step]])
    step = max(1, math.ceil(0.15 / row))
    axes.set_yticks(range(0, len(names), step), names[::step])


def _hatch(axes: "Axes", table: np.ndarray) -> None:
    from matplotlib.patches import Rectangle

    for i, j in np.argwhere(~np.isfinite(table)):
        axes.add_patch(
            Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor="#f2f2f2", edgecolor="#bbbbbb", hatch="////", linewidth=0)
        )


def _write_cells(axes: "Axes", image: "AxesImage", table: np.ndarray, write: Format, column: float, row: float) -> None:
    """The number in each cell, in the ink that is seen on its colour; none where one has no room."""
    texts = {(i, j): write(table[i, j]) for i, j in np.argwhere(np.isfinite(table)).tolist()}
    if not texts or row < 0.17 or column < max(map(text_width, texts.values())) + 0.06:
        return
    for (i, j), text in texts.items():
        ink = ink_on(np.asarray(image.cmap(image.norm(table[i, j]))).tolist())
        axes.text(j, i, text, ha="center", va="center", fontsize=SMALL, color=ink)
    for i, j in np.argwhere(~np.isfinite(table)):
        paper = {"facecolor": "#f2f2f2", "edgecolor": "none", "pad": 1.0}
        axes.text(j, i, "–", ha="center", va="center", fontsize=SMALL, color=QUIET, bbox=paper)


def _outline(
    axes: "Axes", layers: Sequence[str], timesteps: Sequence[int | str], chosen: tuple[str, int | str]
) -> None:
    from matplotlib.patches import Rectangle

    if chosen[0] not in layers or chosen[1] not in timesteps:
        raise ValueError(f"chosen is {chosen!r}; choose a layer of {list(layers)} and a timestep of {list(timesteps)}.")
    corner = (list(timesteps).index(chosen[1]) - 0.48, list(layers).index(chosen[0]) - 0.46)
    for colour, width in (("white", 4.2), (EMPHASIS, 2.4)):  # seen on any colour of the scale, and in grey
        axes.add_patch(Rectangle(corner, 0.96, 0.92, fill=False, edgecolor=colour, linewidth=width))
