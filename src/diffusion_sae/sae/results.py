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
    """What a trainer calls, in every process; override what you need.

    `trainer.stop()` ends the training after the step. A callback that raises ends it at once; the checkpoint stays.
    """

    def on_log(self, trainer: "SAETrainer", step: int, values: dict[str, float]) -> None:
        """After each log line and evaluation."""

    def on_evaluate(self, trainer: "SAETrainer", step: int, metrics: SAEMetrics) -> None:
        """After each evaluation on held-out rows."""

    def on_save(self, trainer: "SAETrainer", step: int) -> None:
        """After each checkpoint."""
