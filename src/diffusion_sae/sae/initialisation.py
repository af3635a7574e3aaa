"""Initial weights of an SAE, from its seed alone."""

import math
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK_ELEMENTS = 2**22  # 16 MB


def initial_weights(config: Any) -> tuple[Float[Tensor, "d_in num_latents"], Float[Tensor, "num_latents d_in"]]:
    """(W_enc, W_dec) by `config.encoder_init`; the decoder's rows are random directions of unit norm."""
    generator = torch.Generator().manual_seed(config.init_seed)
    W_dec = torch.randn(config.num_latents, config.d_in, generator=generator)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    if config.encoder_init == "tied":
        return W_dec.T, W_dec
    return (torch.rand(config.d_in, config.num_latents, generator=generator) * 2 - 1) * kaiming_bound(config), W_dec


def kaiming_bound(config: Any) -> float:
    """Of torch's `kaiming_uniform_` on a tensor (d_in, num_latents), which it takes for a layer of num_latents inputs.

    So Revelio's code draws W_enc; He et al. (2015) have √(6 / d_in) for this layer.
    """
    return math.sqrt(6 / config.num_latents)


def initial_shard(
    config: Any, low: int, high: int, block: int = BLOCK_ELEMENTS
) -> tuple[Float[Tensor, "latents d_in"], Float[Tensor, "latents d_in"]]:
    """(W_encᵀ, W_dec) of the latents low…high − 1, those of `initial_weights`.

    The numbers of a generator come one after the other, so that those of the other latents are drawn as well, but never
    more than about `block` at a time.
    """
    generator = torch.Generator().manual_seed(config.init_seed)
    latents, width = config.num_latents, config.d_in
    W_dec = torch.empty(high - low, width)
    for start, end in _blocks_of_rows(latents, width, block):
        drawn = torch.randn(end - start, width, generator=generator)
        first, last = max(start, low), min(end, high)
        if first < last:
            W_dec[first - low : last - low] = drawn[first - start : last - start]
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    if config.encoder_init == "tied":
        return W_dec.clone(), W_dec
    W_enc, bound = torch.empty(high - low, width), kaiming_bound(config)
    for start, end in _blocks_of_rows(width, latents, block):
        drawn = torch.rand(end - start, latents, generator=generator)[:, low:high]
        W_enc[:, start:end] = ((drawn * 2 - 1) * bound).T
    return W_enc, W_dec


def _blocks_of_rows(rows: int, width: int, block: int) -> list[tuple[int, int]]:
    """randn draws 16 numbers from 16 others, and the last 16 of a tensor once more where it ends within such a group:
    blocks are of a multiple of 16 rows, and the last is not of less than 16 numbers.
    """
    edges = [*range(0, rows, max(16, block // width // 16 * 16)), rows]
    if len(edges) > 2 and (rows - edges[-2]) * width < 16:
        del edges[-2]
    return list(pairwise(edges))
