"""Training on augmented views: which is drawn, that none leaks, and that it goes on after an interruption."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import pipeline

from diffusion_sae import (
    DiffusionFeatureExtractor,
    DiffusionProbe,
    DiffusionProbeConfig,
    FeatureStore,
    ProbeTrainer,
    ProbeTrainingArguments,
)
from diffusion_sae._training import MetricsLogger
from diffusion_sae.cli.main import main
from diffusion_sae.features import FeatureSet, ImageSubset
from diffusion_sae.probes.examples import Examples, Views

LAYER = "up_ft1"
Labelled = Callable[..., FeatureSet]


def numbered(images: int, views: int, positions: int = 1) -> list[FeatureSet]:
    """Plain features and views: (image, position, view) are the three channels."""
    sets = []
    for view in range(views + 1):
        grid = torch.cartesian_prod(torch.arange(images), torch.arange(positions)).float()
        rows = torch.cat([grid, torch.full((len(grid), 1), float(view))], 1)
        sets.append(FeatureSet([rows], rows_per_image=positions, labels=torch.arange(images) % 3))
    return sets


def make_args(folder: Path, **changes: Any) -> ProbeTrainingArguments:
    settings = {"num_train_epochs": 4, "learning_rate": 1e-2, "batch_size": 4, "optimizer": "adamw"}
    return ProbeTrainingArguments(output_dir=str(folder), **(settings | changes))


def make_probe(head: str = "mlp", **config: Any) -> DiffusionProbe:
    settings = {"d_in": 3, "head": head, "width": 8, "num_attention_heads": 2, "num_labels": 3}
    return DiffusionProbe(DiffusionProbeConfig(**(settings | config)))


class TestDrawing:
    def test_an_image_has_one_view_an_epoch_and_over_epochs_all_of_them(self) -> None:
        plain, *rest = numbered(50, views=3, positions=4)
        views = Views([Examples(one, whole_images=False) for one in rest])
        numbers = torch.randperm(200, generator=torch.Generator().manual_seed(0))
        seen: set[tuple[int, int]] = set()
        epochs = []
        for epoch in range(12):
            batch = views.batch(numbers, seed=0, epoch=epoch)
            assert isinstance(batch, Tensor)
            assert torch.equal(batch[:, :2], plain[numbers][:, :2]), "the order is the one that was asked for"
            of_image = {int(image): set() for image in range(50)}
            for image, _, view in batch.tolist():
                of_image[int(image)].add(int(view))
            assert all(len(found) == 1 for found in of_image.values()), "the positions of an image go together"
            seen |= {(image, found.copy().pop()) for image, found in of_image.items()}
            epochs.append(batch[:, 2])
        assert {view for _, view in seen} == {1, 2, 3}, "the plain image is none of them"
        assert len(seen) > 0.95 * 150
        assert not torch.equal(epochs[0], epochs[1])
        assert not torch.equal(views.batch(numbers, seed=1, epoch=0)[:, 2], epochs[0])
        halves = [views.batch(part, seed=0, epoch=3) for part in numbers.split(37)]
        assert torch.equal(torch.cat(halves)[:, 2], epochs[3]), "it does not depend on the batch"

    def test_the_inputs_of_a_fusion_are_of_the_same_view(self, store: FeatureStore) -> None:
        views = Views([Examples(store.aligned(view=view), whole_images=True) for view in (1, 2)])
        batch = views.batch(torch.arange(12), seed=0, epoch=0)
        assert isinstance(batch, dict)
        chosen = []
        for name, value in batch.items():
            layer, t = name.split("@")
            by_view = [store.select(layer, int(t), view=view).to_tensor() for view in (1, 2)]
            chosen.append([[torch.equal(row, one[i]) for one in by_view].index(True) for i, row in enumerate(value)])
        assert chosen[0] == chosen[1]
        assert set(chosen[0]) == {0, 1}


class TestTraining:
    def test_views_of_images_that_are_held_out_are_not_trained_on(self, labelled: Labelled, tmp_path: Path) -> None:
        plain = labelled(40)
        views = [FeatureSet.from_tensor(labelled(40, seed=seed).to_tensor(), plain.labels) for seed in (1, 2)]
        trainer = ProbeTrainer(make_probe(d_in=6), plain, make_args(tmp_path / "a"), views=views)
        expected = trainer.train(progress=False)
        held_out = sorted(set(range(40)) - set(trainer.train_rows.tolist()))
        assert len(held_out) == 4
        spoiled = []
        for view in views:
            rows = view.to_tensor().clone()
            rows[held_out] = 1e6
            spoiled.append(FeatureSet.from_tensor(rows, plain.labels))
        other = ProbeTrainer(make_probe(d_in=6), plain, make_args(tmp_path / "b"), views=spoiled)
        assert other.train(progress=False) == expected
        for name, value in trainer.probe.state_dict().items():
            assert torch.equal(other.probe.state_dict()[name], value), name

    def test_choices_are_made_and_moments_taken_on_plain_images(self, labelled: Labelled, tmp_path: Path) -> None:
        plain = labelled(60)
        views = [FeatureSet.from_tensor(labelled(60, seed=1).to_tensor() * 5, plain.labels)]
        trainer = ProbeTrainer(make_probe(d_in=6), plain, make_args(tmp_path), views=views)
        result = trainer.train(progress=False)
        features, labels = trainer.validation
        held_out = sorted(set(range(60)) - set(trainer.train_rows.tolist()))
        assert torch.equal(features, plain[torch.tensor(held_out)])
        right = (trainer.probe.predict(features).argmax(1) == labels).double().mean().item()
        assert result.validation.accuracy == right
        mean = plain[trainer.train_rows].double().mean(0).float()
        torch.testing.assert_close(trainer.probe.head.feature_mean, mean)

    def test_of_one_view_that_is_the_plain_image_nothing_changes(self, labelled: Labelled, tmp_path: Path) -> None:
        plain = labelled(40)
        results = [
            ProbeTrainer(make_probe(d_in=6), plain, make_args(tmp_path / str(len(views))), views=views).train(
                progress=False
            )
            for views in ([], [plain])
        ]
        assert results[0] == results[1]

    def test_an_interrupted_run_ends_bit_for_bit_the_same(
        self, store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        log = MetricsLogger.log

        def train(folder: str) -> tuple[DiffusionProbe, Any]:
            probe = make_probe("diff-c", d_in=store.select(LAYER, 25).d_in)
            views = [store.select(LAYER, 25, view=view) for view in (1, 2)]
            trainer = ProbeTrainer(probe, store.select(LAYER, 25), make_args(tmp_path / folder), views=views)
            return probe, trainer.train(progress=False)

        undisturbed, expected = train("undisturbed")

        def interrupted(self: MetricsLogger, step: int, values: Any) -> None:
            if step == 2:
                raise KeyboardInterrupt
            log(self, step, values)

        monkeypatch.setattr(MetricsLogger, "log", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train("resumed")
        monkeypatch.setattr(MetricsLogger, "log", log)
        resumed, result = train("resumed")
        assert result == expected
        assert all(torch.equal(undisturbed.state_dict()[n], value) for n, value in resumed.state_dict().items())

    def test_the_probe_takes_plain_images_and_says_how_it_was_trained(
        self, store: FeatureStore, images: list[Any], tmp_path: Path
    ) -> None:
        plain = store.select(LAYER, 25)
        probe = make_probe("diff-c", d_in=plain.d_in)
        views = [store.select(LAYER, 25, view=view) for view in (1, 2)]
        ProbeTrainer(probe, plain, make_args(tmp_path), views=views).train(progress=False)
        loaded = DiffusionProbe.from_pretrained(tmp_path)
        assert loaded.provenance == plain.provenance
        assert loaded.provenance.views == 0
        assert loaded.metrics["training"]["views"] == 2
        assert "view_area" not in (tmp_path / "README.md").read_text()
        answer = pipeline("diffusion-probe", model=str(tmp_path))(images[0], function_to_apply="none")
        extractor = DiffusionFeatureExtractor.from_pretrained(
            "tiny-sd", layers=[LAYER], timesteps=[25], pooling="none", image_size=32
        )
        with torch.no_grad():
            (logits,) = loaded(features=extractor(images[0])[LAYER, 25]).logits
        by_label = {entry["label"]: entry["score"] for entry in answer}
        assert [by_label[f"LABEL_{i}"] for i in range(3)] == pytest.approx(logits.tolist(), abs=1e-5)

    def test_other_views_are_another_run(self, labelled: Labelled, tmp_path: Path) -> None:
        plain = labelled(40)
        views = [FeatureSet.from_tensor(labelled(40, seed=seed).to_tensor(), plain.labels) for seed in (1, 2)]
        ProbeTrainer(make_probe(d_in=6), plain, make_args(tmp_path), views=views).train(progress=False)
        for other in ([], views[:1], views[::-1]):
            with pytest.raises(ValueError, match="with other settings or features"):
                ProbeTrainer(make_probe(d_in=6), plain, make_args(tmp_path), views=other).train(progress=False)


@pytest.fixture(scope="module")
def store(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    extractor = DiffusionFeatureExtractor.from_pretrained(
        "tiny-sd", layers=["bottleneck", LAYER], timesteps=[25], pooling="none", image_size=32, views=2
    )
    return extractor.extract(image_folder, tmp_path_factory.mktemp("views"), progress=False)


class TestRefused:
    def test_views_as_plain_features(self, store: FeatureStore, tmp_path: Path) -> None:
        plain, view = store.select(LAYER, 25), store.select(LAYER, 25, view=1)
        probe, args = make_probe("diff-c", d_in=plain.d_in), make_args(tmp_path)
        for what, given in (("training", (view, None)), ("validation", (plain, view))):
            with pytest.raises(ValueError, match=f"The {what} features are of an augmented view. Give plain ones"):
                ProbeTrainer(probe, given[0], args, validation_features=given[1], allow_mismatch=True)
        with pytest.raises(ValueError, match="The test features are of an augmented view"):
            ProbeTrainer(probe, plain, args).evaluate(view)

    def test_views_of_other_images_or_another_extraction(self, store: FeatureStore, tmp_path: Path) -> None:
        plain, view = store.select(LAYER, 25), store.select(LAYER, 25, view=1)
        probe, args = make_probe("diff-c", d_in=plain.d_in), make_args(tmp_path)
        for images in (torch.arange(11), torch.arange(12).flip(0)):
            with pytest.raises(ValueError, match=r"View 2 .* not of the same images in the same order.*view=2\)"):
                ProbeTrainer(probe, plain, args, views=[view, ImageSubset(view, images)])
        with pytest.raises(ValueError, match="differ in layers"):
            ProbeTrainer(probe, plain, args, views=[store.select("bottleneck", 25, view=1)])
        broken = view.to_tensor().clone()
        broken[3, 0, 0, 0] = float("nan")
        with pytest.raises(ValueError, match=r"View 1 of the training features holds NaN.*rows \[3\]"):
            ProbeTrainer(probe, plain, args, views=[FeatureSet.from_tensor(broken, plain.labels)])
        with pytest.raises(ValueError, match=r"A diff-c probe takes features of the shape"):
            ProbeTrainer(probe, plain, args, views=[FeatureSet.from_tensor(torch.zeros(12, 5))])

    def test_by_another_optimizer(self, labelled: Labelled, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="views belongs to optimizer='adamw', but this training is by 'lbfgs'"):
            ProbeTrainer(
                make_probe("linear", d_in=6), labelled(40), make_args(tmp_path, optimizer="auto"), views=[labelled(40)]
            )


def test_from_the_command_line(image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = [str(image_folder), str(tmp_path / "store"), "--layers", LAYER, "--timesteps", "25", "--image-size", "32"]
    assert main(["extract", *common, "--pooling", "none", "--views", "2", "--no-view-flip"]) == 0
    assert FeatureStore(tmp_path / "store").provenance.view_flip is False
    training = ["--head", "diff-c", "--width", "8", "--num-train-epochs", "2", "--batch-size", "4"]
    out = ["--output-dir", str(tmp_path / "probe")]
    capsys.readouterr()
    assert main(["probe", str(tmp_path / "store"), *out, *training, "--augment", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) >= {"probe", "validation_accuracy"}
    assert DiffusionProbe.from_pretrained(tmp_path / "probe").metrics["training"]["views"] == 2
    plain = [str(image_folder), str(tmp_path / "plain"), *common[2:], "--pooling", "none"]
    assert main(["extract", *plain]) == 0
    assert main(["probe", str(tmp_path / "plain"), *out, *training, "--augment"]) != 0
    assert "--augment needs views" in capsys.readouterr().err
