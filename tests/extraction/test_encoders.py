"""Vision encoders of transformers as baselines, through the extractor's interface."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    SiglipConfig,
    ViTConfig,
)

from diffusion_sae import DiffusionFeatureExtractor
from diffusion_sae.extraction.layers import LayerInfo

VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
REGISTERED = {"num_register_tokens": 2}
SMALL = {key: value for key, value in VISION.items() if key != "intermediate_size"}
CONFIGS: dict[str, Any] = {
    "DINOv2": lambda: Dinov2Config(**SMALL),
    "DINOv2 with registers": lambda: Dinov2WithRegistersConfig(**SMALL, **REGISTERED),
    "DINOv3": lambda: DINOv3ViTConfig(**VISION, **REGISTERED),
    "ViT": lambda: ViTConfig(**VISION),
    "CLIP": lambda: CLIPConfig(text_config=TEXT, vision_config=VISION),
    "SigLIP": lambda: SiglipConfig(text_config=TEXT, vision_config=VISION),
}
SETTINGS = {"layers": ("block1", "block2"), "timesteps": (0,), "device": "cpu"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each as `save_pretrained` leaves it, with the image processor of its kind."""
    root = tmp_path_factory.mktemp("encoders")
    for name, config in CONFIGS.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            AutoModel.from_config(config()).save_pretrained(root / name)
        CLIPImageProcessorPil(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]).save_pretrained(root / name)
    return {name: root / name for name in CONFIGS}


@pytest.mark.parametrize("name", CONFIGS)
def test_features_are_the_models_own_hidden_states(folders, images, name):
    extractor = DiffusionFeatureExtractor.from_pretrained(folders[name], pooling="tokens", **SETTINGS)
    out = extractor(images[:2])
    model = AutoModel.from_pretrained(folders[name])
    vision = getattr(model, "vision_model", model).eval()
    pixels = (extractor.preprocess(images[:2]) + 1) / 2
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]))
    with torch.no_grad():
        states = vision(pixel_values=(pixels - mean) / std, output_hidden_states=True).hidden_states
    for layer, expected in (("block1", states[2]), ("block2", states[3])):
        assert tuple(out[layer, 0].shape) == (2, 16, 16)
        if layer == "block1":  # the last one is normalised in some models' own list
            torch.testing.assert_close(out[layer, 0], expected[:, -16:], atol=1e-5, rtol=1e-5)
    assert extractor.available_layers()[1] == LayerInfo(
        "block1", extractor.available_layers()[1].module_path, 16, 8, "encoder"
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_stores_and_provenance(folders, image_folder, tmp_path, name):
    extractor = DiffusionFeatureExtractor.from_pretrained(folders[name], **SETTINGS)
    store = extractor.extract(image_folder, tmp_path / "store", progress=False)
    features = store.select("block2", 0)
    assert (len(features), features.d_in) == (12, 16)
    assert store.provenance.weights == extractor.provenance.weights
    random = DiffusionFeatureExtractor.from_pretrained(folders[name], random_weights=True, **SETTINGS)
    assert random.provenance.weights != extractor.provenance.weights


def test_another_image_size_interpolates_the_positions(folders, images):
    for name in ("ViT", "CLIP", "DINOv2"):
        extractor = DiffusionFeatureExtractor.from_pretrained(
            folders[name], image_size=48, pooling="tokens", **SETTINGS
        )
        assert tuple(extractor(images[0])["block1", 0].shape) == (1, 36, 16)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"timesteps": (25,)}, "timesteps"),
        ({"prompt": "a shoe"}, "prompt"),
        ({"guidance": 2.0}, "guidance"),
        ({"ensemble": 2}, "ensemble"),
    ],
)
def test_what_an_encoder_has_no_use_for_is_refused(folders, settings, named):
    with pytest.raises(ValueError, match=rf"is a vision encoder: it sees the clean image.*got other {named}\."):
        DiffusionFeatureExtractor.from_pretrained(folders["ViT"], **SETTINGS | settings)


def test_sizes_that_do_not_fit(folders):
    with pytest.raises(ValueError, match=r"image_size must be a multiple of 8, got 30"):
        DiffusionFeatureExtractor.from_pretrained(folders["ViT"], image_size=30, **SETTINGS)
    with pytest.raises(ValueError, match=r"ViTModel has no layer 'bottleneck'.*block0, block1, block2"):
        DiffusionFeatureExtractor.from_pretrained(folders["ViT"], **SETTINGS | {"layers": "bottleneck"})
