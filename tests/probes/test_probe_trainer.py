"""ProbeTrainer: against scikit-learn, its protocol, and what it refuses."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch.optim.optimizer import register_optimizer_step_pre_hook

from diffusion_sae import DiffusionProbe, DiffusionProbeConfig, ProbeTrainer, ProbeTrainingArguments
from diffusion_sae._training import CHECKPOINT, TrainingDivergedError
from diffusion_sae.features import FeatureSet
from diffusion_sae.probes.trainer import ProbeMetrics, ProbeTrainingResult
from diffusion_sae.provenance import Provenance, ProvenanceMismatchError

Labelled = Callable[..., FeatureSet]


def make_probe(head: str = "linear", **config: Any) -> DiffusionProbe:
    return DiffusionProbe(DiffusionProbeConfig(**{"d_in": 6, "head": head, "width": 8, "num_labels": 3} | config))


def make_args(output_dir: Path, **changes: Any) -> ProbeTrainingArguments:
    settings = {"learning_rate": 1e-3, "num_train_epochs": 4, "batch_size": 8}
    return ProbeTrainingArguments(output_dir=str(output_dir), **(settings | changes))


def train(
    probe: DiffusionProbe,
    features: FeatureSet,
    output_dir: Path,
    validation: FeatureSet | None = None,
    **changes: Any,
) -> ProbeTrainingResult:
    trainer = ProbeTrainer(probe, features, make_args(output_dir, **changes), validation_features=validation)
    return trainer.train(progress=False)


@contextmanager
def watch_optimizer(before_step: Callable[[torch.optim.Optimizer], None]) -> Iterator[None]:
    handle = register_optimizer_step_pre_hook(lambda optimizer, *_: before_step(optimizer))
    try:
        yield
    finally:
        handle.remove()


class TestLbfgs:
    @pytest.mark.parametrize("l2", [1e-4, 1e-2, 1.0])
    def test_equals_scikit_learn(self, l2: float, labelled: Labelled, tmp_path: Path) -> None:
        """Its C multiplies the sum of the losses: C = 1 / (n · l2)."""
        rows, validation = labelled(200), labelled(50, seed=1)
        probe = make_probe()
        train(probe, rows, tmp_path, validation, l2_path=(l2,))
        scaler = StandardScaler().fit(rows.to_tensor().double().numpy())
        reference = LogisticRegression(C=1 / (len(rows) * l2), tol=1e-10, max_iter=10_000)
        reference.fit(scaler.transform(rows.to_tensor().double().numpy()), rows.labels.numpy())
        weight, bias = probe.head.classifier.weight.detach(), probe.head.classifier.bias.detach()
        torch.testing.assert_close(weight, torch.tensor(reference.coef_).float(), atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(
            bias - bias.mean(),
            torch.tensor(reference.intercept_ - reference.intercept_.mean()).float(),
            atol=2e-4,
            rtol=1e-3,
        )
        new = labelled(500, seed=2).to_tensor()
        expected = reference.predict_proba(scaler.transform(new.double().numpy()))
        torch.testing.assert_close(probe.predict(new).softmax(1), torch.tensor(expected).float(), atol=2e-4, rtol=0)
        assert probe.predict(new).argmax(1).tolist() == expected.argmax(1).tolist()

    def test_the_strength_is_chosen_on_validation_rows(self, labelled: Labelled, tmp_path: Path) -> None:
        """Few noisy rows in many dimensions, so that the strength matters; each is also fitted on its own."""
        path = (1e-4, 1e-2, 1e-1, 1.0, 30.0)
        shape = {"shape": (40,), "noise": 4.0}
        rows, validation = labelled(60, **shape), labelled(300, seed=1, **shape)
        alone: dict[float, ProbeMetrics] = {}
        for l2 in path:
            alone[l2] = train(make_probe(d_in=40), rows, tmp_path / str(l2), validation, l2_path=(l2,)).validation
        assert len({metrics.accuracy for metrics in alone.values()}) > 2
        best = max(path, key=lambda l2: (alone[l2].accuracy, -alone[l2].loss))
        assert best not in (path[0], path[-1])
        probe = make_probe(d_in=40)
        result = train(probe, rows, tmp_path / "path", validation, l2_path=path)
        assert result.chosen == {"l2": best}
        assert result.validation.accuracy == alone[best].accuracy
        assert [entry["l2"] for entry in result.history] == sorted(path, reverse=True)
        again = probe.predict(validation).argmax(1) == validation.labels
        assert again.double().mean().item() == result.validation.accuracy, "the chosen weights are the ones kept"

    def test_validation_rows_choose_but_are_not_fitted(self, labelled: Labelled, tmp_path: Path) -> None:
        weights = []
        for seed in (1, 2):
            probe = make_probe()
            train(probe, labelled(100), tmp_path / str(seed), labelled(30, seed=seed), l2_path=(1e-2,))
            weights.append(torch.cat([value.flatten() for value in probe.state_dict().values()]))
        assert torch.equal(*weights)

    def test_the_standardisation_is_of_the_training_rows_and_saved(self, labelled: Labelled, tmp_path: Path) -> None:
        probe, features = make_probe(), labelled(100)
        trainer = ProbeTrainer(probe, features, make_args(tmp_path, validation_fraction=0.3))
        trainer.train(progress=False)
        rows = features[trainer.train_rows].double()
        assert len(rows) == 70
        torch.testing.assert_close(probe.head.feature_mean, rows.mean(0).float())
        torch.testing.assert_close(probe.head.feature_std, rows.std(0, correction=0).float())
        saved = load_file(tmp_path / "model.safetensors")
        assert torch.equal(saved["head.feature_mean"], probe.head.feature_mean)
        assert torch.equal(saved["head.feature_std"], probe.head.feature_std)

    def test_constant_features_do_no_harm(self, labelled: Labelled, tmp_path: Path) -> None:
        plain, features = labelled(100), labelled(100).to_tensor()
        constant = torch.tensor([0.0, 0.1, 12345.678]).expand(100, 3)
        padded = FeatureSet.from_tensor(torch.cat([features, constant], 1), plain.labels)
        with_constants, without = make_probe(d_in=9), make_probe()
        train(with_constants, padded, tmp_path / "with")
        train(without, plain, tmp_path / "without")
        logits = with_constants.predict(padded)
        assert torch.isfinite(logits).all()
        torch.testing.assert_close(logits, without.predict(plain), atol=1e-3, rtol=1e-3)

    def test_small_features_beside_large_ones_count(self, tmp_path: Path) -> None:
        """Diffusion models have channels a million times larger than others; here the small one tells the classes."""
        labels = torch.arange(100) % 2
        generator = torch.Generator().manual_seed(0)
        features = torch.stack([1e5 * torch.randn(100, generator=generator), 1e-2 * (labels - 0.5)], 1)
        probe = make_probe(d_in=2, num_labels=2)
        result = train(probe, FeatureSet.from_tensor(features, labels), tmp_path, l2_path=(1.0,))
        assert probe.head.feature_std[1].item() == pytest.approx(5e-3, rel=0.01)
        assert result.validation.accuracy == 1.0


class TestProtocol:
    def test_test_rows_change_nothing(self, labelled: Labelled, tmp_path: Path) -> None:
        probe = make_probe()
        trainer = ProbeTrainer(probe, labelled(100), make_args(tmp_path))
        trainer.train(progress=False)
        before = {name: value.clone() for name, value in probe.state_dict().items()}
        file = (tmp_path / "model.safetensors").read_bytes()
        test_rows = labelled(80, seed=3)
        metrics = trainer.evaluate(test_rows)
        assert all(torch.equal(before[name], value) for name, value in probe.state_dict().items())
        assert (tmp_path / "model.safetensors").read_bytes() == file
        logits = probe.predict(test_rows)
        assert metrics.accuracy == (logits.argmax(1) == test_rows.labels).double().mean().item()
        rows = logits.double().log_softmax(1)
        assert metrics.loss == pytest.approx(-rows[range(80), test_rows.labels].mean().item(), rel=1e-6)
        assert metrics.rows == 80
        assert metrics.accuracy > 0.6

    def test_metrics_say_which_rows_they_are_of(self, labelled: Labelled, tmp_path: Path) -> None:
        probe = make_probe()
        trainer = ProbeTrainer(probe, labelled(100), make_args(tmp_path))
        result = trainer.train(progress=False)
        assert probe.metrics["validation"] == {"accuracy": result.validation.accuracy, "rows": 10}
        assert probe.metrics["training"] == {"rows": 90, "optimizer": "lbfgs", **result.chosen}
        metrics = trainer.evaluate(labelled(80, seed=3))
        trainer.save()
        loaded = DiffusionProbe.from_pretrained(tmp_path)
        assert loaded.metrics == probe.metrics
        assert loaded.metrics["test"] == {"accuracy": metrics.accuracy, "rows": 80}
        assert f"| test.accuracy | {metrics.accuracy:.4g} |" in (tmp_path / "README.md").read_text()

    def test_the_saved_probe_gives_equal_logits(
        self, labelled: Labelled, provenance: Provenance, tmp_path: Path
    ) -> None:
        for head, shape in (("linear", (6,)), ("diff-c", (6, 4, 4))):
            plain = labelled(40, shape)
            features = FeatureSet([plain.to_tensor()], labels=plain.labels, provenance=provenance)
            probe = make_probe(head)
            train(probe, features, tmp_path / head)
            loaded = DiffusionProbe.from_pretrained(tmp_path / head)
            assert not loaded.training
            assert torch.equal(loaded(features=features[:9]).logits, probe(features=features[:9]).logits)
            assert loaded.provenance == provenance

    def test_validation_rows_are_other_images_than_training_rows(self, tmp_path: Path) -> None:
        """Positions of one image are alike: a probe that has seen some of them is not tested by the others."""
        images, tokens = 20, 5
        numbers = torch.arange(images).repeat_interleave(tokens).float()
        features = FeatureSet([numbers[:, None].expand(-1, 6)], rows_per_image=tokens, labels=torch.arange(images) % 3)
        trainer = ProbeTrainer(make_probe(), features, make_args(tmp_path, validation_fraction=0.25))
        trained_on = set(features[trainer.train_rows][:, 0].tolist())
        held_out = set(trainer.validation[0][:, 0].tolist())
        assert (len(trained_on), len(held_out)) == (15, 5)
        assert not trained_on & held_out
        assert torch.equal(trainer.validation[1], trainer.validation[0][:, 0].long() % 3)

    def test_auto_is_lbfgs_for_linear_and_adamw_for_diff_c(self, labelled: Labelled, tmp_path: Path) -> None:
        names = {}
        for head, shape in (("linear", (6,)), ("diff-c", (6, 4, 4))):
            names[head] = ProbeTrainer(make_probe(head), labelled(20, shape), make_args(tmp_path)).optimizer_name
        assert names == {"linear": "lbfgs", "diff-c": "adamw"}
        with pytest.raises(ValueError, match=r"lbfgs is for the linear head.*use optimizer='adamw'"):
            ProbeTrainer(make_probe("diff-c"), labelled(20, (6, 4, 4)), make_args(tmp_path, optimizer="lbfgs"))


class TestAdamW:
    @pytest.mark.parametrize(("head", "shape"), [("linear", (6,)), ("diff-c", (6, 4, 4)), ("diff-c", (16, 6))])
    def test_learns(self, head: str, shape: tuple[int, ...], labelled: Labelled, tmp_path: Path) -> None:
        def draw(rows: int, seed: int) -> FeatureSet:
            if shape != (16, 6):
                return labelled(rows, shape, seed=seed)
            maps = labelled(rows, (6, 4, 4), seed=seed)
            return FeatureSet.from_tensor(maps.to_tensor().flatten(2).transpose(1, 2), maps.labels)

        probe = make_probe(head, width=16)
        settings = {"optimizer": "adamw", "num_train_epochs": 12, "learning_rate": 1e-2}
        trainer = ProbeTrainer(probe, draw(150, 0), make_args(tmp_path, **settings))
        result = trainer.train(progress=False)
        assert result.history[-1]["loss"] < 0.8 * result.history[0]["loss"]
        assert trainer.evaluate(draw(150, 1)).accuracy > 0.6  # 1/3 by chance

    def test_the_best_epoch_is_kept(self, labelled: Labelled, tmp_path: Path) -> None:
        """Almost nothing but noise, so that the accuracy goes up and down."""
        maps = {"shape": (6, 4, 4), "noise": 30.0}
        probe, validation = make_probe("diff-c"), labelled(60, seed=1, **maps)
        settings = {"learning_rate": 2e-2, "num_train_epochs": 15}
        result = train(probe, labelled(40, **maps), tmp_path, validation, **settings)
        by_epoch = [(entry["accuracy"], -entry["validation_loss"]) for entry in result.history]
        best = max(range(15), key=by_epoch.__getitem__)
        assert result.chosen == {"epoch": best}
        assert best != 14, "a run whose last epoch is the best proves nothing"
        assert result.validation.accuracy == by_epoch[best][0]
        assert (probe.predict(validation).argmax(1) == validation.labels).double().mean().item() == by_epoch[best][0]

    def test_learning_rates_follow_a_third_of_a_cosine(self, labelled: Labelled, tmp_path: Path) -> None:
        seen = []
        with watch_optimizer(lambda optimizer: seen.append(optimizer.param_groups[0]["lr"])):
            train(make_probe("diff-c"), labelled(9, (6, 4, 4)), tmp_path, num_train_epochs=6, cosine_epochs=18)
        reference = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(reference, T_max=18)
        expected = []
        for _ in range(6):
            expected.append(scheduler.get_last_lr()[0])
            reference.step()
            scheduler.step()
        assert seen == pytest.approx(expected)

    def test_dropout_acts_and_leaves_the_global_random_state_alone(self, labelled: Labelled, tmp_path: Path) -> None:
        losses = []
        for dropout, seed in ((0.5, 1), (0.5, 2), (0.0, 1)):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                before = torch.random.get_rng_state()
                result = train(
                    make_probe("diff-c", dropout=dropout), labelled(40, (6, 4, 4)), tmp_path / f"{dropout}-{seed}"
                )
                assert torch.equal(torch.random.get_rng_state(), before)
            losses.append([entry["loss"] for entry in result.history])
        assert losses[0] == losses[1], "it depends on the global random state"
        assert losses[0] != losses[2]

    @pytest.mark.parametrize("interrupt_at", [1, 14, 23])
    def test_an_interrupted_run_ends_bit_for_bit_the_same(
        self, interrupt_at: int, labelled: Labelled, tmp_path: Path
    ) -> None:
        """36 rows in batches of 8: five steps an epoch. Runs that are killed: tests/sae/test_resume_after_kill.py."""
        features, steps = labelled(40, (6, 4, 4)), []
        undisturbed, resumed = make_probe("diff-c"), make_probe("diff-c")
        expected = train(undisturbed, features, tmp_path / "undisturbed", num_train_epochs=6)

        def interrupt(_: torch.optim.Optimizer) -> None:
            steps.append(1)
            if len(steps) == interrupt_at:
                raise KeyboardInterrupt

        with watch_optimizer(interrupt), pytest.raises(KeyboardInterrupt):
            train(make_probe("diff-c"), features, tmp_path / "resumed", num_train_epochs=6)
        steps.clear()
        with watch_optimizer(lambda _: steps.append(1)):
            result = train(resumed, features, tmp_path / "resumed", num_train_epochs=6)
        assert len(steps) == 30 - 5 * ((interrupt_at - 1) // 5), "finished epochs are not done again"
        assert result == expected
        assert all(torch.equal(undisturbed.state_dict()[n], value) for n, value in resumed.state_dict().items())
        files = [tmp_path / name / "model.safetensors" for name in ("undisturbed", "resumed")]
        assert files[0].read_bytes() == files[1].read_bytes()

    def test_other_settings_features_or_validation_rows_are_refused(self, labelled: Labelled, tmp_path: Path) -> None:
        shape = (6, 4, 4)
        features, validation = labelled(20, shape), labelled(20, shape, seed=1)
        relabelled = FeatureSet.from_tensor(features.to_tensor(), (features.labels + 1) % 3)
        train(make_probe("diff-c"), features, tmp_path, validation)
        for changed in (
            (make_probe("diff-c", num_labels=4), features, validation, {}),
            (make_probe("diff-c", dropout=0.1), features, validation, {}),
            (make_probe("diff-c"), labelled(20, shape, seed=2), validation, {}),
            (make_probe("diff-c"), relabelled, validation, {}),
            (make_probe("diff-c"), features, labelled(20, shape, seed=2), {}),
            (make_probe("diff-c"), features, validation, {"learning_rate": 1e-4}),
        ):
            probe, rows, validation_rows, changes = changed
            with pytest.raises(ValueError, match="with other settings or features"):
                train(probe, rows, tmp_path, validation_rows, **changes)

    @pytest.mark.parametrize("learning_rate", [1e30, float("inf")])
    def test_divergence_is_an_error(self, learning_rate: float, labelled: Labelled, tmp_path: Path) -> None:
        with pytest.raises(TrainingDivergedError, match=r"loss became (nan|inf) at step 0.*no checkpoint yet"):
            train(make_probe(), labelled(40), tmp_path, optimizer="adamw", learning_rate=learning_rate)
        assert not (tmp_path / CHECKPOINT).exists()
        assert not (tmp_path / "model.safetensors").exists()

    def test_a_last_batch_of_one_row_is_left_out(self, labelled: Labelled, tmp_path: Path) -> None:
        """Where the map has shrunk to one position, BatchNorm has nothing to normalise a single row by."""
        result = train(make_probe("diff-c"), labelled(10, (6, 4, 4)), tmp_path, batch_size=8)  # 9 rows: 8 and 1
        assert len(result.history) == 4

    @pytest.mark.parametrize(
        ("head", "shape", "steps"), [("mlp", (6,), 2), ("linear", (6,), 2), ("diff-c", (6, 4, 4), 1)]
    )
    def test_it_is_left_out_for_batch_statistics_alone(
        self, head: str, shape: tuple[int, ...], steps: int, labelled: Labelled, tmp_path: Path
    ) -> None:
        seen = []
        with watch_optimizer(lambda _: seen.append(1)):
            train(make_probe(head), labelled(10, shape), tmp_path, optimizer="adamw", num_train_epochs=3)
        assert len(seen) == 3 * steps, "9 rows in batches of 8: 8 and 1"

    def test_batches_of_one_row(self, labelled: Labelled, tmp_path: Path) -> None:
        seen = []
        with watch_optimizer(lambda _: seen.append(1)):
            train(make_probe("mlp"), labelled(10), tmp_path / "mlp", batch_size=1, num_train_epochs=2)
        assert len(seen) == 2 * 9
        with pytest.raises(ValueError, match=r"The head diff-c has BatchNorm.*got batch_size=1\. Use a batch_size ≥ 2"):
            train(make_probe("diff-c"), labelled(10, (6, 4, 4)), tmp_path / "diff-c", batch_size=1)
        assert not (tmp_path / "diff-c").exists(), "before anything is written"

    @pytest.mark.parametrize("head", ["linear", "mlp"])
    def test_weights_of_fp16_are_refused(self, head: str, labelled: Labelled, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"cannot train weights of torch\.float16.*Call probe\.float\(\)"):
            train(make_probe(head).half(), labelled(40), tmp_path, optimizer="adamw")
        train(make_probe(head).half().float(), labelled(40), tmp_path, optimizer="adamw", bf16=True)

    def test_more_epochs_than_the_schedule_has_are_explained(self, tmp_path: Path) -> None:
        expected = (
            r"must be an integer ≥ 100, got 90: after it the .* num_train_epochs is 100.*e\.g\. cosine_epochs=300"
        )
        with pytest.raises(ValueError, match=expected):
            make_args(tmp_path, num_train_epochs=100)
        assert make_args(tmp_path, num_train_epochs=100, cosine_epochs=100).cosine_epochs == 100
        with pytest.raises(ValueError, match=r"cosine_epochs must be an integer ≥ 1, got 3\.5"):
            make_args(tmp_path, cosine_epochs=3.5)


class TestRefusedFeatures:
    def test_of_those_that_it_was_trained_on_is_warned(
        self, labelled: Labelled, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        features = labelled(30)
        trainer = ProbeTrainer(make_probe(), features, make_args(tmp_path))
        for same in (features, FeatureSet.from_tensor(features.to_tensor(), features.labels)):
            caplog.clear()
            ProbeTrainer(make_probe(), features, make_args(tmp_path), validation_features=same)
            trainer.evaluate(same)
            said = "The {} features are the training features: what is measured is memory"
            assert said.format("validation") in caplog.text
            assert said.format("test") in caplog.text
        caplog.clear()
        ProbeTrainer(make_probe(), features, make_args(tmp_path), validation_features=labelled(31))
        assert "training" not in caplog.text

        def named(first: int) -> FeatureSet:
            rows = slice(first, first + 20)
            ids = [f"image {i}" for i in range(first, first + 20)]
            return FeatureSet([features[rows]], labels=features.labels[rows], image_ids=ids)

        ProbeTrainer(make_probe(), named(0), make_args(tmp_path), validation_features=named(10))
        assert "10 of the 20 validation images are among the training images" in caplog.text

    def test_classes_are_those_of_the_same_name(self, labelled: Labelled, tmp_path: Path) -> None:
        """However the training, validation and test features number them."""
        features, other = labelled(60), labelled(90)
        own, swapped = ["bag", "coat", "shoe"], torch.tensor([2, 0, 1])
        names = [own[i] for i in swapped.argsort()]
        plain = FeatureSet([features[:]], labels=features.labels, class_names=own)
        held_out = FeatureSet([other[:]], labels=other.labels, class_names=own)
        renumbered = FeatureSet([other[:]], labels=swapped[other.labels], class_names=names)
        probe = make_probe(id2label=dict(enumerate(own)), num_labels=3)
        results = [
            train(probe, plain, tmp_path / str(i), one).validation for i, one in enumerate((held_out, renumbered))
        ]
        assert results[0] == results[1]
        trainer = ProbeTrainer(probe, plain, make_args(tmp_path))
        assert trainer.evaluate(held_out) == trainer.evaluate(renumbered)
        turned = FeatureSet([features[:]], labels=swapped[features.labels], class_names=names)
        assert torch.equal(ProbeTrainer(probe, turned, make_args(tmp_path)).labels, features.labels)
        unknown = FeatureSet([other[:]], labels=other.labels, class_names=["bag", "hat", "shoe"])
        expected = "The test features have the classes hat, which are none of the probe's: bag, coat, shoe"
        with pytest.raises(ValueError, match=expected):
            trainer.evaluate(unknown)

    def test_numbers_that_are_not_read_are_warned_of(
        self, labelled: Labelled, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        args = ProbeTrainingArguments(output_dir=str(tmp_path), learning_rate=0.1)
        ProbeTrainer(make_probe(width=7), labelled(30), args)
        assert "Given and not read: learning_rate, width. This is the head linear, trained by lbfgs" in caplog.text
        caplog.clear()
        ProbeTrainer(make_probe("mlp", width=7), labelled(30), args)
        assert not caplog.text

    def test_labels_outside_the_classes(self, labelled: Labelled, tmp_path: Path) -> None:
        good, bad = labelled(30), labelled(30, classes=5)
        message = "{} features have labels 0…4, the probe has classes 0…2. Check id2label"
        with pytest.raises(ValueError, match=message.format("The training")):
            ProbeTrainer(make_probe(), bad, make_args(tmp_path))
        with pytest.raises(ValueError, match=message.format("The validation")):
            ProbeTrainer(make_probe(), good, make_args(tmp_path), validation_features=bad)
        with pytest.raises(ValueError, match=message.format("The test")):
            ProbeTrainer(make_probe(), good, make_args(tmp_path)).evaluate(bad)
        negative = FeatureSet.from_tensor(good.to_tensor(), good.labels - 1)
        with pytest.raises(ValueError, match="have labels -1…1"):
            ProbeTrainer(make_probe(), negative, make_args(tmp_path))

    def test_without_labels(self, labelled: Labelled, tmp_path: Path) -> None:
        bare = FeatureSet.from_tensor(labelled(30).to_tensor())
        with pytest.raises(ValueError, match="A probe needs labels, and these features have none"):
            ProbeTrainer(make_probe(), bare, make_args(tmp_path))
        with pytest.raises(ValueError, match="A probe needs labels"):
            ProbeTrainer(make_probe(), labelled(30), make_args(tmp_path), validation_features=bare)
        with pytest.raises(ValueError, match="A probe needs labels"):
            ProbeTrainer(make_probe(), labelled(30), make_args(tmp_path)).evaluate(bare)

    @pytest.mark.parametrize(("rows", "fraction"), [(1, 0.1), (2, 0.9)])
    def test_too_few_to_hold_some_out(self, rows: int, fraction: float, labelled: Labelled, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=f"{rows} images are too few to hold out {rows} of them"):
            ProbeTrainer(make_probe(), labelled(rows), make_args(tmp_path, validation_fraction=fraction))

    def test_of_another_shape(self, labelled: Labelled, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"A linear probe takes features of the shape \(N, 6\), got \(1, 7\)"):
            ProbeTrainer(make_probe(), labelled(30, (7,)), make_args(tmp_path))
        with pytest.raises(ValueError, match=r"A diff-c probe takes features of the shape \(N, 6, h, w\)"):
            ProbeTrainer(make_probe("diff-c"), labelled(30), make_args(tmp_path))

    @pytest.mark.parametrize("what", ["training", "validation", "test"])
    def test_with_values_that_are_no_numbers(self, what: str, labelled: Labelled, tmp_path: Path) -> None:
        good, values = labelled(30), labelled(30).to_tensor()
        values[4, 2] = float("nan")
        bad = FeatureSet.from_tensor(values, good.labels)
        rows, validation = bad if what == "training" else good, bad if what == "validation" else good
        with pytest.raises(ValueError, match=rf"The {what} features holds NaN or infinite.*rows \[4\] of 30"):
            ProbeTrainer(make_probe(), rows, make_args(tmp_path), validation_features=validation).evaluate(bad)

    @pytest.mark.parametrize("recorded", [False, True], ids=["new_probe", "probe_with_an_extraction"])
    def test_of_another_extraction(
        self, recorded: bool, labelled: Labelled, provenance: Provenance, tmp_path: Path
    ) -> None:
        plain, other = labelled(30), dataclasses.replace(provenance, prompt="a photo", timesteps=(100,))
        mine = FeatureSet([plain.to_tensor()], labels=plain.labels, provenance=provenance)
        others = FeatureSet([plain.to_tensor()], labels=plain.labels, provenance=other)
        probe = make_probe()
        probe.provenance = provenance if recorded else None
        args, match = (
            make_args(tmp_path),
            rf"(?s)differ in timesteps, prompt.*{provenance.fingerprint}.*{other.fingerprint}",
        )
        if recorded:
            with pytest.raises(ProvenanceMismatchError, match=match):
                ProbeTrainer(probe, others, args)
        with pytest.raises(ProvenanceMismatchError, match=match):
            ProbeTrainer(probe, mine, args, validation_features=others)
        with pytest.raises(ProvenanceMismatchError, match=match):
            ProbeTrainer(probe, mine, args).evaluate(others)
        allowed = ProbeTrainer(probe, others, args, validation_features=mine, allow_mismatch=True)
        assert allowed.train(progress=False).validation.rows == 30
        assert allowed.evaluate(mine, allow_mismatch=True).rows == 30


def test_a_folder_that_cannot_be_written_is_found_before_the_training(labelled: Labelled, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PermissionError, match=r"Cannot write to the output folder .*file/probe"):
        train(make_probe(), labelled(30), tmp_path / "file" / "probe")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
