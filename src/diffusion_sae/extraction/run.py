"""Extraction of a whole data set into a store: what `DiffusionFeatureExtractor.extract` does."""

import logging
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._config import check, check_choice
from .._overlap import Behind
from .._processes import Processes
from ..features import FeatureStore, StoreWriter
from ..provenance import DTYPES
from .images import ImageError
from .reading import Reading, with_texts
from .sources import ImageSource, open_images

if TYPE_CHECKING:
    from .extractor import DiffusionFeatureExtractor

logger = logging.getLogger(__name__)


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
        self.reading = Reading(extractor, source, batch_size=options.batch_size, skip_broken=options.skip_broken)

    def begin(self) -> StoreWriter:
        """In the main process."""
        writer = StoreWriter(
            self.folder,
            self.extractor.provenance,
            source_names=self.source.names,
            labels=self.source.labels,
            class_names=self.source.class_names,
            label_name=self.source.label_name,
            more_labels=self.source.more_labels,
            shard_size=self.options.shard_size,
            store_dtype=self.options.store_dtype,
            append=self.options.append,
            texts=self.reading.texts,
            other_image=lambda row, stored: self.reading.load(row).id != stored,
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

        options, shards = self.options, processes.share_of(writer.missing)
        to_do = sum(len(writer.part.rows(number)) for number in shards)
        total = len(self.source) if processes.count == 1 else to_do
        rows = (row for number in shards for row in writer.part.rows(number))
        with (
            closing(self.reading.ahead(rows)) as images,
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
                    self.reading.add(batch, shard)
                    bar.update(len(batch))
                    left -= len(batch)
                saving.run(writer.write, number, shard)
