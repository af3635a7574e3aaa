"""The files of a store: what they are called, and what each says of itself.

    features/pets/manifest.json            provenance, class names, and of which data sets the images are
                  shard-00000.safetensors  one tensor a (layer, timestep), named `up_ft1@25`: (n, C), (n, T, C), …; of
                                           augmented views of the images one each: `up_ft1@25|view 1`
                  shard-00000.parquet      image_id, source, label of its rows, and further labels: label_subgroup
                  shard-00000.json         its mark: rows, bytes and SHA-256 of both files, images that were skipped

A shard counts once it has its mark, which is written last; what a killed run left beside is made again. The manifest
is written when the work begins and when it ends, and then holds all marks: a finished store is one consistent whole.
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from .._config import check, check_integer, exact_keys
from .._files import parse_json
from ..hub.safe_files import MAX_HEADER_BYTES
from ..provenance import Provenance
from .labels import LABEL, StoredLabels, label_column

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
DATA, INDEX, MARK = ".safetensors", ".parquet", ".json"
MOST = 2**40  # images
METADATA = "__metadata__"  # safetensors' name
LATER = {"label_name": LABEL, "more_labels": {}}  # fields of the manifest that not every store has, and what it means
# safetensors' names; bf16 has no numpy type and is mapped as int16
TYPES = {
    "F32": (np.float32, torch.float32),
    "F16": (np.float16, torch.float16),
    "BF16": (np.int16, torch.bfloat16),
}


Key = tuple[Any, ...]
"""(layer, timestep), and of an augmented view (layer, timestep, view)."""


def tensor_name(layer: str, timestep: int, view: int = 0) -> str:
    return f"{layer}@{timestep}" + (f"|view {view}" if view else "")


def shard_name(number: int) -> str:
    return f"shard-{number:05d}"


def repair(name: str) -> str:
    """What to do about a damaged shard, for the end of a message."""
    return (
        f"To have it made anew, delete {name}{DATA}, {name}{INDEX} and {name}{MARK} and call extract again with the "
        "same data; one from the Hub is downloaded again."
    )


def _are_records(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(entry, dict) and all(isinstance(text, str) for text in entry.values()) for entry in value
    )


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


@dataclass(frozen=True)
class ShardMark:
    """What a finished shard has beside it."""

    shard: str
    """Name, extraction and data, so that a shard from another place or store is found out."""
    rows: int
    """Images."""
    bytes: dict[str, int]
    sha256: dict[str, str]
    skipped: list[dict[str, str]]
    """Broken images that were left out: source and reason."""

    def __post_init__(self) -> None:
        check(isinstance(self.shard, str), f"shard must be a string, got {self.shard!r}.")
        check_integer("rows", self.rows, 0)
        for name, kind in (("bytes", int), ("sha256", str)):
            sizes = getattr(self, name)
            known = isinstance(sizes, dict) and set(sizes) == {DATA, INDEX}
            check(
                known and all(type(size) is kind for size in sizes.values()),
                f"{name} must be of both files, got {sizes!r}.",
            )
        check(_are_records(self.skipped), f"skipped must be a list of sources and reasons, got {self.skipped!r}.")

    @property
    def name(self) -> str:
        return self.shard.split(" ", 1)[0]

    @classmethod
    def from_dict(cls, content: Any, where: str) -> Self:
        return cls(**exact_keys(cls, content, where))


@dataclass(frozen=True)
class Part:
    """The images of one data set: the first that a store was begun with, and each that was appended."""

    data_fingerprint: str
    num_images: int
    """Broken ones included."""
    shard_size: int
    """Images a shard."""
    first_shard: int

    def __post_init__(self) -> None:
        check(
            isinstance(self.data_fingerprint, str), f"data_fingerprint must be a string, got {self.data_fingerprint!r}."
        )
        check_integer("num_images", self.num_images, 0, MOST)
        check_integer("shard_size", self.shard_size, 1, MOST)
        check_integer("first_shard", self.first_shard, 0, MOST)

    @property
    def shards(self) -> range:
        return range(self.first_shard, self.first_shard + -(-self.num_images // self.shard_size))

    def rows(self, shard: int) -> range:
        """Which images of the data set a shard holds."""
        start = (shard - self.first_shard) * self.shard_size
        return range(start, min(start + self.shard_size, self.num_images))


@dataclass(frozen=True)
class Manifest:
    """manifest.json."""

    format_version: int
    provenance: dict[str, Any]
    dtype: str
    """Type of the stored numbers, which need not be that of the computation."""
    class_names: list[str] | None
    labelled: bool
    parts: list[Part]
    complete: bool = False
    shards: list[ShardMark] = field(default_factory=list)
    """All of them in a complete store, none before."""
    label_name: str = LABEL
    """What the data call the labels that `class_names` are of."""
    more_labels: dict[str, list[str]] = field(default_factory=dict)
    """Class names of the further labels, by name."""

    def __post_init__(self) -> None:
        check(isinstance(self.provenance, dict), f"provenance must be an object, got {self.provenance!r}.")
        check(f"torch.{self.dtype}" in map(str, (kind for _, kind in TYPES.values())), f"unknown dtype {self.dtype!r}.")
        check(
            self.class_names is None or _are_names(self.class_names),
            f"class_names must be names, got {self.class_names!r}.",
        )
        check(
            isinstance(self.labelled, bool) and isinstance(self.complete, bool),
            "labelled and complete must be booleans.",
        )
        check(isinstance(self.label_name, str), f"label_name must be a string, got {self.label_name!r}.")
        names = self.more_labels.values() if isinstance(self.more_labels, dict) else [None]
        check(all(map(_are_names, names)), f"more_labels must be lists of names, got {self.more_labels!r}.")
        check(len(self.parts) > 0, "parts must hold at least one data set.")
        begin = 0
        for part in self.parts:
            check(
                part.first_shard == begin,
                f"parts must follow one another: one begins at shard {part.first_shard}, not {begin}.",
            )
            begin = part.shards.stop
        expected = begin if self.complete else 0
        check(len(self.shards) == expected, f"shards must hold {expected} marks, got {len(self.shards)}.")

    @property
    def num_shards(self) -> int:
        return self.parts[-1].shards.stop

    @property
    def label_names(self) -> tuple[str, ...]:
        """The default one first."""
        return *((self.label_name,) if self.labelled else ()), *self.more_labels

    def labels_named(self, name: str | None) -> StoredLabels:
        """Raises ValueError for labels that the images do not have; None: the default ones, which may be none."""
        if name is None or (name == self.label_name and self.labelled):
            return StoredLabels(LABEL, self.class_names)
        if name not in self.more_labels:
            known = ", ".join(map(repr, self.label_names)) or "none"
            raise ValueError(f"The images have no labels {name!r}. Their labels: {known}.")
        return StoredLabels(label_column(name), self.more_labels[name])

    def part_of(self, shard: int) -> Part:
        return next(part for part in self.parts if shard in part.shards)

    @cached_property
    def record(self) -> Provenance:
        return Provenance.from_dict(self.provenance)

    @cached_property
    def _fingerprint(self) -> str:
        return self.record.fingerprint

    def mark_of(self, shard: int) -> str:
        """What the files of a shard say about themselves."""
        return f"{shard_name(shard)} of {self._fingerprint} over {self.part_of(shard).data_fingerprint}"

    def to_dict(self) -> dict[str, Any]:
        """Without further labels, what it was before there were any: a store's files stay the same."""
        content = asdict(self)
        return {key: value for key, value in content.items() if key not in LATER or value != LATER[key]}

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Raises FileNotFoundError if there is none, ValueError for a damaged one or one of another format."""
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no feature store in {str(folder)!r}: it has no {MANIFEST}. "
                "Make one with DiffusionFeatureExtractor.extract or `diffusion-sae extract`."
            )
        return cls.parse(path.read_bytes(), str(path))

    @classmethod
    def parse(cls, text: bytes, where: str) -> Self:
        """Content of a manifest; errors call it `where`."""
        content = parse_json(text, where)
        version = content.get("format_version") if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{where} has format version {version!r}; this library reads {FORMAT_VERSION}. Extract again, or use "
                "the library's version that wrote it."
            )
        content = exact_keys(cls, LATER | content, where)
        for name in ("parts", "shards"):
            check(isinstance(content[name], list), f"{where} is damaged: {name} must be a list.")
        try:
            parts = [Part(**exact_keys(Part, part, where)) for part in content["parts"]]
            shards = [ShardMark.from_dict(mark, where) for mark in content["shards"]]
            manifest = cls(**content | {"parts": parts, "shards": shards})
            for number, mark in enumerate(shards):
                check(mark.shard == manifest.mark_of(number), f"shard {number} is called {mark.shard!r}.")
        except ValueError as error:
            raise ValueError(str(error) if where in str(error) else f"{where} is damaged: {error}") from error
        return manifest


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Header of a safetensors file and the offset of its data; raises if the file is not as long as the header says."""
    with path.open("rb") as file:
        length = header_length(file.read(8), str(path))
        size = path.stat().st_size
        if length > size - 8:
            raise ValueError(f"{path} is no complete safetensors file ({size} bytes).")
        header = parse_header(file.read(length), str(path))
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name != METADATA), default=0)
    if size != 8 + length + end:
        raise ValueError(f"{path} is damaged: it has {size} bytes, its header announces {8 + length + end}.")
    return header, 8 + length


def header_length(prefix: bytes, path: str) -> int:
    """From the first 8 bytes of a safetensors file."""
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 0 < length <= MAX_HEADER_BYTES:
        raise ValueError(
            f"{path} is no complete safetensors file: its header has {length:,} bytes, of {MAX_HEADER_BYTES:,} at most."
        )
    return length


def parse_header(content: bytes, path: str) -> dict[str, Any]:
    """Names and entries; each says its type, its shape and where its bytes are, of which it has as many as it needs."""
    try:
        header = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its header is not valid JSON ({error}).") from error
    if not isinstance(header, dict) or not isinstance(header.get(METADATA, {}), dict):
        raise ValueError(f"{path} is damaged: its header is no object of tensors.")  # noqa: TRY004
    for name, entry in header.items():
        if name != METADATA and not _is_entry(entry):
            raise ValueError(f"{path} is damaged: its header says {str(entry)[:200]} of {name[:100]}.")
    return header


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
            return False
    size = np.dtype(TYPES[entry["dtype"]][0]).itemsize if entry["dtype"] in TYPES else None
    return len(offsets) == 2 and (size is None or math.prod(shape) * size == offsets[1] - offsets[0])  # type: ignore[arg-type]


def as_tensor(buffer: np.ndarray, entry: Mapping[str, Any]) -> Tensor:
    """Bytes as the tensor that an entry of a header describes."""
    numpy_type, torch_type = TYPES[entry["dtype"]]
    return torch.from_numpy(buffer.view(numpy_type).reshape(entry["shape"])).view(torch_type)


class MappedRows:
    """A tensor of a shard as rows (n, …), memory-mapped when first touched."""

    def __init__(self, path: Path, name: str, shape: Sequence[int]) -> None:
        self.path, self.name, self.shape = path, name, torch.Size(shape)

    def __len__(self) -> int:
        return self.shape[0]

    def map(self) -> Tensor:
        header, offset = read_header(self.path)
        entry = header[self.name]
        begin, end = entry["data_offsets"]
        # mode "c" (copy on write): torch wants writable memory
        mapped = np.memmap(self.path, np.uint8, "c", offset + begin, (end - begin,))
        return as_tensor(mapped, entry).view(self.shape)
