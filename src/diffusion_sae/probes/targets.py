"""The targets of a regression as steps of gradient descent see them."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .run import Run
from .tasks import Regression


class TargetUnits:
    """Each output's mean and deviation over the training examples, in whose units a head is trained.

    A step moves a weight by about the learning rate: towards targets of 1000 ± 300 it would take as many more steps as
    they are larger than 1. Other tasks have no units, of which this is 0 and 1.
    """

    def __init__(self, mean: Float[Tensor, " outputs"], std: Float[Tensor, " outputs"]) -> None:
        self.mean, self.std = mean, torch.where(std > 0, std, 1.0)

    @classmethod
    def of(cls, run: Run) -> Self:
        if not isinstance(run.probe.task, Regression):
            return cls(torch.zeros(1), torch.ones(1))
        targets = run.labels[run.rows].double().reshape(len(run.rows), -1)
        std, mean = torch.std_mean(targets, 0, correction=0)
        return cls(mean, std)

    def taken_by(self, run: Run) -> Run:
        """The run with its training targets in these units; those of validation stay as they are."""
        if not isinstance(run.probe.task, Regression):
            return run
        targets = (run.labels.double().reshape(len(run.labels), -1) - self.mean) / self.std
        return dataclasses.replace(run, labels=targets.float())

    @torch.no_grad()
    def fold_(self, classifier: nn.Linear) -> None:
        """Make outputs in these units those of the targets themselves."""
        weight, bias = classifier.weight, classifier.bias
        weight.copy_(weight.cpu().double() * self.std[:, None])  # on the CPU: not all devices have fp64
        bias.copy_(bias.cpu().double() * self.std + self.mean)

    @contextmanager
    def folded(self, classifier: nn.Linear) -> Iterator[None]:
        """The same within it alone."""
        kept = classifier.weight.detach().clone(), classifier.bias.detach().clone()
        self.fold_(classifier)
        try:
            yield
        finally:
            with torch.no_grad():
                classifier.weight.copy_(kept[0])
                classifier.bias.copy_(kept[1])
