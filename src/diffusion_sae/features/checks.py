"""What is found out about a store's shards: on opening what costs little, and on demand every byte."""

import re
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .._files import read_json, sha256_of
from .index_file import read_index_file
from .layout import (
    DATA,
    INDEX,
    MARK,
    METADATA,
    TYPES,
    Manifest,
    ShardMark,
    read_header,
    repair,
    shard_name,
    tensor_name,
)

SHARD_FILE = re.compile(rf"shard-(\d{{5,}})({DATA}|{INDEX}|{MARK})".replace(".", r"\."))


def finished_shards(folder: Path, manifest: Manifest) -> dict[int, ShardMark]:
    """The shards that have their mark, by number, after checking existence, size, header and mark of their files.

    Raises:
        FileNotFoundError: for a marked shard that lacks a file.
        ValueError: for a damaged shard or one of another store; the message says which, and what to do.
    """
    present = {path.name for path in folder.iterdir()}
    _refuse_foreign_files(folder, present, manifest)
    shapes: dict[str, Any] = {}
    found: dict[int, ShardMark] = {}
    # of the files that are there, as a manifest can announce any number
    matches = (SHARD_FILE.fullmatch(name) for name in present if name.endswith(MARK))
    for number in sorted(int(match[1]) for match in matches if match):
        name = shard_name(number)
        mark = ShardMark.from_dict(read_json(folder / (name + MARK)), str(folder / (name + MARK)))
        _check_files(folder, number, mark, manifest, shapes)
        found[number] = mark
    return found


def require_all(folder: Path, manifest: Manifest, found: dict[int, ShardMark]) -> None:
    """A complete store has the shards that its manifest lists, and those as they were when it was completed."""
    for number in range(len(manifest.shards)):
        name = shard_name(number)
        if number not in found:
            raise FileNotFoundError(f"{folder} lacks {name}{MARK}, which its manifest lists. {repair(name)}")
        if found[number] != manifest.shards[number]:
            raise ValueError(f"{folder / name}{MARK} is not the one that the manifest lists. {repair(name)}")


def _refuse_foreign_files(folder: Path, present: Iterable[str], manifest: Manifest) -> None:
    matches = [match for name in present if (match := SHARD_FILE.fullmatch(name))]
    foreign = sorted(match[0] for match in matches if int(match[1]) >= manifest.num_shards)
    if foreign:
        raise ValueError(
            f"{folder} holds {', '.join(foreign[:5])}, which do not belong to its store of {manifest.num_shards} "
            "shards. Move them away."
        )


def _check_files(folder: Path, number: int, mark: ShardMark, manifest: Manifest, shapes: dict[str, Any]) -> None:
    name, expected = shard_name(number), manifest.mark_of(number)
    for suffix in (DATA, INDEX):
        path = folder / (name + suffix)
        if not path.is_file():
            raise FileNotFoundError(f"{folder} lacks {path.name}, which {name}{MARK} lists. {repair(name)}")
        if path.stat().st_size != mark.bytes.get(suffix):
            raise ValueError(
                f"{path} is damaged or from elsewhere: {path.stat().st_size} bytes, {name}{MARK} says "
                f"{mark.bytes.get(suffix)}. {repair(name)}"
            )
    if mark.shard != expected:
        raise ValueError(
            f"{folder / name}{MARK} is from another store: of {mark.shard}, not {expected}. {repair(name)}"
        )
    try:
        _check_data(folder / (name + DATA), expected, mark, manifest, shapes)
        _check_index(folder / (name + INDEX), expected, mark)
    except ValueError as error:
        raise ValueError(f"{error} {repair(name)}") from error


def _check_data(path: Path, expected: str, mark: ShardMark, manifest: Manifest, shapes: dict[str, Any]) -> None:
    record = manifest.record
    keys = product(record.layers, record.timesteps, range(record.views + 1)) if mark.rows else ()
    names = {tensor_name(*key) for key in keys}
    header, _ = read_header(path)
    says = header.pop(METADATA, {}).get("shard")
    if says != expected or set(header) != names:
        raise ValueError(
            f"{path} is from another store: it holds {sorted(header)} of shard {says}, expected are {sorted(names)} "
            f"of shard {expected}."
        )
    for name, entry in header.items():
        dtype = str(TYPES.get(entry["dtype"], (None, entry["dtype"]))[1]).removeprefix("torch.")
        shape = shapes.setdefault(name, entry["shape"][1:])
        if 0 in shape:
            raise ValueError(f"{path} is damaged: {name} has the shape {entry['shape']}, rows without numbers.")
        if (dtype, entry["shape"]) != (manifest.dtype, [mark.rows, *shape]):
            raise ValueError(
                f"{path} is from another store: {name} is {dtype} of shape {entry['shape']}, expected is "
                f"{manifest.dtype} of {[mark.rows, *shape]}."
            )


def _check_index(path: Path, expected: str, mark: ShardMark) -> None:
    try:
        metadata = pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}).") from error
    says = ((metadata.metadata or {}).get(b"shard") or b"?").decode(errors="replace")
    if says != expected or metadata.num_rows != mark.rows:
        raise ValueError(
            f"{path} is from another store: {metadata.num_rows} rows of shard {says}, expected are {mark.rows} of "
            f"shard {expected}."
        )


def read_index(folder: Path, number: int) -> pa.Table:
    """image_id, source and label of the images of a shard."""
    path = folder / (shard_name(number) + INDEX)
    try:
        return read_index_file(path, str(path))
    except ValueError as error:
        raise ValueError(f"{error} {repair(shard_name(number))}") from error


def damaged_files(folder: Path, marks: Iterable[ShardMark]) -> Iterator[tuple[str, str]]:
    """(shard, file) of each file whose content is not what was written, by its SHA-256."""
    for mark in marks:
        for suffix in (DATA, INDEX):
            if sha256_of(folder / (mark.name + suffix)) != mark.sha256[suffix]:
                yield mark.name, mark.name + suffix
