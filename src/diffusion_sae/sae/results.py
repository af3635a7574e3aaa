"""What a training gives, and what it calls on the way."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .evaluation import SAEMetrics

if TYPE_CHECKING:
    from .trainer import SAETrainer


@dataclass(frozen=True)
class SAETrainingResult:
    """What a training came to."""

    metrics: SAEMetrics
    """On the held-out rows; with `eval_fraction=0` on training rows."""
    steps: int
    seconds: float
    """Of this run; a resumed run counts its own part."""
    history: list[dict[str, float]]
    """One entry a log line."""


class SAECallback:
    """What a trainer calls; override what you need. A callback that raises ends the training; the checkpoint stays."""

    def on_log(self, trainer: "SAETrainer", step: int, values: dict[str, float]) -> None:
        """After each log line and evaluation."""

    def on_save(self, trainer: "SAETrainer", step: int) -> None:
        """After each checkpoint."""
