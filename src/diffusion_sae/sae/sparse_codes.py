"""SparseCodes: the sparse codes of many rows on disk, opened. The format is in `code_files`."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._config import check_integer
from .._files import read_json, sha256_of
from ..provenance import Provenance
from .code import SparseCode
from .code_files import CHUNK_ROWS, MARK, ActiveLatents, Manifest, problem_of, read_chunk, repair, shard_name
from .configuration import TOP_K


class _Chunk(NamedTuple):
    """Rows of one shard that are read together."""

    shard: int
    start: int
    """First row, counted over all shards."""
    stop: int


class SparseCodes:
    """The active latents of N rows of features, made by `encode_features` and read a chunk of rows at a time.

    Nothing holds more than a chunk beside what it returns.
    """

    def __init__(self, path: str | Path, *, verify: bool = False) -> None:
        """Open them.

        Args:
            path: their folder.
            verify: also read every byte, see `verify`.

        Raises:
            FileNotFoundError: if there are none, or shards are missing, naming them.
            ValueError: for damaged shards, naming them.
        """
        self.path = Path(path)
        self.manifest = Manifest.read(self.path)
        self._require_all()
        record = self.manifest.features["provenance"]
        self.provenance = None if record is None else Provenance.from_dict(record)
        """The extraction that made the features."""
        self._read: tuple[_Chunk, ActiveLatents] | None = None
        if verify:
            self.verify()

    def _require_all(self) -> None:
        shards = self.manifest.num_shards
        found = [problem_of(self.path, self.manifest, number) for number in range(shards)]
        problems = [problem for problem in found if problem is not None]
        if not problems:
            return
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        kind = FileNotFoundError if all(problem.endswith("missing") for problem in problems) else ValueError
        raise kind(
            f"The sparse codes in {str(self.path)!r} lack {len(problems)} of {shards} shards: "
            f"{'; '.join(problems[:5])}{more}. Call encode_features again with the same SAE and features: it makes "
            "these alone."
        )

    def verify(self) -> None:
        """Read every byte of the shards and compare with the SHA-256 that was written down when they were made.

        Raises:
            ValueError: naming the first file that has changed.
        """
        for number in range(self.manifest.num_shards):
            path = self.manifest.file_of(self.path, number)
            if sha256_of(path) != read_json(self.path / (shard_name(number) + MARK))["sha256"]:
                raise ValueError(f"The content of {path} is not what was written: damaged. {repair(path)}")

    @property
    def num_latents(self) -> int:
        return self.manifest.num_latents

    @property
    def k(self) -> int:
        return self.manifest.k

    def __len__(self) -> int:
        """Number of rows."""
        return self.manifest.rows

    def __repr__(self) -> str:
        return f"SparseCodes({str(self.path)!r}, {len(self)} rows, {self.num_latents} latents, k={self.k})"

    def __getitem__(self, rows: Tensor | slice | Sequence[int]) -> SparseCode:
        """The given rows in the given order, as `sae.encode` gives them; also a slice, or a mask of all rows."""
        if isinstance(rows, slice):
            index = torch.arange(*rows.indices(len(self)))
        elif isinstance(rows, Tensor) and rows.dtype == torch.bool:
            if rows.shape != (len(self),):
                raise IndexError(f"A mask must have one entry a row, {len(self)}, got the shape {tuple(rows.shape)}.")
            index = torch.nonzero(rows).flatten().cpu()
        else:
            index = torch.as_tensor(rows, dtype=torch.long).cpu()
        if index.ndim != 1:
            raise IndexError(f"Rows must be a slice or a list of numbers, got the shape {tuple(index.shape)}.")
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(self):
            raise IndexError(f"Rows must lie in 0…{len(self) - 1}, got {int(index.min())}…{int(index.max())}.")
        ascending, order = index.sort()
        parts = []
        while len(ascending):
            chunk = self._chunk_of(int(ascending[0]))
            inside = int(torch.searchsorted(ascending, chunk.stop))
            parts.append(self._content(chunk).take(ascending[:inside] - chunk.start))
            ascending = ascending[inside:]
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        fixed = self.manifest.sae["config"]["activation"] in TOP_K
        return ActiveLatents.joined(parts).take(place).padded(self.k if fixed else 1)

    def _chunk_of(self, row: int) -> _Chunk:
        shard = row // self.manifest.file_rows
        rows = self.manifest.rows_of(shard)
        start = rows.start + (row - rows.start) // CHUNK_ROWS * CHUNK_ROWS
        return _Chunk(shard, start, min(start + CHUNK_ROWS, rows.stop))

    def _content(self, chunk: _Chunk) -> ActiveLatents:
        """The last one is kept: small batches read it once."""
        if self._read is None or self._read[0] != chunk:
            first = self.manifest.rows_of(chunk.shard).start
            path = self.manifest.file_of(self.path, chunk.shard)
            self._read = (chunk, read_chunk(path, chunk.start - first, chunk.stop - first))
        return self._read[1]

    def _contents(self) -> Iterator[tuple[int, ActiveLatents]]:
        """First row and content of all chunks in order."""
        row = 0
        while row < len(self):
            chunk = self._chunk_of(row)
            yield row, self._content(chunk)
            row = chunk.stop

    def batches(self, batch_size: int = CHUNK_ROWS) -> Iterator[SparseCode]:
        """All rows in order."""
        check_integer("batch_size", batch_size, 1)
        for start in range(0, len(self), batch_size):
            yield self[start : start + batch_size]

    def for_latent(self, latent_index: int) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
        """The rows in which a latent is active, ascending, and its activations there; reads all shards once."""
        check_integer("latent_index", latent_index, 0, self.num_latents - 1)
        rows, acts = [], []
        for first, content in self._contents():
            found = torch.nonzero(content.latents == latent_index).flatten()
            rows.append(first + torch.searchsorted(content.offsets, found, right=True) - 1)
            acts.append(content.acts[found])
        return torch.cat(rows), torch.cat(acts)

    @cached_property
    def _statistics(self) -> tuple[Int[Tensor, " num_latents"], Float[Tensor, " num_latents"]]:
        """Rows in which each latent is active, and its largest activation: one pass over all shards."""
        counts = torch.zeros(self.num_latents, dtype=torch.long)
        largest = torch.full((self.num_latents,), -torch.inf)
        for _, content in self._contents():
            latents = content.latents.long()
            counts += torch.bincount(latents, minlength=self.num_latents)
            largest.scatter_reduce_(0, latents, content.acts, "amax")
        return counts, torch.where(counts > 0, largest, 0.0)

    def density(self) -> Float[Tensor, " num_latents"]:
        """Share of the rows in which each latent is active."""
        return (self._statistics[0].double() / len(self)).float()

    def max_acts(self) -> Float[Tensor, " num_latents"]:
        """Largest activation of each latent; 0 where it is active in no row."""
        return self._statistics[1].clone()
