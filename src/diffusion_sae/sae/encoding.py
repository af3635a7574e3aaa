"""Sparse codes of a whole FeatureSet, from the disk to the disk."""

import dataclasses
import logging
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._config import check_choice, check_integer
from .._files import read_json, remove_leftovers, require_writable_folder
from .._overlap import Behind, computed_ahead
from .._weights import weights_hash
from ..features import FeatureSet, as_feature_set
from ..provenance import Provenance
from .code_files import (
    FORMAT_VERSION,
    FORMATS,
    KIND,
    MANIFEST,
    MARK,
    ActiveLatents,
    Manifest,
    problem_of,
    shard_name,
    write_shard,
)
from .evaluation import LOOKED_AT, rows_at_a_time
from .modeling import KSparseAutoencoder
from .screening import counted
from .sparse_codes import SparseCodes

logger = logging.getLogger(__name__)


class _Batch(NamedTuple):
    features: Float[Tensor, "b d_in"]
    timesteps: Int[Tensor, " b"] | None


@torch.no_grad()
def encode_features(
    sae: KSparseAutoencoder,
    features: FeatureSet | Tensor,
    output: str | Path,
    *,
    format: str = "parquet",
    batch_size: int = 8192,
    file_rows: int = 65_536,
    allow_mismatch: bool = False,
    progress: bool = True,
) -> SparseCodes:
    """Encode all rows into a folder of sparse codes: the next batch is read, and the last shard written, meanwhile.

    A call that was killed is gone on with by the next one with the same arguments, whose files are, byte for byte,
    those of an undisturbed call with the same `batch_size` on the same machine. Missing and damaged shards are made
    anew, others stay.

    Args:
        sae: on the device that is to compute.
        features: rows (N, d_in), such as `FeatureStore.select` gives; of an SAE over several timesteps with their own.
        output: the folder.
        format: parquet (zstd), which other tools read, or safetensors.
        batch_size: rows that are encoded at a time; fewer, where codes have no fixed k and are long.
        file_rows: rows a shard. The active latents of two shards are held in memory, 8 bytes each.
        allow_mismatch: encode features of another extraction than the SAE records.
        progress: show a progress bar.

    Raises:
        ValueError: for features of another width, extraction or timestep, or with NaN or infinity, and for a folder
            with codes of another SAE, of other features or in another format.
    """
    check_choice("format", format, FORMATS)
    check_integer("batch_size", batch_size, 1)
    check_integer("file_rows", file_rows, 1)
    features = as_feature_set(features)
    sae.require_features(features, allow_mismatch=allow_mismatch)
    _require_timesteps(sae, features)
    folder = require_writable_folder(output)
    manifest, missing = _begin_or_continue(folder, _manifest(sae, features, format, file_rows))
    if missing:
        started = time.perf_counter()
        with counted() as screened:
            _make(sae, features, folder, manifest, missing, batch_size=batch_size, progress=progress)
        seconds, rows = time.perf_counter() - started, sum(len(manifest.rows_of(number)) for number in missing)
        logger.info("%s rows encoded into %s in %.1f s, %.1f rows/s", f"{rows:,}", folder, seconds, rows / seconds)
        if screened.rows:
            logger.info("%s", screened.describe())
    if missing or not manifest.complete:
        marks = [read_json(folder / (shard_name(number) + MARK)) for number in range(manifest.num_shards)]
        dataclasses.replace(manifest, complete=True, shards=marks).write(folder)
    return SparseCodes(folder)


def _require_timesteps(sae: KSparseAutoencoder, features: FeatureSet) -> None:
    """Refuse what an SAE over several timesteps cannot take before the first row is read."""
    known = sae.config.timesteps
    if known is None:
        return
    if not features.of_timesteps:
        raise ValueError(
            f"This SAE is for the timesteps {known}, and the features do not say which timestep a row is of. Take them "
            "from a store with select(layer, timesteps), or give timesteps= to FeatureSet."
        )
    unknown = sorted(set(features.of_timesteps) - set(known))
    if unknown:
        raise ValueError(f"This SAE is for the timesteps {known}, the features are also of {unknown}. Leave these out.")


def _make(
    sae: KSparseAutoencoder,
    features: FeatureSet,
    folder: Path,
    manifest: Manifest,
    missing: list[int],
    *,
    batch_size: int,
    progress: bool,
) -> None:
    from tqdm.auto import tqdm

    def read(rows: range) -> _Batch:
        several = sae.config.timesteps is not None
        timesteps = features.timesteps_of(torch.arange(rows.start, rows.stop)) if several else None
        return _Batch(features[rows.start : rows.stop], timesteps)

    first = read(range(min(LOOKED_AT, batch_size, len(features))))
    batch_size = rows_at_a_time(sae, first.features, batch_size, first.timesteps)
    # each shard begins a batch, so that a batch does not depend on where an earlier call was killed
    work = {number: list(_split(manifest.rows_of(number), batch_size)) for number in missing}
    to_do = sum(len(manifest.rows_of(number)) for number in missing)
    bar = tqdm(
        total=manifest.rows,
        initial=manifest.rows - to_do,
        unit="row",
        unit_scale=True,
        desc="encode",
        disable=not progress,
    )
    all_rows = (rows for number in missing for rows in work[number])
    with closing(computed_ahead(all_rows, read, threads=1, ahead=1)) as batches, Behind() as saving, bar:
        for number in missing:
            parts = []
            for rows in work[number]:
                batch = next(batches)
                parts.append(ActiveLatents.of(sae.encode(batch.features.to(sae.W_dec.device), batch.timesteps)))
                bar.update(len(rows))
            saving.run(write_shard, folder, manifest, number, parts)


def _split(rows: range, batch_size: int) -> Iterator[range]:
    for start in range(rows.start, rows.stop, batch_size):
        yield range(start, min(start + batch_size, rows.stop))


def _manifest(sae: KSparseAutoencoder, features: FeatureSet, format: str, file_rows: int) -> Manifest:
    config = sae.config.record()
    record = features.provenance
    return Manifest(
        kind=KIND,
        format_version=FORMAT_VERSION,
        format=format,
        num_latents=sae.config.num_latents,
        k=sae.config.k,
        rows=len(features),
        file_rows=file_rows,
        rows_per_image=features.rows_per_image,
        timesteps=list(features.of_timesteps),
        sae={"name": sae.name_or_path or None, "config": config, "weights": weights_hash({"sae": sae}, {})},
        features={"fingerprint": features.fingerprint(), "provenance": None if record is None else record.to_dict()},
    )


def _begin_or_continue(folder: Path, wanted: Manifest) -> tuple[Manifest, list[int]]:
    """The manifest that is on the disk on return, and the numbers of the shards that are to be made."""
    if not (folder / MANIFEST).exists():
        wanted.write(folder)
        manifest = wanted
    else:
        manifest = Manifest.read(folder)
        _require_same(folder, manifest, wanted)
    remove_leftovers(folder, "codes-*", MANIFEST)
    problems = {number: problem_of(folder, manifest, number) for number in range(manifest.num_shards)}
    missing = [number for number, problem in problems.items() if problem is not None]
    for problem in problems.values():
        if problem is not None and not problem.endswith("missing"):
            logger.warning("made anew in %s: %s", folder, problem)
    if missing and manifest.complete:
        manifest = dataclasses.replace(manifest, complete=False, shards=[])
        manifest.write(folder)
    if 0 < len(missing) < manifest.num_shards:
        logger.info("resuming at shard %d of %d (%d to do)", missing[0] + 1, manifest.num_shards, len(missing))
    return manifest, missing


def _require_same(folder: Path, there: Manifest, wanted: Manifest) -> None:
    """Refuse another SAE, other features and other files, naming both."""
    if there.fingerprint == wanted.fingerprint:
        return
    sides = (there, wanted)
    if (there.sae["config"], there.sae["weights"]) != (wanted.sae["config"], wanted.sae["weights"]):
        what, (old, new) = "of another SAE", map(_describe_sae, sides)
    elif there.features["fingerprint"] != wanted.features["fingerprint"]:
        what, (old, new) = "of other features", map(_describe_features, sides)
    else:
        names = ("format", "file_rows", "rows", "rows_per_image", "timesteps")
        differing = [name for name in names if getattr(there, name) != getattr(wanted, name)]
        what = f"with another {' and '.join(differing)}"
        old, new = (", ".join(f"{name} {getattr(side, name)!r}" for name in differing) for side in sides)
    raise ValueError(
        f"{str(folder)!r} holds sparse codes {what}.\n  there: {old}\n  given: {new}\n"
        "Choose another output folder, or delete this one."
    )


def _describe_sae(manifest: Manifest) -> str:
    config = manifest.sae["config"]
    return (
        f"{manifest.sae['name'] or 'k-SAE'} · d_in {config['d_in']} · {config['num_latents']} latents · "
        f"k {config['k']} · {config['activation']} · weights {manifest.sae['weights']}"
    )


def _describe_features(manifest: Manifest) -> str:
    record = manifest.features["provenance"]
    origin = "of an unknown extraction" if record is None else Provenance.from_dict(record).describe()
    return f"{manifest.rows} rows · content {manifest.features['fingerprint']} · {origin}"
