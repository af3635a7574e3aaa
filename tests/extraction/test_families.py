"""Every family through the one adapter: its layers, its image tokens, early exit, and independence of the batch."""

import copy
from functools import cache
from typing import Any

import pytest
import torch

from diffusion_sae.extraction.backbone import DiffusionBackbone
from diffusion_sae.extraction.extractor import DiffusionFeatureExtractor
from diffusion_sae.extraction.hooks import ImageStream
from diffusion_sae.provenance import ExtractorConfig
from tiny_pipelines import BUILDERS, SIZE, build_seeded

# canonical name: (width, stride)
UNET = {
    "down_ft0": (8, 8),
    "down_ft1": (16, 16),
    "down_ft2": (16, 32),
    "down_ft3": (24, 32),
    "bottleneck": (24, 32),
    "up_ft0": (24, 16),
    "up_ft1": (16, 8),
    "up_ft2": (16, 4),
    "up_ft3": (8, 4),
}
SDXL = {
    "down_ft0": (8, 8),
    "down_ft1": (16, 16),
    "down_ft2": (24, 16),
    "bottleneck": (24, 16),
    "up_ft0": (24, 8),
    "up_ft1": (16, 4),
    "up_ft2": (8, 4),
}
LAYERS = {
    "Stable Diffusion 1.x": UNET,
    "Stable Diffusion 2.x (v-prediction)": UNET,
    "SDXL, SDXL-Turbo": SDXL,
    "Playground 2.5 (EDM)": SDXL,
    "DiT": {f"block{i}": (16, 8) for i in range(3)},
    "PixArt-α": {f"block{i}": (24, 8) for i in range(2)},
    "PixArt-Σ": {f"block{i}": (24, 8) for i in range(2)},
    "Stable Diffusion 3, 3.5": {f"block{i}": (16, 8) for i in range(3)},
    "Flux dev": {"block0": (32, 8), "block1": (32, 8), "single_block0": (32, 8), "single_block1": (32, 8)},
    "Flux schnell": {"block0": (32, 8), "block1": (32, 8), "single_block0": (32, 8), "single_block1": (32, 8)},
    "DDPM": {
        "down_ft0": (8, 2),
        "down_ft1": (16, 4),
        "down_ft2": (16, 4),
        "bottleneck": (16, 4),
        "up_ft0": (16, 2),
        "up_ft1": (16, 1),
        "up_ft2": (8, 1),
    },
    "Unconditional latent diffusion": {
        "down_ft0": (8, 4),
        "down_ft1": (16, 4),
        "bottleneck": (16, 4),
        "up_ft0": (16, 2),
        "up_ft1": (8, 2),
    },
    "Sana": {f"block{i}": (8, 2) for i in range(2)},
    "Lumina 2": {f"block{i}": (24, 16) for i in range(2)},
    "HunyuanDiT": {f"block{i}": (24, 16) for i in range(4)},
    "AuraFlow": {"block0": (32, 8), "single_block0": (32, 8)},
    "CogView 4": {f"block{i}": (16, 16) for i in range(2)},
    "Wan (one frame)": {f"block{i}": (24, 16) for i in range(2)},
    "Qwen-Image": {f"block{i}": (32, 8) for i in range(2)},
}
FLOW = (
    "Stable Diffusion 3, 3.5",
    "Flux dev",
    "Flux schnell",
    "Sana",
    "Lumina 2",
    "AuraFlow",
    "CogView 4",
    "Wan",
    "Qwen",
)
TIME = {"Flux dev": "t/1000", "Flux schnell": "t/1000", "AuraFlow": "t/1000", "Qwen-Image": "t/1000"}
UNCONDITIONAL = ("DDPM", "Unconditional latent diffusion")
families = pytest.mark.parametrize("family", BUILDERS)
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # numpy, in diffusers' constructors


@cache
def pipeline_of(family: str) -> Any:
    return build_seeded(BUILDERS[family])


def extractor_of(family: str, **settings: Any) -> DiffusionFeatureExtractor:
    config = ExtractorConfig(**{"model": "tiny", "layers": tuple(LAYERS[family]), "image_size": SIZE} | settings)
    return DiffusionFeatureExtractor(pipeline_of(family), config)


def test_every_family_is_listed():
    assert set(LAYERS) == set(BUILDERS)


@families
def test_layer_table_is_what_a_forward_puts_out(family, images):
    extractor = extractor_of(family, pooling="none")
    infos = extractor.available_layers()
    assert {info.name: (info.channels, info.stride) for info in infos} == LAYERS[family]
    assert [info.name for info in infos] == list(LAYERS[family])  # in the order of the forward pass
    out = extractor(images[:2])
    for info in infos:
        side = SIZE // info.stride
        expected = (2, info.channels, side, side) if info.family == "unet" else (2, side * side, info.channels)
        assert tuple(out[info.name, 25].shape) == expected
        assert torch.isfinite(out[info.name, 25]).all()


@families
def test_features_do_not_depend_on_the_batch(family, images):
    extractor = extractor_of(family, timesteps=(25, 900))
    together, alone = extractor(images[:3]), extractor(images[1])
    for key, features in together.items():
        scale = features.abs().max()
        torch.testing.assert_close(features[1] / scale, alone[key][0] / scale, atol=1e-5, rtol=0)
        assert (features[0] - features[1]).abs().max() > 1e-6 * scale


@families
def test_each_layer_alone_equals_all_in_one_pass_and_stops_early(family, images):
    everything = extractor_of(family)(images[:2])
    layers = list(LAYERS[family])
    for layer in (layers[0], layers[-1]):
        single = extractor_of(family, layers=layer)(images[:2])
        assert torch.equal(single[layer, 25], everything[layer, 25])
    extractor = extractor_of(family, layers=layers[0])
    later = extractor.backbone.denoiser.get_submodule(extractor.backbone.resolve(layers[1:2])[layers[1]])

    def fail(*_):
        raise AssertionError("a module after the last wanted layer was run")

    handle = later.register_forward_pre_hook(fail)
    try:
        extractor(images[0])
    finally:
        handle.remove()


@families
def test_what_the_denoiser_is_told(family):
    backbone = DiffusionBackbone(pipeline_of(family), image_size=SIZE)
    kind = "edm" if "EDM" in family else "flow" if family.startswith(FLOW) else "vp"
    assert backbone.schedule.kind == kind
    expected = "1 - t/1000" if family == "Lumina 2" else TIME.get(family, "t")
    assert backbone.conditioning("").time_form == expected


def test_edm_tells_a_quarter_of_the_logarithm_of_sigma(images):
    extractor = extractor_of("Playground 2.5 (EDM)", layers="bottleneck", timesteps=(500,))
    told = []
    handle = extractor.backbone.denoiser.time_proj.register_forward_pre_hook(lambda _, args: told.append(args[0]))
    extractor(images[0])
    handle.remove()
    assert told[0].item() == pytest.approx(extractor.backbone.schedule.scheduler_time(500), abs=1e-5)


def test_latents_normalised_by_channel(images):
    """(z − mean) · factor / std, as the pipeline undoes it before decoding."""
    extractor = extractor_of("Playground 2.5 (EDM)")
    vae = extractor.backbone.latent_space.autoencoder
    pixel_values = extractor.preprocess(images[:2])
    with torch.no_grad():
        mode = vae.encode(pixel_values).latent_dist.mode()
    mean, std = (torch.tensor(vae.config[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
    latents = extractor.backbone.encode(pixel_values)
    torch.testing.assert_close(latents * std / vae.config.scaling_factor + mean, mode, atol=1e-4, rtol=1e-4)


@families
def test_the_first_step_of_a_generation_is_replayed(family):
    """The pipeline's own first call of the denoiser, against ours at the same noisy latents and time."""
    pipeline = pipeline_of(family)
    backbone = DiffusionBackbone(pipeline, image_size=SIZE)
    conditioning = backbone.conditioning("")
    seen = {}

    def record(_module, args, kwargs, output):
        seen.setdefault("args", args)
        seen.setdefault("kwargs", kwargs)
        seen.setdefault("output", output[0] if isinstance(output, tuple) else output.sample)

    from diffusion_sae.extraction.conditioning import _call_arguments

    arguments = _call_arguments(pipeline, backbone.denoiser, "", SIZE, None)
    scheduler = pipeline.scheduler
    pipeline.scheduler = copy.deepcopy(scheduler)
    handle = backbone.denoiser.register_forward_hook(record, with_kwargs=True)
    try:
        pipeline(**arguments | {"num_inference_steps": 3})
    finally:
        handle.remove()
        pipeline.scheduler = scheduler
    sample = seen["args"][0] if seen["args"] else seen["kwargs"][conditioning.sample_name]
    told = seen["kwargs"].get(conditioning.time_name)
    told = seen["args"][1] if told is None else told
    given = {**conditioning.batch(1), conditioning.sample_name: sample, conditioning.time_name: told}
    with torch.no_grad():
        torch.testing.assert_close(backbone.denoiser(**given, return_dict=False)[0], seen["output"])


@pytest.mark.parametrize("family", [name for name in BUILDERS if name not in (*UNCONDITIONAL, "DiT")])
def test_prompts_an_image_equal_one_prompt_at_a_time(family, images):
    layer = list(LAYERS[family])[-1]
    mixed = extractor_of(family, layers=layer, prompt_from="image")
    prompts = ["a red shoe", "bag", "a red shoe"]
    out = mixed(images[:3], prompts=prompts)[layer, 25]
    scale = out.abs().max()
    for i, prompt in enumerate(prompts):
        alone = extractor_of(family, layers=layer, prompt=prompt)(images[i])[layer, 25][0]
        torch.testing.assert_close(out[i] / scale, alone / scale, atol=1e-5, rtol=0)
    empty = extractor_of(family, layers=layer)(images[0])[layer, 25][0]
    assert (out[0] - empty).abs().max() > 1e-6 * scale


@pytest.mark.parametrize("family", UNCONDITIONAL)
def test_unconditional_models_refuse_a_prompt(family):
    with pytest.raises(ValueError, match=r"Pipeline takes no prompt, got 'a shoe'. Leave it empty"):
        extractor_of(family, prompt="a shoe")


def test_guidance_is_an_input_of_distilled_models_alone(images):
    weak, strong = (extractor_of("Flux dev", layers="block1", guidance=g)(images[0])["block1", 25] for g in (1.0, 7.0))
    assert not torch.equal(weak, strong)
    for family in ("Flux schnell", "Stable Diffusion 3, 3.5"):
        with pytest.raises(ValueError, match=r"takes no guidance embedding; leave guidance unset"):
            extractor_of(family, guidance=3.5)


@pytest.mark.parametrize(
    ("family", "path"),
    [
        ("Stable Diffusion 1.x", "down_blocks.1.attentions.0.transformer_blocks.0.attn1"),
        ("Stable Diffusion 1.x", "down_blocks.1.attentions.0.transformer_blocks.0.attn2"),
        ("SDXL, SDXL-Turbo", "up_blocks.0.attentions.0.transformer_blocks.1.ff"),
        ("DiT", "transformer_blocks.1.attn1"),
        ("PixArt-α", "transformer_blocks.1.attn2"),
        ("Stable Diffusion 3, 3.5", "transformer_blocks.1.attn"),
        ("Stable Diffusion 3, 3.5", "transformer_blocks.0.ff"),
        ("Flux dev", "transformer_blocks.1.attn"),
        ("Flux dev", "single_transformer_blocks.1.attn"),
        ("Qwen-Image", "transformer_blocks.1.attn"),
        ("Wan (one frame)", "blocks.1.attn2"),
    ],
)
def test_attention_and_mlp_outputs(family, path, images):
    extractor = extractor_of(family, layers=path, pooling="tokens")
    (info,) = extractor.layer_infos()
    features = extractor(images[:2])[path, 25]
    assert tuple(features.shape) == (2, (SIZE // info.stride) ** 2, info.channels)
    assert features.std() > 0


@pytest.mark.parametrize(
    ("family", "layer"),
    [
        ("SDXL, SDXL-Turbo", "up_blocks.0.attentions.1"),
        ("SDXL, SDXL-Turbo", "bottleneck"),
        ("DiT", "block1"),
        ("Stable Diffusion 3, 3.5", "block1"),
        ("Flux dev", "block1"),
        ("Flux dev", "single_block0"),
        ("Lumina 2", "block1"),
    ],
)
def test_difference_is_output_minus_input(family, layer, images):
    """For transformers the input of a block is the output of the one before."""
    named = f"{layer}:diff"
    extractor = extractor_of(family, layers=(layer, named), pooling="none")
    backbone = extractor.backbone
    path = backbone.resolve((layer,))[layer]
    entered = {}

    def record(_module, args, kwargs):
        entered["x"] = backbone.stream(args[0] if args else kwargs["hidden_states"], layer).clone()

    handle = backbone.denoiser.get_submodule(path).register_forward_pre_hook(record, with_kwargs=True)
    out = extractor(images[:2])
    handle.remove()
    torch.testing.assert_close(out[named, 25], out[layer, 25] - entered["x"])
    assert out[named, 25].abs().max() > 0


def test_a_difference_needs_equal_shapes(images):
    extractor = extractor_of("Stable Diffusion 1.x", layers="up_ft1:diff")
    with pytest.raises(ValueError, match=r"Layer up_ft1:diff takes \(1, 24, 2, 2\) and puts out \(1, 16, 4, 4\)"):
        extractor(images[0])


def test_image_stream_by_the_number_of_tokens():
    image, text = torch.ones(1, 16, 4), torch.zeros(1, 7, 4)
    for pair in ((image, text), (text, image)):
        assert ImageStream(16)(pair, "block0") is image
    both = torch.cat([text, image], dim=1)
    assert torch.equal(ImageStream(16, "first")(both, "block0"), image)
    assert torch.equal(ImageStream(16, "last")(torch.cat([image, text], dim=1), "block0"), image)
    with pytest.raises(
        ValueError, match=r"block0 puts out 23 tokens, text and 16 of the image.*add the denoiser to FAM"
    ):
        ImageStream(16)(both, "block0")
    with pytest.raises(ValueError, match=r"block0 puts out 2 streams of 16 tokens.*Choose another image_size"):
        ImageStream(16)((image, image), "block0")
    with pytest.raises(ValueError, match=r"context_embedder works on 7 tokens where the image has 16"):
        ImageStream(16)(text, "context_embedder")


def test_a_pipeline_whose_denoiser_takes_more_than_noisy_latents(images):
    """An inpainting U-Net has nine channels: noisy latents, mask, masked image."""
    from tiny_pipelines import build_sd

    pipeline = build_seeded(lambda: build_sd(in_channels=9))
    with pytest.raises(
        ValueError, match=r"gives its denoiser \(9, 8, 8\) an image, this library would give it \(4, 8, 8\)"
    ):
        DiffusionFeatureExtractor(pipeline, ExtractorConfig(model="inpainting"))(images[0])
