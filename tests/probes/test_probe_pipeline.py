"""`pipeline("diffusion-probe")`: from an image to labels, with the very extraction the probe was trained on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, pipeline

from diffusion_sae import (
    DiffusionFeatureExtractor,
    DiffusionProbe,
    DiffusionProbeConfig,
    ProbeTrainer,
    ProbeTrainingArguments,
)
from diffusion_sae.extraction.images import ImageError
from diffusion_sae.probes.pipeline import DiffusionProbePipeline
from diffusion_sae.provenance import ProvenanceMismatchError

NAMES = ["bag", "dress", "shoe"]


def train_probe(model: Path, image_folder: Path, output_dir: Path, *, head: str, **settings: Any) -> Path:
    """A probe on the 12 images of `image_folder`, through the whole chain: extract, train, save."""
    extractor = DiffusionFeatureExtractor.from_pretrained(model, timesteps=[25], seed=3, **settings)
    store = extractor.extract(image_folder, output_dir / "features", progress=False)
    features = store.select(extractor.config.layers[0], 25)
    config = DiffusionProbeConfig(d_in=features.d_in, head=head, width=8, id2label=dict(enumerate(store.class_names)))
    args = ProbeTrainingArguments(
        output_dir=str(output_dir / "probe"), num_train_epochs=4, learning_rate=1e-2, batch_size=4
    )
    ProbeTrainer(DiffusionProbe(config), features, args).train(progress=False)
    return output_dir / "probe"


@pytest.fixture(scope="module")
def probe_folder(tiny_sd_folder: Path, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output_dir = tmp_path_factory.mktemp("linear")
    return train_probe(tiny_sd_folder, image_folder, output_dir, head="linear", layers=["up_ft1"])


@pytest.fixture(scope="module")
def probe(probe_folder: Path) -> DiffusionProbe:
    return DiffusionProbe.from_pretrained(probe_folder)


@pytest.fixture(scope="module")
def classify(probe_folder: Path) -> DiffusionProbePipeline:
    return pipeline("diffusion-probe", model=str(probe_folder))


def scores_of(answer: list[dict[str, Any]]) -> list[float]:
    """Scores in the order of the classes."""
    by_label = {entry["label"]: entry["score"] for entry in answer}
    return [by_label[name] for name in NAMES]


def expected_scores(probe: DiffusionProbe, images: Any) -> list[list[float]]:
    """By the two halves: an extractor of its own, and the head alone."""
    provenance = probe.provenance
    extractor = DiffusionFeatureExtractor.from_pretrained(
        provenance.model, layers=provenance.layers, timesteps=provenance.timesteps, pooling=provenance.pooling, seed=3
    )
    with torch.no_grad():
        return probe(features=extractor(images)[provenance.layers[0], 25]).logits.softmax(1).tolist()


def test_a_path_an_image_and_a_list(
    classify: DiffusionProbePipeline, probe: DiffusionProbe, image_folder: Path
) -> None:
    assert type(classify) is DiffusionProbePipeline
    paths = sorted(image_folder.rglob("*.png"))[:3]
    expected = expected_scores(probe, [str(path) for path in paths])
    assert len({round(scores[0], 6) for scores in expected}) == 3, "three images must get three answers"
    assert scores_of(classify(str(paths[0]))) == pytest.approx(expected[0], abs=1e-5)
    with Image.open(paths[1]) as image:
        assert scores_of(classify(image)) == pytest.approx(expected[1], abs=1e-5)
    for batch_size in (1, 3):
        answers = classify([str(path) for path in paths], batch_size=batch_size)
        assert [scores_of(answer) for answer in answers] == [pytest.approx(scores, abs=1e-5) for scores in expected]


def test_answers_are_sorted_and_can_be_cut(classify: DiffusionProbePipeline, images: list[Image.Image]) -> None:
    answer = classify(images[0])
    assert {entry["label"] for entry in answer} == set(NAMES)
    assert [entry["score"] for entry in answer] == sorted((entry["score"] for entry in answer), reverse=True)
    assert sum(entry["score"] for entry in answer) == pytest.approx(1)
    assert classify(images[0], top_k=1) == answer[:1]


def test_what_was_learned_comes_through(classify: DiffusionProbePipeline, image_folder: Path) -> None:
    """The images it was fitted on, 24 dimensions for 12 of them: it must know nearly all again."""
    paths = sorted(path for path in image_folder.rglob("*") if path.is_file())
    right = [
        answer[0]["label"] == path.parent.name
        for path, answer in zip(paths, classify(list(map(str, paths))), strict=True)
    ]
    assert sum(right) >= 9


def test_image_classification_runs_on_the_same_artifact(
    classify: DiffusionProbePipeline, probe_folder: Path, images: list[Image.Image]
) -> None:
    plain = pipeline("image-classification", model=str(probe_folder))
    assert scores_of(plain(images[2])) == pytest.approx(scores_of(classify(images[2])), abs=1e-5)


def test_a_model_instance_with_its_image_processor(
    classify: DiffusionProbePipeline, probe: DiffusionProbe, probe_folder: Path, images: list[Image.Image]
) -> None:
    processor = AutoImageProcessor.from_pretrained(probe_folder)
    assert processor.size == 32
    by_instance = pipeline("diffusion-probe", model=probe, image_processor=processor)
    assert scores_of(by_instance(images[1])) == pytest.approx(scores_of(classify(images[1])), abs=1e-6)


def test_preprocessing_is_the_extractors(
    classify: DiffusionProbePipeline, probe: DiffusionProbe, images: list[Image.Image]
) -> None:
    """Wide, with transparency, in another size: what differs between preprocessings."""
    image = images[0].resize((90, 50)).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((90, 50)))
    assert scores_of(classify(image)) == pytest.approx(expected_scores(probe, image)[0], abs=1e-5)


def test_saved_and_loaded_again_without_a_question(
    classify: DiffusionProbePipeline, images: list[Image.Image], tmp_path: Path
) -> None:
    classify.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").rglob("*.py")), "no code travels with an artifact"
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert not {"auto_map", "custom_pipelines"} & set(config)
    again = pipeline("diffusion-probe", model=str(tmp_path / "saved"), trust_remote_code=False)
    assert scores_of(again(images[4])) == scores_of(classify(images[4]))


def test_a_broken_image_is_named(classify: DiffusionProbePipeline, image_folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(next(image_folder.rglob("*.png")).read_bytes()[:60])
    for images in (str(broken), [str(next(image_folder.rglob("*.png"))), str(broken)]):
        with pytest.raises(ImageError, match=r"Cannot read the image '.*broken\.png'"):
            classify(images)
    with pytest.raises(ImageError, match=r"no image file '.*missing\.png'"):
        classify(str(tmp_path / "missing.png"))
    text = tmp_path / "notes.png"
    text.write_text("not an image")
    with pytest.raises(ImageError, match=r"Cannot read the image '.*notes\.png'"):
        classify(str(text))


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("tiny_sd_folder", {"layers": ["bottleneck"]}),
        ("tiny_dit_folder", {"layers": ["block1"]}),
    ],
)
def test_diff_c_on_whole_activations(
    model: str,
    settings: dict[str, Any],
    image_folder: Path,
    images: list[Image.Image],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """Maps (B, C, h, w) of a U-Net and tokens (B, T, C) of a transformer."""
    folder = train_probe(
        request.getfixturevalue(model), image_folder, tmp_path, head="diff-c", pooling="none", **settings
    )
    classify = pipeline("diffusion-probe", model=str(folder))
    expected = expected_scores(classify.model, images[:2])
    assert [scores_of(answer) for answer in classify(images[:2])] == [pytest.approx(s, abs=1e-5) for s in expected]


def test_a_probe_without_an_extraction_cannot_take_images(images: list[Image.Image], tmp_path: Path) -> None:
    DiffusionProbe(DiffusionProbeConfig(d_in=6, num_labels=3)).save_pretrained(tmp_path / "probe")
    classify = pipeline("diffusion-probe", model=str(tmp_path / "probe"))
    with pytest.raises(
        ValueError, match=r"does not say which extraction it was trained on .*no extractor_config\.json"
    ):
        classify(images[0])


def test_a_base_model_whose_weights_changed_is_refused(
    tiny_sd_folder: Path, image_folder: Path, images: list[Image.Image], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_sd_folder, model)
    folder = train_probe(model, image_folder, tmp_path, head="linear", layers=["bottleneck"])
    classify = pipeline("diffusion-probe", model=str(folder))
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_in.bias"] += 1e-3
    save_file(tensors, weights, metadata={"format": "pt"})
    recorded = classify.model.provenance.weights
    with pytest.raises(ProvenanceMismatchError, match=f"trained with weights {recorded} of .*which now has"):
        classify(images[0])


def test_a_base_model_that_is_gone_is_named(
    tiny_sd_folder: Path, image_folder: Path, images: list[Image.Image], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_sd_folder, model)
    folder = train_probe(model, image_folder, tmp_path, head="linear", layers=["bottleneck"])
    shutil.rmtree(model)
    with pytest.raises(FileNotFoundError, match=rf"'{model}' is no folder, no Hub id"):
        pipeline("diffusion-probe", model=str(folder))(images[0])


def test_the_diffusion_model_is_loaded_once_and_late(probe_folder: Path, images: list[Image.Image]) -> None:
    classify = pipeline("diffusion-probe", model=str(probe_folder))
    assert classify.model.__dict__["_extractor"] is None
    classify(images[0])
    extractor = classify.model.extractor
    classify(images[1])
    assert classify.model.extractor is extractor
    assert not any("unet" in name for name, _ in classify.model.named_parameters())
