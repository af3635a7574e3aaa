"""From a data set's images to features in memory, batch by batch; what stores and streams share."""

import dataclasses
import os
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._overlap import computed_ahead
from ..features import Shard
from ..features.layout import Key
from .images import ImageError, image_id, to_pixel_value
from .sources import TEXT_COLUMNS, ImageSource
from .views import cut_views, view_id

if TYPE_CHECKING:
    from .extractor import DiffusionFeatureExtractor

MAX_THREADS = 8


@dataclass(frozen=True)
class LoadedImage:
    row: int
    pixel_values: Tensor | None = None
    id: str = ""
    error: ImageError | None = None
    """Why it is broken; then all else is empty."""
    views: Sequence[Tensor] = ()
    """Augmented views, of the shape of pixel_values."""


class Reading:
    """One data set on its way through one extractor."""

    def __init__(
        self, extractor: "DiffusionFeatureExtractor", source: ImageSource, *, batch_size: int, skip_broken: bool = False
    ) -> None:
        """`batch_size`: images a forward pass."""
        self.extractor, self.source = extractor, source
        self.batch_size, self.skip_broken = batch_size, skip_broken
        self.texts = texts_of(extractor, source)

    def ahead(self, rows: Iterable[int]) -> Generator[LoadedImage]:
        """One batch is decoded while the one before is computed."""
        # in a forked process torch makes its thread pool anew at the first call from a new thread, and fails ("Invalid
        # thread pool!") if two threads are the first: here it is one
        torch.set_num_threads(torch.get_num_threads())
        threads = min(MAX_THREADS, os.cpu_count() or 1) if self.source.concurrent else 1
        return computed_ahead(rows, self.load, threads=threads, ahead=self.batch_size + threads)

    def load(self, row: int) -> LoadedImage:
        """An image, preprocessed; if it is broken, why."""
        extractor = self.extractor
        size, name = extractor.backbone.image_size, self.source.names[row]
        try:
            source = self.source.read(row)
            image = to_pixel_value(source, size, name, **extractor.preprocessing)
        except ImageError as error:
            return LoadedImage(row, error=error)
        if not extractor.config.views:
            return LoadedImage(row, image, image_id(image))
        if isinstance(source, Tensor):
            raise TypeError("Views are cut out of images, and these data are tensors. Give images, or leave views out.")
        views = cut_views(source, size, image_id(image), extractor.config)
        return LoadedImage(row, image, image_id(image), views=views)

    def add(self, batch: list[LoadedImage], shard: Shard) -> None:
        """Features of a batch.

        Raises:
            ImageError: for a broken image, unless `skip_broken`.
            ValueError: for features that are NaN or infinite.
        """
        source = self.source
        for image in batch:
            if image.error is not None:
                if not self.skip_broken:
                    raise image.error
                shard.skipped.append({"source": source.names[image.row], "reason": str(image.error)})
        kept = [image for image in batch if image.pixel_values is not None]
        if kept:
            rows, ids = [image.row for image in kept], [image.id for image in kept]
            more_labels = {name: [further.values[r] for r in rows] for name, further in source.more_labels.items()}
            names, labels = [source.names[r] for r in rows], [source.labels[r] for r in rows]
            shard.add(self._features(kept), ids, names, labels, more_labels)

    def _features(self, images: list[LoadedImage]) -> dict[Key, Tensor]:
        """Of the plain images and of all their views."""
        prompts = None if self.texts is None else [self.texts[image.row] for image in images]
        found: dict[Key, Tensor] = {}
        for view in range(self.extractor.config.views + 1):
            pixels = [image.views[view - 1] if view else image.pixel_values for image in images]
            ids = [view_id(image.id, view) if view else image.id for image in images]
            features = self.extractor.features_of(torch.stack(pixels), ids, prompts)  # type: ignore[arg-type]
            found |= {(*key, view) if view else key: value for key, value in features.items()}
        return found


def with_texts(source: ImageSource, prompts: Sequence[str] | None, prompt_from: str) -> ImageSource:
    """The images with the prompts that were given for them, if any were."""
    if prompts is None:
        return source
    if prompt_from != "image":
        raise ValueError(f"prompts were given, but prompt_from={prompt_from!r} does not take them. Use 'image'.")
    if isinstance(prompts, str) or len(prompts) != len(source):
        raise ValueError(f"prompts must be one text an image: {len(source)} images, prompts: {prompts!r:.60}.")
    return dataclasses.replace(source, texts=list(prompts))


def texts_of(extractor: "DiffusionFeatureExtractor", source: ImageSource) -> Sequence[str] | None:
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
