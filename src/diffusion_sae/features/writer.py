"""Writing a feature store, shard by shard, so that a kill at any moment loses at most the shard in work."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import Tensor

from .._files import fingerprint_of, require_writable_folder, write_atomically, write_json
from ..provenance import Provenance, require_same_provenance
from .store import FORMAT_VERSION, MANIFEST, FeatureStore, shard_mark, tensor_name


@dataclass
class Shard:
    """Rows on their way to the disk."""

    features: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)
    image_ids: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    labels: list[int | None] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)

    def add(
        self,
        features: dict[tuple[str, int], Tensor],
        image_ids: Sequence[str],
        sources: Sequence[str],
        labels: Sequence[int | None],
    ) -> None:
        for key, values in features.items():
            finite = torch.isfinite(values.flatten(1)).all(1)
            if not finite.all():
                bad = [source for source, ok in zip(sources, finite.tolist(), strict=True) if not ok]
                raise ValueError(
                    f"{tensor_name(*key)} came out as NaN or infinite for {', '.join(bad[:5])}. Use dtype bfloat16 or "
                    "float32 if it was float16; otherwise check the model's weights."
                )
            self.features.setdefault(key, []).append(values.cpu())
        self.image_ids += image_ids
        self.sources += sources
        self.labels += labels


class StoreWriter:
    """Begins a store or goes on with one, after checking that it holds the same extraction of the same data."""

    def __init__(
        self,
        folder: str | Path,
        provenance: Provenance,
        *,
        source_names: Sequence[str],
        labels: Sequence[int | None],
        class_names: Sequence[str] | None,
        shard_size: int,
    ) -> None:
        self.folder = require_writable_folder(folder)
        self.provenance = provenance
        data = {
            "names": list(source_names),
            "labels": list(labels),
            "classes": list(class_names or ()),
            "shard_size": shard_size,
        }
        self.manifest = {
            "format_version": FORMAT_VERSION,
            "provenance": provenance.to_dict(),
            "class_names": None if class_names is None else list(class_names),
            "data_fingerprint": fingerprint_of(data),
            "complete": False,
            "shards": [],
        }
        path = self.folder / MANIFEST
        if path.exists():
            self._continue(FeatureStore(self.folder))  # finds damaged shards before the work starts
        else:
            write_json(path, self.manifest)
        for leftover in [*self.folder.glob(".shard-*.tmp"), *self.folder.glob(f".{MANIFEST}.*.tmp")]:  # of a killed run
            leftover.unlink()

    def _continue(self, existing: FeatureStore) -> None:
        what = f"The feature store in {str(self.folder)!r}"
        advice = "Give the settings it was begun with to go on with it, or another folder to begin a new store."
        require_same_provenance(existing.provenance, self.provenance, what, advice=advice)
        if existing.manifest["data_fingerprint"] != self.manifest["data_fingerprint"]:
            raise ValueError(
                f"{what} was begun with other images, labels, class names or shard size. "
                "Give the same data to go on with it, or another folder to begin a new store."
            )
        self.manifest = existing.manifest

    @property
    def finished_shards(self) -> int:
        return len(self.manifest["shards"])

    def write(self, shard: Shard) -> None:
        """Data first, then the manifest that makes it count."""
        name = f"shard-{self.finished_shards:05d}"
        tensors = {tensor_name(*key): torch.cat(parts).contiguous() for key, parts in shard.features.items()}
        index = pa.table(
            {
                "image_id": pa.array(shard.image_ids, pa.string()),
                "source": pa.array(shard.sources, pa.string()),
                "label": pa.array(shard.labels, pa.int64()),
            }
        )
        write_atomically(self.folder / f"{name}.parquet", lambda path: pq.write_table(index, path))
        data = self.folder / f"{name}.safetensors"
        mark = shard_mark(name, self.provenance, self.manifest["data_fingerprint"])
        write_atomically(data, lambda path: save_file(tensors, path, metadata={"shard": mark}))
        self.manifest["shards"].append(
            {
                "name": name,
                "rows": len(shard.image_ids),
                "bytes": data.stat().st_size,
                "skipped": shard.skipped,
            }
        )
        write_json(self.folder / MANIFEST, self.manifest)

    def finish(self) -> None:
        if not self.manifest["complete"]:
            self.manifest["complete"] = True
            write_json(self.folder / MANIFEST, self.manifest)
