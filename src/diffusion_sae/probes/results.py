"""What a training of a probe measures."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ProbeMetrics:
    values: dict[str, float]
    """accuracy; for several labels mean_average_precision and macro_f1; for regression r2 and mse."""
    loss: float
    """Mean over the examples, without class weights."""
    rows: int
    metric: str = "accuracy"
    """The one of `values` that choices are made by."""

    @property
    def score(self) -> float:
        return self.values[self.metric]

    @property
    def accuracy(self) -> float:
        if "accuracy" not in self.values:
            raise AttributeError(f"accuracy is of single-label classification; measured: {', '.join(self.values)}.")
        return self.values["accuracy"]

    def better_than(self, other: "ProbeMetrics | None") -> bool:
        """By the score, ties by the loss."""
        return other is None or (self.score, -self.loss) > (other.score, -other.loss)

    def record(self) -> dict[str, float]:
        """As `metrics.json` has it."""
        return {**self.values, "rows": self.rows}


@dataclass(frozen=True)
class ProbeTrainingResult:
    validation: ProbeMetrics
    """Of what was chosen."""
    chosen: dict[str, float]
    """Which epoch, penalty or number of neighbours that was."""
    history: list[dict[str, float]]
