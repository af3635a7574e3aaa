"""Labels of images from a table beside them: a CSV or Parquet file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from .._config import check, check_choice

IMAGE = "image"
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
SHOWN = 5


class FileLabels(NamedTuple):
    """In the order of the images that were asked for."""

    values: Tensor
    """(images,) class numbers, (images, labels) of 0 and 1, or (images, outputs) numbers."""
    names: list[str]
    """Of the classes, labels or outputs."""


def read_label_file(
    path: str | Path, images: Sequence[str], problem_type: str, names: Sequence[str] | None = None
) -> FileLabels:
    """Labels of images by their names.

    Args:
        path: CSV with a header, or Parquet. The column `image` has an image's path in its folder or its row in its data
            set, as `FeatureStore.sources` gives them; the other columns are labels. Rows of other images are ignored.
        images: which images, in which order.
        problem_type: single_label_classification: one other column, whose values, sorted, are the classes;
            multi_label_classification: a column of 0 and 1 for each label; regression: a column of numbers for each
            output.
        names: classes, labels or outputs in their order, as the training images' file has them; None: those of this
            file.

    Raises:
        ValueError: for a file of another shape, images without a row or with several, and values that are no labels of
            that type.
    """
    check_choice("problem_type", problem_type, PROBLEM_TYPES)
    table = _read(Path(path))
    check(
        IMAGE in table.column_names and table.num_columns > 1,
        f"{path} must have the column {IMAGE!r} and at least one of labels, got {', '.join(table.column_names)}.",
    )
    row_of: dict[str, int] = {}
    in_file = [str(name) for name in table[IMAGE].to_pylist()]
    wanted = set(images)
    repeated = []
    for row, name in enumerate(in_file):
        if name in wanted and name in row_of:
            repeated.append(name)
        row_of[name] = row
    check(not repeated, f"{path} has several rows of {', '.join(repeated[:SHOWN])}.")
    missing = [name for name in images if name not in row_of]
    check(
        not missing,
        f"{path} has no row of {len(missing)} of the {len(wanted)} images, such as {', '.join(missing[:SHOWN])}. Its "
        f"column {IMAGE!r} has names such as {', '.join(in_file[:SHOWN])}.",
    )
    labels = table.drop_columns([IMAGE]).take(pa.array([row_of[name] for name in images], pa.int64()))
    empty = [name for name in labels.column_names if labels[name].null_count]
    check(not empty, f"{path} has images without a value in {', '.join(empty[:SHOWN])}.")
    if problem_type == "single_label_classification":
        return _classes(path, labels, names)
    if names is not None:
        lacking = [name for name in names if name not in labels.column_names]
        check(not lacking, f"{path} lacks the columns {', '.join(lacking)} that the training images have.")
        labels = labels.select(list(names))
    return _numbers(path, labels, only_0_and_1=problem_type == "multi_label_classification")


def _read(path: Path) -> pa.Table:
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet as pq

        return pq.read_table(path)
    import pyarrow.csv as pa_csv

    # names such as 007 are no numbers
    options = pa_csv.ConvertOptions(column_types={IMAGE: pa.string()})
    try:
        return pa_csv.read_csv(path, convert_options=options)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} cannot be read as CSV: {error}") from error


def _classes(path: Any, labels: pa.Table, names: Sequence[str] | None) -> FileLabels:
    check(
        labels.num_columns == 1,
        f"{path} has the columns {', '.join(labels.column_names)}: one class an image is one column. For several "
        "labels an image give problem_type multi_label_classification, for numbers regression.",
    )
    values = labels.column(0).to_pylist()
    classes = [str(value) for value in sorted(set(values))] if names is None else list(names)
    number = {name: i for i, name in enumerate(classes)}
    unknown = sorted({str(value) for value in values} - set(number))
    check(not unknown, f"{path} has classes that the training images do not have: {', '.join(unknown[:SHOWN])}.")
    return FileLabels(torch.tensor([number[str(value)] for value in values]), classes)


def _numbers(path: Any, labels: pa.Table, *, only_0_and_1: bool) -> FileLabels:
    columns = []
    for name in labels.column_names:
        kind = labels[name].type
        check(
            pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind),
            f"{path} has {kind} in the column {name!r}, where numbers are needed.",
        )
        columns.append(torch.tensor(labels[name].to_pylist(), dtype=torch.float32))
    values = torch.stack(columns, 1)
    if only_0_and_1:
        others = values[(values != 0) & (values != 1)]
        check(not len(others), f"{path} must have 0 and 1 for each label, got others, such as {others[:1].tolist()}.")
    check(bool(torch.isfinite(values).all()), f"{path} has NaN or infinite values.")
    return FileLabels(values, labels.column_names)
