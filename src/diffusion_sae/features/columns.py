"""Strings of the store's index, as Arrow keeps them."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Self, overload

import pyarrow as pa

INDEX_SCHEMA = pa.schema([("image_id", pa.string()), ("source", pa.string()), ("label", pa.int64())])


class StringColumn(Sequence[str]):
    """A sequence of strings in an Arrow array: a million take their bytes and not a Python object each.

    Equal to any sequence of the same strings.
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, values: pa.ChunkedArray) -> None:
        self.arrow = values

    @classmethod
    def of(cls, values: Iterable[str]) -> Self:
        return cls(pa.chunked_array([pa.array(values, pa.string())]))

    @classmethod
    def numbers(cls, count: int) -> Self:
        """The strings 0 … count - 1."""
        return cls(pa.chunked_array([pa.array(range(count), pa.int64()).cast(pa.string())]))

    def __len__(self) -> int:
        return len(self.arrow)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "StringColumn": ...
    def __getitem__(self, index: int | slice) -> "str | StringColumn":
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return StringColumn(self.arrow.slice(start, max(0, stop - start)))
            return StringColumn(self.arrow.take(pa.array(range(start, stop, step), pa.int64())))
        return self.arrow[index].as_py()

    def __iter__(self) -> Iterator[str]:
        for chunk in self.arrow.iterchunks():
            for start in range(0, len(chunk), 4096):
                yield from chunk.slice(start, 4096).to_pylist()

    def __eq__(self, other: object) -> bool:
        if isinstance(other, StringColumn):
            return self.arrow.equals(other.arrow)
        if isinstance(other, str) or not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self[:3]))
        return f"StringColumn([{shown}{', …' if len(self) > 3 else ''}], {len(self)} strings)"
