"""Metrics of SAEs, their latents, and probes: pure functions, with `evaluate.Metric`s on top (`docs/metrics.md`)."""

from pathlib import Path
from typing import Any

from ..._config import check_choice

__all__ = ["load_metric", "metric_names", "metric_path"]

_SCRIPTS = Path(__file__).parent / "scripts"


def metric_names() -> list[str]:
    """All metrics that `load_metric` takes."""
    return sorted(path.stem for path in _SCRIPTS.glob("*.py") if path.stem != "__init__")


def metric_path(name: str) -> Path:
    """The script of a metric, which `evaluate.load` takes as well.

    Raises:
        ValueError: for an unknown name, listing the known ones.
    """
    check_choice("metric", name, metric_names())
    return _SCRIPTS / f"{name}.py"


def load_metric(name: str, **options: Any) -> Any:
    """One of these metrics as an `evaluate.Metric`, without network; `options` (`experiment_id`, `cache_dir`, …) are
    those of `evaluate.load`.

    `evaluate` keeps what it is given as Arrow and hands it on as Python lists: for more than some thousand rows call
    the functions themselves.
    """
    import evaluate

    return evaluate.load(str(metric_path(name)), **options)
