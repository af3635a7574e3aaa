"""Reading a shard's index, which may be from anyone: a Parquet file can unpack to far more than it holds."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .columns import INDEX_SCHEMA

STRINGS = [field.name for field in INDEX_SCHEMA if field.type == pa.string()]
MAX_ROW_BYTES = 4096  # an image's id and source are names, its labels numbers
SPARE_BYTES = 1 << 20


def read_index_file(source: Path | pa.BufferReader, where: str, rows: int | None = None) -> pa.Table:
    """The table of an index.

    Args:
        source: the file, or its bytes.
        where: how errors call it.
        rows: images of its shard; None: the file has been held against its shard already.

    Raises:
        ValueError: if it is damaged, or holds or unpacks to more than an index of so many rows can.
    """
    try:
        # strings as numbers of a dictionary, so that what is repeated is not unpacked before it has been counted
        with pq.ParquetFile(source, read_dictionary=STRINGS) as file:
            rows = file.metadata.num_rows if rows is None else rows
            _check_size(file.metadata, rows, where)
            table = file.read(use_threads=False)
        names = table.schema.names
        columns = {name: _unpacked(table[name], rows, where) if name in STRINGS else table[name] for name in names}
        schema = pa.schema([(name, pa.string() if name in STRINGS else pa.int64()) for name in names])
        return pa.table(columns).cast(schema)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{where} is damaged ({error}).") from error


def _check_size(metadata: Any, rows: int, where: str) -> None:
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    chunks = [(group, group.column(i)) for group in groups for i in range(group.num_columns)]
    flat = all(chunk.num_values == group.num_rows for group, chunk in chunks)
    size = sum(chunk.total_uncompressed_size for _, chunk in chunks)
    if metadata.num_rows != rows or not flat or size > _most(rows):
        raise ValueError(
            f"{where} holds {metadata.num_rows:,} rows and {size:,} bytes; an index of {rows:,} images holds one "
            f"value an image and column and at most {_most(rows):,} bytes."
        )


def _most(rows: int) -> int:
    return rows * MAX_ROW_BYTES + SPARE_BYTES


def _unpacked(column: pa.ChunkedArray, rows: int, where: str) -> pa.ChunkedArray:
    if not pa.types.is_dictionary(column.type):
        return column
    size = sum(_unpacked_bytes(chunk) for chunk in column.iterchunks())
    if size > _most(rows):
        raise ValueError(f"{where} unpacks to {size:,} bytes; an index of {rows:,} images has {_most(rows):,} at most.")
    return column.cast(pa.string())


def _unpacked_bytes(chunk: Any) -> int:
    """Bytes of a dictionary-encoded chunk's texts, each as often as it occurs."""
    lengths = pc.call_function("binary_length", [chunk.dictionary])
    return pc.call_function("sum", [pc.take(lengths, chunk.indices)]).as_py() or 0
