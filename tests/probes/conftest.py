"""Labelled features in which the classes can be told apart, but not perfectly."""

from collections.abc import Callable

import pytest
import torch

from diffusion_sae.features import FeatureSet
from diffusion_sae.provenance import Provenance


def draw_classes(
    rows: int, shape: tuple[int, ...] = (6,), classes: int = 3, noise: float = 1.0, seed: int = 0
) -> FeatureSet:
    """Class centres along the first dimension of `shape` (the channels), of very different scales, plus noise."""
    centers = torch.randn(classes, shape[0], generator=torch.Generator().manual_seed(7))
    scales = 10 ** torch.linspace(-2, 2, shape[0])
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    features = centers[labels].reshape(rows, shape[0], *(1,) * (len(shape) - 1))
    features = features + noise * torch.randn(rows, *shape, generator=generator)
    return FeatureSet.from_tensor(features * scales.reshape(-1, *(1,) * (len(shape) - 1)) + 3 * scales[0], labels)


@pytest.fixture(scope="session")
def labelled() -> Callable[..., FeatureSet]:
    return draw_classes


@pytest.fixture(scope="session")
def provenance() -> Provenance:
    return Provenance(
        model="owner/model", layers=("up_ft1",), timesteps=(25,), image_size=64, weights="0123456789abcdef"
    )
