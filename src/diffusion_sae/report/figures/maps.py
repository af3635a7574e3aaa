"""Figures of maps: a set of images in the plane, and the colours of principal components at layers and timesteps."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from ...analysis.maps import ColourMaps, ImageMap
from ...extraction.images import square
from .style import (
    COLOURS,
    GAP,
    MARGIN,
    MARKERS,
    QUIET,
    SMALL,
    TITLE,
    TITLE_LINE,
    WIDTH,
    blank_sheet,
    legend_below,
    new_figure,
    plain_text,
    shortened,
    show_picture,
    styled,
    text_width,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_CLASSES = 14  # that a legend tells apart


@styled
def image_map_figure(
    found: ImageMap,
    labels: Int[np.ndarray, " images"] | None = None,
    class_names: Sequence[str] | None = None,
    *,
    title: str = "",
) -> "Figure":
    """A point an image; classes differ by marker, filled or open, and their names stand in the legend.

    Of more than 14 classes the names stand at the middles of the largest ones, and colour is left out.

    Args:
        found: what `analysis.maps.image_map` gives.
        labels: the class of each image.
        class_names: what they mean.
        title: above the map.

    Raises:
        ValueError: if there are not as many labels as points.
        ImportError: if matplotlib is not installed.
    """
    points = np.asarray(found.points)
    if labels is not None and len(labels) != len(points):
        raise ValueError(f"There are {len(points)} images in the map and {len(labels)} labels: give one an image.")
    figure = new_figure(6.2)
    axes = figure.subplots()
    handles: dict[str, Any] = {}
    size = float(np.clip(20_000 / len(points), 3, 30))
    classes = np.zeros(0, np.int64) if labels is None else np.unique(np.asarray(labels))
    if 0 < len(classes) <= MOST_CLASSES and labels is not None:
        for number, one in enumerate(classes):
            own = points[np.asarray(labels) == one]
            turn, place = divmod(number, len(MARKERS))
            filled = COLOURS[place] if turn == 0 else "none"
            name = str(one) if class_names is None else class_names[int(one)]
            look = {"facecolors": filled, "edgecolors": COLOURS[place], "marker": MARKERS[place], "alpha": 0.7}
            handles[name] = axes.scatter(*own.T, s=size, linewidths=0.8, **look)
        legend_below(figure, handles, most=7)
    else:
        axes.scatter(*points.T, s=size, color="#0072B2", alpha=0.5, linewidths=0)
        if labels is not None:
            _name_classes(axes, points, np.asarray(labels), class_names)
    axes.set_title(shortened(title, WIDTH - 1.0, TITLE))
    if found.settings.get("method") == "pca":
        first, second = (100 * share for share in (*found.settings["explained"], 0.0)[:2])
        axes.set(xlabel=f"first component ({first:.0f} % of the variance)", ylabel=f"second ({second:.0f} %)")
    else:
        axes.set(xticks=[], yticks=[])  # of neighbours alone; its units mean nothing
        axes.spines[:].set_visible(False)
    return figure


def _name_classes(
    axes: "Axes", points: np.ndarray, labels: np.ndarray, class_names: Sequence[str] | None, most: int = 40
) -> None:
    """Names at the medians of the largest classes, as many as have room."""
    figure = axes.get_figure()
    assert figure is not None  # it was made from one
    span = np.ptp(points, axis=0) + 1e-12
    inches = np.array([WIDTH - 0.8, 5.4])
    taken: list[tuple[float, float, float, float]] = []
    values, counts = np.unique(labels, return_counts=True)
    for one in values[np.argsort(-counts, kind="stable")][:most]:
        middle = np.median(points[labels == one], axis=0)
        text = shortened(str(one) if class_names is None else class_names[int(one)], 1.3)
        x, y = (middle - points.min(0)) / span * inches
        half = text_width(text) / 2 + 0.06
        box = (x - half, x + half, y - 0.1, y + 0.1)
        if any(box[0] < b[1] and b[0] < box[1] and box[2] < b[3] and b[2] < box[3] for b in taken):
            continue
        taken.append(box)
        paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.0}
        axes.text(middle[0], middle[1], text, ha="center", va="center", fontsize=SMALL, bbox=paper)


@styled
def colour_map_figure(
    maps: Mapping[tuple[str, int], ColourMaps],
    pictures: Sequence[Image.Image],
    *,
    title: str = "",
    image: int | None = None,
) -> "Figure":
    """Images (rows) at each layer and timestep (columns), in the colours of three principal components.

    With `image` one image alone, layers (rows) by timesteps (columns).

    Args:
        maps: what `analysis.maps.colour_maps` gives.
        pictures: the images that were coloured, in their order.
        title: above the maps.
        image: the place of one of them.

    Raises:
        ValueError: if there are not as many pictures as images in the maps, or no such image.
        ImportError: if matplotlib is not installed.
    """
    count = {len(own.rgb) for own in maps.values()}
    if count != {len(pictures)} or (image is not None and not 0 <= image < len(pictures)):
        raise ValueError(f"The maps are of {sorted(count)} images; got {len(pictures)} pictures and image={image}.")
    if image is not None:
        return _one_image(maps, pictures[image], image, title)
    columns = [("image", "")] + [(layer, f"t = {t}") for layer, t in maps]
    grid = [[_pixels(picture), *(own.rgb[row] for own in maps.values())] for row, picture in enumerate(pictures)]
    return _mosaic(grid, columns, [""] * len(pictures), title)


def _one_image(maps: Mapping[tuple[str, int], ColourMaps], picture: Image.Image, image: int, title: str) -> "Figure":
    layers, timesteps = list(dict.fromkeys(layer for layer, _ in maps)), list(dict.fromkeys(t for _, t in maps))
    empty = np.zeros((0, 0, 3))
    grid = [
        [_pixels(picture) if row == 0 else empty]
        + [maps[layer, t].rgb[image] if (layer, t) in maps else empty for t in timesteps]
        for row, layer in enumerate(layers)
    ]
    return _mosaic(grid, [("image", "")] + [(f"t = {t}", "") for t in timesteps], [str(name) for name in layers], title)


def _pixels(picture: Image.Image) -> Float[np.ndarray, "h w 3"]:
    return np.asarray(square(picture), np.float64) / 255


HEADER = 0.17  # inches of a line of text


def _mosaic(
    grid: Sequence[Sequence[np.ndarray]], columns: Sequence[tuple[str, str]], rows: Sequence[str], title: str
) -> "Figure":
    names = min(1.4, max((text_width(plain_text(row)) + 0.12 if row else 0 for row in rows), default=0))
    size = min(1.4, (WIDTH - 2 * MARGIN - names) / len(columns) - GAP)
    lines = 2 if any(second for _, second in columns) else 1
    above = MARGIN + (TITLE_LINE if title else 0) + HEADER * lines
    width = 2 * MARGIN + names + len(columns) * (size + GAP)
    height = above + len(grid) * (size + GAP) + MARGIN
    figure, axes = blank_sheet(width, height, title)
    for place, heading in enumerate(columns):
        for line, text in enumerate(part for part in heading if part):
            left = MARGIN + names + place * (size + GAP) + size / 2
            top = above - HEADER * (sum(map(bool, heading)) - line)
            short = shortened(text, size, end=True)
            axes.text(left, top, short, ha="center", va="top", fontsize=SMALL, color="black" if line == 0 else QUIET)
    for line, (row, name) in enumerate(zip(grid, rows, strict=True)):
        top = above + line * (size + GAP)
        if name:
            axes.text(MARGIN, top + size / 2, shortened(name, names - 0.08, end=True), va="center", fontsize=SMALL)
        for place, pixels in enumerate(row):
            if pixels.size:
                show_picture(axes, pixels, MARGIN + names + place * (size + GAP), top, size)
    return figure
