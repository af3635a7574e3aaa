"""Sweep: extracts what is missing, fits what is missing, writes one table."""

import dataclasses
import importlib.metadata
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from ..._files import read_json, remove_leftovers, require_writable_folder, write_json
from ...extraction.extractor import VERSIONED
from ...features import FeatureStore
from ...provenance import Provenance
from .baselines import baseline_features
from .cells import Cell, CellResult, path_of
from .config import SweepConfig
from .data import Task, open_splits, require_same_images, tasks
from .fits import check_head, fit_cell, takes_views
from .margins import best_cells, best_of, model_groups
from .observations import observations
from .results import RESULTS, SUMMARY, write_table
from .sources import Extractions, Source, cells_of, features_of, plain_record, sources_of
from .specs import HeadSpec

logger = logging.getLogger(__name__)


class Sweep:
    """Probes over a grid; see SweepConfig for what it covers and what a seed is.

    The L2 strength, the epoch and the best cell are chosen on validation images. Test images are measured at every fit,
    and decide nothing. Killed at any moment, the next run gives the results of an undisturbed one.
    """

    def __init__(self, config: SweepConfig, *, progress: bool = True) -> None:
        """
        Raises:
            ValueError: for images without labels, labels that they lack, and heads that a probe refuses.
        """
        self.config, self.progress = config, progress
        self.folder = Path(config.output_dir)
        for head in config.head_specs:
            check_head(head)
        self.images = open_splits(config)
        self.tasks = tasks(config, self.images)
        self.sources = sources_of(config, self.images["train"].class_names)

    def run(self) -> dict[str, Any]:
        """All of it; returns what is written to `sweep.json`."""
        require_writable_folder(self.folder)
        remove_leftovers(self.folder / "cells", "*.json")
        require_same_images(self.images, self.folder)
        extractions = Extractions(self.config, self.images, progress=self.progress)
        self._check_models(extractions)
        paths: list[Path] = []
        total = sum(len(list(cells_of(s))) for s in self.sources) * len(self.config.head_specs) * len(self.tasks)
        with tqdm(total=total, unit="cell", desc="sweep", disable=not self.progress) as bar:
            for source in self.sources:
                paths += self._fit_source(source, extractions, bar)
        paths += self._fit_inputs()
        results = [CellResult.read(path) for path in paths]
        if "shuffled" in self.config.baselines:
            results += [CellResult.read(path) for path in self._fit_shuffled(results, extractions)]
        return self._write(results)

    def _check_models(self, extractions: Extractions) -> None:
        """Load each model that has work to do once: an unknown layer of the last one is told before hours of work on
        the others. The first one's is told by its own turn.
        """
        to_do = [s for s in self.sources if not all(path.exists() for *_, path in self._planned(s))]
        first_of = {source.model.name: source for source in reversed(to_do)}
        for source in list(reversed(first_of.values()))[1:]:
            extractions.check(source)

    def _file(self, cell: Cell, head: HeadSpec, task: Task, settings: Any, views: dict[str, Any] | None = None) -> Path:
        config = self.config
        decides = {
            "head": dataclasses.asdict(head),
            "label": {role: values.tolist() for role, values in task.labels.items()},
            "settings": settings,
            "seeds": list(config.seeds),
            "train_fraction": config.train_fraction,
            "dataset": [config.dataset, config.splits, config.limit],
            **(views if views and takes_views(head) else {}),
        }
        return path_of(self.folder, cell, decides)

    def _settings(self, source: Source) -> dict[str, Any]:
        # not the timesteps: which others a cell was extracted with does not change it
        settings = {key: value for key, value in source.settings.items() if key not in ("layers", "timesteps")}
        return {"model": source.model.model, "of": source.prompt.of, "dtype": self.config.store_dtype, **settings}

    def _planned(self, source: Source) -> Iterator[tuple[Cell, HeadSpec, Task, Path]]:
        """Cells of a source, those of one layer and timestep together."""
        for layer, timestep in cells_of(source):
            for head in self.config.head_specs:
                for task in self.tasks:
                    cell = Cell(
                        "cell", **source.describe(), layer=layer, timestep=timestep, head=head.name, label=task.name
                    )
                    yield cell, head, task, self._file(cell, head, task, self._settings(source), source.views)

    def _fit_source(self, source: Source, extractions: Extractions, bar: tqdm) -> list[Path]:
        planned = list(self._planned(source))
        missing = [entry for entry in planned if not entry[3].exists()]
        bar.update(len(planned) - len(missing))
        for part, cells in extractions.parts(source, {(cell.layer, cell.timestep) for cell, *_ in missing}):
            stores = extractions.stores(part)
            record = self._remember(source, [store.provenance for store in stores.values()])
            loaded: tuple[Any, _Loaded] = (None, _Loaded({}))
            for cell, head, task, path in missing:
                if (cell.layer, cell.timestep) not in cells:
                    continue
                bar.set_postfix_str(f"{cell.model} {cell.layer} t={cell.timestep}")
                key = (cell.layer, cell.timestep, head.pooling, takes_views(head))
                if loaded[0] != key:
                    loaded = (key, _load(stores, cell.layer, cell.timestep, head))
                self._fit(cell, head, task, path, loaded[1], record.select(cell.layer, cell.timestep))
                bar.update()
        if not self._record(source).exists():
            self._remember(source, [extractions.record(source)])
        if not self.config.keep_features:
            extractions.remove(source)
        return [path for *_, path in planned]

    def _remember(self, source: Source, records: Sequence[Provenance]) -> Provenance:
        """The record of the plain images; results of other weights of the model are not added to."""
        record = plain_record(records)
        for path in sorted((self.folder / "sources").glob("*.json")):
            there = Provenance.from_dict(read_json(path))
            if _model_of(there) == _model_of(record) and there.weights != record.weights:
                raise ValueError(
                    f"{str(self.folder)!r} holds results of {record.model!r} with weights {there.weights}, and the "
                    f"model now has {record.weights}. Choose another output_dir, or load the revision of before."
                )
        with_views = max(records, key=lambda made: made.views)
        write_json(self._record(source), with_views.to_dict())
        return record

    def _record(self, source: Source) -> Path:
        return self.folder / "sources" / f"{source.name}.json"

    def _fit(
        self,
        cell: Cell,
        head: HeadSpec,
        task: Task,
        path: Path,
        loaded: "_Loaded",
        record: Provenance | None,
    ) -> None:
        work = self.folder / "work" / path.stem
        seeds = fit_cell(loaded.features, task, head, self.config, views=loaded.views, provenance=record, work=work)
        rows = {role: len(index) for role, index in task.rows.items()}
        rows["train"] = round(self.config.train_fraction * rows["train"])
        CellResult(cell, task.num_labels, rows, loaded.features["train"][0].numel(), seeds).write(path)

    def _fit_inputs(self) -> list[Path]:
        """Baselines on what goes into the denoiser, with a linear head."""
        head, paths = HeadSpec.parse("linear"), []
        for kind in ("pixels", "latents"):
            for model in self.config.model_specs if kind in self.config.baselines else ():
                loaded: _Loaded | None = None
                for task in self.tasks:
                    cell = Cell(kind, model.name, "trained", 0, "", "", "", -1, head.name, task.name)
                    settings = [model.model, model.extraction, self.config.baseline_size]
                    path = self._file(cell, head, task, settings)
                    if not path.exists():
                        loaded = loaded or _Loaded(baseline_features(kind, model, self.config, self.images))
                        self._fit(cell, head, task, path, loaded, None)
                    paths.append(path)
        return paths

    def _fit_shuffled(self, results: list[CellResult], extractions: Extractions) -> list[Path]:
        """At the best cell of each model, head and label."""
        paths = []
        for group in model_groups(results).values():
            best = best_of(group).results[0].cell
            (source,) = [
                s
                for s in self.sources
                if s.describe().items() <= dataclasses.asdict(best).items() and best.timestep in s.timesteps
            ]
            (head,) = [h for h in self.config.head_specs if h.name == best.head]
            (task,) = [t for t in self.tasks if t.name == best.label]
            cell = dataclasses.replace(best, kind="shuffled")
            task = task.shuffled(self.config.seeds[0])
            path = self._file(cell, head, task, self._settings(source), source.views)
            if not path.exists():
                ((part, _),) = extractions.parts(source, {(best.layer, best.timestep)})
                stores = extractions.stores(part)
                self._remember(source, [store.provenance for store in stores.values()])
                loaded = _load(stores, best.layer, best.timestep, head)
                self._fit(cell, head, task, path, loaded, None)
                if not self.config.keep_features:
                    extractions.remove(source)
            paths.append(path)
        return paths

    def _extraction(self, source: Source) -> dict[str, Any]:
        """Record of all layers and timesteps of a source, which may have been extracted one after the other."""
        recorded = Provenance.from_dict(read_json(self._record(source)))
        record = dataclasses.replace(recorded, layers=source.model.layers, timesteps=source.timesteps)
        return {**record.to_dict(), "fingerprint": record.fingerprint}

    def _write(self, results: list[CellResult]) -> dict[str, Any]:
        write_table(self.folder / RESULTS, results)
        content = {
            "config": self.config.to_dict(),
            "versions": {name: importlib.metadata.version(name) for name in VERSIONED},
            "extractions": {s.folder_name: self._extraction(s) for s in self.sources},
            "fits": sum(len(result.seeds) for result in results),
            "best": best_cells(results),
            "observations": observations(results),
        }
        write_json(self.folder / SUMMARY, content)
        logger.info("%d fits in %s", content["fits"], self.folder / RESULTS)
        return content


@dataclass(frozen=True)
class _Loaded:
    """The features of a cell."""

    features: dict[str, Tensor]
    """Rows of each role that has a split."""
    views: list[Tensor] = field(default_factory=list)
    """Of the training images, for a head that takes them."""


def _load(stores: dict[str, FeatureStore], layer: str, timestep: int, head: HeadSpec) -> _Loaded:
    features = {role: features_of(store, layer, timestep, head.pooling) for role, store in stores.items()}
    views = range(1, stores["train"].num_views + 1) if takes_views(head) else ()
    return _Loaded(features, [features_of(stores["train"], layer, timestep, head.pooling, view) for view in views])


def _model_of(record: Provenance) -> tuple[Any, ...]:
    """What decides the weights."""
    drawn = record.seed if record.random_weights else None
    return (record.model, record.revision, record.dtype, record.random_weights, drawn)
