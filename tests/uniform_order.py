"""The order of rows that batches of rows in memory have, written out: an oracle."""

import torch
from torch import Tensor

from diffusion_sae.features.order import epoch_order


def step_rows(step: int, batch_size: int, count: int, *, seed: int) -> Tensor:
    """Rows of one step: each row once an epoch; the rows left over at an epoch's end wait for the next order."""
    per_epoch = max(1, count // batch_size)
    order = epoch_order(count, seed=seed, epoch=step // per_epoch)
    return order[torch.arange(count)[(step % per_epoch) * batch_size :][:batch_size]]
