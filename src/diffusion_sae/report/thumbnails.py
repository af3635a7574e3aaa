"""Thumbnails of many images in few files: sheets of 16 × 16."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .._overlap import computed_ahead
from ..extraction.images import to_pictures
from ..extraction.sources import ImageSource

ACROSS = 16
"""Thumbnails a row of a sheet, and rows."""
SIDES = {1_000: 128, 4_000: 96}
"""Up to so many images, thumbnails have that side in pixels."""
SMALLEST_SIDE = 64
CRISP_SIDE = 64
"""Up to this size an image is kept as it is and enlarged pixel by pixel, as 28 × 28 digits are."""


@dataclass(frozen=True)
class Sheets:
    count: int
    """Images."""
    side: int
    """Of a thumbnail in pixels."""
    across: int
    crisp: bool
    """Whether to enlarge pixel by pixel."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def as_picture(image: Any) -> Image.Image:
    """RGB; of a tensor (3, H, W) in [-1, 1] as well."""
    return to_pictures(image[None])[0] if isinstance(image, torch.Tensor) else image.convert("RGB")


def seen(image: Any, side: int, crop: str = "center") -> Image.Image:
    """The square that the model saw, on which heat maps lie: the middle, or the whole with its sides made equal."""
    picture = as_picture(image)
    width, height = (min(picture.size),) * 2 if crop == "center" else picture.size
    left, top = (picture.width - width) / 2, (picture.height - height) / 2
    return picture.resize((side, side), Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))


def write_thumbnails(folder: Path, source: ImageSource, crop: str = "center") -> Sheets:
    """`sheet-0000.webp` and so on; holds one sheet at a time.

    Args:
        folder: that they are written to.
        source: the images.
        crop: how the extraction made them square.
    """
    smallest = min(as_picture(source.read(0)).size)
    crisp = smallest <= CRISP_SIDE
    wanted = next((side for most, side in SIDES.items() if len(source) <= most), SMALLEST_SIDE)
    side = smallest if crisp else min(wanted, smallest)
    folder.mkdir(parents=True, exist_ok=True)
    shrunk = computed_ahead(
        range(len(source)),
        lambda i: seen(source.read(i), side, crop),
        threads=2 if source.concurrent else 1,
        ahead=ACROSS,
    )
    sheet = Image.new("RGB", (ACROSS * side, ACROSS * side))
    for i, thumbnail in enumerate(shrunk):
        place = i % ACROSS**2
        sheet.paste(thumbnail, (place % ACROSS * side, place // ACROSS * side))
        if place == ACROSS**2 - 1 or i == len(source) - 1:
            sheet.save(folder / f"sheet-{i // ACROSS**2:04d}.webp", lossless=crisp, quality=80)
            sheet = Image.new("RGB", sheet.size)
    return Sheets(len(source), side, ACROSS, crisp)
