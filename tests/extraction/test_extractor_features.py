"""Features against a naive reference, and what they may and may not depend on."""

import itertools

import numpy as np
import pytest
import torch
from datasets import Dataset, Image
from diffusers import DDPMScheduler

from diffusion_sae.extraction.images import image_id
from diffusion_sae.extraction.noise import seeded_noise
from diffusion_sae.extraction.pooling import pool

ATOL = 1e-5


@torch.no_grad()
def naive_activation(pipeline, image, module_path, t, *, prompt="", seed=0):
    """One image, the whole forward, a plain hook: the definition of an activation, written out."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    latents = pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
    noise = seeded_noise(tuple(latents.shape[1:]), seed=seed, image_id=image_id(pixels[0]), timestep=t)[None]
    noisy = DDPMScheduler.from_config(pipeline.scheduler.config).add_noise(latents, noise, torch.tensor([t]))
    is_unet = hasattr(pipeline, "unet")
    denoiser = pipeline.unet if is_unet else pipeline.transformer
    seen = []
    handle = denoiser.get_submodule(module_path).register_forward_hook(lambda _m, _a, output: seen.append(output))
    try:
        if is_unet:
            tokens = pipeline.tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt")
            denoiser(noisy, t, encoder_hidden_states=pipeline.text_encoder(tokens.input_ids)[0])
        else:
            label = pipeline.labels[prompt] if prompt else 1000
            denoiser(noisy, timestep=torch.tensor([t]), class_labels=torch.tensor([label]))
    finally:
        handle.remove()
    output = seen[0]
    return output if isinstance(output, torch.Tensor) else output[0]


UNET_LAYERS = {
    "down_ft0": "down_blocks.0",
    "down_ft3": "down_blocks.3",
    "bottleneck": "mid_block",
    "up_ft0": "up_blocks.0",
    "up_ft1": "up_blocks.1",
    "up_ft3": "up_blocks.3",
    "up_blocks.1.attentions.0": "up_blocks.1.attentions.0",
    "mid_block.attentions.0.transformer_blocks.0.attn1": "mid_block.attentions.0.transformer_blocks.0.attn1",
}
DIT_LAYERS = {"block0": "transformer_blocks.0", "block2": "transformer_blocks.2", "pos_embed": "pos_embed"}


@pytest.mark.parametrize("prompt", ["", "a photo of a shoe"])
def test_unet_features_equal_the_naive_reference(tiny_sd_pipeline, make_sd_extractor, images, prompt):
    timesteps = (0, 25, 999)
    extractor = make_sd_extractor(layers=tuple(UNET_LAYERS), timesteps=timesteps, prompt=prompt, seed=7)
    out = extractor(images[:3])
    assert set(out) == set(itertools.product(UNET_LAYERS, timesteps))
    for layer, t in out:
        for i in range(3):
            activation = naive_activation(tiny_sd_pipeline, images[i], UNET_LAYERS[layer], t, prompt=prompt, seed=7)
            expected = activation.mean((2, 3)) if activation.ndim == 4 else activation.mean(1)
            torch.testing.assert_close(out[layer, t][i : i + 1], expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("prompt", ["", "shoe"])
def test_dit_features_equal_the_naive_reference(tiny_dit_pipeline, make_dit_extractor, images, prompt):
    timesteps = (0, 100, 999)
    out = make_dit_extractor(layers=tuple(DIT_LAYERS), timesteps=timesteps, prompt=prompt, seed=1)(images[:3])
    for layer, t in itertools.product(DIT_LAYERS, timesteps):
        for i in range(3):
            activation = naive_activation(tiny_dit_pipeline, images[i], DIT_LAYERS[layer], t, prompt=prompt, seed=1)
            torch.testing.assert_close(out[layer, t][i : i + 1], activation.mean(1), atol=ATOL, rtol=0)


@pytest.mark.parametrize("layer", ["up_ft1", "mid_block.attentions.0.transformer_blocks.0.attn1"])
def test_poolings_agree_with_the_activation(tiny_sd_pipeline, make_sd_extractor, images, layer):
    features = {
        pooling: make_sd_extractor(layers=layer, pooling=pooling)(images[:4])[layer, 25]
        for pooling in ("none", "tokens", "mean", "max")
    }
    activation = features["none"]
    expected = naive_activation(tiny_sd_pipeline, images[2], UNET_LAYERS.get(layer, layer), 25)[0]
    torch.testing.assert_close(activation[2], expected, atol=ATOL, rtol=0)
    for i in range(4):
        # (C, h, w) -> (h·w, C), row-major
        rows = (
            activation[i].permute(1, 2, 0).reshape(-1, activation.shape[1]) if activation.ndim == 4 else activation[i]
        )
        torch.testing.assert_close(features["tokens"][i], rows, atol=ATOL, rtol=0)
        torch.testing.assert_close(features["mean"][i], rows.mean(0), atol=ATOL, rtol=0)
        torch.testing.assert_close(features["max"][i], rows.max(0).values, atol=ATOL, rtol=0)


def test_pooled_shapes(make_sd_extractor, make_dit_extractor, images):
    shapes = {
        (family, pooling): tuple(make(layers=layer, pooling=pooling)(images[:2])[layer, 25].shape)
        for family, make, layer in (("unet", make_sd_extractor, "up_ft1"), ("dit", make_dit_extractor, "block1"))
        for pooling in ("mean", "max", "tokens", "none")
    }
    assert shapes == {
        ("unet", "mean"): (2, 16),
        ("unet", "max"): (2, 16),
        ("unet", "tokens"): (2, 16, 16),
        ("unet", "none"): (2, 16, 4, 4),
        ("dit", "mean"): (2, 16),
        ("dit", "max"): (2, 16),
        ("dit", "tokens"): (2, 16, 16),
        ("dit", "none"): (2, 16, 16),
    }


def test_pool_by_hand():
    grid = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]], [[-1.0, -2.0], [-3.0, -4.0]]]])  # (1, 2, 2, 2)
    assert pool(grid, "mean").tolist() == [[3.0, -2.5]]
    assert pool(grid, "max").tolist() == [[6.0, -1.0]]
    assert pool(grid, "tokens").tolist() == [[[1.0, -1.0], [2.0, -2.0], [3.0, -3.0], [6.0, -4.0]]]
    assert pool(pool(grid, "tokens"), "mean").tolist() == [[3.0, -2.5]]


@pytest.mark.parametrize("family", ["unet", "dit"])
def test_features_do_not_depend_on_batch_or_order(make_sd_extractor, make_dit_extractor, images, family):
    make, layers = (make_sd_extractor, ("bottleneck", "up_ft2")) if family == "unet" else (make_dit_extractor, "block2")
    extractor = make(layers=layers, timesteps=(25, 700), pooling="none")
    whole = extractor(images)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(3)).tolist()
    shuffled = extractor([images[i] for i in order])
    for key in whole:
        alone = torch.cat([extractor(image)[key] for image in images])
        torch.testing.assert_close(alone, whole[key], atol=ATOL, rtol=0)
        torch.testing.assert_close(shuffled[key], whole[key][order], atol=ATOL, rtol=0)
    assert len(set(whole.image_ids)) == len(images)
    assert shuffled.image_ids == [whole.image_ids[i] for i in order]


def test_many_layers_and_timesteps_equal_single_calls(make_sd_extractor, images):
    layers, timesteps = ("up_ft2", "down_ft1", "bottleneck"), (500, 25)
    together = make_sd_extractor(layers=layers, timesteps=timesteps)(images[:4])
    assert list(together) == list(itertools.product(layers, timesteps))
    for layer, t in together:
        single = make_sd_extractor(layers=layer, timesteps=t)(images[:4])
        torch.testing.assert_close(together[layer, t], single[layer, t], atol=ATOL, rtol=0)


def test_one_image_in_every_form_gives_the_same_features(make_sd_extractor, images, tmp_path):
    image, path = images[5], tmp_path / "image.png"
    image.save(path)
    table = Dataset.from_dict({"image": [str(path)]}).cast_column("image", Image())
    encoded = table.cast_column("image", Image(decode=False))
    extractor = make_sd_extractor(layers="up_ft1")
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
    forms = {
        "PIL": image,
        "list": [image],
        "path": path,
        "string": str(path),
        "bytes": path.read_bytes(),
        "array": np.array(image),
        "tensor": tensor,
        "batch": tensor[None],
        "list of tensors": [tensor],
        "generator": (image for _ in range(1)),
        "datasets image": table[0]["image"],
        "datasets column": table["image"],
        "undecoded row": encoded[0]["image"],
        "undecoded bytes": {"bytes": path.read_bytes(), "path": None},
    }
    expected = extractor(image)
    for name, form in forms.items():
        out = extractor(form)
        assert out.image_ids == expected.image_ids, name
        torch.testing.assert_close(out["up_ft1", 25], expected["up_ft1", 25], atol=1e-6, rtol=0, msg=name)


def test_different_images_and_seeds_give_different_features(make_sd_extractor, images):
    features = make_sd_extractor(layers="up_ft1")(images)["up_ft1", 25]
    assert torch.pdist(features).min() > 1e-3
    other_seed = make_sd_extractor(layers="up_ft1", seed=1)(images)["up_ft1", 25]
    assert (features - other_seed).abs().amax(1).min() > 1e-3


def test_given_image_ids_draw_the_noise(make_sd_extractor, images):
    extractor = make_sd_extractor(layers="up_ft1", timesteps=500)
    default = extractor(images[:2])
    named = extractor(images[:2], image_ids=default.image_ids)
    assert torch.equal(default["up_ft1", 500], named["up_ft1", 500])
    swapped = extractor(images[:2], image_ids=default.image_ids[::-1])
    assert (default["up_ft1", 500] - swapped["up_ft1", 500]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="Got 2 images and 1 image_ids"):
        extractor(images[:2], image_ids=["only one"])


def test_prompt_changes_unet_features(make_sd_extractor, images):
    empty, bag, shoe = (
        make_sd_extractor(layers="bottleneck", prompt=prompt)(images[:2])["bottleneck", 25]
        for prompt in ("", "a photo of a bag", "a photo of a shoe")
    )
    assert (empty - bag).abs().max() > 1e-4
    assert (bag - shoe).abs().max() > 1e-4


def test_dit_prompt_is_a_class_name(make_dit_extractor, images):
    null, bag, shoe = (
        make_dit_extractor(layers="block2", prompt=prompt)(images[:2])["block2", 25] for prompt in ("", "bag", "shoe")
    )
    assert (null - bag).abs().max() > 1e-4
    assert (bag - shoe).abs().max() > 1e-4
    with pytest.raises(ValueError, match=r"prompt is a class name or number, got 'zebra': bag, dress, shoe"):
        make_dit_extractor(layers="block2", prompt="zebra")


def test_global_random_state_is_left_alone(make_sd_extractor, make_dit_extractor, images, tmp_path):
    torch.manual_seed(99)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    for make, layer in ((make_sd_extractor, "up_ft1"), (make_dit_extractor, "block1")):
        extractor = make(layers=layer)
        first = extractor(images[:2])[layer, 25]
        extractor.available_layers()
        extractor.extract(images[:3], tmp_path / layer, batch_size=2, progress=False)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(5)
        assert torch.equal(extractor(images[:2])[layer, 25], first)
        torch.manual_seed(99)
    assert np.random.get_state()[1].tolist() == numpy_before


def test_unknown_key_lists_what_was_extracted(make_sd_extractor, images):
    out = make_sd_extractor(layers="up_ft1", timesteps=(25, 100))(images[0])
    assert len(out) == 2
    with pytest.raises(KeyError, match=r"'up_ft1', 50.*was not extracted.*'up_ft1', 25"):
        out["up_ft1", 50]


def test_scale_and_shift_of_the_latents(make_sd_extractor, images):
    """(z − shift) · scale, as the families with a shift factor are trained."""
    extractor = make_sd_extractor()
    vae = extractor.backbone.latent_space.autoencoder
    pixel_values = extractor.preprocess(images[:2])
    assert pixel_values.shape == (2, 3, 32, 32)
    with torch.no_grad():
        mode = vae.encode(pixel_values).latent_dist.mode()
    torch.testing.assert_close(extractor.backbone.encode(pixel_values), mode * 4)
    vae.register_to_config(shift_factor=0.5)
    try:
        torch.testing.assert_close(extractor.backbone.encode(pixel_values), (mode - 0.5) * 4)
    finally:
        vae.register_to_config(shift_factor=None)
