"""Stores on the Hub: a dataset repository with the files of the store as they are on the disk."""

import importlib.metadata
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ..hub.dataset import RemoteDataset, dataset_card, push_dataset
from .columns import StringColumn
from .feature_set import FeatureSet
from .index_file import read_index_file
from .labels import StoredLabels
from .layout import (
    DATA,
    INDEX,
    MANIFEST,
    MARK,
    METADATA,
    Manifest,
    ShardMark,
    as_tensor,
    header_length,
    parse_header,
    tensor_name,
)

if TYPE_CHECKING:
    from .store import FeatureStore

PATTERNS = (MANIFEST, *(f"shard-*{suffix}" for suffix in (DATA, INDEX, MARK)))


def push_store(store: "FeatureStore", repo_id: str, **hub: Any) -> str:
    """See `FeatureStore.push_to_hub`."""
    if not store.complete:
        raise ValueError(
            f"The feature store {str(store.path)!r} is unfinished. Call extract again with the same data to finish it, "
            "then push."
        )
    store.verify()
    names = [MANIFEST, *(mark.name + suffix for mark in store.marks.values() for suffix in (DATA, INDEX, MARK))]
    files = {name: store.path / name for name in names}
    return push_dataset(repo_id, files, _card(store, repo_id), stale="shard-*", **hub)


def _card(store: "FeatureStore", repo_id: str) -> Any:
    record, classes = store.provenance, store.class_names
    settings = [*record.listed(), ("weights", record.weights), ("fingerprint", record.fingerprint)]
    contents = [
        ("images", f"{len(store):,}"),
        ("skipped, as they could not be read", len(store.skipped)),
        ("labels", "none" if store.labels is None else ", ".join(classes) if classes else "numbers"),
        *((f"labels `{name}`", ", ".join(names)) for name, names in store.manifest.more_labels.items()),
        ("type of the stored numbers", store.manifest.dtype),
        ("shards", len(store.marks)),
    ]
    return dataset_card(
        [*record.layers, *(f"timestep-{t}" for t in record.timesteps)],
        title=repo_id.rsplit("/", 1)[-1],
        repo_id=repo_id,
        model=record.model,
        images=f"{len(store):,}",
        layers=", ".join(f"`{layer}`" for layer in record.layers),
        timesteps=", ".join(map(str, record.timesteps)),
        layer=record.layers[0],
        timestep=record.timesteps[0],
        contents=contents,
        provenance=settings,
        version=importlib.metadata.version("diffusion-sae"),
    )


def stream_store(repo_id: str, layer: str, timestep: int, labels: str | None, **hub: Any) -> Iterator[FeatureSet]:
    """See `FeatureStore.stream`; errors about the repository, layer and timestep come at once."""
    remote = RemoteDataset(repo_id, **hub)
    manifest = Manifest.parse(bytes(remote.read(MANIFEST)), f"{MANIFEST} of {repo_id}")
    manifest.record.select(layer, timestep)
    chosen = manifest.labels_named(labels)
    return (
        _read_shard(remote, manifest, number, mark, (layer, timestep), chosen)
        for number, mark in enumerate(manifest.shards)
        if mark.rows
    )


def _read_shard(
    remote: RemoteDataset,
    manifest: Manifest,
    number: int,
    mark: ShardMark,
    key: tuple[str, int],
    chosen: StoredLabels,
) -> FeatureSet:
    name, where = mark.name + DATA, f"{mark.name}{DATA} of {remote.repo_id}"
    length = header_length(bytes(remote.read(name, 0, 8)), where)
    header = parse_header(bytes(remote.read(name, 8, 8 + length)), where)
    if header.get(METADATA, {}).get("shard") != manifest.mark_of(number):
        raise ValueError(f"{where} is from another store than its {MANIFEST}. Push the store again.")
    entry = header.get(tensor_name(*key))
    if entry is None or entry["shape"][:1] != [mark.rows] or 0 in entry["shape"]:
        raise ValueError(f"{where} does not hold {tensor_name(*key)} of {mark.rows} images. Push the store again.")
    begin, end = (8 + length + offset for offset in entry["data_offsets"])
    features = as_tensor(np.frombuffer(remote.read(name, begin, end), np.uint8), entry)
    content = pa.BufferReader(bytes(remote.read(mark.name + INDEX)))
    index = read_index_file(content, f"{mark.name}{INDEX} of {remote.repo_id}", mark.rows)
    tokens = manifest.record.pooling == "tokens"
    return FeatureSet(
        [features.flatten(0, 1) if tokens else features],  # (n, T, C) -> (n·T, C)
        rows_per_image=features.shape[1] if tokens else 1,
        labels=chosen.read(index),
        image_ids=StringColumn(index["image_id"]),
        class_names=chosen.class_names,
        provenance=manifest.record.select(*key).plain(),
        timesteps=key[1:],
    )
