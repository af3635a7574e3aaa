"""Reconstruction and sparsity: worked by hand, invariant, and scikit-learn's numbers."""

import pytest
import torch
from sklearn.metrics import explained_variance_score, r2_score

from diffusion_sae.analysis.metrics.reconstruction import cosine, explained_variance, fvu, uncentred_explained_variance
from diffusion_sae.analysis.metrics.sparsity import dead_latents, l0, latent_density
from diffusion_sae.sae.code import SparseCode

TARGET = torch.tensor([[3.0, 4.0], [3.0, 0.0]])
RECONSTRUCTION = torch.tensor([[3.0, 2.0], [3.0, 2.0]])
METRICS = (fvu, explained_variance, uncentred_explained_variance, cosine)


def drawn(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(40, 6, generator=generator) + 2
    return target + 0.3 * torch.randn(40, 6, generator=generator) + 0.1, target


class TestReconstruction:
    def test_by_hand(self):
        """x̄ = (3, 2): the mean row. e = (0, ±2); ‖x‖² = 25 and 9; x̂·x = 17 and 9, ‖x̂‖ = √13."""
        assert fvu(RECONSTRUCTION, TARGET).item() == pytest.approx(1)
        assert explained_variance(RECONSTRUCTION, TARGET).item() == 0
        expected = 1 - (4 / 25 + 4 / 9) / 2
        assert uncentred_explained_variance(RECONSTRUCTION, TARGET).item() == pytest.approx(expected)
        assert cosine(RECONSTRUCTION, TARGET).item() == pytest.approx((17 / 5 + 9 / 3) / 13**0.5 / 2)

    def test_a_constant_error_sets_explained_variance_apart(self):
        """e = (1, 0) in both rows: Σ‖e‖² = 2 of Σ‖x − x̄‖² = 8, but no variance."""
        assert fvu(TARGET - torch.tensor([1.0, 0.0]), TARGET).item() == pytest.approx(0.25)
        assert explained_variance(TARGET - torch.tensor([1.0, 0.0]), TARGET).item() == 1

    def test_scikit_learn_agrees(self):
        given = drawn(0)
        arrays = [rows.double().numpy() for rows in reversed(given)]
        assert 1 - fvu(*given).item() == pytest.approx(r2_score(*arrays, multioutput="variance_weighted"))
        expected = explained_variance_score(*arrays, multioutput="variance_weighted")
        assert explained_variance(*given).item() == pytest.approx(expected)

    @pytest.mark.parametrize("metric", METRICS)
    def test_invariances(self, metric):
        reconstruction, target = drawn(1)
        value = metric(reconstruction, target).item()
        order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
        rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(3))).Q
        for change in (lambda x: x[order], lambda x: x @ rotation, lambda x: 7 * x):
            assert metric(change(reconstruction), change(target)).item() == pytest.approx(value, abs=1e-6)
        shifted = metric(reconstruction + 5, target + 5).item()
        centred = metric in (fvu, explained_variance)
        assert (shifted == pytest.approx(value, abs=1e-5)) == centred

    def test_perfect_and_refused(self):
        _, target = drawn(1)
        assert [metric(target, target).item() for metric in METRICS] == pytest.approx([0, 1, 1, 1])
        with pytest.raises(ValueError, match=r"must both be \(N, d_in\) with N ≥ 1, got \(2, 2\) and \(2, 3\)"):
            fvu(torch.ones(2, 2), torch.ones(2, 3))

    def test_a_row_of_zeros_has_no_share_that_could_be_explained(self):
        target = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
        for reconstruction in (target, target + 1):
            with pytest.raises(
                ValueError, match=r"2 of 4 rows are all 0, the first is row 1\. Leave them out, or use fvu"
            ):
                uncentred_explained_variance(reconstruction, target)
        assert uncentred_explained_variance(torch.zeros(1, 2), target[:1]).item() == 0

    @pytest.mark.parametrize("metric", [fvu, explained_variance])
    @pytest.mark.parametrize("rows", [1, 3])
    def test_rows_that_are_all_equal_have_no_variance(self, metric, rows: int):
        target = torch.tensor([[3.0, 4.0]]).expand(rows, -1)
        with pytest.raises(
            ValueError, match=rf"{metric.__name__} divides by the variance.*all {rows} of them are equal"
        ):
            metric(target + 1, target)


class TestSparsity:
    CODE = SparseCode(torch.tensor([[2.0, 1.0], [3.0, 0.0], [-1.0, 0.0]]), torch.tensor([[0, 2], [2, 0], [3, 0]]))

    def test_by_hand(self):
        """Latents 0, 2, 2 and 3 are active, latents 1 and 4 never; the zeros of free places are not."""
        assert l0(self.CODE) == pytest.approx(4 / 3)
        assert latent_density(self.CODE, 5).tolist() == pytest.approx([1 / 3, 0, 2 / 3, 1 / 3, 0])
        assert dead_latents(self.CODE, 5) == pytest.approx(2 / 5)

    def test_the_places_of_a_row_and_the_rows_have_no_order(self):
        flipped = SparseCode(self.CODE.top_acts.flip(0, 1) * 9, self.CODE.top_indices.flip(0, 1))
        assert l0(flipped) == l0(self.CODE) == pytest.approx(latent_density(self.CODE, 5).sum().item())
        assert torch.equal(latent_density(flipped, 5), latent_density(self.CODE, 5))
        assert dead_latents(flipped, 5) == dead_latents(self.CODE, 5)

    @pytest.mark.parametrize("metric", [latent_density, dead_latents])
    def test_a_latent_that_the_sae_does_not_have_is_refused(self, metric):
        with pytest.raises(ValueError, match=r"must lie in 0…2, got 0…3\. Give the num_latents of the SAE"):
            metric(self.CODE, 3)
        with pytest.raises(ValueError, match=r"must lie in 0…4, got -1…0"):
            metric(SparseCode(torch.ones(1, 2), torch.tensor([[-1, 0]])), 5)

    @pytest.mark.parametrize("metric", [latent_density, dead_latents, lambda code, _: l0(code)])
    def test_a_latent_twice_in_a_row_is_refused(self, metric):
        code = SparseCode(torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]), torch.tensor([[0, 1, 2], [4, 0, 4]]))
        with pytest.raises(ValueError, match=r"got latent 4 more than once in row 1\. Add its activations up"):
            metric(code, 5)
        metric(SparseCode.of_dense(code.to_dense(5)), 5)

    def test_free_places_may_repeat_an_index(self):
        code = SparseCode(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]), torch.zeros(2, 3, dtype=torch.long))
        assert latent_density(code, 2).tolist() == [0.5, 0]
        assert (l0(code), dead_latents(code, 2)) == (0.5, 0.5)
