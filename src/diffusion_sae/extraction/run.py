"""Extraction of a whole data set into a store: what `DiffusionFeatureExtractor.extract` does."""

import dataclasses
import logging
import os
import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._config import check, check_choice
from ..features import FeatureStore, Shard, StoreWriter
from ..provenance import DTYPES
from .images import ImageError, image_id, to_pixel_value
from .overlap import Behind, computed_ahead
from .processes import Processes
from .sources import TEXT_COLUMNS, ImageSource, open_images

if TYPE_CHECKING:
    from .extractor import DiffusionFeatureExtractor

logger = logging.getLogger(__name__)
MAX_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The options of `DiffusionFeatureExtractor.extract`, which says what they mean."""

    split: str
    batch_size: int
    shard_size: int
    limit: int | None
    skip_broken: bool
    append: bool
    store_dtype: str | None
    progress: bool
    prompts: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "shard_size", "limit"):
            value = getattr(self, name)
            check(value is None or value >= 1, f"{name} must be at least 1, got {value}.")
        check_choice("store_dtype", self.store_dtype, (None, *DTYPES))


@dataclass(frozen=True)
class LoadedImage:
    row: int
    pixel_values: Tensor | None = None
    id: str = ""
    error: ImageError | None = None
    """Why it is broken; then the other two are empty."""


def extract_into_store(
    extractor: "DiffusionFeatureExtractor", dataset: Any, output_dir: str | Path, options: RunOptions
) -> FeatureStore:
    """Errors: see `DiffusionFeatureExtractor.extract`."""
    processes = Processes(cpu=extractor.device.type == "cpu")
    with processes.together():
        source = with_texts(open_images(dataset, options.split), options.prompts, extractor.config.prompt_from)
        run = _Run(extractor, source.first(options.limit), Path(output_dir), options)
    state = processes.from_main(lambda: run.begin().state)
    started = time.perf_counter()
    with processes.together():
        if not processes.is_main:
            run.require_equal(processes, state)
        run.make(StoreWriter.joining(output_dir, state), processes)
    processes.from_main(StoreWriter.joining(output_dir, state).finish)
    store, made = FeatureStore(output_dir), sum(len(state[1].rows(number)) for number in state[2])
    if len(store) == 0:
        raise ImageError(f"None of the {len(run.source)} images could be read; {output_dir} holds the reasons.")
    if processes.is_main:
        _log_summary(store, made, time.perf_counter() - started)
    return store


def _log_summary(store: FeatureStore, images: int, seconds: float) -> None:
    rows = store.num_rows // len(store) * images  # an image has the same number of rows everywhere
    logger.info(
        "%s images in %s, %s skipped; this run: %s images in %.1f s, %.1f rows/s",
        *(f"{len(store):,}", store.path, len(store.skipped), f"{images:,}", seconds, rows / seconds),
    )


class _Run:
    """One data set on its way into one store."""

    def __init__(
        self, extractor: "DiffusionFeatureExtractor", source: ImageSource, folder: Path, options: RunOptions
    ) -> None:
        self.extractor, self.source, self.folder, self.options = extractor, source, folder, options
        self.texts = _texts(extractor, source)

    def begin(self) -> StoreWriter:
        """In the main process."""
        writer = StoreWriter(
            self.folder,
            self.extractor.provenance,
            source_names=self.source.names,
            labels=self.source.labels,
            class_names=self.source.class_names,
            shard_size=self.options.shard_size,
            store_dtype=self.options.store_dtype,
            append=self.options.append,
            texts=self.texts,
            other_image=lambda row, stored: self._load(row).id != stored,
        )
        shards = writer.part.shards
        if 0 < len(writer.missing) < len(shards):
            logger.info(
                "resuming at shard %d of %d (%d to do)",
                *(writer.missing[0] - shards.start + 1, len(shards), len(writer.missing)),
            )
        return writer

    def require_equal(self, processes: Processes, state: Any) -> None:
        """In the others: that they were started with the same model and data."""
        manifest, part, _ = state
        mine = (self.extractor.provenance.fingerprint, len(self.source))
        main = (manifest.record.fingerprint, part.num_images)
        if mine != main:
            raise ValueError(
                f"Process {processes.rank} has the extraction {mine[0]} of {mine[1]} images, the main process "
                f"{main[0]} of {main[1]}. Start all with the same model, settings and data."
            )

    def make(self, writer: StoreWriter, processes: Processes) -> None:
        """This process's share of the missing shards."""
        from tqdm.auto import tqdm

        # in a forked process torch makes its thread pool anew at the first call from a new thread, and fails ("Invalid
        # thread pool!") if two threads are the first: here it is one
        torch.set_num_threads(torch.get_num_threads())
        options, shards = self.options, processes.share_of(writer.missing)
        to_do = sum(len(writer.part.rows(number)) for number in shards)
        total = len(self.source) if processes.count == 1 else to_do
        rows = (row for number in shards for row in writer.part.rows(number))
        with (
            closing(self._images_ahead(rows)) as images,
            Behind() as saving,
            tqdm(
                total=total,
                initial=total - to_do,
                unit="img",
                desc="extract" if processes.count == 1 else f"extract (1 of {processes.count} processes)",
                disable=not options.progress or not processes.is_main,
            ) as bar,
        ):
            for number in shards:
                shard = writer.new_shard()
                left = len(writer.part.rows(number))
                while left:
                    batch = list(islice(images, min(left, options.batch_size)))
                    self._add(batch, shard)
                    bar.update(len(batch))
                    left -= len(batch)
                saving.run(writer.write, number, shard)

    def _images_ahead(self, rows: Iterable[int]) -> Generator[LoadedImage]:
        """One batch is decoded while the one before is computed."""
        threads = min(MAX_THREADS, os.cpu_count() or 1) if self.source.concurrent else 1
        return computed_ahead(rows, self._load, threads=threads, ahead=self.options.batch_size + threads)

    def _load(self, row: int) -> LoadedImage:
        extractor = self.extractor
        size, name = extractor.backbone.image_size, self.source.names[row]
        try:
            image = to_pixel_value(self.source.read(row), size, name, **extractor.preprocessing)
        except ImageError as error:
            return LoadedImage(row, error=error)
        return LoadedImage(row, image, image_id(image))

    def _add(self, batch: list[LoadedImage], shard: Shard) -> None:
        source = self.source
        for image in batch:
            if image.error is not None:
                if not self.options.skip_broken:
                    raise image.error
                shard.skipped.append({"source": source.names[image.row], "reason": str(image.error)})
        kept = [image for image in batch if image.pixel_values is not None]
        if kept:
            rows, ids = [image.row for image in kept], [image.id for image in kept]
            pixel_values = torch.stack([image.pixel_values for image in kept if image.pixel_values is not None])
            prompts = None if self.texts is None else [self.texts[row] for row in rows]
            features = self.extractor.features_of(pixel_values, ids, prompts)
            shard.add(dict(features), ids, [source.names[r] for r in rows], [source.labels[r] for r in rows])


def with_texts(source: ImageSource, prompts: Sequence[str] | None, prompt_from: str) -> ImageSource:
    """The images with the prompts that were given for them, if any were."""
    if prompts is None:
        return source
    if prompt_from != "image":
        raise ValueError(f"prompts were given, but prompt_from={prompt_from!r} does not take them. Use 'image'.")
    if isinstance(prompts, str) or len(prompts) != len(source):
        raise ValueError(f"prompts must be one text an image: {len(source)} images, prompts: {prompts!r:.60}.")
    return dataclasses.replace(source, texts=list(prompts))


def _texts(extractor: "DiffusionFeatureExtractor", source: ImageSource) -> Sequence[str] | None:
    """What `prompt_from` takes of each image: its class name, its own text, or nothing."""
    kind = extractor.config.prompt_from
    if kind == "class":
        if source.class_names is None or any(label is None for label in source.labels):
            raise ValueError(
                "prompt_from='class' needs images with class names, which these data lack. Give class folders or "
                "data with a ClassLabel column, or use prompt_from='image' with prompts."
            )
        return [source.class_names[label] for label in source.labels if label is not None]
    if kind == "image" and source.texts is None:
        raise ValueError(
            f"prompt_from='image' needs a text an image: a datasets column {' or '.join(TEXT_COLUMNS)}, which these "
            "data lack, or prompts=[…]."
        )
    return source.texts if kind == "image" else None
