"""Mean and spread of rows, for what is scaled by them."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Moments(NamedTuple):
    """Mean and spread of rows, of each timestep its own."""

    timesteps: tuple[int, ...]
    """Of each entry of the others; empty where they are not known, and all rows are taken together."""
    mean: Float[Tensor, "timesteps d_in"]
    std: Float[Tensor, " timesteps"]
    """√(mean over rows and dimensions of (x − mean)²)."""


def moments_of(
    parts: Iterable[tuple[Float[Tensor, "n d_in"], Int[Tensor, " n"] | None]], timesteps: Sequence[int], d_in: int
) -> Moments:
    """Moments of rows, part by part with their timesteps, accumulated in fp64."""
    known, groups = torch.tensor(timesteps), max(1, len(timesteps))
    total, squares = (torch.zeros(groups, width, dtype=torch.float64) for width in (d_in, 1))
    count = torch.zeros(groups, 1, dtype=torch.float64)
    for rows, of in parts:
        group = torch.zeros(len(rows), dtype=torch.long) if of is None else (of[:, None] == known).int().argmax(1)
        rows = rows.double()
        total.index_add_(0, group, rows)
        squares.index_add_(0, group, rows.pow(2).mean(1, keepdim=True))
        count += torch.bincount(group, minlength=groups)[:, None]
    mean = total / count
    variance = (squares / count)[:, 0] - mean.pow(2).mean(1)
    return Moments(tuple(timesteps), mean.float(), variance.clamp(min=0).sqrt().float())
