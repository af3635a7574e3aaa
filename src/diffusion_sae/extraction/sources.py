"""Data sets of images: a folder, Parquet, a `datasets` name, a Dataset, or a list, seen as one kind of sequence."""

import dataclasses
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from ..features.columns import StringColumn
from ..features.labels import LABEL, LabelSet, numbers_in
from ..zoo import embedded_datasets, embedded_images
from .images import IMAGE_SUFFIXES, load_image

logger = logging.getLogger(__name__)

HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")  # of a data set: mnist, ylecun/mnist
LABEL_COLUMNS = ("label", "labels", "fine_label", "class")
TEXT_COLUMNS = ("prompt", "text", "caption")


@dataclass(frozen=True)
class ImageSource:
    """`read(i)` decodes image i; names and labels are known beforehand."""

    names: Sequence[str]
    """What each image is called in messages and in the store: its path, or its row number."""
    read: Callable[[int], Any]
    """An image as RGB, or a tensor (3, H, W) if the data are tensors; raises ImageError for a broken one."""
    labels: Sequence[int | None]
    class_names: list[str] | None
    texts: Sequence[str] | None = None
    """A prompt an image, from a text column."""
    concurrent: bool = False
    """Whether several threads may call `read` at once; not so for a user's own sequence, of which nothing is known."""
    label_name: str = LABEL
    """What the data call the labels."""
    more_labels: Mapping[str, LabelSet] = field(default_factory=dict)
    """Further labels of the images, by name: fine classes beside coarse ones. A store keeps them all."""

    def __len__(self) -> int:
        return len(self.names)

    def first(self, limit: int | None) -> Self:
        if limit is None:
            return self
        return dataclasses.replace(
            self,
            names=self.names[:limit],
            labels=self.labels[:limit],
            texts=None if self.texts is None else self.texts[:limit],
            more_labels={n: dataclasses.replace(s, values=s.values[:limit]) for n, s in self.more_labels.items()},
        )

    def labelled_by(self, name: str) -> Self:
        """The same images with other of their labels as `labels`; those of before become further ones.

        Raises:
            ValueError: for labels that they do not have.
        """
        if name == self.label_name:
            return self
        if name not in self.more_labels:
            known = ", ".join(map(repr, (self.label_name, *self.more_labels)))
            raise ValueError(f"The images have no labels {name!r}. Their labels: {known}.")
        chosen = self.more_labels[name]
        others = {other: labels for other, labels in self.more_labels.items() if other != name}
        if self.class_names is not None:
            others = {self.label_name: LabelSet(self.labels, self.class_names), **others}
        return dataclasses.replace(
            self, labels=chosen.values, class_names=chosen.class_names, label_name=name, more_labels=others
        )

    def in_classes(self, class_names: list[str], what: str, whose: str) -> Self:
        """The same images with their classes numbered as in `class_names`; see `numbers_in`. Without class names, as
        they are.
        """
        if self.class_names in (None, class_names):
            return self
        known = [label for label in self.labels if label is not None]
        numbers = numbers_in(class_names, self.class_names, known, what, whose)
        labels = [None if label is None else numbers[label] for label in self.labels]
        return dataclasses.replace(self, labels=labels, class_names=class_names)


def from_folder(folder: Path) -> ImageSource:
    """Images directly in the folder, or one sub-folder a class (the layout of `imagefolder`), in order of name."""
    subfolders = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    by_class = [(name.name, _image_files(name)) for name in subfolders]
    by_class = [(name, files) for name, files in by_class if files]
    direct = [p for p in sorted(folder.iterdir()) if p.is_file() and p.suffix.lower() in IMAGE_SUFFIXES]
    if direct and by_class:
        raise ValueError(
            f"{folder} holds images beside class folders ({by_class[0][0]!r}, …). Put every image into a class folder, "
            "or none."
        )
    if direct:
        files, labels, class_names = direct, [None] * len(direct), None
    else:
        files = [file for _, files in by_class for file in files]
        labels = [number for number, (_, files) in enumerate(by_class) for _ in files]
        class_names = [name for name, _ in by_class]
    if not files:
        raise ValueError(f"{folder} holds no images. Files ending in {', '.join(sorted(IMAGE_SUFFIXES))} count.")
    names = StringColumn.of([file.relative_to(folder).as_posix() for file in files])
    return ImageSource(names, lambda i: load_image(folder / names[i]), list(labels), class_names, concurrent=True)


def _image_files(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix.lower() in IMAGE_SUFFIXES]


def from_dataset(table: Any, name: str) -> ImageSource:
    """A `datasets.Dataset` with an image column, and its label columns; ClassLabels beside the first are kept too."""
    from datasets import ClassLabel, Image, Value

    images = [column for column, feature in table.features.items() if isinstance(feature, Image)]
    if not images:
        columns = {column: type(feature).__name__ for column, feature in table.features.items()}
        raise ValueError(f"{name} has no image column; its columns are {columns}. Cast one with datasets.Image().")
    column = "image" if "image" in images else images[0]
    labels: list[int | None] = [None] * len(table)
    class_names = None
    classed = [c for c, feature in table.features.items() if isinstance(feature, ClassLabel)]
    numbered = [
        c for c in LABEL_COLUMNS if isinstance(table.features.get(c), Value) and "int" in table.features[c].dtype
    ]
    label_column = next(iter([c for c in LABEL_COLUMNS if c in classed] + classed + numbered), None)
    if label_column is not None:
        labels = list(table[label_column])
        class_names = table.features[label_column].names if label_column in classed else None
    for other in (c for c in LABEL_COLUMNS if c in table.features and label_column is None):
        logger.warning(
            "%s: the column %r holds no class numbers but %s, and is left out. Make classes of it before the data are "
            "split, with class_encode_column(%r); other targets are given to features by with_labels.",
            name,
            other,
            table.features[other],
            other,
        )
    others = [c for c in classed if c != label_column]
    encoded = table.cast_column(column, Image(decode=False))

    def read(i: int) -> Any:
        return load_image(encoded[i][column], f"row {i} of {name}")

    texts = next((c for c in TEXT_COLUMNS if isinstance(table.features.get(c), Value)), None)
    return ImageSource(
        StringColumn.numbers(len(table)),
        read,
        labels,
        class_names,
        texts=None if texts is None else table[texts],
        concurrent=True,
        label_name=label_column or LABEL,
        more_labels={c: LabelSet(list(table[c]), table.features[c].names) for c in others},
    )


def _load_named(name: str, split: str) -> Any:
    from datasets import Dataset, load_dataset

    if name in embedded_datasets():
        return Dataset.from_parquet(str(embedded_images(split, name)))
    path = Path(name)
    if path.suffix == ".parquet" and path.is_file():
        return Dataset.from_parquet(name)
    is_file_name = path.suffix.lower() in {".parquet", *IMAGE_SUFFIXES} or not HUB_ID.fullmatch(name)
    if path.exists() or is_file_name:
        reason = "is no Parquet file" if path.exists() else "does not exist"
        raise ValueError(f"{name} {reason}. Give a folder of images, a Parquet file, or a `datasets` name.")
    return load_dataset(name, split=split)


def _list_item(item: Any, name: str) -> Any:
    return item if isinstance(item, Tensor) else load_image(item, name)


def open_images(data: Any, split: str = "train") -> ImageSource:
    """Any kind of image data as an ImageSource.

    Args:
        data: a folder of images, with or without class sub-folders; a Parquet file; the name of an embedded or Hub data
            set; a `datasets.Dataset`; or a sequence of images.
        split: the split of a named data set.

    Raises:
        ValueError: if there are no images, or `data` is of another kind.
    """
    if isinstance(data, ImageSource):
        source = data
    elif isinstance(data, str | Path) and Path(data).is_dir():
        source = from_folder(Path(data))
    elif isinstance(data, str | Path):
        source = from_dataset(_load_named(str(data), split), str(data))
    elif hasattr(data, "features") and hasattr(data, "cast_column"):
        source = from_dataset(data, "the data set")
    elif isinstance(data, Sequence):
        names = [str(item) if isinstance(item, str | Path) else str(i) for i, item in enumerate(data)]
        source = ImageSource(names, lambda i: _list_item(data[i], names[i]), [None] * len(data), None)
    else:
        raise TypeError(
            f"Images cannot come from a {type(data).__name__}. Allowed: a folder, a Parquet file, a `datasets` name, a "
            "datasets.Dataset, or a list of images."
        )
    if len(source) == 0:
        raise ValueError("The data set is empty: it has no images to extract features from.")
    return source
