"""Matching of latents, and latents over timesteps."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from diffusion_sae import KSparseAutoencoder, KSparseAutoencoderConfig
from diffusion_sae.analysis.metrics.matching import (
    activation_correlations,
    cosine_similarities,
    match,
    match_activations,
    match_decoders,
    matching_by_chance,
)
from diffusion_sae.analysis.metrics.timesteps import (
    Drift,
    density_by_timestep,
    evaluate_timesteps,
    fvu_by_timestep,
    latent_drift,
)
from diffusion_sae.features import FeatureSet
from diffusion_sae.sae.code import SparseCode
from diffusion_sae.sae.evaluation import evaluate_sae


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class TestMatch:
    def test_by_hand(self):
        """Each takes its best: 0.9 + 0.1 = 1.0. The other way round it is 0.8 + 0.7 = 1.5."""
        found = match(torch.tensor([[0.9, 0.8], [0.7, 0.1]]))
        assert (found.first.tolist(), found.second.tolist()) == ([0, 1], [1, 0])
        assert found.mean == pytest.approx(0.75)
        assert found.share_above(0.75) == 0.5

    def test_no_other_pairing_is_better(self):
        similarity = normal(4, 5)
        best = max(sum(similarity[i, j] for i, j in enumerate(p)) for p in itertools.permutations(range(5), 4))
        assert match(similarity).similarity.sum() == pytest.approx(best.item())

    def test_the_order_of_the_latents_does_not_matter(self):
        decoder = normal(30, 8)
        order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
        found = match_decoders(torch.nn.Parameter(decoder), 3 * decoder[order])
        assert torch.equal(order[found.second], found.first)
        assert found.mean == pytest.approx(1, abs=1e-6)
        assert match(normal(6, 4)[torch.tensor([3, 1, 0, 5, 2, 4])]).mean == pytest.approx(match(normal(6, 4)).mean)

    def test_cosines_by_hand(self):
        found = cosine_similarities(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[3.0, 4.0], [-1.0, 0.0]]))
        assert_close(found, torch.tensor([[0.6, -1.0], [0.0, 0.0]]))

    def test_chance_is_far_from_zero(self):
        """In few dimensions the best of many random directions are near one another."""
        assert matching_by_chance(200, 200, 4).mean > 0.7
        assert matching_by_chance(200, 200, 4).mean == matching_by_chance(200, 200, 4).mean
        assert matching_by_chance(50, 50, 512).mean < 0.2

    def test_what_is_refused(self):
        with pytest.raises(ValueError, match=r"of the same d_in, got \(3, 4\) and \(3, 5\)"):
            match_decoders(torch.ones(3, 4), torch.ones(3, 5))
        with pytest.raises(ValueError, match="finite"):
            match(torch.tensor([[math.nan]]))


class TestCorrelations:
    def test_by_hand(self):
        """(0, 1, 2) with itself doubled 1, turned −1, with (0, 2, 1) ½, with a constant 0."""
        first = torch.tensor([[0.0], [1.0], [2.0]])
        second = torch.tensor([[0.0, 4.0, 0.0, 3.0], [2.0, 2.0, 2.0, 3.0], [4.0, 0.0, 1.0, 3.0]])
        assert_close(activation_correlations([(first, second)]), torch.tensor([[1.0, -1.0, 0.5, 0.0]]).double())

    def test_numpy_agrees_in_any_batches_and_far_from_zero(self):
        first, second = normal(50, 3) + 1000, normal(50, 4, seed=1) * 5
        both = torch.corrcoef(torch.cat([first, second], 1).double().T)[:3, 3:]
        for size in (50, 7):
            batches = zip(first.split(size), second.split(size), strict=True)
            assert_close(activation_correlations(batches), both, atol=1e-6, rtol=1e-6)
        order = torch.arange(50).flip(0)
        assert_close(activation_correlations([(2 * first[order] + 1, second[order])]), both, atol=1e-6, rtol=1e-6)

    def test_nothing_to_compare(self):
        with pytest.raises(ValueError, match="no activations to compare"):
            activation_correlations([])
        with pytest.raises(ValueError, match="got 3 and 2"):
            activation_correlations([(torch.ones(3, 1), torch.ones(2, 1))])

    def test_saes_of_other_widths_are_matched_by_what_activates_them(self):
        """The second SAE's layer is twice as wide and its latents stand in another order."""
        rows = normal(200, 6)
        order = torch.tensor([3, 0, 2, 5, 1, 4])
        first = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=6, num_latents=6, k=2))
        second = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=12, num_latents=6, k=2))
        with torch.no_grad():
            first.W_enc.copy_(torch.eye(6))
            second.W_enc.zero_()
            second.W_enc[:6] = torch.eye(6)[:, order]
        wide = torch.cat([rows, torch.zeros(200, 6)], 1)
        found = match_activations(first, FeatureSet.from_tensor(rows), second, FeatureSet.from_tensor(wide))
        assert torch.equal(order[found.second], found.first)
        assert found.mean == pytest.approx(1)
        with pytest.raises(ValueError, match="not of the same images"):
            match_activations(first, FeatureSet.from_tensor(rows[:9]), second, FeatureSet.from_tensor(wide))


class TestTimesteps:
    def test_by_hand(self):
        """At t = 5 both rows are met; at t = 9 x̂ is the mean of that timestep's rows."""
        target = torch.tensor([[0.0], [10.0], [2.0], [14.0]])
        timesteps = torch.tensor([5, 9, 5, 9])
        reconstruction = torch.tensor([[0.0], [12.0], [2.0], [12.0]])
        assert fvu_by_timestep(reconstruction, target, timesteps) == pytest.approx({5: 0, 9: 1})
        code = SparseCode(torch.tensor([[1.0], [1.0], [2.0], [0.0]]), torch.tensor([[0], [1], [0], [0]]))
        density = density_by_timestep(code, 2, timesteps)
        assert {t: d.tolist() for t, d in density.items()} == {5: [1, 0], 9: [0, 0.5]}

    def test_fvu_of_a_timestep_does_not_know_the_others(self):
        target, timesteps = normal(12, 3), torch.tensor([1, 2]).repeat(6)
        reconstruction = target + 0.1
        before = fvu_by_timestep(reconstruction, target, timesteps)
        shift = 50.0 * (timesteps == 2)[:, None]
        after = fvu_by_timestep(reconstruction + shift, target + shift, timesteps)
        assert after == pytest.approx(before, rel=1e-4)


class TestDrift:
    def test_by_hand(self):
        """Latent 0: (3, 4) and (6, 8), the same but for scale; 1: active in other rows; 2: (1, 0) and (1, 1); 3: never;
        4: at the first alone."""
        first = torch.tensor([[3.0, 1.0, 1.0, 0.0, 0.0], [4.0, 0.0, 0.0, 0.0, 2.0]])
        second = torch.tensor([[6.0, 0.0, 1.0, 0.0, 0.0], [8.0, 5.0, 1.0, 0.0, 0.0]])
        drift = latent_drift(SparseCode.of_dense(first), SparseCode.of_dense(second), 5)
        assert_close(drift[[0, 1, 2, 4]], torch.tensor([0, 1, 1 - 0.5**0.5, 1]).double())
        assert torch.isnan(drift[3])

    def test_dense_agrees_in_any_batches_and_at_any_scale(self):
        dense = [normal(20, 6, seed=s).clamp_min(0) for s in (0, 1)]
        expected = 1 - torch.cosine_similarity(dense[0].double(), dense[1].double(), dim=0)
        drift = Drift(6)
        for rows in torch.arange(20).split(7):
            drift.update(SparseCode.of_dense(dense[0][rows]), SparseCode.of_dense(10 * dense[1][rows]))
        assert_close(drift.compute(), expected)
        same = SparseCode.of_dense(dense[0])
        assert_close(latent_drift(same, same, 6), torch.zeros(6).double())


class TestEvaluateTimesteps:
    def features(self) -> FeatureSet:
        rows = normal(60, 8)
        return FeatureSet([rows, rows, rows + normal(60, 8, seed=1)], rows_per_image=3, timesteps=(10, 20, 400))

    def test_each_timestep_is_what_evaluate_sae_says_of_it(self):
        features = self.features()
        sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=8, num_latents=32, k=4)).train()
        found = evaluate_timesteps(sae, features, batch_size=25)
        assert sae.training
        assert list(found) == [10, 20, 400]
        for t in found:
            rows = features.rows_at(t)
            alone = evaluate_sae(sae, features[rows.start : rows.stop])
            assert found[t].sae.fvu == pytest.approx(alone.fvu)
            assert (found[t].sae.l0, found[t].sae.dead_latents) == (alone.l0, alone.dead_latents)
            assert found[t].density.sum().item() == pytest.approx(alone.l0)

    def test_drift(self):
        sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=8, num_latents=32, k=4))
        found = evaluate_timesteps(sae, self.features(), batch_size=25)
        assert found[10].drift is None
        assert found[20].drift.nan_to_num().abs().max() < 1e-6  # the same rows
        assert found[400].drift.nanmean() > 0.1

    def test_an_sae_over_the_timesteps_is_told_which(self):
        config = KSparseAutoencoderConfig(d_in=8, num_latents=32, k=4, timesteps=[10, 20, 400])
        sae = KSparseAutoencoder(config)
        with torch.no_grad():
            sae.b_dec[1] = 100.0
        found = evaluate_timesteps(sae, self.features())
        assert found[20].sae.fvu > 100 * found[10].sae.fvu

    def test_unknown_timesteps_are_refused(self):
        sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=8, num_latents=32, k=4))
        with pytest.raises(ValueError, match="do not say which timesteps"):
            evaluate_timesteps(sae, FeatureSet.from_tensor(normal(5, 8)))
        with pytest.raises(ValueError, match=r"of the timesteps \(10, 20, 400\), not of 11"):
            self.features().rows_at(11)
