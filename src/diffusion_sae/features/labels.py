"""Labels of images: the one that a store gives by default, and further ones, such as fine classes beside coarse."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import torch
from torch import Tensor

from .columns import INDEX_SCHEMA

LABEL = "label"
"""Column of the index with the default label, and its name where the data have none."""


@dataclass(frozen=True)
class LabelSet:
    """A further label of each image."""

    values: Sequence[int | None]
    class_names: list[str]


def label_column(name: str) -> str:
    """Column of a further label in the index; the prefix keeps it apart from the columns that every index has."""
    return f"{LABEL}_{name}"


def index_schema(further: Iterable[str]) -> pa.Schema:
    """Columns of a shard's index whose images have these further labels."""
    return pa.schema([*INDEX_SCHEMA, *((label_column(name), pa.int64()) for name in further)])


def read_labels(index: pa.Table, column: str = LABEL) -> Tensor | None:
    """(images,); None if not all images have one."""
    values = index[column]
    if not len(values) or values.null_count:
        return None
    return torch.from_numpy(values.to_numpy().copy())


def numbers_in(wanted: Sequence[str], names: Sequence[str], labels: Iterable[int], what: str, whose: str) -> list[int]:
    """By the number of each class of `names` that of the same class in `wanted`; −1 where no label is of the class.

    Raises:
        ValueError: for labels of classes that `wanted` lacks; `what` are labelled so, the wanted classes are `whose`.
    """
    number_of = {name: number for number, name in enumerate(wanted)}
    unknown = [names[number] for number in sorted(set(labels)) if names[number] not in number_of]
    if unknown:
        raise ValueError(
            f"{what} have the classes {', '.join(unknown)}, which are none of {whose}: {', '.join(wanted)}. Name the "
            "same classes alike, or leave these images out."
        )
    return [number_of.get(name, -1) for name in names]


@dataclass(frozen=True)
class StoredLabels:
    """Which labels of a store are meant."""

    column: str
    class_names: list[str] | None

    def read(self, index: pa.Table) -> Tensor | None:
        """See `read_labels`."""
        return read_labels(index, self.column)
