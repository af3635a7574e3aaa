"""The store on disk: safetensors shards, a Parquet index beside each, and a manifest that says where they came from.

    features/pets/manifest.json            provenance, class names, finished shards with rows and bytes
                  shard-00000.safetensors  one tensor a (layer, timestep), named `up_ft1@25`: (n, C), (n, T, C), …
                  shard-00000.parquet      image_id, source, label of its rows

A shard counts once the manifest names it, and the manifest is replaced in one step; what a killed run left beside
finished shards is made again.
"""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from .._files import read_json
from ..provenance import Provenance
from .feature_set import FeatureSet

MANIFEST = "manifest.json"
METADATA = "__metadata__"  # safetensors' name
FORMAT_VERSION = 1
# safetensors' names; bf16 has no numpy type and is mapped as int16
_TYPES = {"F32": (np.float32, torch.float32), "F16": (np.float16, torch.float16), "BF16": (np.int16, torch.bfloat16)}


def tensor_name(layer: str, timestep: int) -> str:
    return f"{layer}@{timestep}"


def shard_mark(name: str, provenance: Provenance, data_fingerprint: str) -> str:
    """What a shard's file says about itself, so that one from another place or store is found out."""
    return f"{name} of {provenance.fingerprint} over {data_fingerprint}"


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Header of a safetensors file and the offset of its data; raises if the file is not as long as the header says."""
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        size = path.stat().st_size
        if not 0 < length <= size - 8:
            raise ValueError(f"{path} is no complete safetensors file ({size} bytes).")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path} is damaged: its header is not valid JSON ({error}).") from error
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name != METADATA), default=0)
    if size != 8 + length + end:
        raise ValueError(f"{path} is damaged: it has {size} bytes, its header announces {8 + length + end}.")
    return header, 8 + length


def map_tensor(path: Path, name: str) -> Tensor:
    """A tensor of a safetensors file, memory-mapped read-only."""
    header, offset = read_header(path)
    entry = header[name]
    numpy_type, torch_type = _TYPES[entry["dtype"]]
    mapped = np.memmap(path, numpy_type, "c", offset + entry["data_offsets"][0], tuple(entry["shape"]))
    return torch.from_numpy(mapped).view(torch_type)  # mode "c" (copy on write): torch wants writable memory


class FeatureStore:
    """Features of many images at several layers and timesteps. Made by `DiffusionFeatureExtractor.extract`."""

    def __init__(self, path: str | Path) -> None:
        """Open a store; missing, damaged and foreign shards are found here and named."""
        self.path = Path(path)
        manifest_path = self.path / MANIFEST
        if not manifest_path.is_file():
            raise FileNotFoundError(
                f"There is no feature store in {str(self.path)!r}: it has no {MANIFEST}. "
                "Make one with DiffusionFeatureExtractor.extract or `diffusion-sae extract`."
            )
        self.manifest = read_json(manifest_path)
        if self.manifest.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{manifest_path} has format version {self.manifest.get('format_version')!r}; this library reads "
                f"{FORMAT_VERSION}. Extract again, or use the library's version that wrote it."
            )
        self.provenance = Provenance.from_dict(self.manifest["provenance"])
        self.class_names: list[str] | None = self.manifest["class_names"]
        self._check_shards()
        index = [self._read_index(shard) for shard in self.manifest["shards"]]
        self.image_ids: list[str] = [i for table in index for i in table["image_id"].to_pylist()]
        self.sources: list[str] = [s for table in index for s in table["source"].to_pylist()]
        labels = [label for table in index for label in table["label"].to_pylist()]
        self.labels = None if None in labels or not labels else torch.tensor(labels)

    def _check_shards(self) -> None:
        expected = {tensor_name(layer, t) for layer in self.layers for t in self.timesteps}
        for shard in self.manifest["shards"]:
            path = self.path / f"{shard['name']}.safetensors"
            for file in (path, path.with_suffix(".parquet")):
                if not file.is_file():
                    raise FileNotFoundError(
                        f"{self.path} lacks {file.name}, which its manifest lists. Extract it again."
                    )
            if path.stat().st_size != shard["bytes"]:
                raise ValueError(
                    f"{path} is damaged or from elsewhere: {path.stat().st_size} bytes, the manifest says "
                    f"{shard['bytes']}. Remove the store and extract it again."
                )
            header, _ = read_header(path)
            mark = header.pop(METADATA, {}).get("shard")
            expected_mark = shard_mark(shard["name"], self.provenance, self.manifest["data_fingerprint"])
            foreign = mark != expected_mark or set(header) != (expected if shard["rows"] else set())
            if foreign or any(entry["shape"][0] != shard["rows"] for entry in header.values()):
                raise ValueError(
                    f"{path} is from another store: it holds {sorted(header)} of shard {mark}, the manifest says "
                    f"{sorted(expected)} with {shard['rows']} rows of shard {expected_mark}. "
                    "Remove the store and extract it again."
                )

    def _read_index(self, shard: dict[str, Any]) -> pa.Table:
        path = self.path / f"{shard['name']}.parquet"
        try:
            table = pq.read_table(path, columns=["image_id", "source", "label"])
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}). Remove the store and extract it again.") from error
        if len(table) != shard["rows"]:
            raise ValueError(
                f"{path} is from another store: it has {len(table)} rows, the manifest says {shard['rows']}. "
                "Remove the store and extract it again."
            )
        return table

    @property
    def layers(self) -> tuple[str, ...]:
        return self.provenance.layers

    @property
    def timesteps(self) -> tuple[int, ...]:
        return self.provenance.timesteps

    @property
    def complete(self) -> bool:
        """Whether every image of the data set is in; an unfinished store goes on when `extract` is called again."""
        return self.manifest["complete"]

    @property
    def skipped(self) -> list[dict[str, str]]:
        """Broken images that were left out, with the reason."""
        return [entry for shard in self.manifest["shards"] for entry in shard["skipped"]]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.image_ids)

    def __repr__(self) -> str:
        state = "" if self.complete else ", unfinished"
        return f"FeatureStore({str(self.path)!r}, {len(self)} images, {self.layers} × t={self.timesteps}{state})"

    def select(self, layer: str, timestep: int) -> FeatureSet:
        """Features of one layer and timestep, memory-mapped."""
        provenance = self.provenance.select(layer, timestep)
        if not self.image_ids:
            raise ValueError(
                f"The feature store {str(self.path)!r} holds no images yet. Run the extraction to its end."
            )
        blocks = [
            map_tensor(self.path / f"{shard['name']}.safetensors", tensor_name(layer, timestep))
            for shard in self.manifest["shards"]
            if shard["rows"]
        ]
        rows_per_image = 1
        if provenance.pooling == "tokens":
            rows_per_image = blocks[0].shape[1]
            blocks = [block.flatten(0, 1) for block in blocks]  # (n, T, C) -> (n·T, C)
        return FeatureSet(
            blocks,
            rows_per_image=rows_per_image,
            labels=self.labels,
            image_ids=self.image_ids,
            class_names=self.class_names,
            provenance=provenance,
        )
