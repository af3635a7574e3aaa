"""Where latents fire: by hand, against the dense view, over timesteps."""

import pytest
import torch
from torch.testing import assert_close

from diffusion_sae import KSparseAutoencoder, KSparseAutoencoderConfig
from diffusion_sae.analysis.latents import latent_statistics
from diffusion_sae.analysis.spatial import activation_maps
from diffusion_sae.features import FeatureSet


def tokens(images: int, *, timesteps: tuple[int, ...] = (), side: int = 2) -> FeatureSet:
    per_image = side * side * max(1, len(timesteps))
    rows = torch.randn(images * per_image, 6, generator=torch.Generator().manual_seed(0))
    return FeatureSet([rows], rows_per_image=per_image, timesteps=timesteps)


@pytest.fixture
def sae() -> KSparseAutoencoder:
    return KSparseAutoencoder(KSparseAutoencoderConfig(d_in=6, num_latents=24, k=3))


@pytest.mark.parametrize("timesteps", [(), (10, 200)])
def test_maps_are_those_of_the_dense_view(sae: KSparseAutoencoder, timesteps: tuple[int, ...]) -> None:
    features = tokens(9, timesteps=timesteps)
    latents, images = torch.tensor([3, 0, 17]), torch.tensor([[8, 1], [1, 0], [5, 5]])
    maps = activation_maps(sae, features, latents, images, images_per_batch=2)
    dense = sae.encode(features[:]).to_dense(24).unflatten(0, (features.num_timesteps, 9, 2, 2)).amax(0)
    assert_close(maps, torch.stack([dense[images[i], :, :, latent] for i, latent in enumerate(latents)]))


def test_the_strongest_position_is_the_images_activation(sae: KSparseAutoencoder) -> None:
    features = tokens(9)
    statistics = latent_statistics(sae, features, 4)
    maps = activation_maps(sae, features, torch.arange(24), statistics.top_images)
    assert_close(maps.amax((2, 3)), statistics.top_acts)


def test_an_sae_over_timesteps_is_told_which() -> None:
    sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=6, num_latents=24, k=3, timesteps=[10, 200]))
    sae.b_dec.data[1] += 5
    features = tokens(3, timesteps=(10, 200))
    maps = activation_maps(sae, features, torch.arange(24), torch.arange(3).expand(24, 3))
    dense = sae.encode(features[:], features.timesteps).to_dense(24).unflatten(0, (2, 3, 2, 2)).amax(0)
    assert_close(maps, dense.permute(3, 0, 1, 2))


def test_what_has_no_grid(sae: KSparseAutoencoder) -> None:
    images = torch.zeros(1, 1, dtype=torch.long)
    with pytest.raises(ValueError, match="a square grid of positions; these features have 1 an image"):
        activation_maps(sae, FeatureSet.from_tensor(torch.randn(4, 6)), torch.zeros(1, dtype=torch.long), images)
    with pytest.raises(ValueError, match=r"one row a latent, got the shapes \(2,\) and \(1, 1\)"):
        activation_maps(sae, tokens(2), torch.tensor([0, 1]), images)
