"""A step's rows some at a time, to the result of all at once: micro-batches that know the statistics of their batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .configuration import PENALISED
from .modeling import KSparseAutoencoder, Timesteps
from .penalised import LOOKED_AT, few_have_a_gradient
from .processes import SAEProcesses, WholeBatch
from .rows import rows_of
from .scratch import distances
from .sparse import Choose

DENSE_BYTES = 2**28
"""Of one array of rows × latents, of which the dense passes of relu and jumprelu hold several."""


class MicroBatch(WholeBatch):
    """Some rows of a batch, which know the statistics of all rows of all processes that were taken beforehand."""

    def __init__(self, processes: SAEProcesses, rows: slice, share: float) -> None:
        """
        Args:
            rows: which rows of this process's batch.
            share: how much of it they are.
        """
        self.processes, self.rows, self.share = processes, rows, share
        self.known: dict[str, Tensor] = {}
        """By statistic."""
        self.code: tuple[Tensor, Tensor] | None = None
        """(values, indices) of these rows that batchtopk has chosen in the whole batch."""

    @property
    def choose(self) -> Choose | None:
        code = self.code
        return None if code is None else lambda *_: code

    def mean(self, value: Tensor, statistic: str = "") -> Tensor:
        return self.known[statistic] if statistic in self.known else self.processes.mean(value)

    def offers(self, values: Tensor) -> Tensor:
        return self.processes.offers(values)

    def own(self, of_offers: Tensor) -> Tensor:
        return self.processes.own(of_offers)

    def largest(self, num_latents: int) -> int:
        return self.processes.largest(num_latents)


@torch.no_grad()
def micro_batches(
    sae: KSparseAutoencoder,
    processes: SAEProcesses,
    batch: Tensor,
    timesteps: Timesteps,
    *,
    size: int | None,
    k: int | None,
    auxk: bool,
) -> Sequence[MicroBatch]:
    """The batch in parts of `size` rows, or by default in as few as the memory for dense codes allows.

    Of several parts batchtopk chooses in one product for all; what jumprelu's penalty and AuxK need of the whole batch
    takes one more forward pass.
    """
    size = size or _rows_at_a_time(sae, processes, batch, timesteps)
    slices = [slice(low, min(low + size, len(batch))) for low in range(0, len(batch), size)]
    parts = [MicroBatch(processes, rows, (rows.stop - rows.start) / len(batch)) for rows in slices]
    if len(parts) == 1:
        return parts
    if sae.config.activation == "batchtopk":
        values, indices = sae._encoded(sae._rows(batch, timesteps), sae.choice_of_batch(k, processes))
        for part in parts:
            part.code = values[part.rows].clone(), indices[part.rows].clone()
    if auxk or sae.config.activation == "jumprelu":
        residual, l0 = batch.new_zeros(()), batch.new_zeros(())
        for part in parts:
            rows = batch[part.rows]
            output = sae(rows, timesteps=rows_of(timesteps, part.rows), k=k, shared=part)
            residual += distances(rows, output.reconstruction).square().sum()
            l0 += (output.top_acts != 0).sum() / len(batch)
        for part in parts:  # of the residual as much as of the rows, as the losses are weighted by it
            part.known = {"l0": processes.mean(l0), "residual": processes.mean(residual) * part.share}
    return parts


def _rows_at_a_time(sae: KSparseAutoencoder, processes: SAEProcesses, batch: Tensor, timesteps: Timesteps) -> int:
    if sae.config.activation not in PENALISED:
        return len(batch)
    first = slice(0, LOOKED_AT)
    if few_have_a_gradient(sae, sae._rows(batch[first], rows_of(timesteps, first)), processes):
        return len(batch)
    return max(1, DENSE_BYTES // (sae.config.num_latents * batch.element_size()))
