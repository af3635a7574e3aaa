"""Orders of rows that depend on a seed and an epoch alone."""

from functools import lru_cache

import torch
from jaxtyping import Int
from torch import Tensor


def generator_of(*, seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


@lru_cache(maxsize=2)  # every step of an epoch asks for it; 10 million rows take a second to permute
def epoch_order(count: int, *, seed: int, epoch: int) -> Int[Tensor, " count"]:
    """A permutation of the rows that depends on (seed, epoch) alone."""
    return torch.randperm(count, generator=generator_of(seed=seed, epoch=epoch))
