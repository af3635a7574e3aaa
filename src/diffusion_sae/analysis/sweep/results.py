"""The tidy table of a sweep: a row a fit."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..._files import read_json, write_atomically
from .cells import CellResult

RESULTS, SUMMARY = "results.parquet", "sweep.json"
SCHEMA = pa.schema(
    [
        ("kind", pa.string()),
        ("model", pa.string()),
        ("weights", pa.string()),
        ("draw", pa.int64()),
        ("prompt", pa.string()),
        ("prompt_of", pa.string()),
        ("layer", pa.string()),
        ("timestep", pa.int64()),
        ("head", pa.string()),
        ("label", pa.string()),
        ("num_labels", pa.int64()),
        ("width", pa.int64()),
        ("seed", pa.int64()),
        ("validation_accuracy", pa.float64()),
        ("validation_loss", pa.float64()),
        ("test_accuracy", pa.float64()),
        ("l2", pa.float64()),
        ("epoch", pa.int64()),
        ("train_images", pa.int64()),
        ("validation_images", pa.int64()),
        ("test_images", pa.int64()),
        ("seconds", pa.float64()),
    ]
)


def rows_of(result: CellResult) -> list[dict[str, Any]]:
    shared = {
        **dataclasses.asdict(result.cell),
        "num_labels": result.num_labels,
        "width": result.width,
        **{f"{role}_images": result.rows.get(role) for role in ("train", "validation", "test")},
    }
    fits = [
        {key: value for key, value in dataclasses.asdict(seed).items() if key != "correct"} for seed in result.seeds
    ]
    return [{**shared, **fit} for fit in fits]


def write_table(path: Path, results: Sequence[CellResult]) -> None:
    rows = [row for result in results for row in rows_of(result)]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    write_atomically(path, lambda temporary: pq.write_table(table, temporary))


@dataclasses.dataclass(frozen=True)
class SweepResults:
    """A finished sweep, read from its folder."""

    rows: list[dict[str, Any]]
    """Of `results.parquet`."""
    summary: dict[str, Any]
    """Of `sweep.json`."""

    @classmethod
    def read(cls, folder: str | Path) -> "SweepResults":
        """
        Raises:
            FileNotFoundError: if the folder holds no finished sweep.
        """
        folder = Path(folder)
        for name in (RESULTS, SUMMARY):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder} holds no finished sweep: there is no {name}. Run `diffusion-sae sweep` to its end."
                )
        rows = pq.ParquetFile(folder / RESULTS).read().to_pylist()
        return cls(rows, read_json(folder / SUMMARY))
