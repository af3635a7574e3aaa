"""Layers that see a whole batch where several processes have a part of it each: the numbers are those of one process.

In a single process, and in evaluation, they are torch's own layers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


class Share(NamedTuple):
    """The rows of a batch that this process has."""

    start: int
    stop: int
    of: int
    copies: int = 1
    """How many processes have these very rows."""


_SHARE: ContextVar[Share | None] = ContextVar("share", default=None)


@contextmanager
def sharing(share: Share | None) -> Iterator[None]:
    """Forward passes in the block are of this share of a batch; None: of a batch of this process alone."""
    token = _SHARE.set(share)
    try:
        yield
    finally:
        _SHARE.reset(token)


def _total(value: Tensor) -> Tensor:
    """Sum over the processes, with gradient."""
    from torch.distributed.nn.functional import all_reduce

    return all_reduce(value)


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d with the mean and variance of all processes' rows, the variance as squares around that mean."""

    def forward(self, input: Tensor) -> Tensor:
        share = _SHARE.get()
        if share is None or not self.training:
            return super().forward(input)
        values = input.float()
        count = torch.tensor([float(values.numel() // values.shape[1])], device=values.device)
        summed = _total(torch.cat([values.sum((0, 2, 3)), count])) / share.copies
        count = summed[-1].detach()
        mean = summed[:-1] / count
        centred = values - mean[:, None, None]
        variance = _total(centred.square().sum((0, 2, 3))) / share.copies / count
        self._remember(mean.detach(), variance.detach() * count / (count - 1))
        result = centred * (variance + self.eps).rsqrt()[:, None, None]
        if self.affine:
            result = result * self.weight[:, None, None] + self.bias[:, None, None]
        return result.to(input.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        for running, value in ((self.running_mean, mean), (self.running_var, variance)):
            running.lerp_(value.to(running), self.momentum)  # type: ignore[union-attr, arg-type]
        self.num_batches_tracked.add_(1)  # type: ignore[operator]


class Dropout(nn.Dropout):
    """nn.Dropout that draws for the whole batch and keeps what its share is given."""

    def forward(self, input: Tensor) -> Tensor:
        share = _SHARE.get()
        if share is None or not self.training:
            return super().forward(input)
        whole = input.new_ones(share.of, *input.shape[1:])
        return input * F.dropout(whole, self.p)[share.start : share.stop]


class Dropout2d(nn.Dropout2d):
    """The same of nn.Dropout2d, which drops whole channels."""

    def forward(self, input: Tensor) -> Tensor:
        share = _SHARE.get()
        if share is None or not self.training:
            return super().forward(input)
        whole = input.new_ones(share.of, input.shape[1], 1, 1)
        return input * F.dropout2d(whole, self.p)[share.start : share.stop]
