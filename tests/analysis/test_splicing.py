"""The denoising loss with something else in place of a layer's activations."""

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from diffusion_sae import DiffusionFeatureExtractor, KSparseAutoencoder, KSparseAutoencoderConfig
from diffusion_sae.analysis.metrics.splicing import Splicing, SplicingLosses, loss_recovered, splicing_losses
from diffusion_sae.extraction.denoising import Denoising
from diffusion_sae.extraction.noise import seeded_noise
from diffusion_sae.extraction.sources import open_images
from diffusion_sae.provenance import ExtractorConfig, ProvenanceMismatchError
from tiny_pipelines import BUILDERS, SIZE, build_seeded

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # numpy, in diffusers' constructors

LAYERS = {
    "Stable Diffusion 1.x": ("down_ft1", "bottleneck", "up_ft1", "bottleneck:diff"),
    "Stable Diffusion 2.x (v-prediction)": ("up_ft1",),
    "SDXL, SDXL-Turbo": ("down_ft0", "up_ft0"),
    "Playground 2.5 (EDM)": ("bottleneck",),
    "DiT": ("block1", "block1:diff"),
    "Stable Diffusion 3, 3.5": ("block0", "block2"),
    "Flux schnell": ("block0", "single_block1"),
    "DDPM": ("up_ft1",),
    "Lumina 2": ("block1",),
}
CELLS = [(family, layer) for family, layers in LAYERS.items() for layer in layers]


@cache
def pipeline_of(family: str) -> Any:
    return build_seeded(BUILDERS[family])


def extractor_of(family: str, *layers: str, **settings: Any) -> DiffusionFeatureExtractor:
    given = {"model": "tiny", "layers": layers, "timesteps": (50, 400), "image_size": SIZE} | settings
    return DiffusionFeatureExtractor(pipeline_of(family), ExtractorConfig(**given))


class TestLossRecovered:
    def test_by_hand(self):
        """Means 1, 2 and 5: of the 4 that the ablation costs, 3 are recovered."""
        losses = [torch.tensor(values) for values in ([0.5, 1.5], [1.0, 3.0], [4.0, 6.0])]
        assert loss_recovered(*losses) == 0.75
        result = SplicingLosses(*losses, mean=torch.tensor([2.0, 4.0]))
        assert result.increase == 1
        assert (result.recovered_from_zero, result.recovered_from_mean) == (0.75, 0.5)
        assert result.summary()["zero"] == 5

    def test_bounds_and_scale(self):
        original, ablated = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 7.0])
        assert loss_recovered(original, original, ablated) == 1
        assert loss_recovered(original, ablated, ablated) == 0
        part = torch.tensor([2.0, 2.5])
        assert loss_recovered(original * 8, part * 8, ablated * 8) == loss_recovered(original, part, ablated)
        assert math.isnan(loss_recovered(original, part, original))


@pytest.mark.parametrize(("family", "layer"), CELLS)
def test_the_identity_changes_no_bit_and_zeros_are_zeros(family, layer, images):
    extractor = extractor_of(family, layer)
    splicing = Splicing(extractor, images[:3], batch_size=2)
    found = splicing.losses({"same": lambda rows, _: rows, "zero": lambda rows, _: torch.zeros_like(rows)})
    assert list(found) == [50, 400]
    for t in found:
        assert torch.equal(found[t]["same"], found[t]["original"])
        assert not torch.equal(found[t]["zero"], found[t]["original"])
        assert torch.isfinite(found[t]["original"]).all()


def losses_with_hook(extractor, images, module, hook):
    denoising = Denoising(extractor)
    batch = next(denoising.batches(open_images(images), len(images)))
    handle = module.register_forward_hook(hook)
    try:
        return {t: denoising.losses(batch, t) for t in extractor.config.timesteps}
    finally:
        handle.remove()


def test_zeros_are_those_of_a_hand_made_hook(images):
    """A U-Net's middle block and DiT's return a tensor, SD3's block text and image."""
    hooks = {
        ("Stable Diffusion 1.x", "bottleneck"): lambda module, args, output: torch.zeros_like(output),
        ("DiT", "block1"): lambda module, args, output: torch.zeros_like(output),
        ("Stable Diffusion 3, 3.5", "block0"): lambda module, args, output: (output[0], torch.zeros_like(output[1])),
    }
    for (family, layer), hook in hooks.items():
        extractor = extractor_of(family, layer)
        backbone = extractor.backbone
        module = backbone.denoiser.get_submodule(backbone.resolve([layer])[layer])
        by_hand = losses_with_hook(extractor, images[:3], module, hook)
        found = Splicing(extractor, images[:3]).losses({"zero": lambda rows, _: torch.zeros_like(rows)})
        for t in by_hand:
            assert torch.equal(found[t]["zero"], by_hand[t]), (family, layer)


def test_a_down_block_is_replaced_as_a_skip_connection_too(images):
    def hook(module, args, output):
        hidden, skips = output
        assert skips[-1] is hidden
        return torch.zeros_like(hidden), (*skips[:-1], torch.zeros_like(hidden))

    extractor = extractor_of("Stable Diffusion 1.x", "down_ft1")
    by_hand = losses_with_hook(extractor, images[:2], extractor.backbone.denoiser.down_blocks[1], hook)
    found = Splicing(extractor, images[:2]).losses({"zero": lambda rows, _: torch.zeros_like(rows)})
    for t in by_hand:
        assert torch.equal(found[t]["zero"], by_hand[t])


def test_the_hooks_are_gone_after_an_error(images):
    extractor = extractor_of("DiT", "block1")

    def fail(rows, t):
        raise RuntimeError("the replacement failed")

    with pytest.raises(RuntimeError, match="the replacement failed"):
        Splicing(extractor, images[:1]).losses({"x": fail})
    assert not any(module._forward_hooks for module in extractor.backbone.denoiser.modules())


def test_a_replacement_of_another_shape_is_refused(images):
    denoising = Denoising(extractor_of("DiT", "block1"))
    batch = next(denoising.batches(open_images(images[:1]), 1))
    message = r"puts out \(1, 16, 16\), its replacement \(1, 4, 16\)"
    with denoising.replaced("block1", lambda acts: acts[:, :4]), pytest.raises(ValueError, match=message):
        denoising.losses(batch, 50)


def test_the_loss_is_that_of_the_definition(images):
    """Of Stable Diffusion: mean of (ε_θ(√ᾱ z + √(1 − ᾱ) ε, t) − ε)², with the extractor's noise."""
    extractor = extractor_of("Stable Diffusion 1.x", "bottleneck", seed=3)
    denoising = Denoising(extractor)
    batch = next(denoising.batches(open_images(images[:2]), 2))
    pipeline = extractor.backbone.pipeline
    pixel_values = extractor.preprocess(images[:2])
    latents = pipeline.vae.encode(pixel_values).latent_dist.mode() * pipeline.vae.config.scaling_factor
    noise = torch.stack([seeded_noise(latents.shape[1:], seed=3, image_id=i, timestep=400) for i in batch.ids])
    alpha = pipeline.scheduler.alphas_cumprod[400]
    text = pipeline.encode_prompt("", "cpu", 1, False)[0].repeat(2, 1, 1)
    said = pipeline.unet(alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, 400, text).sample
    assert_close(denoising.losses(batch, 400), (said - noise).pow(2).mean((1, 2, 3)))


# one of each kind of target; the other families only show that their shapes fit
TARGETS = ("DiT", "Flux schnell", "Playground 2.5 (EDM)", "Stable Diffusion 2.x (v-prediction)")


@pytest.mark.parametrize(
    "family", [family if family in TARGETS else pytest.param(family, marks=pytest.mark.slow) for family in BUILDERS]
)
def test_a_perfect_denoiser_has_no_loss(family, images):
    """Target and prediction have one shape in every family, and the target leads back to z by the model's own rule."""
    extractor = extractor_of(family, next(iter(pipeline_layers(family))))
    denoising = Denoising(extractor)
    batch = next(denoising.batches(open_images(images[:2]), 2))
    losses = denoising.losses(batch, 400)
    assert losses.shape == (2,)
    backbone = extractor.backbone
    z, schedule = batch.latents.float(), backbone.schedule
    noise = torch.stack([seeded_noise(z.shape[1:], seed=0, image_id=i, timestep=400) for i in batch.ids])
    target = schedule.target(z, noise, 400)
    noisy = backbone.add_noise(batch.latents, batch.ids, seed=0, timestep=400)
    signal, sigma = schedule.level(400)
    if schedule.kind == "flow":
        back = noisy - sigma * target
    elif schedule.kind == "edm":
        level = backbone.pipeline.scheduler.sigmas[:-1].flip(0)[400]
        back = backbone.pipeline.scheduler.precondition_outputs(z + level * noise, target, level)
    elif schedule.config["prediction_type"] == "v_prediction":
        back = signal * noisy - sigma * target
        assert_close(
            target, backbone.pipeline.scheduler.get_velocity(z, noise, torch.tensor(400)), rtol=1e-4, atol=1e-4
        )
    else:
        back = (noisy - sigma * target) / signal
    assert_close(back, z, rtol=1e-3, atol=1e-3)


def pipeline_layers(family: str) -> list[str]:
    from diffusion_sae.extraction.backbone import DiffusionBackbone

    return [info.name for info in DiffusionBackbone(pipeline_of(family), image_size=SIZE).available_layers()]


def test_a_velocity_towards_the_data_is_turned():
    """Lumina 2's pipeline negates what its denoiser says: the target of the denoiser itself is z − ε."""
    extractor = extractor_of("Lumina 2", "block1")
    denoising = Denoising(extractor)
    batch = next(denoising.batches(open_images([torch.zeros(3, SIZE, SIZE)]), 1))
    noise = seeded_noise(batch.latents.shape[1:], seed=0, image_id=batch.ids[0], timestep=50)
    assert_close(denoising.target(batch, 50)[0], batch.latents[0] - noise)


class TestSplicingLosses:
    def test_the_embedded_sae_recovers_most_of_the_loss(self):
        name = "tiny-sd-up1-t50"
        extractor = DiffusionFeatureExtractor.from_pretrained(name, device="cpu")
        sae = KSparseAutoencoder.from_pretrained(name)
        images = open_images("fashion-mnist-mini", "test").first(24)
        result = splicing_losses(sae, extractor, images)[50].summary()
        assert result["original"] < result["spliced"] < result["mean"]
        assert result["spliced"] < result["zero"]
        assert result["recovered_from_zero"] > 0.8
        assert result["recovered_from_mean"] > 0.5

    def test_the_embedded_dit_needs_its_block(self):
        """Trained to say ε, of which a prediction of 0 is wrong by 1."""
        extractor = DiffusionFeatureExtractor.from_pretrained(
            "tiny-dit", layers=["block1"], timesteps=[400], device="cpu"
        )
        splicing = Splicing(extractor, open_images("fashion-mnist-mini", "test").first(8))
        found = splicing.losses({"same": lambda rows, _: rows, "zero": lambda rows, _: torch.zeros_like(rows)})[400]
        assert torch.equal(found["same"], found["original"])
        assert found["original"].mean() < 0.2 < 0.8 < found["zero"].mean()

    def test_any_batch_size_gives_the_same(self, images):
        extractor = extractor_of("Stable Diffusion 1.x", "up_ft1")
        sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=16, num_latents=64, k=4)).train()
        whole = splicing_losses(sae, extractor, images[:5], batch_size=5)
        parts = splicing_losses(sae, extractor, torch.cat([extractor.preprocess(i) for i in images[:5]]), batch_size=2)
        assert sae.training
        for t in (50, 400):
            for name in ("original", "spliced", "zero", "mean"):
                assert_close(getattr(whole[t], name), getattr(parts[t], name), rtol=1e-4, atol=1e-5)

    def test_an_sae_that_reconstructs_all_costs_nothing(self, images):
        """k = num_latents = 2 d_in with ± unit directions: x̂ = x."""
        extractor = extractor_of("DiT", "block1")
        sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=16, num_latents=32, k=32))
        with torch.no_grad():
            sae.W_dec.copy_(torch.cat([torch.eye(16), -torch.eye(16)]))
            sae.W_enc.copy_(sae.W_dec.T)
        result = splicing_losses(sae, extractor, images[:2], timesteps=[400])
        assert list(result) == [400]
        assert result[400].recovered_from_zero == pytest.approx(1, abs=1e-5)

    def test_the_mean_is_the_mean_over_images_and_positions(self, images):
        extractor = extractor_of("Stable Diffusion 1.x", "up_ft1", pooling="none")
        means = Splicing(extractor, images[:3], batch_size=2).means()
        out = extractor(images[:3])
        for t in (50, 400):
            assert_close(means[t], out["up_ft1", t].mean((0, 2, 3)), rtol=1e-4, atol=1e-5)

    def test_what_is_refused(self, images):
        sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=16, num_latents=64, k=4))
        extractor = extractor_of("DiT", "block0", "block1")
        with pytest.raises(ValueError, match="layer must be one of the extractor's, block0, block1; got None"):
            splicing_losses(sae, extractor, images)
        with pytest.raises(ValueError, match=r"timesteps must be of the extractor's, \(50, 400\); got \[51\]"):
            splicing_losses(sae, extractor, images, layer="block0", timesteps=[51])
        with pytest.raises(ValueError, match="one forward with noise; the extractor has other ensemble"):
            splicing_losses(sae, extractor_of("DiT", "block0", ensemble=2), images)
        sae.provenance = extractor.provenance.select("block1", (50, 400))
        with pytest.raises(ProvenanceMismatchError, match="This SAE was made for features of another extraction"):
            splicing_losses(sae, extractor, images[:1], layer="block0")
        assert splicing_losses(sae, extractor, images[:1], layer="block0", allow_mismatch=True)
