"""Noise that depends on (seed, image id, timestep) alone."""

import hashlib

import torch
from jaxtyping import Float
from torch import Tensor


def seeded_noise(shape: tuple[int, ...], *, seed: int, image_id: str, timestep: int, member: int = 0) -> Tensor:
    """Standard normal noise of one image, drawn in fp32 on the CPU, so that it is the same on every device.

    `member` numbers the draws of an ensemble; the first is the one that stands alone without an ensemble.
    """
    name = f"{seed}|{image_id}|{timestep}" + (f"|ensemble {member}" if member else "")
    return torch.randn(shape, generator=generator_named(name))


def generator_named(name: str) -> torch.Generator:
    """Of random numbers that depend on the name alone."""
    key = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)


def noise_batch(
    latents: Float[Tensor, "B ..."], image_ids: list[str], *, seed: int, timestep: int, member: int = 0
) -> Tensor:
    """Noise of the shape of `latents` on the CPU, row by row independent of the batch it is in."""
    shape = tuple(latents.shape[1:])
    return torch.stack(
        [seeded_noise(shape, seed=seed, image_id=i, timestep=timestep, member=member) for i in image_ids]
    )
