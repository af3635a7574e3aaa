"""FeatureStore: features on disk, opened. The format is in `layout`."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import torch
from torch import Tensor

from .._config import check_integer
from ..hub.dataset import download_dataset
from .aligned import AlignedFeatures
from .checks import damaged_files, finished_shards, read_index, require_all
from .columns import StringColumn
from .export import to_dataset
from .feature_set import FeatureSet
from .labels import index_schema, read_labels
from .layout import DATA, Manifest, MappedRows, read_header, repair, shard_name, tensor_name
from .sharing import PATTERNS, push_store, stream_store


class FeatureStore:
    """Features of many images at several layers and timesteps. Made by `DiffusionFeatureExtractor.extract`."""

    def __init__(self, path: str | Path, *, verify: bool = False) -> None:
        """Open a store, finished or not; its features are mapped when they are used.

        Args:
            path: its folder.
            verify: also read every byte, see `verify`.

        Raises:
            FileNotFoundError: if there is no store, or a shard lacks a file.
            ValueError: for a damaged shard or one of another store, naming it and saying how to have it made anew.
        """
        self.path = Path(path)
        self.manifest = Manifest.read(self.path)
        self.provenance = self.manifest.record
        self.class_names = self.manifest.class_names
        found = finished_shards(self.path, self.manifest)
        if self.manifest.complete:
            require_all(self.path, self.manifest, found)
        self.marks = found
        """Of each finished shard, by number."""
        if verify:
            self.verify()

    def verify(self) -> None:
        """Read every byte of the shards and compare with the SHA-256 that was written down when they were made.

        Raises:
            ValueError: naming the files that have changed.
        """
        damaged = list(damaged_files(self.path, self.marks.values()))
        if damaged:
            advice = " ".join(repair(shard) for shard in dict.fromkeys(shard for shard, _ in damaged))
            raise ValueError(
                f"The content of {', '.join(file for _, file in damaged)} in {self.path} is not what was written: "
                f"damaged. {advice}"
            )

    @property
    def layers(self) -> tuple[str, ...]:
        return self.provenance.layers

    @property
    def timesteps(self) -> tuple[int, ...]:
        return self.provenance.timesteps

    @property
    def dtype(self) -> torch.dtype:
        """Type of the stored numbers; `select` gives rows in fp32."""
        return getattr(torch, self.manifest.dtype)

    @property
    def complete(self) -> bool:
        """Whether every image of the data set is in; an unfinished store goes on when `extract` is called again."""
        return self.manifest.complete

    @property
    def skipped(self) -> list[dict[str, str]]:
        """Broken images that were left out, with the reason."""
        return [entry for mark in self.marks.values() for entry in mark.skipped]

    @cached_property
    def _index(self) -> pa.Table:
        tables = [read_index(self.path, number) for number in self.marks]
        return pa.concat_tables(tables) if tables else index_schema(self.manifest.more_labels).empty_table()

    @property
    def image_ids(self) -> StringColumn:
        """What the noise of each image was drawn by."""
        return StringColumn(self._index["image_id"])

    @property
    def sources(self) -> StringColumn:
        """Path or row number of each image in its data set."""
        return StringColumn(self._index["source"])

    @cached_property
    def labels(self) -> Tensor | None:
        """(images,); None if not all images have one. These are the default ones of `label_names`."""
        return read_labels(self._index)

    @property
    def label_names(self) -> tuple[str, ...]:
        """What `select` takes as `labels`, the default first, the others by name; () if there are none."""
        return self.manifest.label_names

    def __len__(self) -> int:
        """Number of images."""
        return sum(mark.rows for mark in self.marks.values())

    def __repr__(self) -> str:
        state = "" if self.complete else ", unfinished"
        return f"FeatureStore({str(self.path)!r}, {len(self)} images, {self.layers} × t={self.timesteps}{state})"

    def _shape(self, layer: str, timestep: int) -> list[int]:
        """Of the first shard that has rows."""
        number = next(number for number, mark in self.marks.items() if mark.rows)
        header, _ = read_header(self.path / (shard_name(number) + DATA))
        return header[tensor_name(layer, timestep)]["shape"]

    def _rows_per_image(self, layer: str, timestep: int) -> int:
        return self._shape(layer, timestep)[1] if self.provenance.pooling == "tokens" else 1

    @property
    def num_rows(self) -> int:
        """Rows of all layers and timesteps: images, or for tokens positions of images."""
        keys = [(layer, t) for layer in self.layers for t in self.timesteps]
        return len(self) * sum(self._rows_per_image(*key) for key in keys) if len(self) else 0

    def _no_images(self) -> ValueError:
        return ValueError(f"The feature store {str(self.path)!r} holds no images yet. Run the extraction to its end.")

    @property
    def num_views(self) -> int:
        """Augmented views of each image, beside the plain one."""
        return self.provenance.views

    def select(
        self, layer: str, timestep: int | Sequence[int], *, labels: str | None = None, view: int = 0
    ) -> FeatureSet:
        """Features of one layer, memory-mapped.

        Args:
            layer: one of `layers`.
            timestep: one of `timesteps`, or several: then all rows of the first come first, of the same images in the
                same order at each, and `timesteps` of the FeatureSet says which a row is of.
            labels: one of `label_names`, such as fine classes instead of coarse ones; default the first.
            view: 0: the plain images; 1…num_views: an augmented view of each, in the same order.

        Raises:
            ValueError: for a layer, timestep, labels or view that the store does not have, and for repeated timesteps.
        """
        check_integer("view", view, 0, self.num_views)
        provenance = self.provenance.select(layer, timestep)
        provenance = provenance if view else provenance.plain()
        chosen = self.manifest.labels_named(labels)
        if not len(self):
            raise self._no_images()
        values = chosen.read(self._index)
        if values is None and labels is not None:
            raise ValueError(f"Not all images in {str(self.path)!r} have one of the labels {labels!r}.")
        positions = self._rows_per_image(layer, provenance.timesteps[0])
        return FeatureSet(
            [block for t in provenance.timesteps for block in self._blocks(layer, t, view)],
            rows_per_image=positions * len(provenance.timesteps),
            labels=values,
            image_ids=self.image_ids,
            class_names=chosen.class_names,
            provenance=provenance,
            timesteps=provenance.timesteps,
        )

    def aligned(
        self,
        layers: Sequence[str] | None = None,
        timesteps: Sequence[int] | None = None,
        *,
        labels: str | None = None,
        view: int = 0,
    ) -> AlignedFeatures:
        """Features of several layers and timesteps side by side, for a fusion probe; default all of the store.

        `labels` and `view` as in `select`.

        Raises:
            ValueError: for a layer, timestep, labels or view that the store does not have.
        """
        keys = [(layer, t) for layer in layers or self.layers for t in timesteps or self.timesteps]
        return AlignedFeatures({key: self.select(*key, labels=labels, view=view) for key in keys})

    def _blocks(self, layer: str, timestep: int, view: int) -> list[MappedRows]:
        positions = self._rows_per_image(layer, timestep)
        _, *shape = self._shape(layer, timestep)
        if self.provenance.pooling == "tokens":
            shape = shape[1:]  # (n, T, C) -> (n·T, C)
        name = tensor_name(layer, timestep, view)
        return [
            MappedRows(self.path / (shard_name(number) + DATA), name, [mark.rows * positions, *shape])
            for number, mark in self.marks.items()
            if mark.rows  # all images of a shard may have been broken
        ]

    def to_dataset(
        self, layer: str | None = None, timestep: int | None = None, *, cache_dir: str | Path | None = None
    ) -> Any:
        """The store as a `datasets.Dataset`, written shard by shard into Arrow files that are then memory-mapped.

        Columns: `image_id`, `source`, `label` if the images have labels (a ClassLabel if they have names), further ones
        as `label_subgroup` and the like, for tokens `position`, and one of features a layer and timestep, named like
        the tensor: `up_ft1@25`. Features are lists of fixed length, (C,), or nested ones, (C, h, w); a row is an image,
        for tokens a position of one. Their type is the stored one, save that bfloat16, which Arrow does not have,
        becomes float32. Of the plain images, without views.

        Args:
            layer, timestep: only these; default all.
            cache_dir: where the Arrow files are kept; default the cache of `datasets`.
        """
        if not len(self):
            raise self._no_images()
        keys = [
            (one_layer, t)
            for one_layer in (self.layers if layer is None else (layer,))
            for t in (self.timesteps if timestep is None else (timestep,))
        ]
        for key in keys:
            self.provenance.select(*key)  # raises for what there is not
        return to_dataset(self, keys, cache_dir)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload features with diffusion_sae",
    ) -> str:
        """Push all files and a dataset card to a *dataset* repository in one commit, after `verify`.

        Args:
            repo_id: `owner/name`; the repository is made if need be.
            private, token, commit_message: as in transformers.
            revision: branch; made if there is none.

        Returns:
            URL of the commit.

        Raises:
            ValueError: for an unfinished or damaged store.
        """
        hub = {"private": private, "token": token, "revision": revision, "commit_message": commit_message}
        return push_store(self, repo_id, **hub)

    @classmethod
    def from_hub(
        cls,
        repo_id: str,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Download a store that was pushed to the Hub, and open it; arguments as in transformers.

        Raises:
            FileNotFoundError: if there is no such data set, or it holds no feature store.
        """
        hub = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        return cls(download_dataset(repo_id, PATTERNS, **hub))

    @staticmethod
    def stream(
        repo_id: str,
        layer: str,
        timestep: int,
        *,
        labels: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> Iterator[FeatureSet]:
        """Features of a store on the Hub, one shard after another: nothing is kept on the disk, one shard in memory.

        Of each shard only the tensor that is asked for is downloaded. Shards without rows are left out. `labels` as in
        `select`.

        Yields:
            The rows of a shard as a FeatureSet: `part[:]` (n, d_in) in fp32, `part.labels`, `part.image_ids`.

        Raises:
            FileNotFoundError: if there is no such data set, or it holds no feature store.
            ValueError: for a layer, timestep or labels that the store does not have.
        """
        return stream_store(repo_id, layer, timestep, labels, revision=revision, token=token)
