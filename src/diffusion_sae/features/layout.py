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
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from .._config import exact_keys
from .._files import parse_json
from ..provenance import Provenance
from .labels import LABEL, StoredLabels, label_column

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
DATA, INDEX, MARK = ".safetensors", ".parquet", ".json"
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
        parts = [Part(**exact_keys(Part, part, where)) for part in content["parts"]]
        shards = [ShardMark.from_dict(mark, where) for mark in content["shards"]]
        return cls(**content | {"parts": parts, "shards": shards})


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Header of a safetensors file and the offset of its data; raises if the file is not as long as the header says."""
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        size = path.stat().st_size
        if not 0 < length <= size - 8:
            raise ValueError(f"{path} is no complete safetensors file ({size} bytes).")
        header = parse_header(file.read(length), str(path))
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name != METADATA), default=0)
    if size != 8 + length + end:
        raise ValueError(f"{path} is damaged: it has {size} bytes, its header announces {8 + length + end}.")
    return header, 8 + length


def parse_header(content: bytes, path: str) -> dict[str, Any]:
    try:
        return json.loads(content)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: its header is not valid JSON ({error}).") from error


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
