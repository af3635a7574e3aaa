"""The files of sparse codes: what they are called, what each says of itself, how they are written and read.

    codes/pets/manifest.json        of which SAE and features they are, how many, in what format
               codes-00000.parquet  row, latents, acts of its rows; or codes-00000.safetensors: offsets, latents, acts
               codes-00000.json     its mark: rows, active latents, bytes and SHA-256

Only active latents are written, whose activation is not 0, largest first. A shard counts once it has its mark, which is
written last. The manifest is written when the work begins and when it ends, and then holds all marks.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .._config import exact_keys
from .._files import fingerprint_of, read_json, sha256_of, write_atomically, write_json
from .code import SparseCode

MANIFEST, MARK = "manifest.json", ".json"
KIND, FORMAT_VERSION = "sparse-codes", 1
FORMATS = ("parquet", "safetensors")
CHUNK_ROWS = 8192
"""What is read at a time, and a row group of Parquet."""


@dataclass(frozen=True)
class ActiveLatents:
    """The active latents of n rows without padding: those of row i are at offsets[i]…offsets[i + 1] - 1."""

    offsets: Int[Tensor, " n_plus_1"]
    latents: Int[Tensor, " active"]
    acts: Float[Tensor, " active"]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def of_counts(cls, counts: Int[Tensor, " n"], latents: Int[Tensor, " active"], acts: Tensor) -> Self:
        return cls(torch.cat([counts.new_zeros(1), counts.cumsum(0)]), latents, acts)

    @classmethod
    def of(cls, code: SparseCode) -> Self:
        """On the CPU."""
        active = code.top_acts != 0
        latents, acts = code.top_indices[active], code.top_acts[active]
        return cls.of_counts(active.sum(1).cpu(), latents.int().cpu(), acts.float().cpu())

    @classmethod
    def joined(cls, parts: Iterable[Self]) -> Self:
        parts = list(parts)
        empty = cls(torch.zeros(1, dtype=torch.long), torch.zeros(0, dtype=torch.int32), torch.zeros(0))
        whole = [empty, *parts]
        counts = torch.cat([part.offsets.diff() for part in whole])
        return cls.of_counts(counts, torch.cat([p.latents for p in whole]), torch.cat([p.acts for p in whole]))

    def take(self, rows: Int[Tensor, " r"]) -> Self:
        """The given rows in the given order."""
        counts = self.offsets.diff()[rows]
        shift = self.offsets[rows] - (counts.cumsum(0) - counts)
        place = torch.arange(int(counts.sum())) + shift.repeat_interleave(counts)
        return self.of_counts(counts, self.latents[place], self.acts[place])

    def padded(self, width: int) -> SparseCode:
        """As a rectangle of `width` columns, or of more if a row needs them; free places hold 0."""
        counts = self.offsets.diff()
        width = max(width, 1, int(counts.max()) if len(counts) else 0)
        used = torch.arange(width) < counts[:, None]
        acts, indices = torch.zeros(len(self), width), torch.zeros(len(self), width, dtype=torch.long)
        acts[used], indices[used] = self.acts, self.latents.long()
        return SparseCode(acts, indices)


def shard_name(number: int) -> str:
    return f"codes-{number:05d}"


@dataclass(frozen=True)
class ShardMark:
    """What a finished shard has beside it."""

    shard: str
    """Name and `Manifest.fingerprint`, so that a shard from another folder is found out."""
    rows: int
    active: int
    """Active latents of all its rows."""
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """manifest.json."""

    kind: str
    format_version: int
    format: str
    """parquet or safetensors."""
    num_latents: int
    k: int
    rows: int
    file_rows: int
    """Rows a shard; the last has what is left."""
    rows_per_image: int
    """Over all positions and timesteps of an image."""
    timesteps: list[int]
    """In the order of the rows, of each as many; empty where they are not known."""
    sae: dict[str, Any]
    """name, config and weights, a hash over all tensors."""
    features: dict[str, Any]
    """fingerprint and provenance, the record of their extraction."""
    complete: bool = False
    shards: list[dict[str, Any]] = field(default_factory=list)
    """The marks of all shards of a complete folder, none before."""

    @cached_property
    def fingerprint(self) -> str:
        """Of what decides the bytes of the shards."""
        content = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("complete", "shards")
        }
        own = {"sae": _without(self.sae, "name"), "features": _without(self.features, "provenance")}
        return fingerprint_of(content | own)

    @property
    def num_shards(self) -> int:
        return -(-self.rows // self.file_rows)

    def rows_of(self, shard: int) -> range:
        start = shard * self.file_rows
        return range(start, min(start + self.file_rows, self.rows))

    def mark_of(self, shard: int) -> str:
        return f"{shard_name(shard)} of {self.fingerprint}"

    def file_of(self, folder: Path, shard: int) -> Path:
        return folder / f"{shard_name(shard)}.{self.format}"

    def write(self, folder: Path) -> None:
        write_json(folder / MANIFEST, dataclasses.asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Raises FileNotFoundError if there is none, ValueError for one of something else or another version."""
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(
                f"There are no sparse codes in {str(folder)!r}: it has no {MANIFEST}. Make them with encode_features "
                "or `diffusion-sae encode`."
            )
        content = read_json(path)
        kind = content.get("kind") if isinstance(content, dict) else None
        if kind != KIND:
            raise ValueError(
                f"{path} is not of sparse codes (its kind is {kind!r}, not {KIND!r}). Choose another folder: this one "
                "belongs to something else, such as a feature store."
            )
        if content.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format version {content.get('format_version')!r}; this library reads {FORMAT_VERSION}. "
                "Encode again, or use the library's version that wrote it."
            )
        return cls(**exact_keys(cls, content, str(path)))


def _without(content: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name != key}


def problem_of(folder: Path, manifest: Manifest, number: int) -> str | None:
    """What is wrong with a shard as far as its mark and the size of its file say; None: nothing."""
    mark_path, path = folder / (shard_name(number) + MARK), manifest.file_of(folder, number)
    missing = [file.name for file in (path, mark_path) if not file.is_file()]
    if missing:
        return f"{' and '.join(missing)} missing"
    mark = ShardMark(**exact_keys(ShardMark, read_json(mark_path), str(mark_path)))
    if mark.shard != manifest.mark_of(number) or mark.rows != len(manifest.rows_of(number)):
        return f"{path.name} is of another folder ({mark.shard!r} instead of {manifest.mark_of(number)!r})"
    size = path.stat().st_size
    return None if size == mark.bytes else f"{path.name} is damaged: {size} bytes instead of {mark.bytes}"


def write_shard(folder: Path, manifest: Manifest, number: int, parts: Sequence[ActiveLatents]) -> None:
    """Its file first, then the mark that makes it count."""
    content, path = ActiveLatents.joined(parts), manifest.file_of(folder, number)
    says = {"shard": manifest.mark_of(number)}
    if manifest.format == "parquet":
        table = _table(content, manifest, manifest.rows_of(number).start).replace_schema_metadata(says)
        lists = dict.fromkeys(("latents.list.element", "acts.list.element"), "BYTE_STREAM_SPLIT")
        # dictionaries cost more time here than the compression they precede
        settings: dict[str, Any] = {"compression": "zstd", "use_dictionary": False, "column_encoding": lists}
        write_atomically(path, lambda file: pq.write_table(table, file, row_group_size=CHUNK_ROWS, **settings))
    else:
        tensors = {"offsets": content.offsets, "latents": content.latents, "acts": content.acts}
        write_atomically(path, lambda file: save_file(tensors, file, metadata=says))
    mark = ShardMark(says["shard"], len(content), len(content.acts), path.stat().st_size, sha256_of(path))
    write_json(folder / (shard_name(number) + MARK), dataclasses.asdict(mark))


def _table(content: ActiveLatents, manifest: Manifest, first: int) -> pa.Table:
    row = np.arange(first, first + len(content))
    columns: dict[str, Any] = {"row": row}
    if manifest.rows_per_image > 1:
        per_timestep = manifest.rows // max(1, len(manifest.timesteps))
        positions = manifest.rows_per_image // max(1, len(manifest.timesteps))
        columns["image"] = (row % per_timestep // positions).astype(np.int32)
        columns["position"] = (row % positions).astype(np.int32)
        if len(manifest.timesteps) > 1:
            columns["timestep"] = np.array(manifest.timesteps, np.int32)[row // per_timestep]
    offsets = pa.array(content.offsets.numpy(), pa.int32())
    columns["latents"] = pa.ListArray.from_arrays(offsets, pa.array(content.latents.numpy()))
    columns["acts"] = pa.ListArray.from_arrays(offsets, pa.array(content.acts.numpy()))
    return pa.table(columns)


def read_chunk(path: Path, start: int, stop: int) -> ActiveLatents:
    """Rows of a shard, which must be those of one chunk.

    Raises:
        ValueError: if the file cannot be read, naming it.
    """
    try:
        chunk = _parquet_chunk(path, start) if path.suffix == ".parquet" else _safetensors_chunk(path, start, stop)
    except (pa.ArrowException, SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}). {repair(path)}") from error
    if len(chunk) != stop - start:
        raise ValueError(f"{path} is damaged: {len(chunk)} rows from {start}, not {stop - start}. {repair(path)}")
    return chunk


def repair(path: Path) -> str:
    return f"Delete {path.name} and call encode_features again with the same SAE and features: it is made anew."


def _parquet_chunk(path: Path, start: int) -> ActiveLatents:
    with pq.ParquetFile(path) as file:
        table = file.read_row_group(start // CHUNK_ROWS, columns=["latents", "acts"], use_threads=False)
    latents, acts = (table[name].combine_chunks() for name in ("latents", "acts"))
    counts = torch.from_numpy(np.diff(acts.offsets.to_numpy()).astype(np.int64))
    values = (torch.from_numpy(column.flatten().to_numpy().copy()) for column in (latents, acts))
    return ActiveLatents.of_counts(counts, *values)


def _safetensors_chunk(path: Path, start: int, stop: int) -> ActiveLatents:
    with safe_open(path, "pt") as file:
        offsets = file.get_slice("offsets")[start : stop + 1]
        begin, end = int(offsets[0]), int(offsets[-1])
        if begin == end:
            return ActiveLatents(offsets - begin, torch.zeros(0, dtype=torch.int32), torch.zeros(0))
        return ActiveLatents(offsets - begin, *(file.get_slice(name)[begin:end] for name in ("latents", "acts")))
