"""Which SAE latents fire in which images, how strongly, and where: what a page of latents is made of.

All of it comes from the sparse codes on the disk. Memory grows with the pairs of an image and a latent that fires in
it, 16 bytes each, and not with the positions, timesteps or latents.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from scipy import sparse
from torch import Tensor

from ..features import FeatureSet
from ..sae.code import SparseCode
from ..sae.modeling import KSparseAutoencoder
from ..sae.sparse_codes import SparseCodes
from .latents import LatentStatistics

CHUNK_BYTES = 2**25
"""Of the dense activations (images, num_latents) that exist at a time."""
LARGEST_SIDE = 16
"""Of a heat map; finer grids are pooled by their maximum."""


class _Chunk(NamedTuple):
    first: int
    """Number of its first image."""
    images: int
    timestep: int
    """Which of the timesteps, counted from 0."""
    code: SparseCode
    """(images · positions, k)."""


@dataclass(frozen=True)
class Firing:
    """Activations of images: the largest over an image's positions and timesteps, where that is above 0."""

    by_image: sparse.csr_array
    """(images, num_latents)."""
    by_latent: sparse.csc_array
    """The same, latent by latent."""
    rate: Float[np.ndarray, "timesteps num_latents"]
    """Share of the images in which a latent fires, at each timestep."""
    mean: Float[np.ndarray, "timesteps num_latents"]
    """Mean over the images of their activation at each timestep."""
    active_rows: Int[np.ndarray, " num_latents"]
    """Rows (positions of images at timesteps) in which a latent is active."""

    @property
    def num_images(self) -> int:
        return len(self.by_image.indptr) - 1

    @property
    def images_of(self) -> Int[np.ndarray, " num_latents"]:
        """In how many images each latent fires."""
        return np.diff(self.by_latent.indptr)

    @property
    def max_acts(self) -> Float[np.ndarray, " num_latents"]:
        """0 where a latent fires in no image."""
        return np.asarray(self.by_latent.max(axis=0).todense()).ravel()

    def latent(self, latent_index: int) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """The images in which it fires, ascending, and its activations there."""
        start, stop = self.by_latent.indptr[latent_index : latent_index + 2]
        return self.by_latent.indices[start:stop], self.by_latent.data[start:stop]

    def image(self, image: int) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """The latents that fire in an image, ascending, and their activations."""
        start, stop = self.by_image.indptr[image : image + 2]
        return self.by_image.indices[start:stop], self.by_image.data[start:stop]


def statistics_of(firing: Firing, n: int) -> LatentStatistics:
    """The n strongest images of every latent, and the rest of what `latent_statistics` gives."""
    top_images = torch.zeros(len(firing.images_of), n, dtype=torch.long)
    top_acts = torch.zeros(len(firing.images_of), n)
    sums = np.asarray(firing.by_latent.sum(axis=0)).ravel()
    for latent in np.flatnonzero(firing.images_of).tolist():
        images, acts = firing.latent(latent)
        order = np.argsort(-acts, kind="stable")[:n]
        top_images[latent, : len(order)] = torch.from_numpy(images[order].astype(np.int64))
        top_acts[latent, : len(order)] = torch.from_numpy(acts[order])
    counts = torch.from_numpy(firing.images_of.astype(np.float32))
    mean_acts = torch.from_numpy(sums).float() / counts.clamp_min(1)
    return LatentStatistics(top_images, top_acts, counts / firing.num_images, mean_acts, firing.num_images)


def _chunks(encoded: SparseCodes) -> Iterator[_Chunk]:
    """All images in order; of several timesteps each chunk comes once a timestep."""
    manifest = encoded.manifest
    timesteps = max(1, len(manifest.timesteps))
    positions = positions_of(encoded)
    per_timestep = manifest.rows // timesteps
    images = per_timestep // positions
    at_once = max(1, CHUNK_BYTES // (4 * encoded.num_latents))
    for first in range(0, images, at_once):
        count = min(at_once, images - first)
        for t in range(timesteps):
            start = t * per_timestep + first * positions
            yield _Chunk(first, count, t, encoded[start : start + count * positions])


def find_firing(encoded: SparseCodes) -> Firing:
    """Read all sparse codes once."""
    latents, timesteps = encoded.num_latents, max(1, len(encoded.manifest.timesteps))
    images = encoded.manifest.rows // encoded.manifest.rows_per_image
    counts, sums = np.zeros((timesteps, latents), np.int64), np.zeros((timesteps, latents))
    active_rows = np.zeros(latents, np.int64)
    parts: list[sparse.csr_array] = []
    largest = torch.zeros(0)
    for chunk in _chunks(encoded):
        acts, indices = (tensor.reshape(chunk.images, -1) for tensor in chunk.code)
        dense = torch.zeros(chunk.images, latents).scatter_reduce_(1, indices, acts.float(), "amax")
        counts[chunk.timestep] += (dense > 0).sum(0).numpy()
        sums[chunk.timestep] += dense.sum(0, dtype=torch.float64).numpy()
        active_rows += chunk.code.active_counts(latents).numpy()
        largest = dense if chunk.timestep == 0 else torch.maximum(largest, dense)
        if chunk.timestep == timesteps - 1:
            parts.append(sparse.csr_array(largest.numpy()))
    by_image = sparse.csr_array(sparse.vstack(parts, format="csr"))
    return Firing(by_image, by_image.tocsc(), counts / images, sums / images, active_rows)


def positions_of(encoded: SparseCodes) -> int:
    """Rows of an image at one timestep."""
    return encoded.manifest.rows_per_image // max(1, len(encoded.manifest.timesteps))


def grid_of(positions: int) -> tuple[int, int] | None:
    """Height and width of the heat maps; None for a number of positions that is no square grid."""
    side = math.isqrt(positions)
    if side < 2 or side**2 != positions:
        return None
    small = -(-side // -(-side // LARGEST_SIDE))
    return small, small


def pooled_cells(positions: int) -> Int[np.ndarray, " positions"]:
    """In which cell of `grid_of` each position lies."""
    side, grid = math.isqrt(positions), grid_of(positions)
    if grid is None:
        raise ValueError(
            f"Heat maps need rows that are the positions of a square grid, got {positions} rows an image. Extract with "
            "pooling='tokens'."
        )
    row, column = np.divmod(np.arange(positions), side)
    step = -(-side // LARGEST_SIDE)
    return row // step * grid[1] + column // step


@dataclass(frozen=True)
class HeatMaps:
    """Where on an image a latent fires: the largest activation at each place, over the timesteps."""

    pairs: Int[np.ndarray, " n"]
    """image · num_latents + latent, ascending."""
    values: UInt8[np.ndarray, "n height_x_width"]
    """0 where it is not active, 255 at its strongest place in that image; row by row."""
    num_latents: int

    def of(self, images: np.ndarray, latents: np.ndarray) -> UInt8[np.ndarray, "... height_x_width"]:
        """Maps of pairs that were asked for; all 0 where `images` is negative."""
        found = np.searchsorted(
            self.pairs, np.where(images < 0, 0, images.astype(np.int64) * self.num_latents + latents)
        )
        maps = self.values[np.minimum(found, len(self.pairs) - 1)]
        return np.where((images < 0)[..., None], np.uint8(0), maps)


def heat_maps(encoded: SparseCodes, pairs: Int[np.ndarray, " n"], values: np.ndarray) -> HeatMaps:
    """Heat maps of pairs of an image and a latent, in one pass over the sparse codes.

    Args:
        encoded: of features whose rows are the positions of a square grid.
        pairs: image · num_latents + latent, ascending, without repetition.
        values: (pairs, height · width) in uint8, filled here: `numpy.memmap` keeps it on the disk.
    """
    cells = pooled_cells(positions_of(encoded))
    timesteps = max(1, len(encoded.manifest.timesteps))
    acts = np.zeros((0, 0), np.float32)
    for chunk in _chunks(encoded):
        low, high = np.searchsorted(pairs, np.array([chunk.first, chunk.first + chunk.images]) * encoded.num_latents)
        if chunk.timestep == 0:
            acts = np.zeros((high - low, values.shape[1]), np.float32)
        rows, places = np.nonzero(chunk.code.top_acts.numpy() > 0)
        latents = chunk.code.top_indices.numpy()[rows, places]
        keys = (chunk.first + rows // len(cells)) * encoded.num_latents + latents
        found = np.minimum(np.searchsorted(pairs[low:high], keys), max(0, high - low - 1))
        wanted = np.flatnonzero(pairs[low:high][found] == keys) if high > low else np.zeros(0, np.int64)
        place = found[wanted] * values.shape[1] + cells[rows[wanted] % len(cells)]
        np.maximum.at(acts.reshape(-1), place, chunk.code.top_acts.numpy()[rows[wanted], places[wanted]])
        if chunk.timestep == timesteps - 1:
            scale = acts.max(1, keepdims=True, initial=0)
            values[low:high] = np.ceil(255 * np.divide(acts, scale, out=np.zeros_like(acts), where=scale > 0))
    return HeatMaps(pairs, values, encoded.num_latents)


@torch.no_grad()
def fvu_of_encoded(
    sae: KSparseAutoencoder, features: FeatureSet, encoded: SparseCodes, batch_size: int = 8192
) -> float:
    """Σ‖x − x̂‖² / Σ‖x − x̄‖² of rows that are encoded already; sums in fp64."""
    if len(features) != len(encoded):
        raise ValueError(
            f"The sparse codes are of {len(encoded)} rows, the features have {len(features)}: give both of one store."
        )
    mean = features.mean().double()
    error = variance = 0.0
    for start in range(0, len(features), batch_size):
        rows = torch.arange(start, min(start + batch_size, len(features)))
        batch = features[start : start + len(rows)]
        timesteps: Tensor | None = None if sae.config.timesteps is None else features.timesteps_of(rows)
        code = SparseCode(*(tensor.to(sae.device) for tensor in encoded[start : start + len(rows)]))
        error += (batch.double() - sae.decode(code, timesteps).cpu().double()).pow(2).sum().item()
        variance += (batch.double() - mean).pow(2).sum().item()
    if variance == 0:
        raise ValueError("All rows are equal, so that there is no variance to explain. Evaluate on more images.")
    return error / variance
