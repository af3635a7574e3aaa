"""A store as a `datasets.Dataset`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from .._files import fingerprint_of, write_atomically
from .checks import read_index
from .labels import label_column
from .layout import DATA, MappedRows, read_header, shard_name, tensor_name

if TYPE_CHECKING:
    from .store import FeatureStore

STORED_AS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "float32"}


def to_dataset(store: "FeatureStore", keys: Sequence[tuple[str, int]], cache_dir: str | Path | None) -> Any:
    """See `FeatureStore.to_dataset`. One Arrow file a shard, which `datasets` memory-maps."""
    from datasets import Dataset, concatenate_datasets, config

    columns = [tensor_name(*key) for key in keys]
    features = _features(store, columns)
    marks = {number: mark for number, mark in store.marks.items() if mark.rows}
    content = {"shards": [mark.sha256 for mark in marks.values()], "columns": columns, "classes": store.class_names}
    if store.manifest.more_labels:
        content["more_classes"] = store.manifest.more_labels
    folder = Path(cache_dir or config.HF_DATASETS_CACHE) / "diffusion_sae" / fingerprint_of(content)
    parts = []
    for number in marks:
        path = folder / f"{shard_name(number)}.arrow"
        if not path.exists():
            write_atomically(path, lambda temporary, number=number: _write(store, number, columns, features, temporary))
        parts.append(Dataset.from_file(str(path)))
    return concatenate_datasets(parts)


def _features(store: "FeatureStore", columns: list[str]) -> Any:
    """Types of the columns; an array is a list of fixed length, of lists of fixed length, …"""
    from datasets import ClassLabel, Features, List, Value

    types: dict[str, Any] = {"image_id": Value("string"), "source": Value("string")}
    if store.labels is not None:
        types["label"] = Value("int64") if store.class_names is None else ClassLabel(names=store.class_names)
    for name, class_names in store.manifest.more_labels.items():
        types[label_column(name)] = ClassLabel(names=class_names)
    tokens = store.provenance.pooling == "tokens"
    if tokens:
        types["position"] = Value("int64")
    number = next(number for number, mark in store.marks.items() if mark.rows)
    header, _ = read_header(store.path / (shard_name(number) + DATA))
    for column in columns:
        types[column] = Value(STORED_AS[store.dtype])
        for length in reversed(header[column]["shape"][2 if tokens else 1 :]):
            types[column] = List(types[column], length=length)
    return Features(types)


def _write(store: "FeatureStore", number: int, columns: list[str], features: Any, path: Path) -> None:
    data, index = store.path / (shard_name(number) + DATA), read_index(store.path, number)
    header, _ = read_header(data)
    arrays: dict[str, Any] = {name: index[name].combine_chunks() for name in index.column_names if name in features}
    if "position" in features:
        images, positions = header[columns[0]]["shape"][:2]
        rows = pa.array(np.repeat(np.arange(images), positions))
        arrays = {name: array.take(rows) for name, array in arrays.items()}
        arrays["position"] = pa.array(np.tile(np.arange(positions), images))
    for column in columns:
        tensor = MappedRows(data, column, header[column]["shape"]).map()
        arrays[column] = _nested(tensor.flatten(0, 1) if "position" in features else tensor)
    schema = features.arrow_schema
    table = pa.Table.from_arrays([arrays[name].cast(schema.field(name).type) for name in schema.names], schema=schema)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        writer.write_table(table, max_chunksize=1000)


def _nested(tensor: Tensor) -> pa.Array:
    """(n, a, b, …) as n lists of a lists of b …, all of fixed length."""
    values = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    array: pa.Array = pa.array(values.reshape(-1).numpy())
    for length in reversed(tensor.shape[1:]):
        array = pa.FixedSizeListArray.from_arrays(array, length)
    return array
