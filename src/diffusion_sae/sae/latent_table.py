"""LatentTable: what is known of each latent of an SAE. `latents.parquet` of an artifact; `docs/artifacts.md` has the
columns."""

import json
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor

from .._config import check, exact_keys
from .._files import parse_json, write_atomically

LATENTS_NAME, SHEET_NAME = "latents.parquet", "latents.png"
FORMAT_VERSION = 1
SCHEMA = pa.schema(
    [
        pa.field("latent_index", pa.int32(), nullable=False),
        pa.field("density", pa.float32(), nullable=False),
        pa.field("mean_activation", pa.float32(), nullable=False),
        pa.field("max_activation", pa.float32(), nullable=False),
        pa.field("top_image_ids", pa.list_(pa.string()), nullable=False),
        pa.field("top_activations", pa.list_(pa.float32()), nullable=False),
        pa.field("label", pa.string()),
        pa.field("purity", pa.float32()),
        pa.field("name", pa.string()),
        pa.field("name_score", pa.float32()),
    ]
)
MAX_TOP_IMAGES = 1024
_MAX_ROW_BYTES = 64 * MAX_TOP_IMAGES  # ids have 32 characters
_METADATA, _BATCH = b"diffusion_sae", 1024


@dataclass(frozen=True)
class LatentRecord:
    """What is known of one latent; an image's activation is its largest over positions and timesteps."""

    latent_index: int
    density: float
    """Share of the images in which it is active."""
    mean_activation: float
    """Mean over the images in which it is active; 0 if it is active in none."""
    max_activation: float
    top_image_ids: tuple[str, ...]
    """The images that activate it most, best first."""
    top_activations: tuple[float, ...]
    label: str | None
    """The most common label among them; None where fewer than `images_per_latent` are active, or have no labels."""
    purity: float | None
    """Share of them that have this label."""
    name: str | None
    """What it stands for, in words, where somebody or something has named it."""
    name_score: float | None
    """How well the name does, as measured by what gave it."""


@dataclass(frozen=True, kw_only=True)
class LatentSource:
    """The images that the numbers of a table are of."""

    num_images: int
    images_per_latent: int
    """How many top images a latent has at most, and of how many its label is."""
    dataset: str | None = None
    split: str | None = None
    labels: str | None = None
    """Which labels of the images, where they have several."""
    format_version: int = FORMAT_VERSION


class LatentTable:
    """One row a latent, in their order. Made by `analysis.latent_table`; `sae.latents` of an artifact that has one."""

    def __init__(self, table: pa.Table, source: LatentSource) -> None:
        """
        Args:
            table: the columns of `SCHEMA`.
            source: which images they are of.

        Raises:
            ValueError: for other columns, latents that are not 0, 1, 2, …, and numbers that cannot be.
        """
        _check_columns(table.schema, "The table of latents")
        self.table = table.select(SCHEMA.names).cast(SCHEMA).combine_chunks()
        self.source = source
        self._check_values()

    def _check_values(self) -> None:
        index = self.table["latent_index"].to_pylist()
        check(index == list(range(len(index))), "latent_index must be 0, 1, 2, … in order.")
        for name in ("density", "mean_activation", "max_activation"):
            check(bool(torch.isfinite(self._numbers(name)).all()), f"{name} of the latents has NaN or infinite values.")
        density = self.density
        check(bool(((density >= 0) & (density <= 1)).all()), "density of the latents must lie in 0…1.")
        lengths = [self.table[name].combine_chunks().value_lengths() for name in ("top_image_ids", "top_activations")]
        check(lengths[0].equals(lengths[1]), "top_image_ids and top_activations of the latents differ in length.")

    def _numbers(self, name: str) -> Tensor:
        return torch.from_numpy(self.table[name].to_numpy().copy())

    @property
    def density(self) -> Float[Tensor, " num_latents"]:
        return self._numbers("density")

    @property
    def mean_activation(self) -> Float[Tensor, " num_latents"]:
        return self._numbers("mean_activation")

    @property
    def max_activation(self) -> Float[Tensor, " num_latents"]:
        return self._numbers("max_activation")

    def __len__(self) -> int:
        """Number of latents."""
        return self.table.num_rows

    def __getitem__(self, latent_index: int) -> LatentRecord:
        if not 0 <= latent_index < len(self):
            raise IndexError(f"Latents are 0…{len(self) - 1}, got {latent_index}.")
        (row,) = self.table.slice(latent_index, 1).to_pylist()
        lists = {name: tuple(row[name]) for name in ("top_image_ids", "top_activations")}
        return LatentRecord(**row | lists)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LatentTable) and self.source == other.source and self.table.equals(other.table)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        named = len(self) - self.table["name"].null_count
        return f"LatentTable({len(self)} latents on {self.source.num_images} images, {named} named)"

    def with_names(self, names: Mapping[int, str | None], scores: Mapping[int, float] | None = None) -> Self:
        """The same table with these names, and what they had before for the latents that are not given.

        Args:
            names: by latent; None takes a name away.
            scores: how well each name does; a latent that is given a name without one has none.
        """
        unknown = [i for i in {**names, **(scores or {})} if i not in range(len(self))]
        check(not unknown, f"Latents are 0…{len(self) - 1}, got names of {unknown[:5]}.")
        unnamed = [i for i in scores or {} if i not in names]
        check(not unnamed, f"Latents {unnamed[:5]} have a score but no name.")
        name, score = self.table["name"].to_pylist(), self.table["name_score"].to_pylist()
        for i, text in names.items():
            name[i], score[i] = text, (scores or {}).get(i)
        table = self.table
        for column, values in (("name", name), ("name_score", score)):
            field = SCHEMA.field(column)
            table = table.set_column(SCHEMA.names.index(column), field, pa.array(values, field.type))
        return type(self)(table, self.source)

    def names(self) -> dict[str, str]:
        """By the latent's number, as text: its name; without one the label that most of its top images have."""
        found, columns = {}, (self.table[column].to_pylist() for column in ("name", "label", "purity"))
        for latent, (name, label, purity) in enumerate(zip(*columns, strict=True)):
            if name or (label and purity > 1 / 2):
                found[str(latent)] = name or label
        return found

    def most_interpretable(self, count: int) -> list[int]:
        """Latents that a person may look at first: by purity and then by activation, in turns over the labels, so that
        a frequent one does not take all places. Without labels the strongest of those with all their top images.
        """
        columns = [self.table[name].to_pylist() for name in ("purity", "max_activation", "label")]
        purity, largest, labels = columns
        full = self.table["top_image_ids"].combine_chunks().value_lengths().to_pylist()
        shown = [i for i in range(len(self)) if full[i] == self.source.images_per_latent]
        order = sorted(shown, key=lambda i: (-(purity[i] or 0.0), -largest[i]))
        return in_turns(order, [labels[i] for i in order], count)

    def save(self, path: str | Path) -> None:
        metadata = {_METADATA: json.dumps(vars(self.source), sort_keys=True)}
        table = self.table.replace_schema_metadata(metadata)
        write_atomically(path, lambda temporary: pq.write_table(table, temporary, compression="zstd"))

    @classmethod
    def load(cls, path: str | Path, num_latents: int) -> Self:
        """
        Args:
            path: a file that `save` wrote.
            num_latents: how many latents the SAE has.

        Raises:
            ValueError: for a damaged file, one of another SAE, and one that holds more than such a table can.
        """
        path = Path(path)
        try:
            with pq.ParquetFile(path) as file:
                _check_size(file, num_latents, path)
                metadata = file.schema_arrow.metadata or {}
                batches = []
                for batch in file.iter_batches(_BATCH):
                    check(batch.nbytes <= _BATCH * _MAX_ROW_BYTES, f"{path} holds more than a table of latents can.")
                    batches.append(batch)
                table = pa.Table.from_batches(batches, file.schema_arrow.remove_metadata())
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}). Download it again, or make the table anew.") from error
        described: Any = parse_json(metadata.get(_METADATA, b""), f"The description in {path}")
        return cls(table, LatentSource(**exact_keys(LatentSource, described, f"The description in {path}")))


def in_turns(order: Sequence[int], labels: Sequence[Hashable], count: int) -> list[int]:
    """The first `count` entries in turns over the labels of the entries."""
    by_label: dict[Hashable, list[int]] = defaultdict(list)
    for entry, label in zip(order, labels, strict=True):
        by_label[label].append(entry)
    turns = max(map(len, by_label.values()), default=0)
    return [entries[turn] for turn in range(turns) for entries in by_label.values() if turn < len(entries)][:count]


def _check_columns(schema: pa.Schema, what: str) -> None:
    missing = [name for name in SCHEMA.names if name not in schema.names]
    unknown = [name for name in schema.names if name not in SCHEMA.names]
    check(not missing, f"{what} lacks the columns {', '.join(missing)}.")
    check(not unknown, f"{what} has the unknown columns {', '.join(unknown)}.")


def _check_size(file: pq.ParquetFile, num_latents: int, path: Path) -> None:
    """Before anything is read: what is compressed may be far larger than the file."""
    rows = file.metadata.num_rows
    check(rows == num_latents, f"{path} is of {rows} latents, the SAE has {num_latents}: it is of another one.")
    _check_columns(file.schema_arrow, str(path))
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
    most = max((chunk.num_values for chunk in chunks), default=0)
    size = sum(chunk.total_uncompressed_size for chunk in chunks)
    check(
        most <= rows * MAX_TOP_IMAGES and size <= rows * _MAX_ROW_BYTES + 2**20,
        f"{path} holds more than a table of {rows} latents can: {most} values, {size} bytes.",
    )


class DescribedLatents:
    """The part of an artifact that describes its latents."""

    config: Any
    latents: LatentTable | None = None
    """What is known of each latent, as in `latents.parquet`; `analysis.latent_table` makes it."""
    latent_sheet: bytes | None = None
    """A picture of some of them for the card, as PNG: `latents.png`."""

    def _write_records(self, folder: Path) -> None:
        if self.latents is not None:
            self.latents.save(folder / LATENTS_NAME)
        if self.latent_sheet is not None:
            write_atomically(folder / SHEET_NAME, lambda path: path.write_bytes(self.latent_sheet or b""))

    def _read_records(self, find: Callable[[str], str | None]) -> None:
        table, sheet = find(LATENTS_NAME), find(SHEET_NAME)
        self.latents = None if table is None else LatentTable.load(table, self.config.num_latents)
        self.latent_sheet = None if sheet is None else Path(sheet).read_bytes()
