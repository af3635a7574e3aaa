"""Names of layers: canonical ones, the same in every family, and any dotted module path beside them."""

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from .hooks import run_until_captured


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
    """`unet` or `transformer`."""


# canonical name ← module path, for the blocks that a family is made of
CANONICAL = (
    ("unet", re.compile(r"mid_block"), "bottleneck"),
    ("unet", re.compile(r"down_blocks\.(\d+)"), "down_ft{}"),
    ("unet", re.compile(r"up_blocks\.(\d+)"), "up_ft{}"),
    ("transformer", re.compile(r"transformer_blocks\.(\d+)"), "block{}"),
)


def canonical_layers(denoiser: nn.Module) -> dict[str, str]:
    """{canonical name: module path} in the order of the forward pass."""
    found: dict[str, str] = {}
    for path, _ in denoiser.named_modules():
        for _, pattern, name in CANONICAL:
            if match := pattern.fullmatch(path):
                found[name.format(*match.groups())] = path
    # modules are registered as down, up, mid in diffusers' U-Nets, and run as down, mid, up
    order = {"down": 0, "bott": 1, "up_f": 2, "bloc": 3}
    return dict(sorted(found.items(), key=lambda item: order[item[0][:4]]))


def family_of(denoiser: nn.Module) -> str:
    return "unet" if "bottleneck" in canonical_layers(denoiser) else "transformer"


def resolve_layer(denoiser: nn.Module, name: str) -> str:
    """Module path of a layer given by canonical name or by path; an unknown one raises, listing the valid ones."""
    known = canonical_layers(denoiser)
    if name in known:
        return known[name]
    paths = {path for path, _ in denoiser.named_modules() if path}
    if name in paths:
        return name
    near = difflib.get_close_matches(name, [*known, *paths], n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"{type(denoiser).__name__} has no layer {name!r}.{hint} Layers: {', '.join(known)}; or any dotted module path "
        f"such as {max(paths, key=len)!r}."
    )


def describe_layers(
    denoiser: nn.Module, module_paths: Mapping[str, str], forward: Callable[[], object], image_size: int
) -> list[LayerInfo]:
    """Widths and strides, read off what the layers put out in `forward`; the denoiser may be on the meta device."""
    shapes = {name: out.shape for name, out in run_until_captured(denoiser, module_paths, forward).items()}
    infos = []
    for name, path in module_paths.items():
        shape = shapes[name]  # (B, C, h, w) or (B, T, C) with T positions of a square grid
        channels, positions = (shape[1], shape[3]) if len(shape) == 4 else (shape[2], round(shape[1] ** 0.5))
        infos.append(LayerInfo(name, path, channels, image_size // positions, family_of(denoiser)))
    return infos
