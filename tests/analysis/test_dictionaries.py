"""Baseline dictionaries against worked examples, scikit-learn, and the k-SAE whose initialisation one of them is."""

import sys
from collections.abc import Callable

import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import orthogonal_mp
from torch import Tensor
from torch.testing import assert_close

from diffusion_sae import KSparseAutoencoder, KSparseAutoencoderConfig
from diffusion_sae.analysis.dictionaries import (
    SparseDictionary,
    fit_kmeans,
    fit_nmf,
    fit_pca,
    matching_pursuit,
    random_dictionary,
)


def draw(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def error(dictionary: SparseDictionary, rows: Tensor) -> float:
    """FVU."""
    left = rows - dictionary.decode(dictionary.encode(rows))
    return (left.pow(2).sum() / (rows - rows.mean(0)).pow(2).sum()).item()


class TestMatchingPursuit:
    def test_by_hand(self) -> None:
        """(3, 4, 0) lies along the third direction alone; of (3, 0, −2) the first is taken, then −2 of the last."""
        directions = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0.6, 0.8, 0], [0, 0, 1]])
        rows = torch.tensor([[3.0, 4, 0], [3, 0, -2]])
        one, two = matching_pursuit(rows, directions, 1), matching_pursuit(rows, directions, 2)
        assert_close(one.to_dense(4), torch.tensor([[0.0, 0, 5, 0], [3, 0, 0, 0]]))
        assert_close(two.to_dense(4), torch.tensor([[0.0, 0, 5, 0], [3, 0, 0, -2]]))
        assert one.top_acts.shape == (2, 1)

    @pytest.mark.parametrize("k", [1, 5, 12])
    def test_against_scikit_learn(self, k: int) -> None:
        rows, directions = draw(700, 16), torch.nn.functional.normalize(draw(40, 16, seed=1), dim=1)
        ours = matching_pursuit(rows, directions, k).to_dense(40)
        theirs = orthogonal_mp(directions.double().numpy().T, rows.double().numpy().T, n_nonzero_coefs=k)
        assert_close(ours, torch.from_numpy(theirs.T).float().reshape(700, 40), atol=2e-3, rtol=1e-3)

    def test_nothing_is_left_from_d_in_on(self) -> None:
        rows, directions = draw(20, 6), torch.nn.functional.normalize(draw(30, 6, seed=1), dim=1)
        code = matching_pursuit(rows, directions, 9)
        assert code.top_acts.shape == (20, 9)
        assert ((code.top_acts != 0).sum(1) <= 6).all()
        assert_close(code.to_dense(30) @ directions, rows, atol=1e-4, rtol=1e-4)

    def test_equal_directions_and_directions_of_zeros(self) -> None:
        directions = torch.tensor([[1.0, 0], [1, 0], [0, 0], [0, 1]])
        code = matching_pursuit(torch.tensor([[2.0, 1], [0, 0]]), directions, 3)
        assert_close(code.to_dense(4) @ directions, torch.tensor([[2.0, 1], [0, 0]]))
        assert torch.isfinite(code.top_acts).all()


class TestRandom:
    def test_is_the_sae_at_its_initialisation(self) -> None:
        rows = draw(200, 8) + 3
        dictionary = random_dictionary(rows, 32, 4, seed=5)
        sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=8, num_latents=32, k=4, init_seed=5))
        with torch.no_grad():
            sae.b_dec.copy_(rows.mean(0))
        expected, code = sae.encode(rows), dictionary.encode(rows)
        assert torch.equal(code.top_indices, expected.top_indices)
        assert_close(code.top_acts, expected.top_acts.detach() * dictionary.scale)

    def test_its_scale_is_the_best(self) -> None:
        rows = draw(200, 8)
        fitted = random_dictionary(rows, 64, 16)
        others = [
            SparseDictionary(fitted.W_dec, fitted.b_dec, 16, "top_k", fitted.scale * factor) for factor in (0.9, 1.1)
        ]
        assert error(fitted, rows) < min(error(other, rows) for other in others)

    def test_pursuit_needs_no_scale_and_is_better(self) -> None:
        rows = draw(200, 8)
        pursuing = random_dictionary(rows, 32, 4, coder="matching_pursuit")
        assert pursuing.scale == 1
        assert error(pursuing, rows) < error(random_dictionary(rows, 32, 4), rows)


class TestPCA:
    def test_against_scikit_learn(self) -> None:
        rows = draw(300, 10) * torch.linspace(0.2, 3, 10) + 2
        oracle = PCA(3).fit(rows.double().numpy())
        assert error(fit_pca(rows, 3), rows) == pytest.approx(1 - oracle.explained_variance_ratio_.sum(), abs=1e-5)

    def test_more_components_than_the_width(self) -> None:
        rows = draw(50, 4)
        dictionary = fit_pca(rows, 9)
        assert dictionary.k == len(dictionary.W_dec) == 4
        assert error(dictionary, rows) < 1e-10


class TestLearned:
    @pytest.mark.parametrize("fit", [fit_kmeans, fit_nmf])
    def test_finds_well_apart_directions(self, fit: Callable[..., SparseDictionary]) -> None:
        """Rows are near one of four points about 0; one number a row is enough for its direction."""
        points = 5 * torch.tensor([[1.0, 1, 0], [-1, 0, 1], [0, -1, -1], [0, 0, 0]])
        rows = points[torch.arange(4000) % 4] + 0.05 * draw(4000, 3)
        dictionary = fit(rows, 4, 1, seed=1)
        assert error(dictionary, rows) < 0.05
        assert torch.equal(dictionary.W_dec, fit(rows, 4, 1, seed=1).W_dec)
        assert dictionary.W_dec.norm(dim=1).amax().item() == pytest.approx(1)

    @pytest.mark.parametrize("fit", [fit_kmeans, fit_nmf])
    def test_top_k_is_scaled(self, fit: Callable[..., SparseDictionary]) -> None:
        dictionary = fit(draw(500, 6), 12, 4, coder="top_k")
        assert dictionary.coder == "top_k"
        assert dictionary.scale != 1

    def test_more_centroids_than_rows(self) -> None:
        with pytest.raises(ValueError, match="num_latents must be"):
            fit_kmeans(draw(5, 3), 6, 1)

    def test_without_scikit_learn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
        with pytest.raises(ImportError, match=r"needs scikit-learn.*pip install 'diffusion-sae\[baselines\]'"):
            fit_kmeans(draw(5, 3), 2, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 5}, "k must be"),
        ({"coder": "lasso"}, "coder must be one of"),
        ({"b_dec": torch.zeros(2)}, r"b_dec must be \(3,\) as W_dec has it, got \(2,\)"),
        ({"coder": "projection"}, "uses all 4 directions, got k = 2"),
    ],
)
def test_what_is_no_dictionary(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseDictionary(**({"W_dec": torch.ones(4, 3), "b_dec": torch.zeros(3), "k": 2} | changes))
