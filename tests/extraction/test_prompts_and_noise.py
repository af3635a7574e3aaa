"""Which prompt an image gets, the noise modes, and pairs with the empty prompt."""

from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel

from diffusion_sae import DiffusionFeatureExtractor
from diffusion_sae.extraction.loading import Placement
from diffusion_sae.extraction.noise import seeded_noise
from diffusion_sae.extraction.prompts import PromptSource
from diffusion_sae.provenance import ExtractorConfig

CHOICES = ("a red thing", "a blue thing", "shoe")


def test_one_prompt_for_all(make_sd_extractor, images):
    extractor = make_sd_extractor(layers="up_ft1", prompt="a shoe")
    assert extractor.prompts(extractor.preprocess(images[:2])) == "a shoe"
    with pytest.raises(ValueError, match=r"prompts were given, but prompt_from='config' does not take them"):
        extractor(images[:2], prompts=["a", "b"])


def test_class_template(make_sd_extractor, images):
    template = make_sd_extractor(layers="up_ft1", prompt="a photo of a {}", prompt_from="class")
    out = template(images[:3], prompts=["shoe", "bag", "shoe"])["up_ft1", 25]
    for i, name in enumerate(["shoe", "bag", "shoe"]):
        alone = make_sd_extractor(layers="up_ft1", prompt=f"a photo of a {name}")(images[i])["up_ft1", 25]
        torch.testing.assert_close(out[i : i + 1], alone, atol=1e-5, rtol=0)
    with pytest.raises(
        ValueError, match=r"prompt_from='class' needs a class name for each image: 2 images, prompts: no"
    ):
        template(images[:2])


def test_a_text_an_image(make_sd_extractor, images):
    extractor = make_sd_extractor(layers="up_ft1", prompt_from="image")
    with pytest.raises(ValueError, match=r"needs a prompt for each image: 2 images, prompts: 1"):
        extractor(images[:2], prompts=["one"])


def test_dit_takes_class_names_an_image(make_dit_extractor, images):
    mixed = make_dit_extractor(layers="block2", prompt_from="image")(images[:2], prompts=["bag", ""])["block2", 25]
    for i, prompt in enumerate(["bag", ""]):
        alone = make_dit_extractor(layers="block2", prompt=prompt)(images[i])["block2", 25][0]
        torch.testing.assert_close(mixed[i], alone, atol=1e-5, rtol=0)
    numbered = make_dit_extractor(layers="block2", prompt="0")(images[0])["block2", 25]
    assert torch.equal(numbered, make_dit_extractor(layers="block2", prompt="bag")(images[0])["block2", 25])


def test_the_choice_is_what_clip_itself_scores_highest(clip_folder, images):
    """Against CLIPModel's own `logits_per_image`."""
    from transformers import AutoTokenizer

    config = ExtractorConfig(prompt_from="clip", prompt_choices=CHOICES, clip_model=str(clip_folder))
    source = PromptSource(config, torch.device("cpu"))
    pictures = [*images, Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), "blue")]
    pixel_values = torch.stack(
        [torch.tensor(list(p.tobytes())).view(32, 32, 3).permute(2, 0, 1) / 127.5 - 1 for p in pictures]
    )
    model = CLIPModel.from_pretrained(clip_folder).eval()
    text = AutoTokenizer.from_pretrained(clip_folder)(list(CHOICES), padding=True, return_tensors="pt")
    pixels = CLIPImageProcessorPil.from_pretrained(clip_folder)(pictures, return_tensors="pt").pixel_values
    with torch.no_grad():
        logits = model(pixel_values=pixels, **text).logits_per_image
    chosen = source(pixel_values)
    assert chosen == [CHOICES[i] for i in logits.argmax(1).tolist()]
    assert len(set(chosen)) > 1
    cosines = source._scores(pixel_values)
    torch.testing.assert_close(cosines * model.logit_scale.exp(), logits, atol=1e-4, rtol=1e-4)


def test_clip_prompts_reach_the_features(make_sd_extractor, clip_folder, images):
    extractor = make_sd_extractor(
        layers="up_ft1", prompt_from="clip", prompt_choices=CHOICES, clip_model=str(clip_folder)
    )
    out = extractor(images[:4])["up_ft1", 25]
    for i, prompt in enumerate(extractor.prompts(extractor.preprocess(images[:4]))):
        alone = make_sd_extractor(layers="up_ft1", prompt=prompt)(images[i])["up_ft1", 25][0]
        torch.testing.assert_close(out[i], alone, atol=1e-5, rtol=0)


def test_the_text_encoder_runs_once_a_prompt(tiny_sd_pipeline, make_sd_extractor, images):
    calls = []
    handle = tiny_sd_pipeline.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    extractor = make_sd_extractor(layers="bottleneck", timesteps=(25, 100), prompt_from="image")
    for _ in range(3):
        extractor(images[:3], prompts=["bag", "shoe", "bag"])
    handle.remove()
    assert len(calls) == 2


def test_many_texts_do_not_fill_the_memory(make_sd_extractor, images, monkeypatch):
    monkeypatch.setattr("diffusion_sae.extraction.backbone.MAX_PROMPTS", 3)
    extractor = make_sd_extractor(layers="bottleneck", prompt_from="image")
    prompts = [f"bag {i}" for i in range(5)]
    out = extractor(images[:5], prompts=prompts)["bottleneck", 25]
    assert list(extractor.backbone._conditionings) == prompts[2:]
    alone = make_sd_extractor(layers="bottleneck", prompt=prompts[0])(images[0])["bottleneck", 25][0]
    torch.testing.assert_close(out[0], alone, atol=1e-5, rtol=0)


def test_without_noise_the_denoiser_sees_the_latents(make_sd_extractor, images):
    extractor = make_sd_extractor(layers="up_ft1", noise="none", timesteps=(0, 500), pooling="none")
    seen = []
    handle = extractor.backbone.denoiser.conv_in.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    out = extractor(images[:2])
    handle.remove()
    latents = extractor.backbone.encode(extractor.preprocess(images[:2]))
    assert [torch.equal(sample, latents) for sample in seen] == [True, True]
    assert not torch.equal(out["up_ft1", 0], out["up_ft1", 500])  # the time is told all the same
    other = make_sd_extractor(layers="up_ft1", noise="none", timesteps=(0, 500), pooling="none", seed=7)
    assert torch.equal(other(images[:2])["up_ft1", 0], out["up_ft1", 0])


def test_an_ensemble_is_the_mean_over_its_draws(make_sd_extractor, images):
    extractor = make_sd_extractor(layers="up_ft1", ensemble=3, pooling="none", timesteps=100)
    backbone = extractor.backbone
    pixel_values = extractor.preprocess(images[:2])
    ids = extractor(images[:2]).image_ids
    latents = backbone.encode(pixel_values)
    draws = []
    for member in range(3):
        noise = torch.stack([seeded_noise((4, 8, 8), seed=0, image_id=i, timestep=100, member=member) for i in ids])
        signal, sigma = backbone.schedule.level(100)
        draws.append(backbone.activations(signal * latents + sigma * noise, 100, {"up_ft1": "up_blocks.1"})["up_ft1"])
    torch.testing.assert_close(extractor(images[:2])["up_ft1", 100], torch.stack(draws).mean(0), atol=1e-6, rtol=1e-5)
    single = make_sd_extractor(layers="up_ft1", pooling="none", timesteps=100)(images[:2])["up_ft1", 100]
    torch.testing.assert_close(single, draws[0])
    assert (draws[0] - draws[1]).abs().max() > 1e-3


def test_an_ensemble_comes_nearer_to_the_mean_over_the_noise(make_sd_extractor, images):
    """The spread over seeds falls as 1/√n."""

    def spread(ensemble: int) -> float:
        runs = [
            make_sd_extractor(layers="up_ft1", ensemble=ensemble, seed=seed, timesteps=500)(images[:4])["up_ft1", 500]
            for seed in range(6)
        ]
        return torch.stack(runs).std(0).mean().item()

    assert spread(8) < 0.6 * spread(1)


@pytest.mark.parametrize("pooling", ["mean", "tokens", "none"])
def test_a_pair_is_both_side_by_side(make_sd_extractor, make_dit_extractor, images, pooling):
    for make, layer, axis in ((make_sd_extractor, "up_ft1", 1), (make_dit_extractor, "block1", 2)):
        settings: dict[str, Any] = {"layers": layer, "pooling": pooling}
        pair = make(prompt="shoe", classifier_free_pair=True, **settings)(images[:2])[layer, 25]
        both = [make(prompt=prompt, **settings)(images[:2])[layer, 25] for prompt in ("", "shoe")]
        dim = axis if pooling == "none" else -1
        torch.testing.assert_close(pair, torch.cat(both, dim=dim), atol=1e-6, rtol=0)


def test_crop_and_resampling(make_sd_extractor):
    wide = Image.new("RGB", (64, 32), "black")
    wide.paste("white", (0, 0, 16, 32))  # cut away by the centre crop
    centre = make_sd_extractor().preprocess(wide)
    whole = make_sd_extractor(crop="none").preprocess(wide)
    assert (centre == -1).all()
    assert (whole[0, 0, :, 0] == 1).all()
    nearest = make_sd_extractor(crop="none", resample="nearest").preprocess(wide)
    assert set(nearest.unique().tolist()) == {-1.0, 1.0}
    assert not torch.equal(whole, nearest)


def test_placement_goes_to_diffusers_own_switches(tiny_sd_folder):
    extractor = DiffusionFeatureExtractor.from_pretrained(
        tiny_sd_folder, device="cpu", vae_tiling=True, vae_slicing=True, attention_backend="native"
    )
    vae = extractor.backbone.latent_space.autoencoder
    assert (vae.use_tiling, vae.use_slicing) == (True, True)
    with pytest.raises(ValueError, match=r"offload must be one of None, 'model', 'sequential', got 'disk'"):
        Placement(offload="disk")
    with pytest.raises(ValueError, match=r"device_map and offload exclude each other"):
        Placement(device_map="balanced", offload="model")
    with pytest.raises(ValueError, match=r"device_map decides the devices itself; leave out device"):
        Placement(device_map="balanced", device="cpu")


def test_slicing_and_attention_backends_do_not_change_features(tiny_sd_folder, images):
    plain = DiffusionFeatureExtractor.from_pretrained(tiny_sd_folder, layers="up_ft1", device="cpu")
    placed = DiffusionFeatureExtractor.from_pretrained(
        tiny_sd_folder, layers="up_ft1", device="cpu", vae_slicing=True, attention_backend="_native_math"
    )
    expected = plain(images[:3])["up_ft1", 25]
    torch.testing.assert_close(placed(images[:3])["up_ft1", 25], expected, atol=1e-5, rtol=0)
    assert placed.provenance.fingerprint == plain.provenance.fingerprint


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.06), ("float16", 0.01)])
def test_half_precision(tiny_sd_folder, images, dtype, tolerance):
    """Every family's arithmetic in half precision stays near fp32's; bf16 has 8 bits, fp16 11."""
    full = DiffusionFeatureExtractor.from_pretrained(tiny_sd_folder, layers="up_ft1", device="cpu")
    half = DiffusionFeatureExtractor.from_pretrained(tiny_sd_folder, layers="up_ft1", device="cpu", dtype=dtype)
    expected, got = full(images[:3])["up_ft1", 25], half(images[:3])["up_ft1", 25]
    assert got.dtype == getattr(torch, dtype)
    assert (got.float() - expected).norm() < tolerance * expected.norm()
