"""Losses, labels and metrics of each problem type against scikit-learn; penalties and balance of the training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import average_precision_score, balanced_accuracy_score, f1_score, r2_score
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from diffusion_sae import DiffusionProbe, DiffusionProbeConfig, ProbeTrainer, ProbeTrainingArguments
from diffusion_sae.features import FeatureSet
from diffusion_sae.probes import convex
from diffusion_sae.probes.results import ProbeMetrics
from diffusion_sae.probes.tasks import TASKS, average_precision
from diffusion_sae.probes.trainer import FITS, ProbeTrainingResult

Labelled = Callable[..., FeatureSet]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_trainer(
    folder: Path, features: FeatureSet, validation: FeatureSet | None = None, **given: Any
) -> ProbeTrainer:
    names = set(DiffusionProbeConfig.__annotations__) | {"num_labels", "problem_type"}
    config = {"d_in": 6, "num_labels": 3, "width": 8} | {k: v for k, v in given.items() if k in names}
    args = {"learning_rate": 1e-2, "batch_size": 8, "num_train_epochs": 4}
    args |= {k: v for k, v in given.items() if k not in names}
    probe = DiffusionProbe(DiffusionProbeConfig(**config))
    training = ProbeTrainingArguments(output_dir=str(folder), **args)
    return ProbeTrainer(probe, features, training, validation_features=validation)


def standardised(features: FeatureSet) -> np.ndarray:
    return StandardScaler().fit_transform(features.to_tensor().double().numpy())


class TestMetrics:
    def test_average_precision_equals_scikit_learn_also_with_equal_scores(self) -> None:
        scores, labels = drawn(60).mul(3).round() / 3, (drawn(60, seed=1) > 0.4).long()
        assert scores.unique().numel() < 30
        assert average_precision(scores, labels) == pytest.approx(average_precision_score(labels, scores))
        assert average_precision(scores, torch.zeros(60)) is None

    def test_multi_label(self) -> None:
        logits, labels = drawn(50, 4), (drawn(50, 4, seed=1) > 0).float()
        labels[:, 2] = 0  # a label that never occurs is left out of the mean average precision
        metrics = TASKS["multi_label_classification"].metrics(logits, labels)
        kept = [0, 1, 3]
        expected = average_precision_score(labels[:, kept], logits[:, kept], average="macro")
        assert metrics["mean_average_precision"] == pytest.approx(expected)
        expected = f1_score(labels, logits > 0, average="macro", zero_division=0)
        assert metrics["macro_f1"] == pytest.approx(expected)

    def test_regression(self) -> None:
        logits, labels = drawn(50, 3), drawn(50, 3, seed=1)
        metrics = TASKS["regression"].metrics(logits, labels)
        assert metrics["r2"] == pytest.approx(r2_score(labels, logits), rel=1e-5)
        assert metrics["mse"] == pytest.approx((logits - labels).square().mean().item(), rel=1e-5)
        constant = TASKS["regression"].metrics(torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0], [1.0]]))
        assert constant == {"r2": 1.0, "mse": 0.0}

    def test_balanced_accuracy(self) -> None:
        logits, labels = drawn(70, 3), torch.cat([torch.zeros(60), torch.ones(8), torch.full((2,), 2)]).long()
        metrics = TASKS[None].metrics(logits, labels, balanced=True)
        assert metrics["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, logits.argmax(1)))

    def test_accuracy_of_another_problem_type_is_an_error(self) -> None:
        with pytest.raises(AttributeError, match="accuracy is of single-label classification; measured: r2, mse"):
            _ = ProbeMetrics({"r2": 0.5, "mse": 1.0}, 1.0, 3, "r2").accuracy


class TestLabels:
    @pytest.mark.parametrize(
        ("problem_type", "labels", "message"),
        [
            (
                None,
                torch.zeros(30, 3),
                r"one class number an example, \(N,\) integers, got float32 of the shape \(30, 3",
            ),
            (None, torch.zeros(30), r"one class number an example.*'multi_label_classification', for numbers"),
            (
                "multi_label_classification",
                torch.zeros(30).long(),
                r"must have 3 labels an example, \(N, 3\) of 0 and 1",
            ),
            ("multi_label_classification", torch.zeros(30, 2), r"must have 3 labels an example.*shape \(30, 2\)"),
            ("multi_label_classification", torch.full((30, 3), 2), "labels of 0 and 1, got others, such as 2"),
            (
                "regression",
                torch.zeros(30),
                r"must have 3 numbers an example, \(N, 3\), got float32 of the shape \(30,\)",
            ),
            ("regression", torch.full((30, 3), float("nan")), "have labels that are NaN or infinite"),
        ],
    )
    def test_that_do_not_fit_are_refused(
        self, problem_type: str | None, labels: Tensor, message: str, tmp_path: Path
    ) -> None:
        with pytest.raises(ValueError, match=f"The training features .*{message}"):
            make_trainer(tmp_path, FeatureSet.from_tensor(drawn(30, 6), labels), problem_type=problem_type)

    def test_one_number_an_image_needs_no_second_dimension(self, tmp_path: Path) -> None:
        features = FeatureSet.from_tensor(drawn(40, 6), drawn(40, 6)[:, 0])
        trainer = make_trainer(tmp_path, features, features, num_labels=1, problem_type="regression")
        assert trainer.fit(progress=False).validation.values["r2"] > 0.99
        with torch.no_grad():
            output = trainer.probe(features=features[:7], labels=features.labels[:7])
        assert output.loss.item() == pytest.approx((output.logits[:, 0] - features.labels[:7]).square().mean().item())

    @pytest.mark.parametrize("optimizer", ["auto", "adamw"])
    @pytest.mark.parametrize("head", ["linear", "mlp"])
    def test_targets_may_have_any_size(self, head: str, optimizer: str, tmp_path: Path) -> None:
        """Targets of 1000 ± 300 beside others of 0 ± 0.01 are learned as well as those of 0 ± 1, by the same steps."""
        rows = drawn(200, 6)
        unit = rows[:, :2] @ torch.tensor([[0.8, 0.6], [0.6, -0.8]])
        mean, size = torch.tensor([1000.0, 0.0]), torch.tensor([300.0, 0.01])
        scores, outputs = [], []
        for folder, targets in (("unit", unit), ("sized", mean + size * unit)):
            features = FeatureSet.from_tensor(rows, targets)
            held_out = FeatureSet.from_tensor(rows[:40], targets[:40])
            given = {"head": head, "optimizer": optimizer, "width": 64, "dropout": 0, "num_train_epochs": 20}
            trainer = make_trainer(
                tmp_path / folder, features, held_out, num_labels=2, problem_type="regression", **given
            )
            result = trainer.fit(progress=False)
            predicted = trainer.probe.predict(held_out)
            assert result.validation == trainer.evaluate(held_out)
            scores.append(result.validation.values["r2"])
            outputs.append(predicted if folder == "unit" else (predicted - mean) / size)
        assert min(scores) > 0.9
        torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0.15)

    def test_a_classifier_needs_two_classes_regression_one_output(self) -> None:
        assert DiffusionProbeConfig(d_in=6, num_labels=1, problem_type="regression").num_labels == 1
        assert DiffusionProbeConfig(d_in=6, num_labels=1, problem_type="multi_label_classification").num_labels == 1


class TestConvexProblems:
    def test_ridge_equals_scikit_learn(self, tmp_path: Path) -> None:
        """Its penalty is α‖w‖² beside the sum of squares: α = n l2 / 2."""
        features, l2 = FeatureSet.from_tensor(drawn(60, 6), drawn(60, seed=1)), 0.3
        trainer = make_trainer(tmp_path, features, features, num_labels=1, problem_type="regression", l2_path=(l2,))
        trainer.fit(progress=False)
        reference = Ridge(alpha=60 * l2 / 2).fit(standardised(features), features.labels.numpy())
        weight = trainer.probe.head.classifier.weight[0].detach().double().numpy()
        np.testing.assert_allclose(weight, reference.coef_, atol=1e-4)

    def test_several_labels_are_as_many_logistic_regressions(self, tmp_path: Path) -> None:
        """The loss is a mean over three labels, so that each has three times the strength."""
        labels = (drawn(80, 3, seed=1) + drawn(80, 6)[:, :3] > 0).long()
        features, l2 = FeatureSet.from_tensor(drawn(80, 6), labels), 0.02
        kind = {"problem_type": "multi_label_classification", "l2_path": (l2,)}
        trainer = make_trainer(tmp_path, features, features, **kind)
        trainer.fit(progress=False)
        for c in range(3):
            reference = LogisticRegression(C=1 / (80 * 3 * l2), tol=1e-8).fit(standardised(features), labels[:, c])
            weight = trainer.probe.head.classifier.weight[c].detach().double().numpy()
            np.testing.assert_allclose(weight, reference.coef_[0], atol=1e-3)

    def test_l1_equals_scikit_learn(self, labelled: Labelled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(convex, "TOLERANCE", 1e-5)
        rows = labelled(120)
        trainer = make_trainer(tmp_path, rows, rows, optimizer="fista", l1_path=(0.1,))
        seen = []
        minimise = convex.minimise_l1
        monkeypatch.setattr("diffusion_sae.probes.paths.minimise_l1", lambda *a: seen.append(a[-1]) or minimise(*a))
        result = trainer.fit(progress=False)
        options = {"l1_ratio": 1.0, "solver": "saga", "tol": 1e-8, "max_iter": 50_000}
        reference = LogisticRegression(C=1 / (120 * seen[0]), random_state=0, **options)
        reference.fit(standardised(rows), rows.labels.numpy())
        weight = trainer.probe.head.classifier.weight.detach().double().numpy()
        np.testing.assert_allclose(weight, reference.coef_, atol=2e-3)
        assert ((weight == 0) == (np.abs(reference.coef_) < 1e-6)).all()
        assert 0 < (weight != 0).sum() < weight.size
        assert result.chosen == {"l1": 0.1, "active_weights": int((weight != 0).any(0).sum())}

    @pytest.mark.parametrize(("fraction", "some"), [(1.0, False), (0.98, True)])
    def test_the_path_begins_where_the_first_weight_appears(
        self, fraction: float, some: bool, labelled: Labelled, tmp_path: Path
    ) -> None:
        rows = labelled(120)
        trainer = make_trainer(tmp_path, rows, rows, optimizer="fista", l1_path=(fraction,))
        trainer.fit(progress=False)
        weight = trainer.probe.head.classifier.weight
        assert bool((weight.abs() > 1e-6).any()) == some
        if not some:  # the bias alone gives the shares of the classes
            shares = torch.bincount(rows.labels) / 120
            torch.testing.assert_close(trainer.probe.predict(rows[:1]).softmax(1)[0], shares, atol=1e-4, rtol=0)

    def test_sparse_design_equals_the_dense_one(self) -> None:
        dense = drawn(30, 12).clamp_min(0.5).sub(0.5).double()
        dense[:, 4] = 0
        row, column = torch.nonzero(dense, as_tuple=True)
        sparse = convex.Design.scaled_by_rms(row, column, dense[row, column], (30, 12))
        scale = dense.square().mean(0).sqrt()
        scale[4] = 1
        torch.testing.assert_close(sparse.scale, scale)
        weight, bias, target = drawn(3, 12, seed=1).double(), drawn(3, seed=2).double(), drawn(30, 3, seed=3)
        gradients = []
        for design in (sparse, convex.Design(dense / scale, scale)):
            leaf = weight.clone().requires_grad_()
            logits = design.logits(leaf, bias)
            (logits - target).square().sum().backward()
            gradients.append(torch.cat([logits.detach(), leaf.grad.T]))
        torch.testing.assert_close(*gradients)


class TestBalance:
    def long_tail(self, labelled: Labelled, seed: int = 0) -> FeatureSet:
        plain = labelled(400, noise=2.0, seed=seed)
        keep = torch.cat([torch.nonzero(plain.labels == c).flatten()[:n] for c, n in enumerate((100, 25, 8))])
        return FeatureSet.from_tensor(plain[keep], plain.labels[keep])

    def test_class_weights_equal_scikit_learns(self, labelled: Labelled, tmp_path: Path) -> None:
        rows, l2 = self.long_tail(labelled), 0.01
        trainer = make_trainer(tmp_path, rows, rows, class_weights="balanced", l2_path=(l2,))
        result = trainer.fit(progress=False)
        reference = LogisticRegression(C=1 / (len(rows) * l2), class_weight="balanced", tol=1e-9, max_iter=5000)
        reference.fit(standardised(rows), rows.labels.numpy())
        weight = trainer.probe.head.classifier.weight.detach().double().numpy()
        np.testing.assert_allclose(weight, reference.coef_, atol=1e-3)
        assert result.validation.metric == "balanced_accuracy"
        plain = make_trainer(tmp_path, rows, rows, l2_path=(l2,))
        plain.fit(progress=False)
        test = self.long_tail(labelled, seed=1)
        scores = [balanced_accuracy_score(test.labels, one.probe.predict(test).argmax(1)) for one in (trainer, plain)]
        assert scores[0] > scores[1] + 0.1

    def test_weights_of_labels_are_negatives_over_positives(self) -> None:
        labels = torch.tensor([[1, 0], [0, 0], [0, 0], [1, 0], [0, 0]])
        weights = TASKS["multi_label_classification"].class_weights(labels, 2)
        assert weights.tolist() == [1.5, 1.0]

    def test_balanced_sampling_draws_each_class_as_often(self, labelled: Labelled, tmp_path: Path) -> None:
        rows = self.long_tail(labelled)
        trainer = make_trainer(tmp_path, rows, rows, head="mlp", balanced_sampling=True, num_train_epochs=30)
        seen, batch = [], trainer.examples.batch
        trainer.examples.batch = lambda numbers: seen.append(numbers) or batch(numbers)  # type: ignore[method-assign]
        trainer.fit(progress=False)
        counts = torch.bincount(rows.labels[torch.cat(seen[1:])]).double()
        assert (counts / counts.sum()).tolist() == pytest.approx([1 / 3] * 3, abs=0.04)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"balanced_sampling": True}, "balanced_sampling belongs to optimizer='adamw', but this.*by 'lbfgs'"),
            ({"bf16": True, "head": "knn"}, "bf16 belongs to optimizer='adamw'"),
            ({"early_stopping_patience": 3}, "early_stopping_patience belongs to optimizer='adamw'"),
            ({"class_weights": "balanced", "head": "prototype"}, "prototype has no loss to weight"),
            ({"optimizer": "fista", "head": "mlp"}, "The head mlp is trained by adamw, got optimizer='fista'"),
            ({"optimizer": "adamw", "head": "knn"}, "The head knn is not trained by an optimizer, got.*'adamw'"),
            ({"class_weights": "some"}, "class_weights must be one of 'none', 'balanced', got 'some'"),
            ({"l1_path": (2.0,)}, "l1_path must be a number > 0 and ≤ 1, got 2.0"),
            ({"neighbors_path": (0,)}, "neighbors_path must be an integer ≥ 1, got 0"),
            ({"early_stopping_patience": 0}, "early_stopping_patience must be an integer ≥ 1"),
            ({"balanced_sampling": True, "class_weights": "balanced"}, "do the same twice: choose one"),
        ],
    )
    def test_options_that_would_do_nothing_are_refused(
        self, given: dict[str, Any], message: str, labelled: Labelled, tmp_path: Path
    ) -> None:
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, labelled(30), **given)

    def test_regression_has_no_classes(self, tmp_path: Path) -> None:
        features = FeatureSet.from_tensor(drawn(30, 6), drawn(30, 3))
        with pytest.raises(ValueError, match="Regression has no classes to balance"):
            make_trainer(tmp_path, features, problem_type="regression", class_weights="balanced")


class TestEpochs:
    """What early stopping and bf16 change."""

    noisy = {"noise": 30.0}  # noqa: RUF012

    def fit(self, folder: Path, labelled: Labelled, **given: Any) -> tuple[DiffusionProbe, ProbeTrainingResult]:
        settings = {"head": "mlp", "num_train_epochs": 40, "learning_rate": 2e-2, **given}
        trainer = make_trainer(folder, labelled(40, **self.noisy), labelled(60, seed=1, **self.noisy), **settings)
        return trainer.probe, trainer.fit(progress=False)

    def test_training_stops_when_patience_is_over_and_keeps_the_best(self, labelled: Labelled, tmp_path: Path) -> None:
        probe, result = self.fit(tmp_path / "stopped", labelled, early_stopping_patience=3)
        assert len(result.history) == result.chosen["epoch"] + 1 + 3 < 40
        epochs = len(result.history)
        _, whole = self.fit(tmp_path / "whole", labelled)
        assert [entry["loss"] for entry in whole.history[:epochs]] == [entry["loss"] for entry in result.history]
        _, again = self.fit(tmp_path / "stopped", labelled, early_stopping_patience=3)
        assert again == result, "a finished run is not gone on with"
        accuracy = (probe.predict(labelled(60, seed=1, **self.noisy)).argmax(1)) == labelled(
            60, seed=1, **self.noisy
        ).labels
        assert accuracy.double().mean().item() == result.validation.accuracy

    def test_bf16_is_near_fp32_and_not_the_same(self, labelled: Labelled, tmp_path: Path) -> None:
        losses = []
        for bf16 in (False, True):
            probe, result = self.fit(tmp_path / str(bf16), labelled, bf16=bf16, num_train_epochs=3, dropout=0)
            assert {value.dtype for value in probe.parameters()} == {torch.float32}
            losses.append([entry["loss"] for entry in result.history])
        assert losses[0] != losses[1]
        assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_every_way_of_fitting_is_named() -> None:
    assert set(FITS) == {"lbfgs", "fista", "adamw", "none"}
