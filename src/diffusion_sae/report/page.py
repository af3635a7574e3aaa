"""The page of one run: a single HTML file that needs no network, no server and no torch.

The caller measures; this module only shows. Every text of `PageData` is taken as hostile input (a label may be
markup, a file name may not even be Unicode), every number is checked before it is drawn.
"""

import base64
import hashlib
import io
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup
from PIL import Image

from diffusion_sae._files import write_atomically

MAX_SIDE = 128  # pixels of an embedded image: twice the size it is shown at, for dense screens
CRISP_SIDE = 64  # up to this size an image is enlarged pixel by pixel, as 28 × 28 digits are

# One hue, luminance monotonic from low to high: readable with any colour vision and in grey.
RAMP_LIGHT = ("#eaf1f5", "#c2d8e6", "#88b4d0", "#4484ae", "#1a5a86", "#0b3454")
RAMP_DARK = ("#1d2a35", "#22435c", "#2b648d", "#4d90bd", "#90c1df", "#dcedf7")


@dataclass(frozen=True)
class Baseline:
    """One bar of the accuracy chart. `highlight` marks the probe this page is about."""

    name: str
    accuracy: float  # fraction, 0…1
    std: float | None = None  # one standard deviation, same unit
    note: str = ""
    highlight: bool = False

    def __post_init__(self) -> None:
        _require_fraction(f"accuracy of {self.name!r}", self.accuracy)
        _require_fraction(f"std of {self.name!r}", self.std)


@dataclass(frozen=True)
class Figure:
    """A key figure, already formatted: `Figure("FVU", "0.083", "fraction of variance unexplained")`."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Example:
    """An image that activates a latent; `source` says where it came from (a file name, a data set row)."""

    image: Image.Image
    label: str
    activation: float
    source: str = ""


@dataclass(frozen=True)
class LatentPanel:
    """A SAE latent and its top images, strongest first."""

    latent_index: int
    name: str  # most common label among the top images
    purity: float  # share of the top images that carry this label, 0…1
    density: float  # share of the rows on which the latent is active, 0…1
    max_activation: float
    examples: list[Example]

    def __post_init__(self) -> None:
        _require_fraction(f"purity of latent {self.latent_index}", self.purity)
        _require_fraction(f"density of latent {self.latent_index}", self.density)


@dataclass(frozen=True)
class LayerGrid:
    """Probe accuracy at each layer (rows) and timestep (columns); None where it was not measured."""

    layers: list[str]
    timesteps: list[int]
    accuracy: list[list[float | None]]
    chosen: tuple[str, int]
    baseline: float | None  # accuracy to compare each cell with
    caption: str

    def __post_init__(self) -> None:
        if [len(row) for row in self.accuracy] != [len(self.timesteps)] * len(self.layers):
            raise ValueError(
                f"accuracy has rows of {[len(row) for row in self.accuracy]} cells for {len(self.layers)} layers and "
                f"{len(self.timesteps)} timesteps. Give one row a layer, one cell a timestep, None if not measured."
            )
        for value in [self.baseline, *self.measured.values()]:
            _require_fraction("accuracy in the grid", value)
        if self.measured and tuple(self.chosen) not in self.measured:
            raise ValueError(f"chosen is {self.chosen!r}; choose a measured cell: one of {list(self.measured)}.")

    @property
    def measured(self) -> dict[tuple[str, int], float]:
        """The accuracy of each (layer, timestep) that was measured."""
        cells = [(layer, timestep) for layer in self.layers for timestep in self.timesteps]
        values = [value for row in self.accuracy for value in row]
        return {cell: value for cell, value in zip(cells, values, strict=True) if value is not None}


@dataclass(frozen=True)
class Prediction:
    """What the probe says of one image; `label` is the true one, empty if it is not known."""

    image: Image.Image
    label: str
    scores: list[tuple[str, float]]  # (label, probability), best first

    def __post_init__(self) -> None:
        for name, score in self.scores:
            _require_fraction(f"score of {name!r}", score)
        values = [score for _, score in self.scores]
        if not values or values != sorted(values, reverse=True):
            raise ValueError(f"scores are {values}: give at least one, best first.")

    @property
    def correct(self) -> bool | None:
        return self.scores[0][0] == self.label if self.label else None


@dataclass(frozen=True)
class PageData:
    """All that a page shows. An empty list, dict or None leaves its section out."""

    title: str
    subtitle: str
    figures: list[Figure]
    baselines: list[Baseline]
    grid: LayerGrid | None
    latents: list[LatentPanel]
    shuffled_purity: float | None  # mean purity of the same latents when labels are shuffled
    predictions: list[Prediction]
    provenance: dict[str, str]
    commands: list[str]

    def __post_init__(self) -> None:
        _require_fraction("shuffled_purity", self.shuffled_purity)


def render_page(data: PageData) -> str:
    """The page as one HTML text, with its images, style and script inside."""
    heat = _heat(data.grid) if data.grid and data.grid.measured else None
    correct = Counter(prediction.correct for prediction in data.predictions)
    return _template().render(
        data=data, heat=heat, correct=correct, ramps={"light": RAMP_LIGHT, "dark": RAMP_DARK}, crisp_side=CRISP_SIDE
    )


def write_page(path: str | Path, data: PageData) -> None:
    """Writes the page; an error, or a kill, leaves the file that was there before."""
    text = render_page(data)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=_percent, share=_share, number=_number, clip=_clip, png=_png, sha256=_sha256)
    return environment.get_template("page.html")


def _require_fraction(what: str, value: float | None) -> None:
    if value is not None and not -1e-6 <= value <= 1 + 1e-6:  # float32 means may miss 0 and 1 by an ulp
        raise ValueError(f"{what} is {value!r}, but must lie between 0 and 1. Divide a percentage by 100.")


def _heat(grid: LayerGrid) -> dict[str, Any]:
    """Colours of the cells and the ends of their scale, which are the lowest and the highest measured value."""
    low, high = min(grid.measured.values()), max(grid.measured.values())
    spread = (high - low) or 1.0
    colours = {cell: _colours((value - low) / spread) for cell, value in grid.measured.items()}
    mark = None if grid.baseline is None or not low < grid.baseline < high else (grid.baseline - low) / spread
    return {"low": low, "high": high, "mark": mark, "colours": colours, "chosen": tuple(grid.chosen)}


def _colours(position: float) -> str:
    """CSS variables: background and ink of a cell at `position` (0…1) of the scale, in light and dark."""
    pairs = []
    for scheme, ramp in (("l", RAMP_LIGHT), ("d", RAMP_DARK)):
        index = min(int(position * (len(ramp) - 1)), len(ramp) - 2)
        weight = position * (len(ramp) - 1) - index
        ends = [[int(ramp[i][j : j + 2], 16) for j in (1, 3, 5)] for i in (index, index + 1)]
        rgb = [round(a + (b - a) * weight) for a, b in zip(*ends, strict=True)]
        linear = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        ink = "#000" if luminance > 0.179 else "#fff"  # the better of the two has a contrast of at least 4.5
        pairs.append(f"--{scheme}b:#{bytes(rgb).hex()};--{scheme}f:{ink}")
    return ";".join(pairs)


def _png(image: Image.Image) -> str:
    """The image as a PNG data URI, at most `MAX_SIDE` pixels wide and high, without its metadata."""
    if image.mode not in ("L", "RGB", "RGBA"):
        image = image.convert("RGBA" if "transparency" in image.info or image.mode in ("LA", "PA", "La") else "RGB")
    small = image.copy()
    small.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    small.info = {}  # a photograph's place and camera are nobody's business here
    buffer = io.BytesIO()
    small.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _printable(value: Any) -> Any:
    """Text with control characters and broken Unicode (undecodable file names) made visible as U+FFFD."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", value)


def _clip(text: str, length: int = 160) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}%"


def _share(value: float) -> str:
    return f"{100 * value:.3g}%" if value == 0 or value >= 1e-5 else "<0.001%"


def _number(value: float) -> str:
    size = abs(value)
    return f"{value:,.0f}" if size >= 1000 else f"{value:.2f}" if size >= 0.01 or size == 0 else f"{value:.2g}"


def _sha256(script: str) -> str:
    """Hash of the inline script for the Content-Security-Policy: no other script runs."""
    return base64.b64encode(hashlib.sha256(str(script).encode()).digest()).decode()
