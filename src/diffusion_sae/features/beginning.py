"""Which shards are to be made: those of a new store, those that an unfinished one lacks, or those to append."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Self

import numpy as np

from .._files import require_writable_folder, write_json
from ..provenance import Provenance, require_same_provenance
from .checks import finished_shards, read_index, require_all
from .labels import LABEL, LabelSet
from .layout import FORMAT_VERSION, MANIFEST, Manifest, Part, ShardMark, shard_name

State = tuple[Manifest, Part, list[int]]
CHECKED_IMAGES = 32
OTHER_DATA = (
    "Give the same data to go on with it, append=True to add these images behind, or another folder to begin a new "
    "store."
)


@dataclass(frozen=True)
class DataRecord:
    """What tells one data set from another without reading its images."""

    fingerprint: str
    num_images: int
    shard_size: int
    class_names: list[str] | None
    labelled: bool
    label_name: str = LABEL
    more_labels: dict[str, list[str]] = field(default_factory=dict)
    """Class names of the further labels."""

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        labels: Sequence[int | None],
        class_names: Sequence[str] | None,
        shard_size: int,
        texts: Sequence[str] | None = None,
        label_name: str = LABEL,
        more_labels: Mapping[str, LabelSet] | None = None,
    ) -> Self:
        classes = None if class_names is None else list(class_names)
        digest = hashlib.sha256(f"{classes!r} {shard_size}\n".encode())
        labelled = len(labels) > 0
        for name, label, text in zip(names, labels, repeat(None) if texts is None else texts, strict=False):
            digest.update(f"{name!r} {label} {text!r}\n".encode())
            labelled &= label is not None
        # by name, as they are when the manifest is read again, so that a resumed run writes the same columns
        ordered = dict(sorted((more_labels or {}).items()))
        for name, further in ordered.items():
            digest.update(f"{name!r} {further.class_names!r} {list(further.values)!r}\n".encode())
        further_classes = {name: list(further.class_names) for name, further in ordered.items()}
        fingerprint = digest.hexdigest()[:16]
        return cls(fingerprint, len(names), shard_size, classes, labelled, label_name, further_classes)

    def manifest(self, provenance: Provenance, dtype: str) -> Manifest:
        """Of a store that begins with these images."""
        return Manifest(
            FORMAT_VERSION,
            provenance.to_dict(),
            dtype,
            self.class_names,
            self.labelled,
            [self.part(0)],
            label_name=self.label_name,
            more_labels=self.more_labels,
        )

    def part(self, first_shard: int) -> Part:
        return Part(self.fingerprint, self.num_images, self.shard_size, first_shard)


def begin_or_continue(
    folder: Path,
    provenance: Provenance,
    data: DataRecord,
    *,
    dtype: str,
    append: bool,
    source_names: Sequence[str],
    other_image: Callable[[int, str], bool] | None,
) -> State:
    """Manifest, the data set's part of it and its missing shards; arguments and errors: see `StoreWriter`."""
    if not (folder / MANIFEST).exists():
        if append:
            raise FileNotFoundError(
                f"There is no feature store in {str(folder)!r} to append to. Leave out append to begin one."
            )
        require_writable_folder(folder)
        manifest = data.manifest(provenance, dtype)
        finished_shards(folder, dataclasses.replace(manifest, parts=[Part("", 0, 1, 0)]))  # else they would be counted
        write_json(folder / MANIFEST, manifest.to_dict())
        return manifest, manifest.parts[0], list(manifest.parts[0].shards)
    manifest = Manifest.read(folder)
    what = f"The feature store in {str(folder)!r}"
    advice = "Give the settings it was begun with to go on with it, or another folder to begin a new store."
    require_same_provenance(manifest.record, provenance, what, advice=advice)
    if manifest.dtype != dtype:
        raise ValueError(
            f"{what} was begun with store_dtype {manifest.dtype!r}, got {dtype!r}. Give the one it was begun with, or "
            "another folder to begin a new store."
        )
    found = finished_shards(folder, manifest)
    if manifest.complete:
        _require_marks_of_manifest(folder, manifest, found)
    part = _Continued(folder, what, manifest, found, source_names, other_image).find(data, append=append)
    return _continue(folder, what, manifest, found, part)


def _require_marks_of_manifest(folder: Path, manifest: Manifest, found: dict[int, ShardMark]) -> None:
    """Whole shards are missing where someone deleted damaged ones; the others must be those of the manifest."""
    require_all(folder, manifest, {number: found.get(number, mark) for number, mark in enumerate(manifest.shards)})


def _continue(folder: Path, what: str, manifest: Manifest, found: dict[int, ShardMark], part: Part) -> State:
    for earlier in manifest.parts:
        lacking = [number for number in earlier.shards if number not in found]
        if lacking and earlier.first_shard < part.first_shard:
            raise ValueError(
                f"{what} lacks {', '.join(map(shard_name, lacking[:5]))} of the {earlier.num_images} images before "
                "these. Call extract with the data these are of first; it makes what is missing."
            )
    missing = [number for number in part.shards if number not in found]
    if missing:
        require_writable_folder(folder)
    if part not in manifest.parts or (missing and manifest.complete):
        parts = [*manifest.parts, *([] if part in manifest.parts else [part])]
        manifest = dataclasses.replace(manifest, parts=parts, complete=False, shards=[])
        write_json(folder / MANIFEST, manifest.to_dict())
    return manifest, part, missing


@dataclass(frozen=True)
class _Continued:
    """A store that is there already, and the data set whose images it may hold."""

    folder: Path
    what: str
    manifest: Manifest
    found: dict[int, ShardMark]
    source_names: Sequence[str]
    other_image: Callable[[int, str], bool] | None

    def find(self, data: DataRecord, *, append: bool) -> Part:
        """The part that holds the data set, or a new one."""
        parts = self.manifest.parts
        if not append:
            if data.part(0) != parts[0]:
                raise ValueError(
                    f"{self.what} was begun with other images, labels, class names or shard size. {OTHER_DATA}"
                )
            self._require_same(parts[0], OTHER_DATA)
            return parts[0]
        for part in parts:
            if data.part(part.first_shard) == part:
                unfinished = any(number not in self.found for number in part.shards)
                if self._first_other(part) is None:
                    return part
                if unfinished:
                    self._require_same(part, "Give the same data until they are complete, then append others.")
        return self._new_part(data)

    def _new_part(self, data: DataRecord) -> Part:
        parts = self.manifest.parts
        unfinished = [part for part in parts if any(number not in self.found for number in part.shards)]
        if unfinished:
            raise ValueError(
                f"{self.what} is unfinished: it lacks some of the {unfinished[0].num_images} images of data that it "
                "was given before. Call extract with those first; then append."
            )
        if data.class_names != self.manifest.class_names:
            raise ValueError(
                f"{self.what} has the class names {self.manifest.class_names}, the data to append {data.class_names}. "
                "They must be equal, or labels would change their meaning: map the labels first, or begin a new store."
            )
        if data.labelled != self.manifest.labelled:
            kinds = {True: "labels", False: "no labels"}
            raise ValueError(
                f"{self.what} has {kinds[self.manifest.labelled]}, the data to append has {kinds[data.labelled]}. "
                "Give both or neither labels, or begin a new store."
            )
        if data.more_labels != self.manifest.more_labels:
            raise ValueError(
                f"{self.what} has the further labels {self.manifest.more_labels}, the data to append "
                f"{data.more_labels}. They must be equal in name and class names: rename or cast the columns first, or "
                "begin a new store."
            )
        return data.part(self.manifest.num_shards)

    def _require_same(self, part: Part, advice: str) -> None:
        name = self._first_other(part)
        if name is not None:
            raise ValueError(f"{self.what} was begun with other images: {name!r} is another one. {advice}")

    def _first_other(self, part: Part) -> str | None:
        """Name of a stored image that is another one in the data set now, of some that are read again.

        Rows and numbered images have the same names in every data set.
        """
        if self.other_image is None:
            return None
        shards = [number for number in part.shards if number in self.found and self.found[number].rows]
        rows = np.cumsum([self.found[number].rows for number in shards]) if shards else np.zeros(0, int)
        total = int(rows[-1]) if shards else 0
        for i in np.linspace(0, total - 1, min(total, CHECKED_IMAGES)).astype(int):
            shard = int(np.searchsorted(rows, i, side="right"))
            index = read_index(self.folder, shards[shard])
            entry = int(i) - int(rows[shard]) + len(index)
            name = index["source"][entry].as_py()
            row = next((r for r in part.rows(shards[shard]) if self.source_names[r] == name), None)
            if row is None or self.other_image(row, index["image_id"][entry].as_py()):
                return name
        return None
