"""One SAE trained by several processes: each computes a share of every batch, all make the same update.

What is exchanged is what the gradients of W_enc and W_dec are sums of, codes and rows: O(batch · (k + d_in)) numbers,
where the gradients themselves are O(num_latents · d_in).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed

from .._processes import Processes
from .sparse import SparseGradients


class SAEProcesses(Processes):
    """Processes that exchange numbers; a single one waits for nothing and exchanges nothing."""

    @property
    def place(self) -> tuple[int, int]:
        """(rank, number of processes)."""
        return self.rank, self.count

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The block runs in the main process, and then in the others."""
        if self.count > 1 and not self.is_main:
            distributed.barrier()
        yield
        if self.count > 1 and self.is_main:
            distributed.barrier()

    def broadcast(self, value: Tensor) -> Tensor:
        """The main process's numbers, written into `value` everywhere."""
        if self.count > 1:
            shared = value.detach().contiguous()
            distributed.broadcast(shared, 0)
            with torch.no_grad():
                value.copy_(shared)
        return value

    def mean(self, value: Tensor) -> Tensor:
        """Mean over the processes; without gradient."""
        if self.count == 1:
            return value
        total = value.detach().clone()
        distributed.all_reduce(total)
        return total / self.count

    def gather(self, value: Tensor, padding: float = 0) -> Tensor:
        """The rows of all processes one below the other; narrower ones are filled up with `padding`."""
        if self.count == 1:
            return value
        value = value.detach()
        width = torch.tensor(value.shape[-1], device=value.device)
        distributed.all_reduce(width, op=distributed.ReduceOp.MAX)
        value = torch.nn.functional.pad(value, (0, int(width) - value.shape[-1]), value=padding)
        parts = [torch.empty_like(value) for _ in range(self.count)]
        distributed.all_gather(parts, value.contiguous())
        return torch.cat(parts)

    def share(self, gradients: SparseGradients) -> SparseGradients:
        """The gradients of the mean of all processes' losses: the pairs of all, weighted by 1 / number."""
        if self.count == 1:
            return gradients
        shared = SparseGradients(gradients.latents)
        gathered: dict[int, Tensor] = {}  # encoder and decoder share the indices of a code
        for mine, all_of_them in ((gradients.W_enc, shared.W_enc), (gradients.W_dec, shared.W_dec)):
            for indices, weights, dense in mine:
                if indices.data_ptr() not in gathered:
                    gathered[indices.data_ptr()] = self.gather(indices)
                every = gathered[indices.data_ptr()]
                all_of_them.append((every, self.gather(weights) / self.count, self.gather(dense)))
        return shared
