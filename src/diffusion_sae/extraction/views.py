"""Augmented views of an image: the crop and the flip of Revelio's training, drawn once and kept."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from ..provenance import ExtractorConfig
from .images import resized_box
from .noise import generator_named

PROPORTIONS = (3 / 4, 4 / 3)
ATTEMPTS = 10


@dataclass(frozen=True)
class View:
    box: tuple[float, float, float, float]
    """Left, top, right and bottom of the crop, in pixels of the image."""
    flip: bool


def view_id(image_id: str, number: int) -> str:
    """What the noise of a view is drawn by; views count from 1."""
    return f"{image_id}|view {number}"


def draw_view(size: tuple[int, int], config: ExtractorConfig, image_id: str, number: int) -> View:
    """A crop of a share U(view_area, 1) of the image's area, with proportions exp(U(log ¾, log 4/3)), anywhere in it;
    mirrored with the chance ½. It depends on (seed, image id, number) alone.

    This is the distribution of torchvision's RandomResizedCrop: what does not fit into the image is drawn again, ten
    times at most, after which the middle of the image is taken.

    Args:
        size: width and height of the image.
        config: seed, view_area and view_flip.
        image_id: of the plain image.
        number: of the view, from 1.
    """
    generator = generator_named(f"{config.seed}|{view_id(image_id, number)}")

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()

    flip = uniform(0, 1) < 0.5 and config.view_flip
    for _ in range(ATTEMPTS):
        area = size[0] * size[1] * uniform(config.view_area, 1)
        proportion = math.exp(uniform(*map(math.log, PROPORTIONS)))
        width, height = math.sqrt(area * proportion), math.sqrt(area / proportion)
        left, top = uniform(0, size[0] - width), uniform(0, size[1] - height)
        if width <= size[0] and height <= size[1]:
            return View((left, top, left + width, top + height), flip)
    proportion = min(max(size[0] / size[1], PROPORTIONS[0]), PROPORTIONS[1])
    width, height = min(size[0], size[1] * proportion), min(size[1], size[0] / proportion)
    left, top = (size[0] - width) / 2, (size[1] - height) / 2
    return View((left, top, left + width, top + height), flip)


def cut_views(image: Image.Image, size: int, image_id: str, config: ExtractorConfig) -> list[Float[Tensor, "3 h w"]]:
    """All views of an RGB image, (3, size, size) in [-1, 1]."""
    drawn = [draw_view(image.size, config, image_id, number) for number in range(1, config.views + 1)]
    pixels = [resized_box(image, view.box, size, config.resample) for view in drawn]
    return [one.flip(2) if view.flip else one for one, view in zip(pixels, drawn, strict=True)]
