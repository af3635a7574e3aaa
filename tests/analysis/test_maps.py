"""Principal components against scikit-learn, maps of images, and colours of positions."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.decomposition import PCA
from torch.testing import assert_close

from diffusion_sae.analysis import pca
from diffusion_sae.analysis.maps import PositionColours, colour_maps, image_map
from diffusion_sae.analysis.pca import principal_components
from diffusion_sae.features import FeatureSet


def rows(count: int = 300, width: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, width, generator=generator) * torch.linspace(5, 1, width) + 3


@pytest.mark.parametrize("kind", ["exact", "iterated", "sparse", "feature set"])
def test_components_are_those_of_scikit_learn(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pca, "_BATCH", 64)
    if kind == "iterated":
        monkeypatch.setattr(pca, "EXACT_WIDTH", 4)
    data = rows() * (torch.rand(300, 12, generator=torch.Generator().manual_seed(1)) < 0.5)
    given = {"sparse": sparse.csr_array(data.numpy()), "feature set": FeatureSet.from_tensor(data)}.get(kind, data)
    found = principal_components(given, 3)
    reference = PCA(3).fit(data.double().numpy())
    assert_close(found.mean, torch.from_numpy(reference.mean_).float())
    assert_close(found.explained, torch.from_numpy(reference.explained_variance_ratio_).float(), atol=1e-6, rtol=1e-4)
    cosines = (found.components.double() * torch.from_numpy(reference.components_)).sum(1)
    assert_close(cosines.abs(), torch.ones(3).double(), atol=1e-4, rtol=0)
    assert_close(found.project(given), (data - found.mean) @ found.components.T, atol=1e-4, rtol=1e-4)
    assert (found.components.gather(1, found.components.abs().argmax(1, keepdim=True)) > 0).all()


def test_components_of_what_has_none() -> None:
    with pytest.raises(ValueError, match="All 5 rows are equal"):
        principal_components(torch.ones(5, 3), 2)
    with pytest.raises(ValueError, match=r"rows \(N, d\) with N ≥ 2, got the shape \(1, 3\)"):
        principal_components(torch.ones(1, 3), 1)
    with pytest.raises(ValueError, match=r"n must be an integer in 1…3, got 4"):
        principal_components(rows(5, 3), 4)


def groups(count: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """Two groups that are far apart."""
    labels = torch.arange(count) % 2
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 8, generator=generator) * 0.3 + 4 * labels[:, None], labels


UMAP = pytest.param("umap", True, marks=pytest.mark.slow)


@pytest.mark.parametrize(("method", "is_sparse"), [("pca", True), ("tsne", False), UMAP])
def test_images_that_are_alike_are_near_each_other(method: str, is_sparse: bool) -> None:
    data, labels = groups()
    given = sparse.csr_array(data.numpy()) if is_sparse else data
    found = image_map(given, method, neighbors=10, seed=3)
    assert found.points.shape == (60, 2)
    distances = torch.cdist(*(torch.from_numpy(found.points).double(),) * 2).fill_diagonal_(torch.inf)
    assert (labels[distances.argmin(1)] == labels).all()
    assert found.settings["method"] == method
    assert found.settings["images"] == 60
    again = image_map(given, method, neighbors=10, seed=3)
    assert (found.points == again.points).all()


def test_pca_maps_are_projections_of_images() -> None:
    """Of token features the mean of an image's positions."""
    data = rows(40 * 4)
    tokens = FeatureSet([data], rows_per_image=4)
    means = data.unflatten(0, (40, 4)).mean(1)
    found = image_map(tokens, "pca")
    assert_close(torch.from_numpy(found.points), principal_components(means, 2).project(means), atol=1e-4, rtol=1e-4)
    assert found.settings["explained"] == pytest.approx(principal_components(means, 2).explained.tolist(), abs=1e-5)
    narrow = image_map(torch.arange(6.0)[:, None], "pca")
    assert (narrow.points[:, 1] == 0).all()


def test_maps_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="A map needs at least 4 images, got 3"):
        image_map(rows(3), "pca")
    with pytest.raises(ValueError, match="method must be one of 'pca', 'umap', 'tsne', got 'mds'"):
        image_map(rows(), "mds")
    with pytest.raises(ValueError, match="neighbors must be an integer ≥ 2"):
        image_map(rows(), "pca", neighbors=1)
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ImportError, match=r"A UMAP needs umap-learn.*diffusion-sae\[maps\]"):
        image_map(rows(), "umap")
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(ImportError, match=r"A t-SNE needs scikit-learn.*diffusion-sae\[baselines\]"):
        image_map(rows(), "tsne")


def test_a_small_set_has_fewer_neighbours() -> None:
    assert image_map(rows(5), "tsne").settings["neighbors"] == 4


def checkered(images: int, side: int = 4, kind: str = "tokens", sign: float = 1.0) -> FeatureSet:
    """Positions of two kinds like the fields of a board, and three directions in which they differ."""
    field = torch.arange(side)[:, None] + torch.arange(side)[None]
    noise = torch.randn(images, side, side, 6, generator=torch.Generator().manual_seed(0))
    data = noise * torch.tensor([0.1, 2.0, 1.0, 0.1, 0.1, 0.1])
    data[..., 0] += sign * 10.0 * (field % 2)
    if kind == "none":
        return FeatureSet([data.permute(0, 3, 1, 2)])
    if kind == "token rows":
        return FeatureSet([data.flatten(1, 2)])
    return FeatureSet([data.flatten(0, 2)], rows_per_image=side * side)


@pytest.mark.parametrize("kind", ["tokens", "none", "token rows"])
def test_colours_tell_positions_apart(kind: str) -> None:
    """The first component is which kind of field a position is, whatever way the features are laid out."""
    maps = colour_maps({("a", 25): checkered(20, kind=kind)}, [3, 0, 19], fit_images=10)
    rgb = maps["a", 25].rgb
    assert rgb.shape == (3, 4, 4, 3)
    field = (np.arange(4)[:, None] + np.arange(4)[None]) % 2
    assert (np.abs(rgb[..., 0] - field) < 0.15).all()
    assert (rgb >= 0).all()
    assert (rgb <= 1).all()
    assert maps["a", 25].explained[0] > 0.8
    pair = colour_maps({("a", 25): checkered(20, kind=kind)}, [0], fit_images=10)["a", 25]
    assert_close(pair.rgb[0], rgb[1])


def test_components_point_the_same_way_in_the_next_cell() -> None:
    cells = {("a", 25): checkered(20), ("b", 25): checkered(20, sign=-1.0), ("c", 25): checkered(20, side=8)}
    maps = colour_maps(cells, [0, 1])
    assert_close(maps["b", 25].rgb[..., 0], maps["a", 25].rgb[..., 0], atol=0.1, rtol=0)
    assert maps["c", 25].rgb.shape == (2, 8, 8, 3)


def test_new_images_get_the_same_colours() -> None:
    own = checkered(20)
    found = colour_maps({("a", 25): own}, [4])["a", 25]
    again = found.colours(own[:].unflatten(0, (20, 4, 4))[4])
    assert_close(torch.from_numpy(found.rgb[0]), again)
    turned = found.colours.flipped(torch.tensor([-1.0, 1, 1]))(own[:])
    assert_close(turned[:, 0], 1 - found.colours(own[:])[:, 0])


def test_a_store_has_all_its_cells(make_sd_extractor, images, tmp_path: Path) -> None:
    extractor = make_sd_extractor(layers=["down_ft0", "up_ft1"], timesteps=[25, 500], pooling="tokens")
    store = extractor.extract(images, tmp_path / "store", progress=False)
    maps = colour_maps(store, [0, 5])
    assert list(maps) == [(layer, t) for layer in ("down_ft0", "up_ft1") for t in (25, 500)]
    assert all(m.rgb.shape[0] == 2 and m.rgb.shape[1] == m.rgb.shape[2] for m in maps.values())


def test_colours_of_what_has_no_positions() -> None:
    with pytest.raises(ValueError, match="a square grid of positions at one timestep, got 1 rows an image over 1"):
        colour_maps({("a", 25): FeatureSet.from_tensor(rows())}, [0])
    with pytest.raises(ValueError, match=r"images must lie in 0…19, got \[20\]"):
        colour_maps({("a", 25): checkered(20)}, [20])
    with pytest.raises(ValueError, match="n must be an integer in 1…2, got 3"):
        PositionColours.fit(rows(10, 2))
