"""Writing a feature store, shard by shard, so that a kill at any moment loses at most the shards in work."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import Tensor

from .._config import check_choice
from .._files import remove_leftovers, sha256_of, write_atomically, write_json
from ..provenance import DTYPES, Provenance
from .beginning import DataRecord, begin_or_continue
from .checks import finished_shards
from .labels import LABEL, LabelSet, index_schema
from .layout import DATA, INDEX, MANIFEST, MARK, Key, Manifest, Part, ShardMark, shard_name, tensor_name


@dataclass
class Shard:
    """Rows on their way to the disk."""

    dtype: torch.dtype | None = None
    """Type they are stored in; None: as they come."""
    features: dict[Key, list[Tensor]] = field(default_factory=dict)
    image_ids: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    labels: list[int | None] = field(default_factory=list)
    more_labels: dict[str, list[int | None]] = field(default_factory=dict)
    skipped: list[dict[str, str]] = field(default_factory=list)

    def add(
        self,
        features: Mapping[Any, Tensor],
        image_ids: Sequence[str],
        sources: Sequence[str],
        labels: Sequence[int | None],
        more_labels: Mapping[str, Sequence[int | None]] | None = None,
    ) -> None:
        """Images of one batch: features {(layer, timestep): (B, …)} and one entry an image of the others.

        Of augmented views of the images: {(layer, timestep, view): (B, …)} as well.

        The further labels go by the names that the store was begun with.

        Raises:
            ValueError: for NaN or infinite values, and for such as are too large for `dtype`.
        """
        for key, values in features.items():
            bad = _not_finite(values, sources)
            if bad:
                raise ValueError(
                    f"{tensor_name(*key)} came out as NaN or infinite for {', '.join(bad[:5])}. Use dtype bfloat16 or "
                    "float32 if it was float16; otherwise check the model's weights."
                )
            stored = values.to(self.dtype or values.dtype)
            bad = _not_finite(stored, sources)
            if bad:
                raise ValueError(
                    f"{tensor_name(*key)} reaches {values.abs().max().item():.4g} for {', '.join(bad[:5])}, which "
                    f"{stored.dtype} cannot hold (its largest number is {torch.finfo(stored.dtype).max:.4g}). Use "
                    "store_dtype 'bfloat16' or 'float32'."
                )
            self.features.setdefault(key, []).append(stored.cpu())
        self.image_ids += image_ids
        self.sources += sources
        self.labels += labels
        for name, values in (more_labels or {}).items():
            self.more_labels.setdefault(name, []).extend(values)

    def index(self, further: Sequence[str]) -> pa.Table:
        """What the Parquet file holds, of images with these further labels.

        Raises:
            ValueError: if not every image has them.
        """
        rows = len(self.image_ids)
        for name in {*further, *self.more_labels}:
            values = self.more_labels.get(name, [])
            if name not in further or len(values) != rows:
                raise ValueError(
                    f"{rows} images came with {len(values)} labels {name!r}; the store was begun with the further "
                    f"labels {list(further)}, one an image. Give Shard.add those and no others."
                )
        columns = [self.image_ids, self.sources, self.labels, *(self.more_labels.get(name, []) for name in further)]
        schema = index_schema(further)
        return pa.Table.from_arrays([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)


def _not_finite(values: Tensor, sources: Sequence[str]) -> list[str]:
    finite = torch.isfinite(values.flatten(1)).all(1)
    return [source for source, ok in zip(sources, finite.tolist(), strict=True) if not ok]


class StoreWriter:
    """Begins a store, goes on with one, or appends to one, after checking that it is the same extraction.

    Several processes may write one store: the first begins it, the others join with its `state`, and each writes other
    shards.
    """

    def __init__(
        self,
        folder: str | Path,
        provenance: Provenance,
        *,
        source_names: Sequence[str],
        labels: Sequence[int | None],
        class_names: Sequence[str] | None,
        shard_size: int,
        store_dtype: str | None = None,
        append: bool = False,
        texts: Sequence[str] | None = None,
        label_name: str = LABEL,
        more_labels: Mapping[str, LabelSet] | None = None,
        other_image: Callable[[int, str], bool] | None = None,
    ) -> None:
        """Open a store for writing; on return the manifest is on the disk.

        Args:
            folder: where it is, or will be.
            provenance: the extraction that makes the features.
            source_names, labels, texts: of each image of the data set; texts are its prompts, if it has its own.
            class_names: what the labels mean.
            label_name: what the data call these labels.
            more_labels: further labels of each image, by name.
            shard_size: images a shard.
            store_dtype: float32, bfloat16 or float16; None: that of the computation.
            append: the images come behind those of other data sets.
            other_image: `other_image(row, image_id)` reads a row of the data set and says whether it is another image
                than the one that the store holds for it.

        Raises:
            ProvenanceMismatchError: if the store is of another extraction.
            ValueError: if it is of other data or another dtype, or damaged.
            FileNotFoundError: if there is no store to append to.
        """
        if store_dtype is not None:
            check_choice("store_dtype", store_dtype, DTYPES)
        self.folder = Path(folder)
        data = DataRecord.of(source_names, labels, class_names, shard_size, texts, label_name, more_labels)
        self.manifest, self.part, self.missing = begin_or_continue(
            self.folder,
            provenance,
            data,
            dtype=store_dtype or provenance.dtype,
            append=append,
            source_names=source_names,
            other_image=other_image,
        )
        remove_leftovers(self.folder, "shard-*", MANIFEST)

    @classmethod
    def joining(cls, folder: str | Path, state: tuple[Manifest, Part, list[int]]) -> Self:
        """The writer of another process, from what the first one's `state` is."""
        writer = cls.__new__(cls)
        writer.folder = Path(folder)
        writer.manifest, writer.part, writer.missing = state
        return writer

    @property
    def state(self) -> tuple[Manifest, Part, list[int]]:
        """What `joining` takes."""
        return self.manifest, self.part, self.missing

    def new_shard(self) -> Shard:
        return Shard(getattr(torch, self.manifest.dtype))

    def write(self, number: int, shard: Shard) -> None:
        """Index and data first, then the mark that makes them count."""
        if number not in self.part.shards:
            raise ValueError(
                f"These images make the shards {self.part.shards.start}…{self.part.shards.stop - 1}, got {number}."
            )
        name, says = shard_name(number), {"shard": self.manifest.mark_of(number)}
        index = shard.index(list(self.manifest.more_labels)).replace_schema_metadata(says)
        paths = {suffix: self.folder / (name + suffix) for suffix in (DATA, INDEX)}
        write_atomically(paths[INDEX], lambda path: pq.write_table(index, path))
        # each list is given up as soon as it is joined
        tensors = {tensor_name(*key): torch.cat(shard.features.pop(key)).contiguous() for key in list(shard.features)}
        write_atomically(paths[DATA], lambda path: save_file(tensors, path, metadata=says))
        mark = ShardMark(
            shard=says["shard"],
            rows=len(shard.image_ids),
            bytes={suffix: path.stat().st_size for suffix, path in paths.items()},
            sha256={suffix: sha256_of(path) for suffix, path in paths.items()},
            skipped=shard.skipped,
        )
        write_json(self.folder / (name + MARK), dataclasses.asdict(mark))

    def finish(self) -> None:
        """Complete the store when no shard is missing; images of other data sets may still be on their way."""
        if self.manifest.complete:
            return
        found = finished_shards(self.folder, self.manifest)
        if len(found) < self.manifest.num_shards:
            return
        complete = dataclasses.replace(self.manifest, complete=True, shards=list(found.values()))
        write_json(self.folder / MANIFEST, complete.to_dict())
        self.manifest = complete
