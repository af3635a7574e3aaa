"""`pipeline("diffusion-probe")`: from an image to labels, with the very extraction the probe was trained on."""

import dataclasses
import json
import shutil
from base64 import b64encode
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, pipeline
from transformers.pipelines import ImageClassificationPipeline
from transformers.pipelines.image_classification import ClassificationFunction

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


@pytest.fixture
def served(image_folder: Path) -> Iterator[str]:
    """Address of the images over HTTP."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(image_folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_every_kind_of_input_gets_the_same_answers(
    classify: DiffusionProbePipeline, probe: DiffusionProbe, image_folder: Path, served: str
) -> None:
    files = sorted(image_folder.rglob("*.png"))[:3]
    expected = [pytest.approx(scores, abs=1e-5) for scores in expected_scores(probe, [str(path) for path in files])]
    loaded = [Image.open(path).convert("RGB") for path in files]
    arrays = [np.asarray(image) for image in loaded]
    tensors = list(probe.extractor.preprocess(loaded))
    entries = [{"bytes": path.read_bytes(), "path": None} for path in files]
    table = Dataset.from_dict({"picture": loaded}).cast_column("picture", _images())
    addresses = [f"{served}/{path.relative_to(image_folder)}" for path in files]
    for given in (loaded, arrays, tensors, entries, addresses, [str(files[0]), loaded[1], addresses[2]]):
        assert [scores_of(answer) for answer in classify(given, batch_size=2)] == expected
        assert scores_of(classify(given[0])) == expected[0]
    for given in (tuple(loaded), table["picture"]):
        answers = classify(given, batch_size=2)
        assert isinstance(answers, list)
        assert [scores_of(answer) for answer in answers] == expected
    seen = []
    lazy = iter(classify((seen.append(i) or image for i, image in enumerate(loaded)), batch_size=1))
    assert scores_of(next(lazy)) == expected[0]
    assert len(seen) < 3, "a generator is read when its answers are"
    assert [scores_of(answer) for answer in lazy] == expected[1:]
    assert [scores_of(answer) for answer in classify(torch.stack(tensors))] == expected
    for stream in (table.to_iterable_dataset()["picture"], iter(loaded), dict(enumerate(loaded)).values()):
        assert [scores_of(answer) for answer in classify(stream, batch_size=2)] == expected


def _images() -> Any:
    from datasets import Image as ImageFeature

    return ImageFeature()


def test_an_address_that_gives_nothing_is_an_error(classify: DiffusionProbePipeline, served: str) -> None:
    with pytest.raises(ImageError, match=rf"no image at '{served}/missing\.png': .*404"):
        classify(f"{served}/missing.png")
    with pytest.raises(ImageError, match=rf"Cannot read the image '{served}/'"):
        classify(f"{served}/")  # a listing
    with pytest.raises(ImageError, match=r"no image at 'http://127\.0\.0\.1:9/none\.png'"):
        classify("http://127.0.0.1:9/none.png", timeout=5)


def test_an_image_in_its_address(classify: DiffusionProbePipeline, image_folder: Path) -> None:
    path = sorted(image_folder.rglob("*.png"))[0]
    content = b64encode(path.read_bytes()).decode()
    assert classify(f"data:image/png;base64,{content}") == classify(str(path))
    with pytest.raises(ImageError, match=r"'data:image/png;base64' is followed by no base64"):
        classify("data:image/png;base64,no base64")
    with pytest.raises(ImageError, match="Cannot read the image 'data:image/png;base64,"):
        classify(f"data:image/png;base64,{b64encode(b'no image').decode()}")


def test_functions_of_the_logits(
    classify: DiffusionProbePipeline, probe: DiffusionProbe, images: list[Image.Image]
) -> None:
    with torch.no_grad():
        logits = probe(pixel_values=probe.extractor.preprocess(images[0])).logits[0]
    functions = {"none": logits, "sigmoid": logits.sigmoid(), "softmax": logits.softmax(0)}
    for name, scores in functions.items():
        answer = classify(images[0], function_to_apply=name)
        assert scores_of(answer) == pytest.approx(scores.tolist(), abs=1e-5)
    with pytest.raises(ValueError, match="mean is not a valid ClassificationFunction"):
        classify(images[0], function_to_apply="mean")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", [None, *ClassificationFunction])
@pytest.mark.parametrize(
    ("problem_type", "num_labels"),
    [
        (None, 3),
        ("single_label_classification", 3),
        ("multi_label_classification", 1),
        ("multi_label_classification", 3),
        ("regression", 1),
    ],
)
def test_scores_are_those_of_transformers(
    classify: DiffusionProbePipeline,
    monkeypatch: pytest.MonkeyPatch,
    problem_type: str | None,
    num_labels: int,
    function: ClassificationFunction | None,
    dtype: torch.dtype,
) -> None:
    config = DiffusionProbeConfig(
        d_in=4, id2label={i: f"label {i}" for i in range(num_labels)}, problem_type=problem_type
    )
    monkeypatch.setattr(classify, "model", SimpleNamespace(config=config))
    outputs = {"logits": torch.tensor([[0.5, -2.0, 1.5]], dtype=dtype)[:, :num_labels]}
    for top_k in (1, 2, 5):
        given: Any = {"function_to_apply": function, "top_k": top_k}
        expected = ImageClassificationPipeline.postprocess(classify, dict(outputs), **given)
        answer = classify.postprocess(outputs, **given)
        assert [entry["label"] for entry in answer] == [entry["label"] for entry in expected]
        assert [entry["score"] for entry in answer] == pytest.approx([entry["score"] for entry in expected], rel=1e-6)


def test_half_precision_and_a_device_by_name(
    classify: DiffusionProbePipeline, probe_folder: Path, images: list[Image.Image], served: str, image_folder: Path
) -> None:
    """The head in bf16 on the features of the very same extraction, which stays in fp32, as does the noise."""
    half = pipeline("diffusion-probe", model=str(probe_folder), dtype="bfloat16", device="cpu")
    assert half.model.dtype == torch.bfloat16
    assert half.model.extractor.config.dtype == "float32"
    file = next(image_folder.rglob("*.png"))
    full = scores_of(classify(str(file)))
    assert scores_of(half(str(file))) == pytest.approx(full, abs=0.05)
    assert scores_of(half(f"{served}/{file.relative_to(image_folder)}")) == scores_of(half(str(file)))
    assert scores_of(half(str(file))) != full


class TestOverrides:
    def test_what_the_probe_was_trained_with_is_honoured(
        self, classify: DiffusionProbePipeline, images: list[Image.Image]
    ) -> None:
        assert classify(images[0], timestep=25, seed=3) == classify(images[0])

    @pytest.mark.parametrize(
        ("given", "differ", "says"), [({"timestep": 100}, "timesteps", r"t=100"), ({"seed": 4}, "seed", r"seed 4")]
    )
    def test_another_is_refused_or_taken_with_allow_mismatch(
        self,
        given: dict[str, int],
        differ: str,
        says: str,
        classify: DiffusionProbePipeline,
        probe: DiffusionProbe,
        images: list[Image.Image],
    ) -> None:
        recorded = probe.provenance
        settings = {"timesteps": (given.get("timestep", 25),), "seed": given.get("seed", 3)}
        changed = dataclasses.replace(recorded, **settings)
        match = rf"(?s)This probe .*differ in {differ}\).*t=25.*seed 3.*{recorded.fingerprint}.*{says}.*"
        with pytest.raises(ProvenanceMismatchError, match=match + f"{changed.fingerprint}.*allow_mismatch=True"):
            classify(images[0], **given)
        extractor = DiffusionFeatureExtractor.from_pretrained(
            recorded.model, layers=recorded.layers, pooling=recorded.pooling, **settings
        )
        with torch.no_grad():
            expected = probe(features=next(iter(extractor(images[:2]).values()))).logits.softmax(1)
        answers = classify(images[:2], allow_mismatch=True, batch_size=2, **given)
        for answer, scores in zip(answers, expected.tolist(), strict=True):
            assert scores_of(answer) == pytest.approx(scores, abs=1e-5)
        assert scores_of(answers[0]) != pytest.approx(scores_of(classify(images[0])), abs=1e-5)
        assert classify.model.extractor.config.timesteps == (25,), "the probe's own extraction is as it was"

    def test_given_when_the_pipeline_is_made(self, probe_folder: Path, images: list[Image.Image]) -> None:
        with pytest.raises(ProvenanceMismatchError, match="differ in timesteps"):
            pipeline("diffusion-probe", model=str(probe_folder), timestep=100)(images[0])
        made = pipeline("diffusion-probe", model=str(probe_folder), timestep=100, allow_mismatch=True)
        assert scores_of(made(images[0])) == scores_of(made(images[0], seed=3))

    def test_a_timestep_that_there_is_not(self, classify: DiffusionProbePipeline, images: list[Image.Image]) -> None:
        with pytest.raises(ValueError, match="timestep must be an integer in 0…999, got 1000"):
            classify(images[0], timestep=1000, allow_mismatch=True)

    def test_the_seed_of_random_weights_is_refused(
        self, tiny_sd_folder: Path, image_folder: Path, images: list[Image.Image], tmp_path: Path
    ) -> None:
        folder = train_probe(
            tiny_sd_folder, image_folder, tmp_path, head="linear", layers=["bottleneck"], random_weights=True
        )
        classify = pipeline("diffusion-probe", model=str(folder))
        with pytest.raises(ValueError, match="also draws the model's random weights: leave seed out"):
            classify(images[0], seed=4, allow_mismatch=True)


def test_arguments_that_are_none(classify: DiffusionProbePipeline, images: list[Image.Image]) -> None:
    with pytest.raises(ValueError, match="explain must be one of True, False, got 'yes'"):
        classify(images[0], explain="yes")
    with pytest.raises(ValueError, match="top_latents must be an integer ≥ 1, got 0"):
        classify(images[0], top_latents=0)
    with pytest.raises(ValueError, match="top_k must be an integer ≥ 1, got -1"):
        classify(images[0], top_k=-1)
    with pytest.raises(TypeError, match="contributions"):
        classify(images[0], contributions=3)


def test_answers_are_sorted_and_can_be_cut(classify: DiffusionProbePipeline, images: list[Image.Image]) -> None:
    answer = classify(images[0])
    assert {entry["label"] for entry in answer} == set(NAMES)
    assert [entry["score"] for entry in answer] == sorted((entry["score"] for entry in answer), reverse=True)
    assert sum(entry["score"] for entry in answer) == pytest.approx(1)
    assert classify(images[0], top_k=1) == answer[:1]


@pytest.mark.parametrize("nothing", [[], ()])
def test_no_images_have_no_answers(classify: DiffusionProbePipeline, nothing: Any) -> None:
    assert classify(nothing) == []


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
