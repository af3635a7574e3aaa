"""A picture of an SAE's latents: each with the images that activate it most. It goes into the artifact's card."""

import io
from collections.abc import Callable

from PIL import Image, ImageChops, ImageDraw, ImageFont

from ..extraction.images import square
from ..sae.latent_table import LatentTable

IMAGES, SIDE, GAP, COLUMNS = 6, 72, 4, 2  # of a latent; pixels
CAPTION, MARGIN = 40, 20
BACKGROUND, INK, FAINT = "#ffffff", "#1a1a1a", "#626262"
CELL = (IMAGES * SIDE + (IMAGES - 1) * GAP, CAPTION + SIDE + MARGIN)


def latent_sheet(table: LatentTable, read: Callable[[str], Image.Image], count: int = 12) -> bytes:
    """PNG of the `count` most interpretable latents, two a row, the images of each from left to right as they activate
    it.

    Args:
        table: what is known of the latents.
        read: gives an image by its id.
        count: how many latents.

    Raises:
        ValueError: if no latent has all its top images, so that there is nothing to see.
    """
    chosen = table.most_interpretable(count)
    if not chosen:
        raise ValueError(
            f"No latent is active in {table.source.images_per_latent} of {table.source.num_images} images. Make the "
            "table with a smaller n, or of more images."
        )
    rows = -(-len(chosen) // COLUMNS)
    size = (MARGIN + COLUMNS * (CELL[0] + MARGIN), MARGIN // 2 + rows * CELL[1])
    sheet = Image.new("RGB", size, BACKGROUND)
    for place, latent in enumerate(chosen):
        row, column = divmod(place, COLUMNS)
        _draw(sheet, MARGIN + column * (CELL[0] + MARGIN), MARGIN // 2 + row * CELL[1], table, latent, read)
    file, grey = io.BytesIO(), sheet.convert("L")
    if not ImageChops.difference(sheet, grey.convert("RGB")).getbbox():  # of grey images: half the file
        sheet = grey
    sheet.save(file, "PNG", optimize=True)
    return file.getvalue()


def _draw(sheet: Image.Image, x: int, y: int, table: LatentTable, latent: int, read: Callable) -> None:
    record, canvas = table[latent], ImageDraw.Draw(sheet)
    title = record.name or record.label
    canvas.text((x, y), f"{latent}" + (f"  {title}" if title else ""), INK, ImageFont.load_default(16))
    facts = [] if record.purity is None else [f"purity {record.purity:.2f}"]
    facts += [f"active in {record.density:.1%} of images", f"up to {record.max_activation:.3g}"]
    canvas.text((x, y + 20), "  ·  ".join(facts), FAINT, ImageFont.load_default(12))
    for number, image_id in enumerate(record.top_image_ids[:IMAGES]):
        shown = square(read(image_id)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        sheet.paste(shown, (x + number * (SIDE + GAP), y + CAPTION))
