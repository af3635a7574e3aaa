"""Names of layers: canonical ones, the same in every family, and any dotted module path beside them."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from .families import CANONICAL
from .hooks import DIFFERENCE


@dataclass(frozen=True)
class LayerInfo:
    """One layer that features can be taken from."""

    name: str
    """Canonical name, or the dotted module path where there is none."""
    module_path: str
    """Path of the module within the denoiser."""
    channels: int
    """Width of its output."""
    stride: int
    """Pixels of the preprocessed image a position of the output stands for, along one side."""
    family: str
    """`unet`, `transformer`, or `encoder` for the vision models that serve as baselines."""


def canonical_layers(denoiser: nn.Module) -> dict[str, str]:
    """{canonical name: module path} in the order of the forward pass."""
    found: dict[str, tuple[int, int, str]] = {}
    for path, _ in denoiser.named_modules():
        for order, (pattern, name) in enumerate(CANONICAL):
            if match := re.fullmatch(pattern, path):
                number = int(match.group(1)) if match.groups() else 0
                found[name.format(number)] = (order, number, path)
    # modules are registered as down, up, mid in diffusers' U-Nets, and run as down, mid, up
    return {name: path for name, (_, _, path) in sorted(found.items(), key=lambda item: item[1][:2])}


def family_of(denoiser: nn.Module) -> str:
    return "unet" if any(name.startswith("down_ft") for name in canonical_layers(denoiser)) else "transformer"


def resolve_layer(denoiser: nn.Module, name: str) -> str:
    """Module path of a layer given by canonical name or by path, with or without `:diff`.

    An unknown one raises, listing the valid ones.
    """
    known = canonical_layers(denoiser)
    plain = name.removesuffix(DIFFERENCE)
    if plain in known:
        return known[plain]
    paths = {path for path, _ in denoiser.named_modules() if path}
    if plain in paths:
        return plain
    near = difflib.get_close_matches(plain, [*known, *paths], n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"{type(denoiser).__name__} has no layer {name!r}.{hint} Layers: {', '.join(known)}; or any dotted module path "
        f"such as {max(paths, key=len)!r}; with {DIFFERENCE!r} behind it, what the module adds to its input."
    )


def describe_layers(
    activations: Mapping[str, Tensor], module_paths: Mapping[str, str], image_size: int, family: str
) -> list[LayerInfo]:
    """Widths and strides, read off the shapes of activations, which may be on the meta device."""
    infos = []
    for name, path in module_paths.items():
        shape = activations[name].shape  # (B, C, h, w) or (B, T, C) with T positions of a square grid
        channels, positions = (shape[1], shape[3]) if len(shape) == 4 else (shape[2], round(shape[1] ** 0.5))
        infos.append(LayerInfo(name, path, channels, image_size // positions, family))
    return infos
