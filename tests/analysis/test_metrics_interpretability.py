"""Metrics of single units, each worked by hand and invariant; and the baselines beside them."""

import math

import pytest
import torch
from torch.testing import assert_close

from diffusion_sae import KSparseAutoencoder, KSparseAutoencoderConfig
from diffusion_sae.analysis.latents import label_purity, latent_statistics, unit_statistics
from diffusion_sae.analysis.metrics.baselines import (
    Units,
    compare_with_baselines,
    direction_units,
    neuron_units,
    pca_units,
    principal_axes,
    random_units,
    score_units,
)
from diffusion_sae.analysis.metrics.interpretability import (
    Monosemanticity,
    base_rate_of,
    hierarchical_agreement,
    label_divergence,
    label_entropy,
    label_std,
    monosemanticity,
    purity,
)
from diffusion_sae.features import FeatureSet

TOP = torch.tensor([[0, 0, 0, 0], [0, 0, 3, 3], [0, 1, 2, 3], [1, 1, 1, 2]])
BASE_RATE = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestLabels:
    def test_by_hand(self):
        """H(q) = 1.75 bits; H(p) = 0, 1, 2 and 0.75·log₂(4/3) + 0.5."""
        assert label_std(TOP).tolist() == pytest.approx([0, 1.5, math.sqrt(1.25), math.sqrt(3) / 4])
        share, label = purity(TOP)
        assert share.tolist() == [1, 0.5, 0.25, 0.75]
        assert label.tolist() == [0, 0, 0, 1]
        last = 0.75 * math.log2(4 / 3) + 0.5
        assert label_entropy(TOP, BASE_RATE).tolist() == pytest.approx([0, 1 / 1.75, 2 / 1.75, last / 1.75])
        assert label_divergence(TOP[:2], BASE_RATE).tolist() == pytest.approx([1, 0.5 * 0 + 0.5 * 2])

    def test_a_renumbering_of_the_classes_changes_label_std_alone(self):
        new = torch.tensor([2, 3, 1, 0])
        rate = torch.empty_like(BASE_RATE)
        rate[new] = BASE_RATE
        assert torch.equal(purity(new[TOP])[0], purity(TOP)[0])
        assert_close(label_entropy(new[TOP], rate), label_entropy(TOP, BASE_RATE))
        assert_close(label_divergence(new[TOP], rate), label_divergence(TOP, BASE_RATE))
        assert_close(hierarchical_agreement(new[TOP]), hierarchical_agreement(TOP))
        assert not torch.allclose(label_std(new[TOP]), label_std(TOP))

    def test_the_order_of_the_top_images_does_not_matter(self):
        for metric in (label_std, lambda top: purity(top)[0], hierarchical_agreement):
            assert_close(metric(TOP.flip(1)), metric(TOP))

    def test_hierarchy_by_hand(self):
        """Classes 0, 1 are of coarse class 0, and 2, 3 of 1. The second unit: 2 of 6 pairs agree on both levels; the
        third: 2 of 6 on the coarse one alone; the last: 3 of 6 on both."""
        coarse = torch.tensor([0, 0, 1, 1])[TOP]
        found = hierarchical_agreement(coarse, TOP).tolist()
        assert found == pytest.approx([1, 2 * 2 / 12, 2 / 12, 3 * 2 / 12])
        assert hierarchical_agreement(TOP).tolist() == pytest.approx([1, 1 / 3, 0, 1 / 2])

    def test_fine_labels_count_below_the_same_coarse_one_alone(self):
        top = torch.tensor([[7, 7]])
        assert hierarchical_agreement(torch.tensor([[0, 1]]), top).item() == 0
        assert hierarchical_agreement(torch.tensor([[1, 1]]), top).item() == 1

    def test_what_is_refused(self):
        with pytest.raises(ValueError, match="labels whose base rate is 0"):
            label_entropy(TOP, torch.tensor([0.5, 0.5, 0.0, 0.0]))
        with pytest.raises(ValueError, match=r"of one shape with n ≥ 2, got \(4, 1\)"):
            hierarchical_agreement(TOP[:, :1])

    @pytest.mark.parametrize("metric", [label_entropy, label_divergence])
    def test_a_base_rate_is_made_of_shares_of_all_classes(self, metric):
        for wrong, said in (
            ([4, 2, 1, 1], "the least 1 and the sum 8"),
            ([0.5, 0.25, 0.125, 0.0625], "the least 0.0625 and the sum 0.9375"),
            ([1.5, -0.75, 0.125, 0.125], "the least -0.75 and the sum 1"),
            ([math.nan, 0.25, 0.125, 0.125], "the sum nan"),
        ):
            with pytest.raises(ValueError, match=rf"must be the share of each class.*{said}\. Give base_rate_of"):
                metric(TOP, torch.tensor(wrong))
        for top, span in ((TOP, "0…3"), (TOP - 1, "-1…2")):
            with pytest.raises(ValueError, match=rf"labels in 0…2, the classes of base_rate, got {span}"):
                metric(top, torch.tensor([0.5, 0.25, 0.25]))
        assert (metric(TOP, BASE_RATE) >= 0).all()

    def test_base_rate(self):
        assert base_rate_of(torch.tensor([0, 2, 2, 2])).tolist() == [0.25, 0, 0.75]

    def test_as_mixed_as_the_data_is_one(self):
        top = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 3]])
        assert label_entropy(top, BASE_RATE).item() == pytest.approx(1)
        assert label_divergence(top, BASE_RATE).item() == pytest.approx(0)


def pairwise(acts: torch.Tensor, embeddings: torch.Tensor) -> list[float]:
    """The definition, pair by pair."""
    scores = []
    for z in acts.double().T:
        a = (z - z.min()) / (z.max() - z.min())
        weighted = total = 0.0
        for n in range(len(a)):
            for m in range(len(a)):
                if n != m:
                    s = torch.cosine_similarity(embeddings[n].double(), embeddings[m].double(), dim=0)
                    weighted, total = weighted + a[n] * a[m] * s, total + a[n] * a[m]
        scores.append(float(weighted / total))
    return scores


class TestMonosemanticity:
    def test_by_hand(self):
        """a = (1, ½, 0): of the pairs (1, 2) has weight ½, the others none. s₁₂ = 0.6. The second unit's a = (1, ½, ¼)
        after the shift: weights ½, ¼, ⅛ with s = 0.6, 0, 0.8."""
        embeddings = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0]])
        acts = torch.tensor([[2.0, 9.0], [1.0, 7.0], [0.0, 6.0]])
        more = torch.cat([acts, torch.tensor([[0.0, 5.0]])])
        assert monosemanticity(acts, embeddings)[0].item() == pytest.approx(0.6)
        score = monosemanticity(more, torch.cat([embeddings, torch.ones(1, 2)]))[1].item()
        assert score == pytest.approx((0.5 * 0.6 + 0.125 * 0.8) / (0.5 + 0.25 + 0.125))

    def test_one_pass_in_batches_is_the_definition(self):
        acts = torch.rand(12, 5, generator=generator(0)) + 3
        embeddings = torch.randn(12, 4, generator=generator(1))
        score = Monosemanticity()
        for rows in torch.arange(12).split(5):
            score.update(acts[rows], embeddings[rows])
        assert score.compute().tolist() == pytest.approx(pairwise(acts, embeddings), abs=1e-9)

    def test_invariances(self):
        acts, embeddings = torch.rand(20, 3, generator=generator(2)), torch.randn(20, 4, generator=generator(3))
        value = monosemanticity(acts, embeddings)
        order = torch.randperm(20, generator=generator(4))
        rotation = torch.linalg.qr(torch.randn(4, 4, generator=generator(5))).Q
        lengths = torch.rand(20, 1, generator=generator(6)) + 0.5
        same = {"rtol": 1e-5, "atol": 1e-6}
        assert_close(monosemanticity(5 * acts + 2, embeddings), value, **same)
        assert_close(monosemanticity(acts, lengths * embeddings @ rotation), value, **same)
        assert_close(monosemanticity(acts[order], embeddings[order]), value, **same)

    def test_no_pair_no_score(self):
        acts = torch.tensor([[0.0, 1.0], [0.0, 1.0], [3.0, 1.0]])
        assert torch.isnan(monosemanticity(acts, torch.eye(3))).all()
        with pytest.raises(ValueError, match="no direction"):
            monosemanticity(acts, torch.zeros(3, 2))
        with pytest.raises(ValueError, match="3 images and 2 embeddings"):
            monosemanticity(acts, torch.ones(2, 2))
        with pytest.raises(ValueError, match="There are no images"):
            Monosemanticity().compute()


def clusters(images: int = 300, d_in: int = 8) -> FeatureSet:
    """Three classes, each along a sum of two coordinates, so that no neuron is one class's alone."""
    labels = torch.arange(images) % 3
    directions = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator(0))).Q[:3]
    noise = 0.05 * torch.randn(images, d_in, generator=generator(1))
    strength = 1 + torch.rand(images, 1, generator=generator(2))
    return FeatureSet.from_tensor(strength * directions[labels] + noise, labels, ["a", "b", "c"])


def sae_of_classes(features: FeatureSet) -> KSparseAutoencoder:
    """One latent a class and one that is never active."""
    sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=8, num_latents=4, k=1))
    rows, labels = features.to_tensor(), features.image_labels
    with torch.no_grad():
        sae.W_dec[:3] = torch.stack([rows[labels == c].mean(0) for c in range(3)])
        sae.W_dec[3] = -sae.W_dec[:3].sum(0)
        sae.normalize_decoder_()
        sae.W_enc.copy_(sae.W_dec.T)
    return sae


class TestBaselines:
    def test_latents_of_the_classes_beat_every_baseline(self):
        features = clusters()
        embeddings = torch.nn.functional.one_hot(features.image_labels, 3).float()
        found = compare_with_baselines(
            sae_of_classes(features), features, coarse=torch.tensor([0, 0, 1]), embeddings=embeddings, n=8
        )
        latents = found.pop("SAE latents")
        assert (latents.measured, latents.num_units) == (3, 4)
        expected = {"label_std": 0, "label_purity": 1, "label_entropy": 0, "label_divergence": math.log2(3)}
        expected |= {"hierarchical_agreement": 1, "monosemanticity": 1}
        assert latents.means == pytest.approx(expected, abs=0.01)
        assert list(found) == ["raw neurons", "PCA directions", "random directions", "shuffled labels"]
        assert [found[name].num_units for name in found] == [16, 16, 2048, 4]
        for scores in found.values():
            assert scores.means["label_purity"] < latents.means["label_purity"]
            assert scores.means["monosemanticity"] < latents.means["monosemanticity"]
        assert found["shuffled labels"].means["label_purity"] < 0.7
        assert found["shuffled labels"].means["monosemanticity"] == pytest.approx(1 / 3, abs=0.05)

    def test_units_by_hand(self):
        """x̄ = (2, 0): the first coordinate's + end sees 1 in the first image, its − end 1 in the second."""
        features = FeatureSet.from_tensor(torch.tensor([[3.0, 5.0], [1.0, -5.0]]), [0, 1])
        acts = torch.cat(list(neuron_units(features).activations()))
        assert acts.tolist() == [[1, 5, 0, 0], [0, 0, 1, 5]]

    def test_an_image_counts_by_its_largest_row(self):
        rows = torch.tensor([[1.0], [-3.0], [0.0], [2.0]])
        features = FeatureSet([rows], rows_per_image=2, labels=torch.tensor([0, 1]))
        acts = torch.cat(list(direction_units("x", torch.ones(1, 1), features).activations()))
        assert acts.tolist() == [[1, 3], [2, 0]]

    def test_principal_axes(self):
        rows = torch.randn(500, 3, generator=generator(0)) * torch.tensor([1.0, 5.0, 0.2]) + 7
        axes = principal_axes(FeatureSet.from_tensor(rows))
        assert_close(axes.abs(), torch.eye(3)[[1, 0, 2]], atol=0.05, rtol=0)
        assert len(list(pca_units(FeatureSet.from_tensor(rows)).activations())) == 1

    def test_random_units_follow_from_the_seed(self):
        features = clusters(20)
        one, same, other = (torch.cat(list(random_units(features, 5, s).activations())) for s in (1, 1, 2))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)

    def test_the_images_are_read_in_blocks(self):
        """So that 20,480 units × 10,000 images need no more memory than n images and a block."""
        features = clusters(60)
        whole = torch.cat(list(neuron_units(features).activations()))

        def blocks(size: int) -> Units:
            return Units("blocks", lambda: iter(whole.split(size)))

        labels = features.image_labels
        embeddings = torch.randn(60, 4, generator=generator(3))
        one, many = (score_units(blocks(size), labels, embeddings=embeddings, n=5) for size in (60, 7))
        assert one.means == pytest.approx(many.means, abs=1e-6)
        assert torch.equal(unit_statistics(iter(whole.split(7)), 5).top_acts, whole.T.topk(5).values)
        with pytest.raises(ValueError, match="activations of 60 images, got 3 labels"):
            score_units(blocks(60), labels[:3])
        with pytest.raises(ValueError, match="There are no activations"):
            unit_statistics(iter([]))

    def test_the_reports_purity_is_the_same_number(self):
        features = clusters()
        sae = sae_of_classes(features)
        statistics = latent_statistics(sae, features, 8)
        mean = label_purity(statistics, features.image_labels).mean
        assert mean == compare_with_baselines(sae, features, n=8)["SAE latents"].means["label_purity"]

    def test_unlabelled_features_are_refused(self):
        features = FeatureSet.from_tensor(torch.randn(5, 8, generator=generator(0)))
        with pytest.raises(ValueError, match="judged by labelled images"):
            compare_with_baselines(sae_of_classes(clusters()), features)
