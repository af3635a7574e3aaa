"""Noise that depends on (seed, image id, timestep) alone."""

import pytest
import torch

from diffusion_sae.extraction.noise import noise_batch, seeded_noise


def test_noise_depends_on_seed_image_and_timestep_alone():
    key = {"seed": 3, "image_id": "cat", "timestep": 25}
    noise = seeded_noise((4, 8, 8), **key)
    torch.manual_seed(12345)
    assert torch.equal(seeded_noise((4, 8, 8), **key), noise)
    for change in ({"seed": 4}, {"image_id": "dog"}, {"timestep": 26}):
        assert not torch.equal(seeded_noise((4, 8, 8), **{**key, **change}), noise)


def test_keys_do_not_run_into_each_other():
    """Seed 1 with image `12` is not seed 11 with image `2`."""
    keys = [(1, "12", 25), (11, "2", 25), (1, "1", 225), (1, "122", 5), (1, "12|2", 5)]
    noises = [seeded_noise((64,), seed=seed, image_id=name, timestep=t) for seed, name, t in keys]
    assert len({tuple(noise.tolist()) for noise in noises}) == len(keys)


def test_a_row_does_not_depend_on_its_batch():
    latents = torch.zeros(3, 4, 8, 8)
    batch = noise_batch(latents, ["a", "b", "c"], seed=0, timestep=100)
    swapped = noise_batch(latents, ["c", "b", "a"], seed=0, timestep=100)
    alone = noise_batch(latents[:1], ["b"], seed=0, timestep=100)
    assert torch.equal(batch, swapped.flip(0))
    assert torch.equal(batch[1:2], alone)


def test_noise_is_standard_normal():
    """400 images: moments within four standard errors, hardly any correlation between images or neighbours."""
    noise = noise_batch(torch.zeros(400, 256), [f"image-{i}" for i in range(400)], seed=0, timestep=25)
    count = noise.numel()
    assert noise.mean().abs() < 4 / count**0.5
    assert (noise.var() - 1).abs() < 4 * (2 / count) ** 0.5
    assert (noise.pow(4).mean() - 3).abs() < 4 * (96 / count) ** 0.5
    assert (noise.abs() > 1.959964).float().mean().item() == pytest.approx(0.05, abs=4 * (0.05 * 0.95 / count) ** 0.5)
    between = torch.corrcoef(noise) - torch.eye(400)
    assert between.abs().max() < 6 / 256**0.5
    assert (noise[:, 1:] * noise[:, :-1]).mean().abs() < 4 / count**0.5


def test_drawing_noise_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    seeded_noise((4, 8, 8), seed=0, image_id="cat", timestep=25)
    assert torch.equal(torch.get_rng_state(), before)
