"""Metrics of classifiers: worked by hand, invariant, and scikit-learn's numbers."""

import math

import pytest
import torch
from sklearn.metrics import confusion_matrix as sklearn_confusion
from torch.testing import assert_close

from diffusion_sae import DiffusionProbe, DiffusionProbeConfig, KSparseAutoencoder, KSparseAutoencoderConfig
from diffusion_sae.analysis.metrics.probes import (
    Interval,
    accuracy,
    bootstrap_mean,
    confusion_matrix,
    expected_calibration_error,
    per_class_accuracy,
    probe_reconstructions,
    reconstructed_accuracy,
)
from diffusion_sae.features import FeatureSet

LABELS = torch.tensor([0, 0, 1, 1, 1])
SAID = torch.tensor([0, 1, 1, 1, 0])


def drawn(count: int, classes: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(classes, (count,), generator=generator), torch.randint(classes, (count,), generator=generator)


class TestAccuracy:
    def test_by_hand(self):
        assert accuracy(SAID, LABELS).value == pytest.approx(0.6)
        assert accuracy(LABELS, LABELS) == Interval(1, 1, 1)

    def test_the_interval_is_the_binomial_one(self):
        """Of 400 with 0.8 right: 0.8 ± 1.96 √(0.8 · 0.2 / 400)."""
        right = torch.arange(400) < 320
        found = bootstrap_mean(right.double(), resamples=4000)
        half = 1.96 * math.sqrt(0.8 * 0.2 / 400)
        assert found.value == pytest.approx(0.8)
        assert (found.low, found.high) == pytest.approx((0.8 - half, 0.8 + half), abs=0.004)
        narrow = bootstrap_mean(right.double(), confidence=0.5)
        assert found.low < narrow.low < narrow.high < found.high

    def test_it_follows_from_the_seed_and_not_from_the_global_one(self):
        before = torch.get_rng_state()
        said, labels = drawn(100)
        assert accuracy(said, labels) == accuracy(said, labels)
        assert accuracy(said, labels) != accuracy(said, labels, seed=1)
        assert torch.equal(before, torch.get_rng_state())

    def test_a_renumbering_of_the_classes_changes_nothing(self):
        said, labels = drawn(100)
        new = torch.tensor([2, 0, 3, 1])
        assert accuracy(new[said], new[labels]) == accuracy(said, labels)
        old = confusion_matrix(said, labels, 4)
        assert torch.equal(confusion_matrix(new[said], new[labels], 4)[new][:, new], old)

    @pytest.mark.parametrize("options", [{"confidence": 1.0}, {"resamples": 0}])
    def test_what_is_refused(self, options):
        with pytest.raises(ValueError, match="A bootstrap needs"):
            bootstrap_mean(torch.ones(3), **options)
        with pytest.raises(ValueError, match=r"Give logits.argmax\(1\)"):
            accuracy(torch.ones(3, 2), LABELS)


class TestConfusion:
    def test_by_hand(self):
        assert confusion_matrix(SAID, LABELS, 3).tolist() == [[1, 1, 0], [1, 2, 0], [0, 0, 0]]
        found = per_class_accuracy(SAID, LABELS, 3).tolist()
        assert found[:2] == pytest.approx([1 / 2, 2 / 3])
        assert math.isnan(found[2])

    def test_scikit_learn_agrees(self):
        said, labels = drawn(200)
        assert confusion_matrix(said, labels, 4).tolist() == sklearn_confusion(labels, said).tolist()

    def test_a_class_out_of_range_is_refused(self):
        with pytest.raises(ValueError, match=r"must lie in 0…0, got 0…1"):
            confusion_matrix(SAID, LABELS, 1)


class TestCalibration:
    def test_by_hand(self):
        """Bins of width ½: all are in the upper one, with mean confidence 0.8 and ½ right. With ten bins 0.7 (right) is
        in the seventh and 0.9 (wrong) in the ninth: (0.3 + 0.9) / 2."""
        probabilities = torch.tensor([[0.7, 0.3], [0.1, 0.9]], dtype=torch.float64)
        labels = torch.tensor([0, 0])
        assert expected_calibration_error(probabilities, labels, bins=2) == pytest.approx(0.3)
        assert expected_calibration_error(probabilities, labels, bins=10) == pytest.approx(0.6)

    def test_certain_and_right_is_calibrated(self):
        assert expected_calibration_error(torch.eye(3), torch.arange(3)) == 0
        assert expected_calibration_error(torch.eye(3), torch.tensor([1, 2, 0])) == 1

    def test_order_and_numbering_do_not_matter(self):
        probabilities = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).softmax(1)
        labels, _ = drawn(50)
        value = expected_calibration_error(probabilities, labels)
        assert expected_calibration_error(probabilities.flip(0), labels.flip(0)) == pytest.approx(value)
        assert expected_calibration_error(probabilities.flip(1), 3 - labels) == pytest.approx(value)

    def test_logits_are_refused(self):
        with pytest.raises(ValueError, match=r"Give logits.softmax\(1\)"):
            expected_calibration_error(torch.tensor([[2.0, 1.0]]), torch.tensor([0]))

    @pytest.mark.parametrize("label", [-1, 3])
    def test_a_label_outside_the_classes_is_refused(self, label):
        with pytest.raises(
            ValueError, match=r"Classes must lie in 0…2, got .*\. Give labels and predictions of the same"
        ):
            expected_calibration_error(torch.eye(3), torch.tensor([0, label, 2]))

    def test_bins_are_at_least_one(self):
        with pytest.raises(ValueError, match="bins must be an integer ≥ 1, got 0"):
            expected_calibration_error(torch.eye(3), torch.arange(3), bins=0)
        assert expected_calibration_error(torch.eye(3), torch.arange(3), bins=1) == 0


class TestReconstructedAccuracy:
    def test_by_hand(self):
        """3 of 5 are right before, 2 after; the first and the last are said otherwise."""
        found = reconstructed_accuracy(SAID, torch.tensor([1, 1, 1, 1, 1]), LABELS)
        assert found.original.value == pytest.approx(0.6)
        assert found.reconstructed.value == pytest.approx(0.6)
        assert found.difference.value == pytest.approx(0)
        assert found.agreement == pytest.approx(0.6)

    def test_the_difference_is_paired(self):
        """Both right in the same rows: no difference in any resample."""
        said, labels = drawn(100)
        assert reconstructed_accuracy(said, said, labels).difference == Interval(0, 0, 0)

    def test_a_probe_on_an_saes_reconstructions(self):
        """The probe says the sign of the first coordinate; the SAE knows that one alone, or the other one."""
        rows = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
        features = FeatureSet.from_tensor(rows, (rows[:, 0] > 0).long(), ["−", "+"])
        probe = DiffusionProbe(DiffusionProbeConfig(d_in=2, id2label={0: "−", 1: "+"}, label2id={"−": 0, "+": 1}))
        with torch.no_grad():
            probe.head.classifier.weight.copy_(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
        for axis, expected in ((0, 1.0), (1, 0.5)):
            sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=2, num_latents=2, k=1))
            with torch.no_grad():
                sae.W_dec.copy_(torch.stack([torch.eye(2)[axis], -torch.eye(2)[axis]]))
                sae.W_enc.copy_(sae.W_dec.T)
            found = probe_reconstructions(probe, sae, features, batch_size=10)
            assert found.original.value == 1
            assert found.reconstructed.value == pytest.approx(expected, abs=0.2)
            assert_close(found.difference.value, found.reconstructed.value - 1)
        with pytest.raises(ValueError, match="needs labels"):
            probe_reconstructions(probe, sae, FeatureSet.from_tensor(rows))

    @pytest.mark.parametrize("head", ["sae", "attention", "linear"])
    def test_of_positions(self, head: str):
        """What the probe says of whole images is compared with the labels of images; without an error of the SAE both
        are the same.
        """
        images, positions, width = 40, 4, 3
        rows = torch.randn(images * positions, width, generator=torch.Generator().manual_seed(0)).abs()
        labels = torch.arange(images) % 2
        features = FeatureSet([rows], labels=labels, rows_per_image=positions, class_names=["a", "b"])
        sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=width, num_latents=width, k=width)).eval()
        with torch.no_grad():
            sae.W_dec.copy_(torch.eye(width))
            sae.W_enc.copy_(torch.eye(width))
        names = {0: "a", 1: "b"}
        config = DiffusionProbeConfig(d_in=width, head=head if head != "sae" else "linear", width=8, id2label=names)
        probe = DiffusionProbe.from_sae(sae, id2label=names) if head == "sae" else DiffusionProbe(config)
        with torch.no_grad():
            probe.head.classifier.weight.normal_(generator=torch.Generator().manual_seed(1))
        found = probe_reconstructions(probe, sae, features, batch_size=7)
        said = probe.predict(features).argmax(1)
        expected = (said == probe.labels_of(features)).double().mean().item()
        assert found.original.value == pytest.approx(expected)
        assert found.reconstructed.value == pytest.approx(expected)
        assert found.agreement == 1
        of_images = (said == probe.labels_of(features)).double().view(images, -1).mean(1)
        assert found.original == bootstrap_mean(of_images)
