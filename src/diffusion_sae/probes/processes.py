"""One probe trained by several processes, of which each computes a share of every batch."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn

from .._processes import Processes
from .heads.shared import Share, sharing


class ProbeProcesses(Processes):
    """Processes that make the same updates, from the gradients of all; a single one exchanges nothing."""

    @contextmanager
    def share_of_batch(self, rows: Tensor) -> Iterator[tuple[Tensor, float]]:
        """This process's rows of a batch, and the weight of the mean over them in the mean over the batch.

        Of a batch with fewer rows than processes all have all rows.
        """
        if self.count == 1:
            yield rows, 1.0
            return
        count = len(rows)
        if count < self.count:
            with sharing(Share(0, count, count, self.count)):
                yield rows, 1 / self.count
            return
        start, stop = (number * count // self.count for number in (self.rank, self.rank + 1))
        with sharing(Share(start, stop, count)):
            yield rows[start:stop], (stop - start) / count

    def sum_gradients(self, module: nn.Module) -> None:
        """In place, over the processes."""
        if self.count > 1:
            for parameter in module.parameters():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                distributed.all_reduce(parameter.grad)

    def summed(self, value: float) -> float:
        """Over the processes."""
        if self.count == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        if distributed.get_backend() == "nccl":
            total = total.cuda()
        distributed.all_reduce(total)
        return total.item()
