"""One SAE trained by several processes.

`SAEProcesses`: each computes a share of every batch, all make the same update. What is exchanged is what the gradients
of W_enc and W_dec are sums of, codes and rows: O(batch · (k + d_in)) numbers, where the gradients themselves are
O(num_latents · d_in).

`ShardProcesses`: each holds a share of the latents and sees every batch whole (`sharding`).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor, distributed, nn

from .._processes import Processes
from .sparse import Choose, SparseGradients


class WholeBatch:
    """A batch that one process has, with all of its rows and latents.

    Of a batch that several have a part of, what is a statistic of all rows asks the others here.
    """

    @property
    def choose(self) -> Choose | None:
        """What batchtopk has chosen, if that is known already."""
        return None

    def mean(self, value: Tensor, statistic: str = "") -> Tensor:  # noqa: ARG002
        """Mean over all shares of the rows, without gradient. Of a named statistic a micro-batch knows it already."""
        return value

    def offers(self, values: Float[Tensor, "N width"]) -> Float[Tensor, "rows shares width"]:
        """What is offered of each row of the batch by each share of the latents."""
        return values[:, None]

    def own(self, of_offers: Bool[Tensor, "rows shares width"]) -> Bool[Tensor, "N width"]:
        """The part of what is said of `offers` that is of this process's."""
        return of_offers[:, 0]

    def largest(self, num_latents: int) -> int:
        """Latents of the largest share."""
        return num_latents


class SAEProcesses(Processes, WholeBatch):
    """Processes that exchange numbers; a single one waits for nothing and exchanges nothing."""

    @property
    def place(self) -> tuple[int, int]:
        """(rank, number of processes), by which a batch is shared out."""
        return self.rank, self.count

    @property
    def batch_shares(self) -> int:
        """How many shares a batch has."""
        return self.place[1]

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

    def broadcast_state(self, sae: nn.Module) -> None:
        """The main process's numbers for all that the processes hold alike."""
        for value in sae.state_dict().values():
            self.broadcast(value)

    def total(self, of_latents: list[Tensor], shared: list[Tensor]) -> Tensor:
        """Sum, in fp64, of numbers of the latents that this process holds and of what all processes have."""
        return torch.stack(of_latents + shared).double().sum()

    def mean(self, value: Tensor, statistic: str = "") -> Tensor:  # noqa: ARG002
        """See `WholeBatch`; a batch's shares have the same number of rows."""
        if self.count == 1:
            return value
        total = value.detach().clone()
        distributed.all_reduce(total)
        return total / self.count

    def offers(self, values: Tensor) -> Tensor:
        return self.gather(values)[:, None]

    def own(self, of_offers: Tensor) -> Tensor:
        rows = len(of_offers) // self.batch_shares
        first, _ = self.place
        return of_offers[first * rows : (first + 1) * rows, 0]

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


PER_LATENT = ("W_enc", "b_enc", "W_dec")
"""Parameters of which a process holds the part of its latents; the others are everywhere."""


class ShardProcesses(SAEProcesses):
    """Processes that hold a share of the latents each. All see the whole batch, so that there is nothing to average."""

    def __init__(self) -> None:
        """On the accelerator of this process where CUDA is there and `accelerate launch --cpu` does not say no."""
        cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        super().__init__(cpu=cpu)
        self.device = torch.device("cpu")
        if not cpu:
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())

    @property
    def place(self) -> tuple[int, int]:
        return 0, 1

    def broadcast_state(self, sae: nn.Module) -> None:
        for name, value in sae.state_dict().items():
            if name not in PER_LATENT:
                self.broadcast(value)

    def total(self, of_latents: list[Tensor], shared: list[Tensor]) -> Tensor:
        return self.summed(torch.stack(of_latents).double().sum()) + sum(value.double() for value in shared)

    def mean(self, value: Tensor, statistic: str = "") -> Tensor:  # noqa: ARG002
        return value

    def gather(self, value: Tensor, padding: float = 0) -> Tensor:  # noqa: ARG002
        return value

    def share(self, gradients: SparseGradients) -> SparseGradients:
        return gradients

    def bounds(self, num_latents: int, rank: int | None = None) -> tuple[int, int]:
        """First latent of a process, by default this one, and the one behind its last: shares differ by one at most."""
        rank = self.rank if rank is None else rank
        return rank * num_latents // self.count, (rank + 1) * num_latents // self.count

    def largest(self, num_latents: int) -> int:
        return -(-num_latents // self.count)

    def offers(self, values: Tensor) -> Tensor:
        return self.all_of(values, values.shape[1]).transpose(0, 1)

    def own(self, of_offers: Tensor) -> Tensor:
        return of_offers[:, self.rank]

    def summed(self, value: Tensor) -> Tensor:
        """Sum over the processes; without gradient."""
        total = value.detach().clone(memory_format=torch.contiguous_format)
        if self.count > 1:
            distributed.all_reduce(total)
        return total

    def all_of(self, value: Tensor, width: int | None = None) -> Tensor:
        """(processes, rows, width): what each has of every row, filled up with 0, by default to the largest width."""
        value = value.detach()
        if width is None:
            most = torch.tensor(value.shape[1], device=value.device)
            if self.count > 1:
                distributed.all_reduce(most, op=distributed.ReduceOp.MAX)
            width = int(most)
        value = torch.nn.functional.pad(value, (0, width - value.shape[1])).contiguous()
        if self.count == 1:
            return value[None]
        parts = [torch.empty_like(value) for _ in range(self.count)]
        distributed.all_gather(parts, value)
        return torch.stack(parts)

    def collect(self, value: Tensor, num_latents: int) -> Tensor | None:
        """The rows (latents of this process, …) of all processes on the main one's CPU; None in the others.

        They come one process after the other: beside its own the main process's device holds one share at a time.
        """
        value = value.detach().contiguous()
        if not self.is_main:
            distributed.send(value, 0)
            return None
        whole = torch.empty(num_latents, *value.shape[1:], dtype=value.dtype)
        for rank in range(self.count):
            low, high = self.bounds(num_latents, rank)
            part = value
            if rank:
                part = value.new_empty(high - low, *value.shape[1:])
                distributed.recv(part, rank)
            whole[low:high] = part
        return whole
