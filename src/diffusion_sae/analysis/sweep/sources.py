"""What a sweep extracts: a store for each model, weights, draw, prompt and split, shared by layers, heads and seeds."""

import dataclasses
import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..._files import fingerprint_of, read_json, write_json
from ...extraction.extractor import DiffusionFeatureExtractor
from ...extraction.pooling import pool
from ...extraction.sources import ImageSource
from ...features import FeatureStore
from ...provenance import ExtractorConfig, Provenance
from .config import SweepConfig
from .data import texts_of
from .fits import takes_views
from .specs import ModelSpec, PromptSpec

GRID = ("layers", "timesteps")
COVERS = "covers.json"
GridCell = tuple[str, int]
"""Layer and timestep."""


@dataclass(frozen=True)
class Source:
    """One extraction; `timesteps` may be a part of the model's, where features are not kept."""

    model: ModelSpec
    weights: str
    draw: int
    prompt: PromptSpec
    timesteps: tuple[int, ...]
    pooling: str
    views: dict[str, Any] = field(default_factory=dict)
    """Further settings of the training images' extraction, where a head takes augmented views of them."""

    @property
    def settings(self) -> dict[str, Any]:
        """Of ExtractorConfig, of plain images."""
        prompt = self.prompt
        extraction = {**self.model.extraction, **prompt.extraction, "prompt": prompt.prompt}
        if prompt.of is not None:
            extraction["prompt_from"] = "image"  # the texts themselves are made by `texts_of`
        return {
            **extraction,
            "layers": self.model.layers,
            "timesteps": self.timesteps,
            "pooling": self.pooling,
            "seed": self.draw,
            "random_weights": self.weights == "random",
        }

    @property
    def name(self) -> str:
        """Of all extractions that differ in layers and timesteps alone. Readable, and told apart by a hash."""
        settings = ExtractorConfig(model=self.model.model, **self.settings, **self.views).to_dict()
        decides = {key: value for key, value in settings.items() if key not in GRID}
        parts = (self.model.name, self.weights, self.prompt.name, f"draw{self.draw}")
        named = "-".join(re.sub(r"[^\w.]+", "-", part).strip("-")[:24] for part in parts)
        return f"{named}-{fingerprint_of(decides | {'of': self.prompt.of})[:8]}"

    @property
    def folder_name(self) -> str:
        return f"{self.name}-{fingerprint_of({'layers': self.model.layers, 'timesteps': self.timesteps})[:6]}"

    def narrowed(self, cells: Collection[GridCell]) -> "Source":
        """The same extraction of the layers and timesteps of these cells alone."""
        layers, timesteps = {layer for layer, _ in cells}, {timestep for _, timestep in cells}
        model = dataclasses.replace(self.model, layers=tuple(layer for layer in self.model.layers if layer in layers))
        return dataclasses.replace(self, model=model, timesteps=tuple(t for t in self.timesteps if t in timesteps))

    def describe(self) -> dict[str, Any]:
        """What the columns of the results say of it."""
        return {
            "model": self.model.name,
            "weights": self.weights,
            "draw": self.draw,
            "prompt": self.prompt.name,
            "prompt_of": self.prompt.of or "",
        }


def pooling_of(config: SweepConfig) -> str:
    """What is stored: the features as the most demanding head takes them, from which the others' are made."""
    wanted = {head.pooling for head in config.head_specs}
    if len(wanted) == 1:
        return wanted.pop()
    return "none" if "none" in wanted else "tokens"


def views_of(config: SweepConfig) -> dict[str, Any]:
    """Settings of the training images' extraction; no views where no head would take them."""
    if not config.views or not any(takes_views(head) for head in config.head_specs):
        return {}
    return {"views": config.views, "view_flip": config.view_flip}


def sources_of(config: SweepConfig, class_names: Sequence[str] | None = None) -> list[Source]:
    """All extractions, in the order in which they are made; `class_names` fill the choices of CLIP's prompts."""
    pooling, views = pooling_of(config), views_of(config)
    return [
        Source(
            model,
            weights,
            draw,
            prompt.with_choices(class_names) if class_names else prompt,
            timesteps,
            pooling,
            views,
        )
        for model in config.model_specs
        for weights in model.weights
        for draw in config.draws
        for prompt in model.prompts
        for timesteps in ([model.timesteps] if config.keep_features else [(t,) for t in model.timesteps])
    ]


class Extractions:
    """Makes the stores of a sweep, when they are needed."""

    def __init__(self, config: SweepConfig, images: dict[str, ImageSource], *, progress: bool = True) -> None:
        self.config, self.images, self.progress = config, images, progress
        self.folder = Path(config.output_dir) / "features"
        self.opened: dict[str, dict[str, FeatureStore]] = {}

    def parts(self, source: Source, cells: Collection[GridCell]) -> list[tuple[Source, set[GridCell]]]:
        """Extractions that have these cells of a source, and which of them: those that an earlier sweep, maybe of other
        layers or timesteps, has begun, and one of what no other has.
        """
        left, parts = set(cells), []
        for path in sorted(self.folder.glob(f"{source.name}-*/{COVERS}")):
            there = read_json(path)
            begun = dataclasses.replace(
                source,
                model=dataclasses.replace(source.model, layers=tuple(there["layers"])),
                timesteps=tuple(there["timesteps"]),
            )
            own = left & {(layer, timestep) for layer, timestep in cells_of(begun)}
            if own:
                parts.append((begun, own))
                left -= own
        return [*parts, (source.narrowed(left), left)] if left else parts

    def stores(self, source: Source) -> dict[str, FeatureStore]:
        """By role; a finished store is opened, an unfinished one gone on with."""
        if source.folder_name in self.opened:
            return self.opened[source.folder_name]
        write_json(
            self.folder / source.folder_name / COVERS,
            {"layers": list(source.model.layers), "timesteps": list(source.timesteps)},
        )
        plain, made = self._extractor(source), {}
        for role, images in self.images.items():
            texts = texts_of(source.prompt, images)
            extractor = plain.with_views(**source.views) if role == "train" and source.views else plain
            made[role] = extractor.extract(
                images,
                self.folder / source.folder_name / role,
                batch_size=self.config.batch_size,
                store_dtype=self.config.store_dtype,
                prompts=texts,
                progress=self.progress,
            )
        self.opened[source.folder_name] = made
        return made

    def record(self, source: Source) -> Provenance:
        """Of an extraction whose results are all there, so that its features are not needed."""
        extractor = self._extractor(source)
        return (extractor.with_views(**source.views) if source.views else extractor).provenance

    def check(self, source: Source) -> None:
        """Load the model, which refuses layers that it has not."""
        self._extractor(source)

    def _extractor(self, source: Source) -> DiffusionFeatureExtractor:
        """Of plain images."""
        return DiffusionFeatureExtractor.from_pretrained(
            source.model.model, device=self.config.device, **source.settings
        )

    def remove(self, source: Source) -> None:
        """All of its timesteps alone."""
        for path in self.folder.glob(f"{source.name}-*/{COVERS}"):
            if set(read_json(path)["timesteps"]) <= set(source.timesteps):
                self.opened.pop(path.parent.name, None)
                shutil.rmtree(path.parent, ignore_errors=True)


def as_pooled(rows: Tensor, stored: str, wanted: str, positions: int) -> Tensor:
    """Stored features as a head takes them: pooled after they were stored whole, which is the same but for rounding."""
    if stored == wanted:
        return rows
    if stored == "tokens":
        rows = rows.unflatten(0, (-1, positions))  # (n·T, C) → (n, T, C)
    return pool(rows, wanted)


def cells_of(source: Source) -> Iterator[GridCell]:
    for timestep in source.timesteps:
        for layer in source.model.layers:
            yield layer, timestep


def plain_record(records: Sequence[Provenance]) -> Provenance:
    """The one of the plain images of all splits."""
    (record,) = {plain.fingerprint: plain for plain in (record.plain() for record in records)}.values()
    return record


def features_of(store: FeatureStore, layer: str, timestep: int, wanted: str, view: int = 0) -> Tensor:
    """All rows of a cell, in fp32, as a head takes them: one row an image."""
    features = store.select(layer, timestep, view=view)
    return as_pooled(features.to_tensor(), store.provenance.pooling, wanted, features.positions_per_image)
