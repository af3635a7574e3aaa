"""Which latents fire where, against loops over images, positions and timesteps."""

from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion_sae import KSparseAutoencoder, KSparseAutoencoderConfig, encode_features
from diffusion_sae.analysis import firing as module
from diffusion_sae.analysis.firing import (
    Firing,
    find_firing,
    fvu_of_encoded,
    grid_of,
    heat_maps,
    positions_of,
    statistics_of,
)
from diffusion_sae.analysis.latents import latent_statistics
from diffusion_sae.analysis.relations import class_moments, most_cofiring, most_similar
from diffusion_sae.features import FeatureSet
from diffusion_sae.sae.evaluation import evaluate_sae
from diffusion_sae.sae.sparse_codes import SparseCodes

IMAGES, SIDE, TIMESTEPS, LATENTS, K = 7, 3, (10, 400), 40, 4


@pytest.fixture(scope="module")
def sae() -> KSparseAutoencoder:
    torch.manual_seed(0)
    return KSparseAutoencoder(KSparseAutoencoderConfig(d_in=8, num_latents=LATENTS, k=K)).eval()


def features(side: int = SIDE, images: int = IMAGES) -> FeatureSet:
    rows = len(TIMESTEPS) * images * side**2
    values = torch.randn(rows, 8, generator=torch.Generator().manual_seed(1))
    return FeatureSet([values], rows_per_image=len(TIMESTEPS) * side**2, timesteps=TIMESTEPS)


@pytest.fixture(scope="module")
def encoded(sae: KSparseAutoencoder, tmp_path_factory: pytest.TempPathFactory) -> SparseCodes:
    return encode_features(sae, features(), tmp_path_factory.mktemp("encoded"), progress=False)


@pytest.fixture(scope="module")
def dense(sae: KSparseAutoencoder) -> np.ndarray:
    """(timesteps, images, positions, num_latents)."""
    acts = sae.encode(features()[:]).to_dense(LATENTS).detach().numpy()
    return acts.reshape(len(TIMESTEPS), IMAGES, SIDE**2, LATENTS)


@pytest.fixture(params=[1, 3, 100])
def found(request: pytest.FixtureRequest, encoded: SparseCodes, monkeypatch: pytest.MonkeyPatch) -> Firing:
    """With so many images at a time."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * LATENTS * request.param)
    return find_firing(encoded)


def test_firing_is_the_largest_over_positions_and_timesteps(found: Firing, dense: np.ndarray) -> None:
    expected = dense.max((0, 2))
    np.testing.assert_array_equal(found.by_image.toarray(), expected)
    np.testing.assert_array_equal(found.by_latent.toarray(), expected)
    np.testing.assert_allclose(found.rate, (dense.max(2) > 0).mean(1))
    np.testing.assert_allclose(found.mean, dense.max(2).mean(1), rtol=1e-6)
    np.testing.assert_array_equal(found.active_rows, (dense > 0).sum((0, 1, 2)))
    np.testing.assert_array_equal(found.images_of, (expected > 0).sum(0))
    np.testing.assert_array_equal(found.max_acts, expected.max(0))
    assert found.num_images == IMAGES
    latent = int(found.images_of.argmax())
    images, acts = found.latent(latent)
    np.testing.assert_array_equal(images, np.flatnonzero(expected[:, latent]))
    np.testing.assert_array_equal(acts, expected[images, latent])
    latents, acts = found.image(2)
    np.testing.assert_array_equal(latents, np.flatnonzero(expected[2]))
    np.testing.assert_array_equal(acts, expected[2, latents])


def test_statistics_are_those_of_the_features(found: Firing, sae: KSparseAutoencoder) -> None:
    mine, theirs = statistics_of(found, 4), latent_statistics(sae, features(), 4)
    assert mine.num_images == theirs.num_images
    for name in ("top_acts", "density", "mean_acts"):
        torch.testing.assert_close(getattr(mine, name), getattr(theirs, name))
    active = mine.top_acts > 0
    assert torch.equal(mine.top_images[active], theirs.top_images[active])


@pytest.mark.parametrize("at_once", [1, 4, 100])
def test_heat_maps(encoded: SparseCodes, dense: np.ndarray, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * LATENTS * at_once)
    images, latents = np.nonzero(dense.max((0, 2)) > 0)
    images, latents = (
        np.append(images[::3], 5),
        np.append(latents[::3], np.flatnonzero(dense[:, 5].max((0, 1)) == 0)[0]),
    )
    pairs = np.unique(images.astype(np.int64) * LATENTS + latents)
    maps = heat_maps(encoded, pairs, np.zeros((len(pairs), SIDE**2), np.uint8))
    assert grid_of(positions_of(encoded)) == (SIDE, SIDE)
    for image, latent in zip(images.tolist(), latents.tolist(), strict=True):
        own = dense[:, image, :, latent].max(0)
        expected = np.ceil(255 * (own / own.max())) if own.max() > 0 else np.zeros(SIDE**2)
        np.testing.assert_array_equal(maps.of(np.array([image]), np.array([latent]))[0], expected)
    assert not maps.of(np.array([[-1, -1]]), np.array([[0, 3]])).any()


def test_fine_grids_are_pooled_by_their_maximum(sae: KSparseAutoencoder, tmp_path: Path) -> None:
    side = 20  # 2 × 2 positions a cell
    fine = encode_features(sae, features(side, 2), tmp_path, progress=False)
    dense = sae.encode(features(side, 2)[:]).to_dense(LATENTS).detach().numpy()
    dense = dense.reshape(len(TIMESTEPS), 2, 10, 2, 10, 2, LATENTS).max((0, 3, 5)).reshape(2, 100, LATENTS)
    assert grid_of(positions_of(fine)) == (10, 10)
    pairs = np.array([5, LATENTS + 5])
    maps = heat_maps(fine, pairs, np.zeros((2, 100), np.uint8))
    own = dense[:, :, 5]
    np.testing.assert_array_equal(maps.values, np.ceil(255 * (own / own.max(1, keepdims=True))))


def test_no_grid_no_map(sae: KSparseAutoencoder, tmp_path: Path) -> None:
    pooled = encode_features(sae, FeatureSet([torch.randn(5, 8)]), tmp_path, progress=False)
    assert grid_of(positions_of(pooled)) is None
    with pytest.raises(ValueError, match="positions of a square grid, got 1 rows an image"):
        heat_maps(pooled, np.array([0]), np.zeros((1, 1), np.uint8))


def test_fvu(sae: KSparseAutoencoder, encoded: SparseCodes) -> None:
    assert fvu_of_encoded(sae, features(), encoded) == pytest.approx(evaluate_sae(sae, features()).fvu, rel=1e-6)
    with pytest.raises(ValueError, match="give both of one store"):
        fvu_of_encoded(sae, FeatureSet([torch.randn(5, 8)]), encoded)


def test_constant_rows_have_no_fvu(sae: KSparseAutoencoder, tmp_path: Path) -> None:
    constant = FeatureSet([torch.ones(5, 8)])
    with pytest.raises(ValueError, match="no variance to explain"):
        fvu_of_encoded(sae, constant, encode_features(sae, constant, tmp_path, progress=False))


def test_similar_latents(sae: KSparseAutoencoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusion_sae.analysis.relations.BLOCK", 7)
    latents = np.arange(0, LATENTS, 2)
    nearest = most_similar(sae.W_dec, latents, 5)
    directions = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
    for i, latent in enumerate(latents.tolist()):
        cosines = (directions[latents] @ directions[latent]).numpy()
        cosines[i] = -1
        order = np.argsort(-cosines)[:5]
        np.testing.assert_array_equal(nearest.latents[i], latents[order])
        np.testing.assert_allclose(nearest.values[i], cosines[order], rtol=1e-5)
    few = most_similar(sae.W_dec, latents[:3], 5)
    assert (few.latents[:, 2:] == -1).all()


def test_latents_that_fire_together(encoded: SparseCodes, dense: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    fires = dense.max((0, 2)) > 0
    living = np.flatnonzero(fires.any(0))
    together = most_cofiring(find_firing(encoded), living, 3)
    assert together.num_images == IMAGES
    for i, latent in enumerate(living.tolist()):
        both = (fires[:, living] & fires[:, [latent]]).sum(0)
        overlap = both / (fires[:, living] | fires[:, [latent]]).sum(0)
        overlap[i] = 0
        np.testing.assert_allclose(together.values[i], np.sort(overlap)[::-1][:3], rtol=1e-6)
        np.testing.assert_allclose(overlap[np.searchsorted(living, together.latents[i])], together.values[i], rtol=1e-6)
    monkeypatch.setattr("diffusion_sae.analysis.relations.MOST_PAIRS", int((fires.sum(1) ** 2).sum() // 2))
    assert 2 <= most_cofiring(find_firing(encoded), living, 3).num_images <= 4


def test_class_moments(encoded: SparseCodes, dense: np.ndarray) -> None:
    acts = dense.max((0, 2))
    labels = np.array([0, 2, 2, 0, 3, 3, 3])
    moments = class_moments(find_firing(encoded), labels, range(1, 4))
    np.testing.assert_array_equal(moments.images, [0, 2, 3])
    assert not moments.mean[0].any()
    for i, label in ((1, 2), (2, 3)):
        np.testing.assert_allclose(moments.mean[i], acts[labels == label].mean(0), atol=1e-6)
        np.testing.assert_allclose(moments.std[i], acts[labels == label].std(0), atol=1e-4)
