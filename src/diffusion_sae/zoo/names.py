"""Names of artifacts: `<model>-<layer>-t<timestep>[-<dataset>]`, as in `sd15-up1-t25`. Parsed and built here alone."""

import re
from dataclasses import dataclass
from typing import Self

SHORT_LAYERS = {"bottleneck": "mid"}
_LONG = (("down", "down_ft"), ("up", "up_ft"), ("b", "block"), ("s", "single_block"))
_NAME = re.compile(
    r"(?P<model>[a-z0-9][a-z0-9.-]*?)-(?P<layer>mid|down\d+|up\d+|b\d+|s\d+)-t(?P<timestep>\d{1,3})(?:-(?P<dataset>[a-z0-9][a-z0-9.-]*))?"
)


def short_layer(layer: str) -> str:
    """`up_ft1` → `up1`; a dotted module path has no short form."""
    if layer in SHORT_LAYERS:
        return SHORT_LAYERS[layer]
    for short, long in _LONG:
        if match := re.fullmatch(rf"{long}(\d+)", layer):
            return short + match[1]
    raise ValueError(f"{layer!r} has no short form for an artifact's name; canonical layers have one (up_ft1 → up1).")


def long_layer(short: str) -> str:
    """`up1` → `up_ft1`."""
    for long, known in SHORT_LAYERS.items():
        if short == known:
            return long
    for prefix, long in _LONG:
        if match := re.fullmatch(rf"{prefix}(\d+)", short):
            return long + match[1]
    raise ValueError(f"{short!r} is no short layer name; these are mid, down0…, up0…, b0…, s0….")


@dataclass(frozen=True)
class ArtifactName:
    model: str
    layer: str
    """Canonical layer name, the long form."""
    timestep: int
    dataset: str | None = None

    def __post_init__(self) -> None:
        name = str(self)
        match = _NAME.fullmatch(name)
        # a model or data set whose own name holds something like "-up1-t25" would be read back as another artifact
        if match is None or (match["model"], match["dataset"]) != (self.model, self.dataset):
            raise ValueError(
                f"{name!r} is no artifact name: model and data set are lower-case letters, digits, dots and hyphens, "
                "and the timestep lies in 0…999, as in sd15-up1-t25."
            )

    @classmethod
    def parse(cls, name: str) -> Self:
        match = _NAME.fullmatch(name.rsplit("/", 1)[-1])
        if match is None:
            raise ValueError(
                f"{name!r} is no artifact name. Names are <model>-<layer>-t<timestep>[-<dataset>], as in sd15-up1-t25."
            )
        return cls(match["model"], long_layer(match["layer"]), int(match["timestep"]), match["dataset"])

    def __str__(self) -> str:
        name = f"{self.model}-{short_layer(self.layer)}-t{self.timestep}"
        return name if self.dataset is None else f"{name}-{self.dataset}"
