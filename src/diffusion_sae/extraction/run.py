"""Extraction of a whole data set into a store: what `DiffusionFeatureExtractor.extract` does."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .._files import require_writable_folder
from ..features import FeatureStore, Shard, StoreWriter
from .images import ImageError, image_id, to_pixel_value
from .sources import ImageSource, open_images

if TYPE_CHECKING:
    from .extractor import DiffusionFeatureExtractor


def extract_into_store(
    extractor: "DiffusionFeatureExtractor",
    dataset: Any,
    output_dir: str | Path,
    *,
    split: str,
    batch_size: int,
    shard_size: int,
    limit: int | None,
    skip_broken: bool,
    progress: bool,
) -> FeatureStore:
    """Arguments and errors: see `DiffusionFeatureExtractor.extract`."""
    for name, value in (("batch_size", batch_size), ("shard_size", shard_size), ("limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    source = open_images(dataset, split).first(limit)
    require_writable_folder(output_dir)
    writer = StoreWriter(
        output_dir,
        extractor.provenance,
        source_names=source.names,
        labels=source.labels,
        class_names=source.class_names,
        shard_size=shard_size,
    )
    if writer.finished_shards:
        require_same_images(extractor, source, FeatureStore(output_dir))
    from tqdm.auto import tqdm

    done = min(writer.finished_shards * shard_size, len(source))
    with tqdm(total=len(source), initial=done, unit="img", desc="extract", disable=not progress) as bar:
        for start in range(done, len(source), shard_size):
            stop = min(start + shard_size, len(source))
            shard = Shard()
            for first in range(start, stop, batch_size):
                rows = range(first, min(first + batch_size, stop))
                extract_rows(extractor, source, rows, shard, skip_broken=skip_broken)
                bar.update(len(rows))
            writer.write(shard)
    writer.finish()
    store = FeatureStore(output_dir)
    if len(store) == 0:
        raise ImageError(f"None of the {len(source)} images could be read; {output_dir} holds the reasons.")
    return store


def require_same_images(
    extractor: "DiffusionFeatureExtractor", source: ImageSource, store: FeatureStore, checked: int = 32
) -> None:
    """Some stored images are read again: rows and numbered images have the same names in every data set."""
    row_of = {name: row for row, name in enumerate(source.names)}
    for i in torch.linspace(0, len(store) - 1, min(len(store), checked)).long().tolist():
        name = store.sources[i]
        now = to_pixel_value(source.read(row_of[name]), extractor.backbone.image_size, name)
        if image_id(now) != store.image_ids[i]:
            raise ValueError(
                f"The feature store in {str(store.path)!r} was begun with other images: {name!r} is another one. "
                "Give the same data to go on with it, or another folder to begin a new store."
            )


def extract_rows(
    extractor: "DiffusionFeatureExtractor", source: ImageSource, rows: range, shard: Shard, *, skip_broken: bool
) -> None:
    kept, pixel_values = [], []
    for row in rows:
        name = source.names[row]
        try:
            pixel_values.append(to_pixel_value(source.read(row), extractor.backbone.image_size, name))
            kept.append(row)
        except ImageError as error:
            if not skip_broken:
                raise
            shard.skipped.append({"source": name, "reason": str(error)})
    if kept:
        ids = [image_id(image) for image in pixel_values]
        features = extractor._features(torch.stack(pixel_values), ids)
        shard.add(dict(features), ids, [source.names[r] for r in kept], [source.labels[r] for r in kept])
