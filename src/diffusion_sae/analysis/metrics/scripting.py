"""What the metric scripts share: kinds of input, what `evaluate` is told of a metric, and lists as tensors."""

import inspect
from collections.abc import Callable
from typing import Any

import datasets
import evaluate
import torch
from torch import Tensor

from ...sae.code import SparseCode
from .matching import Matching
from .probes import Interval

ROW = datasets.List(datasets.Value("float32"))
"""One row of numbers."""
LABELS = datasets.List(datasets.Value("int64"))
"""Several class numbers, or latents."""
LABEL = datasets.Value("int64")
NUMBER = datasets.Value("float64")


def info(function: Callable[..., Any], inputs: str, *, source: str = "", **features: Any) -> evaluate.MetricInfo:
    """Described by the docstring of the function underneath."""
    return evaluate.MetricInfo(
        description=inspect.getdoc(function) or "",
        citation=source,
        inputs_description=inputs,
        features=datasets.Features(features),
    )


def rows(values: list[list[float]]) -> Tensor:
    """(N, d) in fp32, in which they were kept."""
    return torch.tensor(values, dtype=torch.float32)


def labels(values: list[Any]) -> Tensor:
    """(N,) or (N, n) class numbers."""
    return torch.tensor(values, dtype=torch.long)


def numbers(values: list[float]) -> Tensor:
    """(N,) in fp64."""
    return torch.tensor(values, dtype=torch.float64)


def sparse_code(top_acts: list[list[float]], top_indices: list[list[int]]) -> SparseCode:
    return SparseCode(rows(top_acts), labels(top_indices))


def of_units(name: str, values: Tensor) -> dict[str, Any]:
    """The mean over the units that have a value, and every unit's."""
    return {name: values.double().nanmean().item(), "per_unit": values.tolist()}


def of_interval(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}


def of_matching(matching: Matching) -> dict[str, Any]:
    return {
        "mean_similarity": matching.mean,
        "first": matching.first.tolist(),
        "second": matching.second.tolist(),
        "similarity": matching.similarity.tolist(),
    }
