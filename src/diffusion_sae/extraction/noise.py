"""Noise that depends on (seed, image id, timestep) alone, added in closed form."""

import hashlib

import torch
from jaxtyping import Float
from torch import Tensor


def seeded_noise(shape: tuple[int, ...], *, seed: int, image_id: str, timestep: int) -> Tensor:
    """Standard normal noise of one image, drawn in fp32 on the CPU, so that it is the same on every device."""
    key = hashlib.sha256(f"{seed}|{image_id}|{timestep}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    return torch.randn(shape, generator=generator)


def noise_batch(latents: Float[Tensor, "B c h w"], image_ids: list[str], *, seed: int, timestep: int) -> Tensor:
    """(B, c, h, w) noise on the CPU, row by row independent of the batch it is in."""
    shape = tuple(latents.shape[1:])
    return torch.stack([seeded_noise(shape, seed=seed, image_id=i, timestep=timestep) for i in image_ids])


def add_noise(latents: Tensor, noise: Tensor, alpha_cumprod: float) -> Tensor:
    """√ᾱ_t · latents + √(1 − ᾱ_t) · noise, the forward process in closed form (Ho et al. 2020, eq. 4).

    `scheduler.add_noise` is not used: a freshly made DPMSolver++, UniPC or DEIS gives t = 25 the level of t = 974, and
    the Euler family works in another scale.
    """
    return alpha_cumprod**0.5 * latents + (1 - alpha_cumprod) ** 0.5 * noise
