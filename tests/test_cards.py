"""The embedded artifacts load, and hub_cards/ holds their cards as the packaged template renders them."""

from pathlib import Path

import pytest
import torch
from transformers import pipeline

from diffusion_sae import DiffusionFeatureExtractor, DiffusionProbe, KSparseAutoencoder
from diffusion_sae.extraction.sources import open_images
from diffusion_sae.hub.card import write_artifact_card
from diffusion_sae.zoo import embedded_artifacts, embedded_models, embedded_path

ROOT = Path(__file__).parents[1]
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
    assert (tmp_path / "README.md").read_text() == (ROOT / f"hub_cards/{name}.md").read_text()


def test_sae_takes_features_of_its_own_extractor() -> None:
    sae = KSparseAutoencoder.from_pretrained("tiny-sd-up1-t50")
    extractor = DiffusionFeatureExtractor.from_pretrained("tiny-sd-up1-t50")
    source = open_images("fashion-mnist-mini", "test")
    (features,) = extractor([source.read(i) for i in range(64)]).values()
    output = sae(features.flatten(0, 1))
    # its card says 0.10 on held-out rows
    assert abs(output.fvu.item() - sae.metrics["held_out"]["fvu"]) < 0.05
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
