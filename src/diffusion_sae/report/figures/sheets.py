"""Sheets of top images: a latent a block, its images side by side, and below each where on it the latent fires."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageFilter

from ...analysis.latents import LatentStatistics, label_purity, latent_statistics, purest_latents
from ...analysis.spatial import activation_maps
from ...extraction.images import square, to_pictures
from ...extraction.sources import ImageSource
from ...features import FeatureSet
from ...sae.modeling import KSparseAutoencoder
from .style import (
    GAP,
    MARGIN,
    QUIET,
    SMALL,
    TEXT,
    TITLE_LINE,
    WIDTH,
    blank_sheet,
    plain_text,
    shortened,
    show_picture,
    significant,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEAT = (213, 94, 0)  # Okabe & Ito's vermilion: seen on white, on black and, as a grey between, in print
NAMES = 1.75  # inches of the column of names
PIXELS = 160  # the side of an overlay


@dataclass(frozen=True)
class LatentRow:
    """A latent and its images, as a sheet shows them."""

    title: str
    images: Sequence[Image.Image]
    """Strongest first."""
    notes: Sequence[str] = ()
    """Lines below the title."""
    acts: Sequence[float] = ()
    """Activation on each image, written above it; none where empty."""
    maps: Float[np.ndarray, "n h w"] | None = None
    """Activations over the positions of each image."""


def heat_overlay(
    image: Image.Image, activation: Float[np.ndarray, "h w"], peak: float | None = None, side: int = PIXELS
) -> np.ndarray:
    """An image in grey, with colour where a latent fires: uint8 (side, side, 3).

    A grid is enlarged linearly between the middles of its positions; colour covers the image the more the stronger the
    activation is, and at `peak` leaves a tenth of it. A line goes round where it is at least half of `peak`: in grey
    the colour is a middle grey.

    Args:
        image: the image; cut to the middle square if it is none.
        activation: over the positions, ≥ 0.
        peak: what is drawn strongest; default the largest activation of this image.
        side: pixels of the result.

    Raises:
        ValueError: for activations that are no finite grid.
    """
    grid = np.asarray(activation, np.float32)
    if grid.ndim != 2 or not np.isfinite(grid).all():
        raise ValueError(f"activation must be a finite grid (h, w), got the shape {grid.shape}. Leave out NaN.")
    peak = float(grid.max()) if peak is None else peak
    share = np.clip(grid / peak, 0, 1) if peak > 0 else np.zeros_like(grid)
    share = np.asarray(Image.fromarray(share).resize((side, side), Image.Resampling.BILINEAR))
    strength = 0.9 * share[..., None]
    grey = np.asarray(square(image).convert("L").resize((side, side), _enlarging(image)), np.float32)[..., None]
    coloured = np.rint(grey * (1 - strength) + np.array(HEAT, np.float32) * strength).astype(np.uint8)
    return _outlined(coloured, share >= 0.5)


def _outlined(picture: np.ndarray, region: np.ndarray) -> np.ndarray:
    """A white line within the edge of a region and a black one outside of it, of which one is seen on any picture."""
    mask = Image.fromarray(region)
    inner = region & ~np.asarray(mask.convert("L").filter(ImageFilter.MinFilter(3)), bool)
    outer = ~region & np.asarray(mask.convert("L").filter(ImageFilter.MaxFilter(3)), bool)
    return np.where(inner[..., None], np.uint8(255), np.where(outer[..., None], np.uint8(0), picture))


def _enlarging(image: Image.Image) -> Image.Resampling:
    """Small pictures are enlarged pixel by pixel, so that it is seen how small they are."""
    return Image.Resampling.NEAREST if min(image.size) <= 64 else Image.Resampling.BICUBIC


@styled
def top_image_sheet(rows: Sequence[LatentRow], *, title: str = "", columns: int = 8) -> "Figure":
    """A block a latent: its name and notes, its top images, and below these the same with colour where it fires.

    Colour is relative to the latent's strongest position on the images shown, so that images can be compared within a
    block, not between blocks.

    Args:
        rows: the latents.
        title: above the sheet.
        columns: images a latent at the most.

    Raises:
        ValueError: without rows, or without images in all of them.
        ImportError: if matplotlib is not installed.
    """
    columns = min(columns, max((len(row.images) for row in rows), default=0))
    if columns < 1:
        raise ValueError("A sheet needs at least one latent with an image.")
    size = min((WIDTH - 2 * MARGIN - NAMES) / columns - GAP, 1.5)
    heights = [_block_height(row, size) for row in rows]
    top = MARGIN + (TITLE_LINE if title else 0)
    height = top + sum(heights) + GAP * 3 * (len(rows) - 1) + MARGIN
    width = 2 * MARGIN + NAMES + columns * (size + GAP)
    figure, axes = blank_sheet(width, height, title)
    for row, block in zip(rows, heights, strict=True):
        _draw_row(axes, row, top, size, columns)
        top += block + GAP * 3
        if row is not rows[-1]:
            axes.axhline(top - GAP * 1.5, color="#dddddd", linewidth=0.8)
    return figure


ACT_LINE = 0.16  # inches of the line with an activation


def _block_height(row: LatentRow, size: float) -> float:
    lines = 0.22 + 0.16 * len(row.notes)
    return max(lines, size + (ACT_LINE if len(row.acts) else 0) + (0 if row.maps is None else size + GAP))


def _draw_row(axes: "Axes", row: LatentRow, top: float, size: float, columns: int) -> None:
    axes.text(
        MARGIN, top, shortened(row.title, NAMES - 0.15, TEXT, weight="bold"), va="top", fontsize=TEXT, weight="bold"
    )
    for line, note in enumerate(row.notes):
        axes.text(MARGIN, top + 0.2 + 0.16 * line, shortened(note, NAMES - 0.15), va="top", fontsize=SMALL, color=QUIET)
    below = top + (ACT_LINE if len(row.acts) else 0)
    peak = 0.0 if row.maps is None else float(np.max(row.maps[:columns]))
    for column, image in enumerate(row.images[:columns]):
        left = MARGIN + NAMES + column * (size + GAP)
        if len(row.acts):
            text = plain_text(significant(row.acts[column]))
            axes.text(left + size / 2, top - 0.02, text, ha="center", va="top", fontsize=SMALL, color=QUIET)
        show_picture(axes, np.asarray(square(image)), left, below, size)
        if row.maps is not None:
            show_picture(axes, heat_overlay(image, row.maps[column], peak), left, below + size + GAP, size)


def firing_sheet(
    sae: KSparseAutoencoder,
    features: FeatureSet,
    source: ImageSource,
    *,
    latents: Sequence[int] | None = None,
    count: int = 8,
    columns: int = 8,
    names: Mapping[int, str] | None = None,
    title: str = "",
    statistics: LatentStatistics | None = None,
) -> "Figure":
    """The sheet of an SAE's most interpretable latents: their top images, and where on each they fire.

    With labels these are the purest ones, in turns over the labels; without, the strongest of those that fire on at
    least `columns` images. Where features are of a square grid of positions, each image also shows where it fires.

    Args:
        sae: the autoencoder.
        features: of the images, from the SAE's extraction; tokens, or pooled, which have no overlay.
        source: the images themselves.
        latents: these, instead of the most interpretable.
        count: latents that are chosen.
        columns: images a latent.
        names: titles of latents, by index; others are titled by their number.
        title: above the sheet.
        statistics: `latent_statistics(sae, features, columns)`, if it is known already.

    Raises:
        ValueError: if the images are not those of the features, or no latent fires on enough of them.
        ImportError: if matplotlib is not installed.
    """
    if len(source) != features.num_images:
        raise ValueError(
            f"The features are of {features.num_images} images, the source has {len(source)}: give those they were "
            "made of."
        )
    columns = min(columns, features.num_images)
    statistics = latent_statistics(sae, features, columns) if statistics is None else statistics
    chosen = _most_interpretable(statistics, features, count) if latents is None else list(latents)
    if not chosen:
        raise ValueError(f"No latent fires on {columns} of the {features.num_images} images. Ask for fewer columns.")
    index = torch.as_tensor(chosen)
    images = statistics.top_images[index, :columns]
    maps = activation_maps(sae, features, index, images).numpy() if features.positions_per_image > 1 else None
    crop = "center" if features.provenance is None else features.provenance.crop
    rows = []
    for place, latent in enumerate(chosen):
        firing = statistics.top_acts[latent, :columns] > 0
        shown = images[place, firing]
        rows.append(
            LatentRow(
                title=(names or {}).get(latent, f"latent {latent}"),
                images=[_picture(source, int(i), crop) for i in shown],
                notes=_notes(statistics, features, latent, shown, named=latent in (names or {})),
                acts=statistics.top_acts[latent, :columns][firing].tolist(),
                maps=None if maps is None else maps[place][firing.numpy()],
            )
        )
    return top_image_sheet(rows, title=title, columns=columns)


def _most_interpretable(statistics: LatentStatistics, features: FeatureSet, count: int) -> list[int]:
    if features.image_labels is not None:
        purity = label_purity(statistics, features.image_labels)
        return [int(purity.latents[i]) for i in purest_latents(statistics, purity, count)]
    known = statistics.measurable
    strongest = statistics.max_acts[known].argsort(descending=True, stable=True)[:count]
    return known[strongest].tolist()


def _notes(
    statistics: LatentStatistics, features: FeatureSet, latent: int, shown: torch.Tensor, *, named: bool
) -> list[str]:
    notes = [f"latent {latent}"] if named else []
    if features.image_labels is not None and len(shown):
        labels = features.image_labels[shown]
        label = int(labels.mode().values)
        name = str(label) if features.class_names is None else features.class_names[label]
        notes.append(f"{int((labels == label).sum())} of {len(shown)}: {name}")
    return [*notes, f"fires on {100 * statistics.density[latent].item():.2g} % of images"]


def _picture(source: ImageSource, image: int, crop: str) -> Image.Image:
    """Square, as the extractor sees it: the middle, or the whole image without its proportions."""
    read = source.read(image)
    picture = read if isinstance(read, Image.Image) else to_pictures(read[None])[0]
    if crop == "center":
        return square(picture)
    side = min(picture.size)
    return picture.convert("RGB").resize((side, side))
