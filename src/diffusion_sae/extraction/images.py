"""Images of every kind into `pixel_values`, the way the model was trained to see them."""

import hashlib
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
ACCEPTED = (
    "a PIL image, a path, bytes, a (H, W), (H, W, 3) uint8 array, a tensor (3, H, W) or (B, 3, H, W) in [-1, 1], "
    "a dict with 'bytes' or 'path' as datasets gives it, or a list of these"
)


class ImageError(ValueError):
    """An image that cannot be read; the message names it."""


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, 8 bits a channel: transparency is laid on white, 16-bit and float grey are scaled to 8 bits."""
    if 0 in image.size:
        raise ImageError(f"it has no pixels, its size is {image.width} × {image.height}")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode == "I":
        grey = np.asarray(image).astype(np.float64) / 257.0  # 65535 → 255
        return Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        grey = np.asarray(image)
        if not np.isfinite(grey).all() or grey.min() < 0 or grey.max() > 255:
            raise ImageError("A floating-point image must have values in 0…255; convert it to 8 bits first.")
        return Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def square(image: Image.Image) -> Image.Image:
    """The middle square in RGB, of whole pixels."""
    side, (width, height) = min(image.size), image.size
    left, top = (width - side) // 2, (height - side) // 2
    return image.convert("RGB").crop((left, top, left + side, top + side))


def load_image(source: Any, name: str | None = None) -> Image.Image:
    """One image, fully decoded, as RGB. Raises ImageError for what is broken or no image, naming its file or `name`."""
    if isinstance(source, dict) and {"bytes", "path"} & set(source):
        name = source.get("path") or name
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
    label = str(source) if isinstance(source, str | Path) else name or "the given image"
    try:
        if isinstance(source, Image.Image):
            return to_rgb(source)
        if isinstance(source, str | Path):
            with Image.open(source) as image:
                return to_rgb(image)
        if isinstance(source, bytes):
            with Image.open(BytesIO(source)) as image:
                return to_rgb(image)
    except FileNotFoundError as error:
        raise ImageError(f"There is no image file {label!r}. Check the path.") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(
            f"Cannot read the image {label!r}: {error}. Repair or remove it, or use skip_broken."
        ) from error
    if (
        isinstance(source, np.ndarray)
        and source.dtype == np.uint8
        and (source.ndim == 2 or (source.ndim == 3 and source.shape[2] in (1, 3, 4)))
    ):
        return to_rgb(Image.fromarray(source.squeeze(2) if source.shape[2:] == (1,) else source))
    shape = (
        f" of shape {tuple(source.shape)} and type {source.dtype}" if isinstance(source, np.ndarray | Tensor) else ""
    )
    raise ImageError(
        f"Cannot read the image {label!r}: an image cannot be a {type(source).__name__}{shape}. Allowed: {ACCEPTED}."
    )


def preprocess(
    image: Image.Image, size: int, *, crop: str = "center", resample: str = "bicubic"
) -> Float[Tensor, "3 size size"]:
    """Middle square, or with crop="none" the whole image, resized to size × size; values in [-1, 1]."""
    width, height = (min(image.size),) * 2 if crop == "center" else image.size
    left, top = (image.width - width) / 2, (image.height - height) / 2
    return resized_box(image, (left, top, left + width, top + height), size, resample)


def resized_box(
    image: Image.Image, box: tuple[float, float, float, float], size: int, resample: str
) -> Float[Tensor, "3 size size"]:
    """A part of the image (left, top, right, bottom), resized to size × size; values in [-1, 1]."""
    if image.size != (size, size) or box != (0, 0, size, size):
        # resampled within the box alone: a strip of 1 × 10,000 pixels would not fit into memory otherwise
        image = image.resize((size, size), Image.Resampling[resample.upper()], box=box)
    # numpy: at the size of a small model a call of torch takes longer than its arithmetic
    pixels = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)).astype(np.float32)  # (H, W, 3) -> (3, H, W)
    pixels /= np.float32(127.5)
    pixels -= np.float32(1)
    return torch.from_numpy(pixels)


def to_pictures(pixel_values: Float[Tensor, "B 3 H W"]) -> list[Image.Image]:
    """Preprocessed images as 8-bit pictures, to look at or to give to another model."""
    pixels = ((pixel_values.float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(np.asarray(image.permute(1, 2, 0))) for image in pixels]  # (3, H, W) -> (H, W, 3)


def image_id(pixel_values: Float[Tensor, "3 H W"]) -> str:
    """Name of an image by its content: SHA-256 of the preprocessed 8-bit pixels.

    The noise is drawn by this name, so that a picture gets the same noise whether it comes as a file, a PIL image, a
    tensor or a row of a data set.
    """
    scaled = (pixel_values.detach().float().cpu().numpy() + np.float32(1)) * np.float32(127.5)
    pixels = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
    return hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).hexdigest()[:32]


def check_pixel_values(pixel_values: Tensor, size: int | None = None) -> Float[Tensor, "B 3 H W"]:
    """A batch of `pixel_values`, with an added batch dimension if need be; refuses other shapes and ranges."""
    batch = pixel_values[None] if pixel_values.ndim == 3 else pixel_values
    expected = "(B, 3, H, W)" if size is None else f"(B, 3, {size}, {size})"
    wrong_size = size is not None and batch.shape[2:] != (size, size)
    if batch.ndim != 4 or batch.shape[1] != 3 or batch.numel() == 0 or wrong_size:
        raise ImageError(f"pixel_values must have the shape {expected}, got {tuple(pixel_values.shape)}.")
    if not batch.is_floating_point():
        raise ImageError(f"pixel_values must be floating point in [-1, 1], got {batch.dtype}. Scale: x / 127.5 - 1.")
    if not torch.isfinite(batch).all():
        raise ImageError("pixel_values hold NaN or infinite values. Check where the images come from.")
    low, high = batch.min().item(), batch.max().item()
    if low < -1.001 or high > 1.001:
        raise ImageError(f"pixel_values must lie in [-1, 1], got values from {low:.3g} to {high:.3g}.")
    return batch


def to_pixel_value(source: Any, size: int, name: str | None = None, **how: str) -> Float[Tensor, "3 size size"]:
    """One image of a list, preprocessed as `how` says (crop, resample); a tensor must be so already.

    Errors call it by its file or `name`.
    """
    if not isinstance(source, Tensor):
        return preprocess(load_image(source, name), size, **how)
    if source.ndim != 3:
        raise ImageError(f"Image {name!r} of a list must have shape (3, {size}, {size}), got {tuple(source.shape)}.")
    try:
        return check_pixel_values(source, size)[0]
    except ImageError as error:
        raise ImageError(f"Cannot use the image {name!r}: {error}") from error


def to_pixel_values(images: Any, size: int, **how: str) -> Float[Tensor, "B 3 size size"]:
    """Anything that `ACCEPTED` lists, as one preprocessed batch."""
    if isinstance(images, Tensor):
        return check_pixel_values(images, size)
    single = isinstance(images, str | Path | bytes | dict | np.ndarray | Image.Image)
    if not single and not isinstance(images, Iterable):
        load_image(images)  # raises, and says what is allowed
    sources: Sequence[Any] = [images] if single else list(images)
    if not sources:
        raise ImageError(f"Got no images: an empty {type(images).__name__}. Give {ACCEPTED}.")
    names = [None] if single else [str(i) for i in range(len(sources))]
    return torch.stack([to_pixel_value(s, size, name, **how) for s, name in zip(sources, names, strict=True)])
