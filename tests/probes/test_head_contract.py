"""What every head keeps: one contract from features to the pipeline, over all heads and problem types."""

import dataclasses
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import pipeline

from diffusion_sae import (
    DiffusionFeatureExtractor,
    DiffusionProbe,
    DiffusionProbeConfig,
    FeatureStore,
    KSparseAutoencoder,
    KSparseAutoencoderConfig,
    ProbeTrainer,
    ProbeTrainingArguments,
)
from diffusion_sae._training import MetricsLogger
from diffusion_sae.features import AlignedFeatures, FeatureSet
from diffusion_sae.probes.configuration import FUSIONS, HEADS
from diffusion_sae.probes.heads import HEADS as HEAD_CLASSES
from diffusion_sae.probes.heads.fusion import FUSIONS as FUSION_CLASSES
from diffusion_sae.probes.tasks import TASKS
from diffusion_sae.probes.trainer import FITS
from diffusion_sae.probes.training_args import OPTIMIZERS

LAYER, TIMESTEPS = "up_ft1", (25, 100)
CASES: dict[str, dict[str, Any]] = {
    "linear": {"pooling": "mean"},
    "mlp": {"pooling": "mean", "depth": 2},
    "diff-c": {"pooling": "none"},
    "attention": {"pooling": "tokens"},
    "attention-maps": {"pooling": "none"},
    "fusion-mixing": {"pooling": "none", "fusion": "mixing"},
    "fusion-mixing-pooled": {"pooling": "mean", "fusion": "mixing"},
    "fusion-attention": {"pooling": "none", "fusion": "attention", "pool_size": 2},
    "fusion-attention-tokens": {"pooling": "tokens", "fusion": "attention", "pool_size": 2},
    "knn": {"pooling": "mean"},
    "prototype": {"pooling": "mean"},
    "sae": {"pooling": "mean"},
    "sae-tokens": {"pooling": "tokens"},
}
NAMES = ("bag", "dress", "shoe")
Given = FeatureSet | AlignedFeatures


def head_of(case: str) -> str:
    return case if case in HEADS else case.split("-")[0]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def extractors() -> dict[str, DiffusionFeatureExtractor]:
    """The embedded model at two layers and two timesteps, by pooling."""
    found = {}
    for pooling in ("mean", "none", "tokens"):
        settings: dict[str, Any] = {"layers": ["bottleneck", LAYER], "timesteps": TIMESTEPS, "pooling": pooling}
        found[pooling] = DiffusionFeatureExtractor.from_pretrained("tiny-sd", seed=3, image_size=32, **settings)
    return found


@pytest.fixture(scope="module")
def stores(
    extractors: dict[str, DiffusionFeatureExtractor], image_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, FeatureStore]:
    folder = tmp_path_factory.mktemp("stores")
    return {
        pooling: extractor.extract(image_folder, folder / pooling, progress=False)
        for pooling, extractor in extractors.items()
    }


def features_of(case: str, stores: dict[str, FeatureStore]) -> Given:
    store = stores[CASES[case]["pooling"]]
    return store.aligned() if head_of(case) == "fusion" else store.select(LAYER, 25)


def make_probe(case: str, features: Given, **config: Any) -> DiffusionProbe:
    given = {key: value for key, value in CASES[case].items() if key != "pooling"}
    settings = {"width": 8, "num_attention_heads": 2, "id2label": dict(enumerate(NAMES)), **given, **config}
    if head_of(case) == "sae":
        sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=features.d_in, num_latents=150, k=6))
        sae.provenance = features.provenance
        return DiffusionProbe.from_sae(sae, **settings)
    if isinstance(features, AlignedFeatures):
        settings["inputs"] = features.inputs
    return DiffusionProbe(DiffusionProbeConfig(d_in=features.d_in, head=head_of(case), **settings))


def train(probe: DiffusionProbe, features: Given, folder: Path, validation: Given | None = None) -> Any:
    args = ProbeTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=4,
        learning_rate=1e-2,
        batch_size=4,
        l1_path=(0.5, 0.1),
        l2_path=(0.1, 0.01),
        neighbors_path=(1, 3),
        validation_fraction=0.25,
    )
    return ProbeTrainer(probe, features, args, validation_features=validation).train(progress=False)


def first(features: Given, count: int) -> Tensor | dict[tuple[str, int], Tensor]:
    """The first images, as the extractor gives them."""
    if isinstance(features, AlignedFeatures):
        return {key: first(one, count) for key, one in features.items()}  # type: ignore[misc]
    at_once = features.positions_per_image
    rows = features[: count * at_once]
    return rows if at_once == 1 else rows.unflatten(0, (count, at_once))


def labels_of(problem_type: str | None, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    if problem_type == "multi_label_classification":
        return torch.randint(0, 2, (count, 3), generator=generator)
    if problem_type == "regression":
        return torch.randn(count, 3, generator=generator)
    return torch.arange(count) % 3


def test_the_contract_holds_for_all_there_is() -> None:
    assert set(HEADS) == set(HEAD_CLASSES) == {head_of(case) for case in CASES}
    assert set(FUSIONS) == set(FUSION_CLASSES) == {given["fusion"] for given in CASES.values() if "fusion" in given}
    optimizers = {name for head in HEAD_CLASSES.values() for name in head.optimizers}
    assert optimizers | {"none"} == set(FITS)
    assert optimizers | {"auto"} == set(OPTIMIZERS)
    fields = set(DiffusionProbeConfig.__annotations__)
    kinds = (*HEAD_CLASSES.values(), *FUSION_CLASSES.values())
    read = {name for kind in kinds for name in kind.options}
    assert fields - read == {"d_in", "head", "init_seed", "latent_names"}


@pytest.fixture(scope="module")
def trained(
    stores: dict[str, FeatureStore], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Given, DiffusionProbe, Path, Any]]:
    """Features, probe, its folder and the training's result, by case; trained once."""

    @cache
    def get(case: str) -> tuple[Given, DiffusionProbe, Path, Any]:
        features, folder = features_of(case, stores), tmp_path_factory.mktemp(case)
        probe = make_probe(case, features)
        return features, probe, folder, train(probe, features, folder)

    return get


class TestContract:
    def test_one_row_of_logits_an_image(self, case: str, trained: Any) -> None:
        features, probe, _, _ = trained(case)
        logits = probe.predict(features)
        assert logits.shape == (12, 3)
        assert torch.isfinite(logits).all()
        with torch.no_grad():
            output = probe(features=first(features, 5), labels=torch.arange(5) % 3)
        torch.testing.assert_close(output.logits, logits[:5])
        assert output.loss.shape == ()
        assert logits[:, 0].unique().numel() > 1, "other images, other logits"

    def test_saved_and_loaded_it_gives_equal_logits(self, case: str, trained: Any) -> None:
        features, probe, folder, _ = trained(case)
        loaded = DiffusionProbe.from_pretrained(folder)
        assert torch.equal(loaded.predict(features), probe.predict(features))
        assert loaded.provenance == features.provenance
        assert loaded.metrics == probe.metrics
        saved = json.loads(probe.config.to_json_string())
        assert json.loads(loaded.config.to_json_string()) == saved

    def test_an_interrupted_training_ends_bit_for_bit_the_same(
        self, case: str, trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        features, _, undisturbed, expected = trained(case)
        log = MetricsLogger.log
        stop_at = min(1, len(expected.history) - 1)

        def interrupted(self: MetricsLogger, step: int, values: Any) -> None:
            if step == stop_at:
                raise KeyboardInterrupt
            log(self, step, values)

        monkeypatch.setattr(MetricsLogger, "log", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(make_probe(case, features), features, tmp_path / "resumed")
        monkeypatch.setattr(MetricsLogger, "log", log)
        assert train(make_probe(case, features), features, tmp_path / "resumed") == expected
        files = [folder / "model.safetensors" for folder in (undisturbed, tmp_path / "resumed")]
        assert files[0].read_bytes() == files[1].read_bytes()

    def test_the_pipeline_equals_extractor_and_head(
        self, case: str, trained: Any, extractors: Any, images: list[Image.Image]
    ) -> None:
        _, probe, folder, _ = trained(case)
        extractor = extractors[CASES[case]["pooling"]]
        extracted = (extractor if head_of(case) == "fusion" else extractor.only(LAYER, 25))(images[:2])
        given = dict(extracted) if head_of(case) == "fusion" else next(iter(extracted.values()))
        with torch.no_grad():
            expected = probe(features=given).logits.softmax(1)
        classify = pipeline("diffusion-probe", model=str(folder))
        for batch_size in (1, 2):
            for scores, answer in zip(expected, classify(images[:2], batch_size=batch_size), strict=True):
                by_label = {entry["label"]: entry["score"] for entry in answer}
                got = torch.tensor([by_label[name] for name in NAMES])
                torch.testing.assert_close(got, scores, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("problem_type", [name for name in TASKS if name])
    def test_problem_types(self, case: str, problem_type: str, stores: dict[str, FeatureStore], tmp_path: Path) -> None:
        features = features_of(case, stores).with_labels(labels_of(problem_type, 12))
        if problem_type not in HEAD_CLASSES[head_of(case)].problem_types:
            with pytest.raises(ValueError, match=f"The head prototype is for single_label.*got '{problem_type}'"):
                make_probe(case, features, problem_type=problem_type)
            return
        probe = make_probe(case, features, problem_type=problem_type)
        result = train(probe, features, tmp_path, validation=features)
        names = {
            "single_label_classification": {"accuracy"},
            "multi_label_classification": {"mean_average_precision", "macro_f1"},
            "regression": {"r2", "mse"},
        }
        assert set(result.validation.values) == names[problem_type]
        assert set(probe.metrics["validation"]) == names[problem_type] | {"rows"}
        loaded = DiffusionProbe.from_pretrained(tmp_path)
        assert loaded.config.problem_type == problem_type
        assert torch.equal(loaded.predict(features), probe.predict(features))

    def test_initialisation_depends_on_init_seed_alone(self, case: str, stores: dict[str, FeatureStore]) -> None:
        features, states = features_of(case, stores), []
        with torch.random.fork_rng(devices=[]):
            for seed in (1, 2):
                torch.manual_seed(seed)
                states.append(make_probe(case, features).state_dict())
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], value) for name, value in states[1].items())

    def test_features_of_another_shape_are_refused(self, case: str, stores: dict[str, FeatureStore]) -> None:
        features = features_of(case, stores)
        probe = make_probe(case, features)
        wrong: list[Any] = [
            torch.zeros(2, 3),
            torch.zeros(4),
            torch.zeros(2, 3, 4, 4),
            {"up_ft1@25": torch.zeros(2, 3)},
        ]
        for given in wrong:
            with pytest.raises(ValueError, match=rf"An? {head_of(case)} probe takes"):
                probe(features=given)

    def test_on_the_meta_device(self, case: str, stores: dict[str, FeatureStore]) -> None:
        probe = make_probe(case, features_of(case, stores))
        with torch.device("meta"):
            empty = DiffusionProbe(probe.config)
        shapes = {name: (value.shape, value.dtype) for name, value in probe.state_dict().items()}
        assert {name: (value.shape, value.dtype) for name, value in empty.state_dict().items()} == shapes

    def test_features_of_another_extraction_are_refused(
        self, case: str, stores: dict[str, FeatureStore], tmp_path: Path
    ) -> None:
        features = features_of(case, stores)
        probe = make_probe(case, features)
        probe.provenance = dataclasses.replace(features.provenance, prompt="a photo")
        with pytest.raises(ValueError, match="differ in prompt"):
            train(probe, features, tmp_path)


EXPLAINED = [case for case in CASES if HEAD_CLASSES[head_of(case)].explains]


class TestExplain:
    @pytest.fixture(params=EXPLAINED)
    def case(self, request: pytest.FixtureRequest) -> str:
        return request.param

    def test_heat_maps_and_rest_are_the_logits(self, case: str, trained: Any) -> None:
        features, probe, _, _ = trained(case)
        given = first(features, 5)
        probe.train()
        output = probe.explain(given)
        assert probe.training, "explain leaves the mode as it was"
        probe.eval()
        with torch.no_grad():
            logits = probe(features=given).logits
        torch.testing.assert_close(output.logits, logits)
        if given.ndim == 2:
            assert output.heat_maps is None
            torch.testing.assert_close(probe.contributions(given).sum(2) + output.rest, logits)
            return
        assert output.heat_maps.shape[:2] == (5, 3)
        assert output.heat_maps.ndim == 4
        torch.testing.assert_close(output.heat_maps.sum((2, 3)) + output.rest, logits, atol=1e-5, rtol=1e-4)
        if output.heat_maps[0, 0].numel() > 1:  # diff-c has shrunk 4 × 4 positions to one
            assert output.heat_maps.flatten(2).std(2).gt(0).any(), "positions differ"

    def test_what_the_pipeline_answers(
        self, case: str, trained: Any, extractors: Any, images: list[Image.Image]
    ) -> None:
        _, probe, folder, _ = trained(case)
        given = next(iter(extractors[CASES[case]["pooling"]].only(LAYER, 25)(images[:3]).values()))
        expected = probe.explain(given)
        classify = pipeline("diffusion-probe", model=str(folder))
        plain = classify(images[:3])
        for batch_size in (1, 3):
            for i, answer in enumerate(classify(images[:3], explain=True, batch_size=batch_size)):
                assert [entry["label"] for entry in answer] == [entry["label"] for entry in plain[i]]
                for entry in answer:
                    number = NAMES.index(entry["label"])
                    assert entry["logit"] == pytest.approx(expected.logits[i, number].item(), abs=1e-5, rel=1e-4)
                    assert entry["rest"] == pytest.approx(expected.rest[i, number].item(), abs=1e-5, rel=1e-4)
                    if expected.heat_maps is None:
                        assert "heat_map" not in entry
                    else:
                        torch.testing.assert_close(
                            entry["heat_map"], expected.heat_maps[i, number], atol=1e-5, rtol=1e-4
                        )
                    assert ("contributions" in entry) == (head_of(case) == "sae")
        assert all(set(entry) == {"label", "score"} for entry in plain[0])


def test_the_mean_of_latents_over_positions_is_explained_too(stores: dict[str, FeatureStore]) -> None:
    features = features_of("sae-tokens", stores)
    probe = make_probe("sae-tokens", features, latent_pooling="mean")
    torch.nn.init.normal_(probe.head.classifier.weight, generator=torch.Generator().manual_seed(0))
    output = probe.explain(first(features, 4))
    torch.testing.assert_close(output.heat_maps.sum((2, 3)) + output.rest, output.logits, atol=1e-5, rtol=1e-4)


def test_a_heat_map_shows_the_position_that_decided(labelled: Any) -> None:
    """Only one position of an image has features that are not those of the mean image."""
    for head in ("attention", "sae", "diff-c"):
        position = 5
        tokens = torch.zeros(1, 16, 6)
        tokens[0, position] = 4.0
        if head == "sae":
            sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=6, num_latents=12, k=2))
            probe = DiffusionProbe.from_sae(sae, num_labels=2)
        else:
            config = DiffusionProbeConfig(d_in=6, head=head, width=8, num_attention_heads=2, num_labels=2)
            probe = DiffusionProbe(config)
        torch.nn.init.normal_(probe.head.classifier.weight, generator=torch.Generator().manual_seed(0))
        maps = probe.explain(tokens).heat_maps[0]
        if head == "diff-c":
            assert maps.shape == (2, 1, 1)  # 4 × 4 positions, halved three times and rounded up: see TestDiffCHeatMaps
            continue
        others = maps.flatten(1)[:, [i for i in range(16) if i != position]]
        spread = (others - others.mean(1, keepdim=True)).abs().amax(1)
        assert ((maps.flatten(1)[:, position] - others.mean(1)).abs() > 10 * spread + 1e-4).all(), head


class TestDiffCHeatMaps:
    """Three convolutions of stride 2: position (p, q) of the map sees the features from 8p − 8 to 8p + 8, 8q − 8 to
    8q + 8.
    """

    @pytest.fixture
    def probe(self) -> DiffusionProbe:
        return DiffusionProbe(DiffusionProbeConfig(d_in=6, head="diff-c", width=32, num_labels=2)).eval()

    @staticmethod
    def with_content(height: int, width: int, p: int, q: int) -> Tensor:
        """Zeros but for 4 × 4 in the corner that (p, q) names: 0 is the upper or left end, -1 the lower or right."""
        image = torch.zeros(1, 6, height, width)
        rows, columns = (slice(0, 4) if end == 0 else slice(-4, None) for end in (p, q))
        image[:, :, rows, columns] = 4 * torch.randn(6, 4, 4, generator=torch.Generator().manual_seed(1))
        return image

    @pytest.mark.parametrize(("height", "width"), [(24, 40), (40, 24), (9, 17)])
    def test_maps_of_several_positions_and_rest_are_the_logits(
        self, probe: DiffusionProbe, height: int, width: int
    ) -> None:
        images = torch.randn(3, 6, height, width, generator=torch.Generator().manual_seed(2))
        output = probe.explain(images)
        assert output.heat_maps.shape == (3, 2, -(-height // 8), -(-width // 8))
        assert output.heat_maps.flatten(2).std(2).gt(0).all(), "positions differ"
        with torch.no_grad():
            logits = probe(features=images).logits
        torch.testing.assert_close(output.heat_maps.sum((2, 3)) + output.rest, logits, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("corner", [(0, 0), (0, -1), (-1, 0), (-1, -1)])
    @pytest.mark.parametrize(("height", "width"), [(24, 40), (40, 24), (32, 32)])
    def test_the_evidence_is_where_the_content_is(
        self, probe: DiffusionProbe, height: int, width: int, corner: tuple[int, int]
    ) -> None:
        p, q = corner
        with torch.no_grad():
            probe.head.classifier.weight.abs_()  # so that channels cannot cancel out
        image = self.with_content(height, width, p, q)
        given = [image]
        if height == width:  # the same as tokens, row by row
            given.append(image.flatten(2).transpose(1, 2))
        for features in given:
            maps = probe.explain(features).heat_maps[0]
            far = torch.ones(maps.shape[1:], dtype=torch.bool)
            rows, columns = (slice(0, 2) if end == 0 else slice(-2, None) for end in corner)
            far[rows, columns] = False
            assert maps[:, far].abs().max() < 1e-6, "positions that do not see the content say nothing of it"
            assert (maps[:, p, q] > 1e-2).all()


def test_positions_that_form_no_square_stay_a_row() -> None:
    probe = DiffusionProbe(DiffusionProbeConfig(d_in=6, head="attention", width=8, num_attention_heads=2, num_labels=2))
    output = probe.explain(torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0)))
    assert output.heat_maps.shape == (3, 2, 5)


@pytest.mark.parametrize("case", [case for case in CASES if case not in EXPLAINED])
def test_heads_that_explain_nothing_say_so(case: str, trained: Any, images: list[Image.Image]) -> None:
    features, probe, folder, _ = trained(case)
    with pytest.raises(ValueError, match=rf"explain is for the heads diff-c, attention, sae; .*is {head_of(case)}"):
        probe.explain(first(features, 2))
    if case == "linear":
        with pytest.raises(ValueError, match="explain is for the heads"):
            pipeline("diffusion-probe", model=str(folder))(images[0], explain=True)


def test_latents_have_the_names_of_the_saes_table() -> None:
    sae = KSparseAutoencoder.from_pretrained("tiny-sd-up1-t50")
    assert sae.latents is not None
    sae.latents = sae.latents.with_names({3: "stripes"})
    names = DiffusionProbe.from_sae(sae, num_labels=3).config.latent_names
    assert names == sae.latents.names()
    assert names["3"] == "stripes"
    assert DiffusionProbe.from_sae(sae, num_labels=3, latent_names={"1": "dots"}).config.latent_names == {"1": "dots"}


def test_of_positions_an_image_has_the_mean_of_their_logits(
    extractors: Any, images: list[Image.Image], tmp_path: Path
) -> None:
    """A head of rows that was trained on positions."""
    store = extractors["tokens"].extract(images, tmp_path / "store", progress=False)
    features = store.select(LAYER, 25).with_labels(torch.arange(len(images)) % 3)
    probe = DiffusionProbe(DiffusionProbeConfig(d_in=features.d_in, num_labels=3))
    args = ProbeTrainingArguments(output_dir=str(tmp_path / "probe"))
    ProbeTrainer(probe, features, args).train(progress=False)
    classify = pipeline("diffusion-probe", model=str(tmp_path / "probe"), function_to_apply="none")
    expected = probe.predict(features).view(len(images), -1, 3).mean(1)
    for answer, logits in zip(classify(images[:4]), expected, strict=False):
        scores = {entry["label"]: entry["score"] for entry in answer}
        assert [scores[f"LABEL_{i}"] for i in range(3)] == pytest.approx(logits.tolist(), rel=1e-3, abs=1e-4)


def test_the_pipeline_says_which_latents_decided(
    trained: Any, extractors: Any, images: list[Image.Image], tmp_path: Path
) -> None:
    _, probe, folder, _ = trained("sae-tokens")
    tokens = extractors["tokens"].only(LAYER, 25)(images[:1])[LAYER, 25]
    with torch.no_grad():
        expected, acts = probe.contributions(tokens)[0], probe(features=tokens).latent_acts[0]
    best = int(expected[0].abs().argmax())
    assert expected[0, best] != 0
    loaded = DiffusionProbe.from_pretrained(folder)
    loaded.config.latent_names = {str(best): "stripes"}
    loaded.save_pretrained(tmp_path)
    classify = pipeline("diffusion-probe", model=str(tmp_path), explain=True)
    answer = {entry["label"]: entry for entry in classify(images[0])}["bag"]
    first_one = answer["contributions"][0]
    assert (first_one["latent"], first_one["name"]) == (best, "stripes")
    assert first_one["contribution"] == pytest.approx(expected[0, best].item(), rel=1e-4)
    assert first_one["activation"] == pytest.approx(acts[best].item(), rel=1e-4)
    assert len(answer["contributions"]) <= 5
    every = {entry["label"]: entry for entry in classify(images[0], top_latents=150)}["bag"]
    total = sum(entry["contribution"] for entry in every["contributions"]) + every["rest"]
    assert total == pytest.approx(every["logit"], rel=1e-4, abs=1e-5)
    sizes = [abs(entry["contribution"]) for entry in every["contributions"]]
    assert sizes == sorted(sizes, reverse=True)


def test_a_probe_on_several_timesteps_takes_no_other_one(trained: Any, images: list[Image.Image]) -> None:
    classify = pipeline("diffusion-probe", model=str(trained("fusion-mixing-pooled")[2]))
    with pytest.raises(ValueError, match=r"timestep=25 is not for this probe, whose inputs .* \[25, 100\]: leave"):
        classify(images[0], timestep=25)
    with pytest.raises(ValueError, match="differ in seed"):
        classify(images[0], seed=9)


def test_scores_of_several_labels_and_of_regression(
    stores: dict[str, FeatureStore], images: list[Image.Image], tmp_path: Path
) -> None:
    for problem_type in ("multi_label_classification", "regression"):
        features = features_of("linear", stores).with_labels(labels_of(problem_type, 12))
        probe = make_probe("linear", features, problem_type=problem_type)
        train(probe, features, tmp_path / problem_type, validation=features)
        answer = pipeline("diffusion-probe", model=str(tmp_path / problem_type))(images[0])
        with torch.no_grad():
            (logits,) = probe(pixel_values=probe.extractor.preprocess(images[0])).logits
        scores = logits.sigmoid() if problem_type == "multi_label_classification" else logits
        expected = dict(zip(NAMES, scores.tolist(), strict=True))
        assert {entry["label"]: entry["score"] for entry in answer} == pytest.approx(expected, abs=1e-5)
