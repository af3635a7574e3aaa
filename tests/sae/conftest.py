"""Data with a known dictionary, and a record of an extraction that such data could come from."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffusion_sae.provenance import Provenance


def draw_superposition(rows: int, d_in: int = 16, num_features: int = 40, active: float = 3.0, seed: int = 0) -> Tensor:
    """Sums of a few of `num_features` > `d_in` unit directions with positive weights, around a mean that is not 0."""
    dictionary = torch.Generator().manual_seed(12345)  # one dictionary for all seeds
    directions = torch.nn.functional.normalize(torch.randn(num_features, d_in, generator=dictionary), dim=1)
    center = torch.randn(d_in, generator=dictionary)
    generator = torch.Generator().manual_seed(seed)
    present = torch.rand(rows, num_features, generator=generator) < active / num_features
    weights = torch.rand(rows, num_features, generator=generator) + 0.5
    return (present * weights) @ directions + center


@pytest.fixture(scope="session")
def superposition() -> Callable[..., Tensor]:
    return draw_superposition


@pytest.fixture(scope="session")
def provenance() -> Provenance:
    return Provenance(
        model="owner/model", layers=("up_ft1",), timesteps=(25,), image_size=64, weights="0123456789abcdef"
    )
