"""Initial weights of an SAE, from its seed alone."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def initial_weights(config: Any) -> tuple[Float[Tensor, "d_in num_latents"], Float[Tensor, "num_latents d_in"]]:
    """(W_enc, W_dec) by `config.encoder_init`; the decoder's rows are random directions of unit norm."""
    generator = torch.Generator().manual_seed(config.init_seed)
    W_dec = torch.randn(config.num_latents, config.d_in, generator=generator)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    if config.encoder_init == "tied":
        return W_dec.T, W_dec
    bound = math.sqrt(6 / config.d_in)  # He et al. 2015 for a layer of d_in inputs, uniform
    return (torch.rand(config.d_in, config.num_latents, generator=generator) * 2 - 1) * bound, W_dec
