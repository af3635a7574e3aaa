"""One training of a probe: what every way of fitting is given."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .examples import Examples, Features, Views, to_device
from .modeling import DiffusionProbe
from .processes import ProbeProcesses
from .results import ProbeMetrics
from .tasks import Task
from .training_args import ProbeTrainingArguments


@dataclass(frozen=True)
class Run:
    probe: DiffusionProbe
    args: ProbeTrainingArguments
    examples: Examples
    rows: Tensor
    """Numbers of the examples that are trained on."""
    labels: Tensor
    """Of all examples."""
    validation: tuple[Features, Tensor]
    class_weights: Tensor | None
    output_dir: Path
    progress: bool
    processes: ProbeProcesses
    views: Views | None
    """Augmented views of all examples, which are trained on in their place."""
    name: str
    """Fingerprint of settings and features, for the checkpoint."""

    @property
    def balanced(self) -> bool:
        """Whether choices are made by a metric in which all classes count alike."""
        return self.args.class_weights == "balanced" or self.args.balanced_sampling

    @property
    def report_to(self) -> str:
        """Of several processes the main one reports."""
        return self.args.report_to if self.processes.is_main else "none"

    def validate(self) -> ProbeMetrics:
        features, labels = self.validation
        return self.measure(self.probe.predict(features), labels)

    def measure(self, logits: Tensor, labels: Tensor) -> ProbeMetrics:
        return measure(self.probe.task, logits, labels, balanced=self.balanced)

    def batches(self) -> Iterator[Features]:
        """The training examples in order, in the head's shape, on its device."""
        for batch in self.examples.batches(self.rows):
            yield to_device(self.probe.head.arranged(batch), self.probe.device)

    def step_batch(self, numbers: Tensor, epoch: int) -> Features:
        """Examples of one step of an epoch, on the head's device."""
        if self.views is None:
            return to_device(self.examples.batch(numbers), self.probe.device)
        return to_device(self.views.batch(numbers, seed=self.args.seed, epoch=epoch), self.probe.device)

    def training_labels(self) -> Tensor:
        return self.labels[self.rows].to(self.probe.device)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of each example, times the weight of its class."""
        weights = None if self.class_weights is None else self.class_weights.to(logits)
        return self.probe.task.losses(logits, labels, weights)

    def metrics_line(self, metrics: ProbeMetrics, **more: float) -> dict[str, float]:
        return {**more, **metrics.values, "validation_loss": metrics.loss}


def measure(task: Task, logits: Tensor, labels: Tensor, *, balanced: bool = False) -> ProbeMetrics:
    """A task's metrics of logits; `balanced`: choices are made by the one in which all classes count alike."""
    values = task.metrics(logits, labels, balanced=balanced)
    metric = task.balanced_metric if balanced else task.metric
    return ProbeMetrics(values, task.loss(logits.double(), labels).item(), len(labels), metric)


def class_weights_of(run_args: ProbeTrainingArguments, probe: DiffusionProbe, labels: Tensor) -> Tensor | None:
    if run_args.class_weights == "none":
        return None
    return probe.task.class_weights(labels, probe.config.num_labels).to(torch.float32)
