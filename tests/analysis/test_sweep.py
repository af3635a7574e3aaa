"""Sweeps on the embedded models: the grid, the protocol, interruptions, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusion_sae import (
    DiffusionProbe,
    DiffusionProbeConfig,
    ProbeTrainer,
    ProbeTrainingArguments,
    Sweep,
    SweepConfig,
)
from diffusion_sae.analysis.sweep import fits, run
from diffusion_sae.analysis.sweep.data import open_splits, subset_of, tasks, texts_of
from diffusion_sae.analysis.sweep.results import SweepResults
from diffusion_sae.analysis.sweep.specs import HeadSpec, PromptSpec
from diffusion_sae.features import FeatureSet, FeatureStore
from diffusion_sae.zoo import embedded_images, embedded_path

KIND = {
    "tops": ["T-shirt", "pullover", "dress", "coat", "shirt"],
    "trousers": ["trouser"],
    "shoes": ["sandal", "sneaker", "ankle boot"],
    "bags": ["bag"],
}
Row = dict[str, Any]


def config(output_dir: Path, **changes: Any) -> SweepConfig:
    settings = {
        "models": ("tiny-sd",),
        "layers": ("bottleneck", "up_ft1"),
        "timesteps": (25, 300),
        "limit": 60,
        "seeds": (0, 1),
        "batch_size": 60,
    }
    return SweepConfig(output_dir=str(output_dir), **(settings | changes))


def sweep(output_dir: Path, **changes: Any) -> dict[str, Any]:
    return Sweep(config(output_dir, **changes), progress=False).run()


def table(folder: Path) -> list[Row]:
    """Without what depends on the clock."""
    rows = pq.ParquetFile(folder / "results.parquet").read().to_pylist()
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, both kinds of weights, two labels, prompts with and without the label."""
    folder = tmp_path_factory.mktemp("whole")
    own = [{"name": "empty"}, {"name": "class", "prompt": "{number}"}]
    dit = {"model": "tiny-dit", "layers": ["block2"], "timesteps": [25], "prompts": own, "weights": ["trained"]}
    prompts = ({"name": "empty"}, {"name": "class", "prompt": "a photo of a {}"})
    labels = ("label", {"name": "kind", "groups": KIND})
    sweep(folder, models=("tiny-sd", dit), weights=("trained", "random"), prompts=prompts, labels=labels)
    return folder


def test_the_table_has_a_row_a_fit(whole: Path) -> None:
    rows = table(whole)
    cells = [row for row in rows if row["kind"] == "cell"]
    # tiny-sd: 2 weights × 2 prompts × 2 layers × 2 timesteps; tiny-dit: 2 prompts; each 2 labels × 2 seeds
    assert len(cells) == (16 + 2) * 4
    keys = [
        tuple(row[n] for n in ("model", "weights", "prompt", "layer", "timestep", "label", "seed")) for row in cells
    ]
    assert len(set(keys)) == len(keys)
    assert {row["kind"] for row in rows} == {"cell", "pixels", "latents", "shuffled"}
    assert {(row["train_images"], row["validation_images"], row["test_images"]) for row in rows} == {(54, 60, 60)}
    assert {(row["label"], row["num_labels"]) for row in rows} == {("label", 10), ("kind", 4)}
    assert all(row["l2"] in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1) and row["epoch"] is None for row in rows)


def test_what_the_numbers_say(whole: Path) -> None:
    rows = table(whole)

    def mean(**wanted: Any) -> float:
        own = [row["test_accuracy"] for row in rows if all(row[n] == v for n, v in wanted.items())]
        return sum(own) / len(own)

    plain = {"kind": "cell", "model": "tiny-sd", "layer": "up_ft1", "timestep": 25, "label": "label"}
    assert mean(**plain, weights="trained", prompt="empty") > mean(**plain, weights="random", prompt="empty")
    assert mean(**plain, weights="trained", prompt="class") > mean(**plain, weights="trained", prompt="empty")
    assert mean(kind="shuffled", label="label") < 0.3
    assert mean(kind="pixels", label="kind") > mean(kind="pixels", label="label")


def test_the_summary_records_where_everything_comes_from(whole: Path) -> None:
    summary = json.loads((whole / "sweep.json").read_text())
    assert SweepConfig.from_dict(summary["config"]).to_dict() == summary["config"]
    assert summary["fits"] == len(table(whole))
    assert len(summary["extractions"]) == 6
    for name, record in summary["extractions"].items():
        for split in ("train", "validation", "test"):
            store = FeatureStore(whole / "features" / name / split)
            assert store.provenance.fingerprint == record["fingerprint"]
            assert store.provenance.weights == record["weights"]
    assert {"torch", "diffusers"} <= set(summary["versions"])


def test_the_best_cell_is_chosen_on_validation_among_prompts_without_the_label(whole: Path) -> None:
    rows, summary = table(whole), SweepResults.read(whole).summary
    assert {(b["model"], b["label"]) for b in summary["best"]} == {
        (model, label) for model in ("tiny-sd", "tiny-dit") for label in ("label", "kind")
    }
    for best in summary["best"]:
        own = [r for r in rows if r["kind"] == "cell" and (r["model"], r["label"]) == (best["model"], best["label"])]
        own = [r for r in own if r["weights"] == "trained" and r["prompt"] == "empty"]
        scores: dict[tuple, float] = {}
        for row in own:
            key = (row["layer"], row["timestep"])
            scores[key] = scores.get(key, 0) + row["validation_accuracy"] / 2
        assert scores[best["layer"], best["timestep"]] == pytest.approx(max(scores.values()))
        assert best["prompt"] == "empty"
        assert best["margins"]["shuffled labels"]["exceeds_noise"]


@pytest.mark.parametrize("at", [1, 4])
def test_an_interrupted_sweep_ends_with_the_results_of_an_undisturbed_one(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = {"layers": ("bottleneck",), "weights": ("trained", "random"), "baselines": ("pixels", "shuffled")}
    expected = sweep(tmp_path / "undisturbed", **grid)
    calls, fit = [], run.fit_cell

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return fit(*args, **kwargs)

    monkeypatch.setattr(run, "fit_cell", dying)
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path / "resumed", **grid)
    assert not (tmp_path / "resumed" / "results.parquet").exists()
    shard = next((tmp_path / "resumed" / "features").glob("*/train/shard-00000.*"))
    shard.touch()
    (tmp_path / "resumed" / "cells").mkdir(exist_ok=True)
    (tmp_path / "resumed" / "cells" / ".x.json.1.tmp").write_text("half")
    got = sweep(tmp_path / "resumed", **grid)
    assert len(calls) == 2 + 2 + 1 + 1 + 1, "the cells that were done are not fitted again"
    assert table(tmp_path / "resumed") == table(tmp_path / "undisturbed")
    assert got["best"] == expected["best"]
    assert got["extractions"] == expected["extractions"]
    assert not list((tmp_path / "resumed" / "cells").glob(".*"))


def test_a_larger_grid_fits_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = {"layers": ("bottleneck",), "baselines": ()}
    sweep(tmp_path, **grid, timesteps=(25,))
    calls, fit = [], run.fit_cell

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return fit(*args, **kwargs)

    monkeypatch.setattr(run, "fit_cell", counted)
    summary = sweep(tmp_path, **grid, timesteps=(25, 300))
    assert len(calls) == 1
    stores = [FeatureStore(path) for path in (tmp_path / "features").glob("*/train")]
    assert sorted(store.timesteps for store in stores) == [(25,), (300,)], "what was extracted is not extracted again"
    (record,) = summary["extractions"].values()
    assert (record["layers"], record["timesteps"]) == (["bottleneck"], [25, 300])
    assert len(table(tmp_path)) == 4
    sweep(tmp_path, **grid, timesteps=(25, 300), seeds=(0, 1, 2))
    assert len(calls) == 3, "other seeds are other fits"
    sweep(tmp_path, **grid, timesteps=(300,), seeds=(0, 1, 2))
    assert len(calls) == 3
    assert len(list((tmp_path / "features").iterdir())) == 2


def test_results_of_other_weights_are_not_added_to(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(embedded_path("tiny-sd") or "", model)
    grid = {"models": (str(model),), "layers": ("bottleneck",), "baselines": (), "limit": 20}
    sweep(tmp_path / "out", **grid, timesteps=(25,))
    (file,) = (model / "unet").glob("*.safetensors")
    tensors = load_file(file)
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"holds results of .* with weights .*, and the model now has .*output_dir"):
        sweep(tmp_path / "out", **grid, timesteps=(25, 300))


def test_heads_that_are_trained_step_by_step(tmp_path: Path) -> None:
    """Whole activations are stored once; the linear head's are pooled from them, and are those of a pooled store."""
    diff_c = {"head": "diff-c", "name": "small", "width": 8, "num_train_epochs": 2, "learning_rate": 1e-3}
    grid = {"layers": ("bottleneck",), "timesteps": (25,), "baselines": ()}
    sweep(tmp_path / "both", **grid, heads=("linear", diff_c))
    rows = table(tmp_path / "both")
    assert [(row["head"], row["seed"]) for row in rows] == [("linear", 0), ("linear", 1), ("small", 0), ("small", 1)]
    assert [row["epoch"] for row in rows[:2]] == [None, None]
    assert all(row["epoch"] in (0, 1) and row["l2"] is None for row in rows[2:])
    assert not list((tmp_path / "both" / "work").glob("*"))
    sweep(tmp_path / "linear", **grid)
    for one, other in zip(rows[:2], table(tmp_path / "linear"), strict=True):
        assert one["test_accuracy"] == pytest.approx(other["test_accuracy"], abs=0.04)
        assert one["validation_loss"] == pytest.approx(other["validation_loss"], rel=1e-2)


@pytest.mark.parametrize("validation", ["validation", None])
def test_heads_that_are_trained_in_epochs_take_views(tmp_path: Path, validation: str | None) -> None:
    """The fits are ProbeTrainer's own with the views of the store; other heads and splits know nothing of them."""
    mlp = {"head": "mlp", "width": 8, "num_train_epochs": 3, "learning_rate": 1e-2}
    grid: dict[str, Any] = {"layers": ("bottleneck",), "timesteps": (25,), "heads": ("linear", mlp), "limit": 40}
    grid |= {"baselines": (), "validation_split": validation}
    result = sweep(tmp_path / "views", **grid, views=2, view_flip=False)
    sweep(tmp_path / "plain", **grid)
    (folder,) = (tmp_path / "views" / "features").iterdir()
    stores = {path.name: FeatureStore(path) for path in folder.iterdir() if path.is_dir()}
    assert {name: store.num_views for name, store in stores.items()} == dict.fromkeys(stores, 0) | {"train": 2}
    (record,) = result["extractions"].values()
    assert (record["views"], record["view_flip"]) == (2, False)
    assert record["fingerprint"] == stores["train"].provenance.fingerprint
    rows, plain = table(tmp_path / "views"), table(tmp_path / "plain")
    assert rows[:2] == plain[:2], "linear probes are fitted on plain images"
    assert [row["validation_loss"] for row in rows[2:]] != [row["validation_loss"] for row in plain[2:]]

    settings = config(tmp_path, **grid)
    (task,) = tasks(settings, open_splits(settings))
    own = task.rows["train"][subset_of(len(task.rows["train"]), 0.9, 1)]
    features, *views = (stores["train"].select("bottleneck", 25, view=view).to_tensor()[own] for view in range(3))
    labels = torch.tensor([label for label in open_splits(settings)["train"].labels if label is not None])
    held = stores[task.split_of["validation"]].select("bottleneck", 25).to_tensor()[task.rows["validation"]]
    probe = DiffusionProbe(
        DiffusionProbeConfig(
            d_in=features.shape[1], head="mlp", width=8, init_seed=1, id2label=dict(enumerate("0123456789"))
        )
    )
    trained = ProbeTrainer(
        probe,
        FeatureSet([features], labels=labels[own]),
        ProbeTrainingArguments(output_dir=str(tmp_path / "probe"), seed=1, num_train_epochs=3, learning_rate=1e-2),
        validation_features=FeatureSet([held], labels=task.labels["validation"]),
        views=[FeatureSet([view]) for view in views],
    ).fit(progress=False)
    assert rows[3]["validation_loss"] == pytest.approx(trained.validation.loss, rel=1e-6)


def test_results_that_another_sweep_has_made_need_no_extraction(tmp_path: Path) -> None:
    mlp = {"head": "mlp", "width": 8, "num_train_epochs": 1}
    grid: dict[str, Any] = {"layers": ("bottleneck",), "timesteps": (25,), "limit": 20, "baselines": ()}
    sweep(tmp_path, **grid, heads=("linear", mlp), views=1)
    summary = sweep(tmp_path, **grid, heads=("linear",), views=1)
    assert [record["views"] for record in summary["extractions"].values()] == [0]
    assert len(list((tmp_path / "features").iterdir())) == 1


def test_views_that_no_head_takes_are_not_extracted(tmp_path: Path) -> None:
    grid = {"layers": ("bottleneck",), "timesteps": (25,), "baselines": ()}
    sweep(tmp_path, **grid, views=2)
    (store,) = (FeatureStore(path) for path in (tmp_path / "features").glob("*/train"))
    assert store.num_views == 0


def test_features_that_are_not_kept(tmp_path: Path) -> None:
    grid = {"layers": ("bottleneck",), "baselines": ("shuffled",)}
    kept, dropped = sweep(tmp_path / "kept", **grid), sweep(tmp_path / "dropped", **grid, keep_features=False)
    assert table(tmp_path / "kept") == table(tmp_path / "dropped")
    assert kept["best"] == dropped["best"]
    assert list((tmp_path / "kept" / "features").iterdir())
    assert not list((tmp_path / "dropped" / "features").iterdir())


def test_without_validation_and_test_splits(tmp_path: Path) -> None:
    grid = {"layers": ("bottleneck",), "timesteps": (25,), "baselines": ()}
    result = sweep(tmp_path, **grid, validation_split=None, test_split=None, validation_fraction=0.25)
    rows = table(tmp_path)
    assert {(row["train_images"], row["validation_images"], row["test_images"]) for row in rows} == {(40, 15, None)}
    assert all(row["test_accuracy"] is None for row in rows)
    assert result["best"][0]["measured_on"] == "validation"


def test_a_seed_draws_nine_tenths_of_the_training_rows() -> None:
    subsets = [subset_of(100, 0.9, seed) for seed in (0, 0, 1)]
    assert [int(s.sum()) for s in subsets] == [90, 90, 90]
    assert torch.equal(subsets[0], subsets[1])
    assert not torch.equal(subsets[0], subsets[2])


def test_prompts_of_a_class(tmp_path: Path) -> None:
    images = open_splits(config(tmp_path))["train"]
    names = images.class_names or []
    own = texts_of(PromptSpec.parse("a {} no. {number}"), images) or []
    assert own[:3] == [f"a {names[n]} no. {n}" for n in images.labels[:3]]  # type: ignore[index]
    wrong = PromptSpec.parse({"name": "wrong", "prompt": "{number}", "of": "other"})
    other = [int(text) for text in texts_of(wrong, images) or []]
    assert all(text != label for text, label in zip(other, images.labels, strict=True))
    assert len(set(other)) == 10
    assert other == [int(text) for text in texts_of(wrong, images) or []]
    assert texts_of(PromptSpec.parse("a photo"), images) is None
    clip = PromptSpec.parse({"prompt": "a {}", "prompt_from": "clip", "clip_model": "owner/clip"})
    assert clip.with_choices(names).extraction["prompt_choices"] == tuple(f"a {name}" for name in names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": ({"head": "linear", "widht": 3},)}, r"does not know widht\. Known:.*width"),
        ({"heads": ({"head": "diff-c", "num_train_epochs": 0},)}, "num_train_epochs must be an integer"),
        ({"heads": ("no-such-head",)}, "has no usual pooling"),
        ({"heads": ({"head": "mlp", "optimizer": "lbfgs"},)}, "'mlp' of the sweep, .*lbfgs is for the linear head"),
        ({"heads": ({"head": "linear", "bf16": True},)}, "'linear' of the sweep, .*bf16 belongs to optimizer='adamw'"),
        ({"heads": ({"head": "diff-c", "batch_size": 1},)}, "'diff-c' of the sweep, .*Use a batch_size ≥ 2"),
        ({"heads": ({"head": "diff-c", "pooling": "mean"},)}, "'diff-c' of the sweep, on features of pooling 'mean'"),
        ({"heads": ({"head": "linear", "pooling": "none"},)}, "'linear' of the sweep, on features of pooling 'none'"),
        ({"heads": ({"head": "attention", "pooling": "max"},)}, "'attention' of the sweep, on features of pooling"),
        ({"heads": ({"head": "knn", "class_weights": "balanced"},)}, "'knn' of the sweep, .*has no loss to weight"),
        ({"heads": ({"head": "sae", "pooling": "mean"},)}, "or choose another of linear, mlp, diff-c, attention, knn"),
        ({"heads": ("linear", "linear")}, "linear is named twice"),
        ({"models": ({"modle": "tiny-sd"},)}, r"does not know 'modle' \(did you mean 'model'\?\)"),
        ({"models": ({"model": "tiny-sd", "timesteps": [1000]},)}, "in 0…999, got 1000"),
        ({"prompts": ({"prompt": "a photo", "of": "own"},)}, r"do not fit: a template has \{\}"),
        ({"weights": ("fresh",)}, "weights must be one of 'trained', 'random'"),
        ({"views": -1}, "views must be an integer ≥ 0, got -1"),
        ({"view_flip": False}, "view_flip is of views, of which there are none"),
        ({"seeds": ()}, "seeds must name at least one"),
        ({"test_split": "train"}, r"splits repeat in \['train', 'validation', 'train'\]"),
        ({"seeds": (1, 1)}, "seeds must not repeat"),
        ({"train_fraction": 0}, "train_fraction must be a number > 0"),
        ({"labels": ("species",)}, "have no labels 'species'"),
        ({"labels": ({"name": "two", "groups": {"a": ["bag"], "b": ["boat"]}},)}, r"unknown \['boat'\], missing"),
        ({"labels": ({"name": "two", "groups": {"a": ["bag"], "b": ["bag"]}},)}, "stands in two groups"),
        ({"labels": ({"name": "one", "groups": {"a": ["bag"]}},)}, "needs at least two groups"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Sweep(config(tmp_path, **changes), progress=False)


def test_a_layer_that_the_last_model_has_not_is_told_before_any_extraction(tmp_path: Path) -> None:
    sd = {"model": "tiny-sd", "layers": ["bottleneck"], "timesteps": [25], "weights": ["trained"]}
    dit = {"model": "tiny-dit", "layers": ["block99"], "timesteps": [25], "weights": ["trained"]}
    with pytest.raises(ValueError, match="block99"):
        sweep(tmp_path, models=[sd, dit])
    assert not list(tmp_path.glob("features/*"))
    assert not list(tmp_path.glob("cells/*"))


def test_images_without_labels_are_refused(tmp_path: Path, image_folder: Path) -> None:
    folder = image_folder / "bag"
    with pytest.raises(ValueError, match="needs labelled images; of the train images"):
        Sweep(config(tmp_path, dataset=str(folder), validation_split=None, test_split=None), progress=False)


def test_a_folder_without_a_finished_sweep(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no finished sweep: there is no results\.parquet"):
        SweepResults.read(tmp_path)


def test_every_head_of_the_library_can_be_named(tmp_path: Path) -> None:
    from diffusion_sae.probes.configuration import HEADS

    for head in set(HEADS) - {"fusion", "sae"}:
        fits.check_head(HeadSpec.parse(head))
    for head in ("fusion", "sae"):
        with pytest.raises(ValueError, match="a cell of a sweep is one layer at one timestep"):
            fits.check_head(HeadSpec.parse({"head": head, "pooling": "mean"}))
    assert len(tasks(config(tmp_path), open_splits(config(tmp_path)))) == 1


def test_labels_are_those_of_the_data(tmp_path: Path) -> None:
    """emoji-mini has coarse and fine classes of the same images; `label` is its default, the coarse ones."""
    of_emoji = {"dataset": "emoji-mini", "models": ("tiny-sd",), "labels": ("label", "subgroup"), "limit": 40}
    sweep = SweepConfig(output_dir=str(tmp_path), **of_emoji)
    coarse, fine = tasks(sweep, open_splits(sweep))
    images = Dataset.from_parquet(str(embedded_images("train", "emoji-mini")))
    for task, column in ((coarse, "group"), (fine, "subgroup")):
        assert task.class_names == images.features[column].names
        assert task.labels["train"].tolist() == images[column][:40]


class TestImagesOfAFolder:
    """Classes a, b, c; the test split has no b."""

    CLASSES: ClassVar[dict[str, tuple[str, ...]]] = {
        "train": ("a", "b", "c"),
        "validation": ("a", "b", "c"),
        "test": ("a", "c"),
    }

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        draw = np.random.default_rng(0)
        for split, names in self.CLASSES.items():
            for name in names:
                for i in range(6):
                    pixels = draw.integers(0, 80, (32, 32, 3), dtype=np.uint8) + np.uint8(80 * "abc".index(name))
                    path = tmp_path / "images" / split / name / f"{i}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels).save(path)
        return tmp_path / "images"

    def settings(self, folder: Path, **changes: Any) -> dict[str, Any]:
        given = {"dataset": str(folder), "layers": ("bottleneck",), "timesteps": (25,), "seeds": (0,), "baselines": ()}
        return given | {"limit": None} | changes

    def test_splits_are_folders_and_classes_have_names(self, folder: Path, tmp_path: Path) -> None:
        settings = self.settings(folder)
        found = open_splits(config(tmp_path, **settings))
        assert {split: len(source) for split, source in found.items()} == {"train": 18, "validation": 18, "test": 12}
        assert found["test"].class_names == ["a", "b", "c"]
        assert set(found["test"].labels) == {0, 2}
        sweep(tmp_path / "out", **settings)
        (row,) = table(tmp_path / "out")
        assert (row["train_images"], row["test_images"]) == (16, 12)
        assert row["test_accuracy"] > 0.9

    def test_the_same_images_in_every_role_are_refused(self, folder: Path, tmp_path: Path) -> None:
        expected = "has no folder train, validation, test: training, validation and test would be the same images"
        with pytest.raises(ValueError, match=expected):
            open_splits(config(tmp_path, **self.settings(folder / "train")))
        with pytest.raises(ValueError, match="would be the same images"):
            open_splits(config(tmp_path, **self.settings(embedded_images("validation"))))
        alone = self.settings(folder / "train", validation_split=None, test_split=None, validation_fraction=0.3)
        assert len(open_splits(config(tmp_path, **alone))["train"]) == 18
        sweep(tmp_path / "out", **alone)
        (row,) = table(tmp_path / "out")
        assert row["validation_images"] == 5

    def test_a_class_that_training_lacks_is_refused(self, folder: Path, tmp_path: Path) -> None:
        (folder / "test/a").rename(folder / "test/d")
        with pytest.raises(
            ValueError, match="The test images have the classes d, which are none of the training images'"
        ):
            open_splits(config(tmp_path, **self.settings(folder)))

    def test_other_images_of_the_same_names_are_refused(self, folder: Path, tmp_path: Path) -> None:
        settings = self.settings(folder)
        sweep(tmp_path / "out", **settings)
        before = table(tmp_path / "out")
        sweep(tmp_path / "out", **settings)
        assert table(tmp_path / "out") == before
        Image.new("RGB", (32, 32), (1, 2, 3)).save(folder / "test/c/2.png")
        with pytest.raises(
            ValueError, match=r"holds results of other images: image 8 of the test split, 'c/2.png', is"
        ):
            sweep(tmp_path / "out", **settings)
