"""RecipeRun: extract → train → measure → save → push. Each stage keeps what it made and is not done again."""

import gc
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..._files import fingerprint_of, read_json, require_writable_folder, write_json
from ..._processes import Processes
from ...extraction.extractor import DiffusionFeatureExtractor
from ...extraction.loading import default_device
from ...features import FeatureSet, FeatureStore
from ...features.layout import MANIFEST
from .config import Recipe
from .dry import NOTE, dry, random_extractor
from .models import MODELS

logger = logging.getLogger(__name__)
RECIPE, MEASURED = "recipe.json", "measured.json"


@dataclass(frozen=True)
class RecipeResult:
    """What a run came to."""

    artifact: Path
    """Folder of the finished artifact, card included."""
    metrics: dict[str, Any]
    commit: str | None
    """URL of the pushed commit, if it was pushed."""


class RecipeRun:
    """One recipe in one folder, which holds `features/`, `trained/`, `measured.json` and `artifact/`.

    A run that was killed goes on in the stage where it stopped; extraction and training go on within theirs. Under
    `accelerate launch` all processes extract and train together, and the main one does the rest.
    """

    def __init__(
        self, recipe: Recipe, output_dir: str | Path, *, device: str | None = None, dry_run: bool = False
    ) -> None:
        """
        Args:
            recipe: what is made.
            output_dir: folder of all stages; one of another recipe is refused.
            device: cpu, cuda or mps; None: CUDA, else MPS, else the CPU.
            dry_run: the true architecture with random weights, few images and few steps: see `dry`.
        """
        self.recipe = dry(recipe) if dry_run else recipe
        self.dry_run = dry_run
        self.folder = require_writable_folder(output_dir)
        self.device = device or default_device()
        self.processes = Processes(cpu=self.device == "cpu")
        self.maker = MODELS[recipe.kind](self.recipe, self.folder, self.device)

    def run(self, *, push: str | None = None, **hub: Any) -> RecipeResult:
        """All stages.

        Args:
            push: `owner/name` to push the artifact to; None: it stays in the folder.
            **hub: as `push_to_hub`.

        Raises:
            ValueError: if the folder holds the stages of another recipe, or a dry run is to be pushed.
        """
        if push is not None and self.dry_run:
            raise ValueError("A dry run is not pushed: its weights are random. Leave out --push or --dry-run.")
        self.processes.from_main(self._begin)
        stores = self.extract()
        if not self._done("trained/config.json"):
            logger.info("training on %s images", f"{len(stores['train']):,}")
            self.maker.train({name: self._features(store) for name, store in stores.items()})
        return self.processes.from_main(lambda: self._finish(stores, push, hub))

    def _done(self, name: str) -> bool:
        """As the main process sees it, so that all go the same way."""
        return self.processes.from_main((self.folder / name).exists)

    def _begin(self) -> None:
        """Refuse a folder of other stages."""
        content = self.recipe.to_dict() | {"dry_run": self.dry_run}
        path = self.folder / RECIPE
        if not path.exists():
            write_json(path, content)
            return
        before = read_json(path)
        if fingerprint_of(before) != fingerprint_of(content):
            differing = _differing(before, content)
            raise ValueError(
                f"{self.folder} holds the stages of a recipe with other settings: {', '.join(differing)}. Give another "
                "--output-dir, or delete this one."
            )

    def extract(self) -> dict[str, FeatureStore]:
        """Features of every split; the model is loaded only if some are missing."""
        folders = {purpose: self.folder / "features" / purpose for purpose in self.recipe.splits}
        todo = self.processes.from_main(lambda: [name for name, folder in folders.items() if not _complete(folder)])
        if todo:
            extractor = self._extractor()
            data = self.recipe.data
            for purpose in todo:
                logger.info("features of the split %s", self.recipe.splits[purpose])
                extractor.extract(
                    data.dataset,
                    folders[purpose],
                    split=self.recipe.splits[purpose],
                    batch_size=data.batch_size,
                    limit=data.limit,
                    store_dtype=data.store_dtype,
                )
            del extractor
            gc.collect()  # a backbone of gigabytes has cycles
        return {purpose: FeatureStore(folder) for purpose, folder in folders.items()}

    def _extractor(self) -> DiffusionFeatureExtractor:
        config = self.recipe.extraction
        if self.dry_run:
            return random_extractor(self.recipe, self.device)
        settings = {key: value for key, value in config.to_dict().items() if key not in ("model", "revision")}
        return DiffusionFeatureExtractor.from_pretrained(
            config.model, revision=config.revision, device=self.device, **settings
        )

    def _features(self, store: FeatureStore) -> FeatureSet:
        timesteps = self.recipe.extraction.timesteps
        timestep = timesteps[0] if len(timesteps) == 1 else timesteps
        return store.select(self.recipe.extraction.layers[0], timestep, labels=self.recipe.data.labels)

    def _finish(self, stores: Mapping[str, FeatureStore], push: str | None, hub: Mapping[str, Any]) -> RecipeResult:
        """In the main process."""
        measured = self.folder / MEASURED
        features = {name: self._features(store) for name, store in stores.items()}
        if not measured.exists():
            logger.info("measuring on %s images", f"{len(stores[self.recipe.described]):,}")
            write_json(measured, self.maker.measure(features, stores[self.recipe.described]))
        artifact = self.folder / "artifact"
        model = self.maker.finished()
        model.metrics = self._metrics(model.metrics, read_json(measured), stores)
        model.save_pretrained(artifact, repo_id=push or self.recipe.name)
        commit = None if push is None else model.push_to_hub(push, **hub)
        return RecipeResult(artifact, model.metrics, commit)

    def _metrics(
        self, trained: Mapping[str, Any], measured: Mapping[str, Any], stores: Mapping[str, FeatureStore]
    ) -> dict[str, Any]:
        """metrics.json of the artifact: what the training measured, what was measured after it, and on what."""
        splits = self.recipe.splits
        data: dict[str, Any] = {"dataset": self.recipe.data.dataset, **splits}
        data |= {f"{purpose}_images": len(store) for purpose, store in stores.items()}
        if self.recipe.kind == "sae":
            data["latents"] = splits[self.recipe.described]
        if self.recipe.data.labels is not None:
            data["labels"] = self.recipe.data.labels
        notes = [NOTE] if self.dry_run else []
        notes += [str(trained["note"])] if "note" in trained else []
        if "test" in splits:
            notes.append(f"`test`: on {len(stores['test']):,} images of the split {splits['test']}.")
        return {**trained, **measured, "data": data, "note": " ".join(notes) or "As in `metrics.json`."}


def _complete(folder: Path) -> bool:
    return (folder / MANIFEST).exists() and FeatureStore(folder).complete


def _differing(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of what differs."""
    names = []
    for key in sorted({*one, *other}):
        mine, theirs = one.get(key), other.get(key)
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            names += _differing(mine, theirs, f"{prefix}{key}.")
        elif mine != theirs:
            names.append(f"{prefix}{key}")
    return names
