"""Relations of SAE latents: to one another, by direction and by firing, and to classes."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse
from torch import Tensor

from .firing import Firing

BLOCK = 512
"""Latents that are compared with all others at a time."""
MOST_PAIRS = 2_000_000_000
"""Pairs of latents, summed over the images, that co-firing counts; of more images a random part is taken."""


@dataclass(frozen=True)
class Nearest:
    """For each of some latents its nearest others, nearest first."""

    latents: Int[np.ndarray, "m n"]
    """-1 where there are no more."""
    values: Float[np.ndarray, "m n"]


def _largest(scores: np.ndarray, among: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The n largest of each row above 0, and the latents they belong to."""
    n_here = min(n, scores.shape[1])
    columns = np.argpartition(-scores, n_here - 1, axis=1)[:, :n_here]
    values = np.take_along_axis(scores, columns, 1)
    order = np.argsort(-values, axis=1, kind="stable")
    values, columns = np.take_along_axis(values, order, 1), np.take_along_axis(columns, order, 1)
    latents = np.where(values > 0, among[columns], -1)
    missing = ((0, 0), (0, n - n_here))
    return np.pad(latents, missing, constant_values=-1), np.pad(np.where(values > 0, values, 0), missing)


@torch.no_grad()
def most_similar(W_dec: Float[Tensor, "num_latents d_in"], latents: Int[np.ndarray, " m"], n: int = 8) -> Nearest:
    """By the cosine of the decoder's directions, among the given latents; only cosines above 0."""
    directions = torch.nn.functional.normalize(W_dec.detach().cpu().float()[torch.from_numpy(latents)], dim=1)
    found = []
    for start in range(0, len(latents), BLOCK):
        cosines = (directions[start : start + BLOCK] @ directions.T).numpy()
        own = np.arange(len(cosines))
        cosines[own, start + own] = 0
        found.append(_largest(cosines, latents, n))
    return Nearest(np.concatenate([f[0] for f in found]), np.concatenate([f[1] for f in found]))


@dataclass(frozen=True)
class CoFiring(Nearest):
    num_images: int
    """Images it was counted on."""


def most_cofiring(firing: Firing, latents: Int[np.ndarray, " m"], n: int = 8, seed: int = 0) -> CoFiring:
    """By the overlap of the images in which they fire: images with both, of the images with either (Jaccard).

    Counts Σ (latents of an image)² pairs; where these are more than `MOST_PAIRS`, on a random part of the images.
    """
    fires = firing.by_image[:, latents]
    fires = sparse.csr_array((np.ones(len(fires.indices), np.float32), fires.indices, fires.indptr), fires.shape)
    pairs = (np.diff(fires.indptr).astype(np.float64) ** 2).sum()
    if pairs > MOST_PAIRS:
        share = max(1, int(firing.num_images * MOST_PAIRS / pairs))
        chosen = np.sort(np.random.default_rng(seed).choice(firing.num_images, share, replace=False))
        fires = fires[chosen]
    by_latent, counts = fires.tocsc(), np.asarray(fires.sum(0)).ravel()
    found = []
    for start in range(0, len(latents), BLOCK):
        both = (by_latent[:, start : start + BLOCK].T @ fires).toarray()
        either = counts[start : start + BLOCK, None] + counts - both
        overlap = np.divide(both, either, out=np.zeros_like(both), where=either > 0)
        own = np.arange(len(overlap))
        overlap[own, start + own] = 0
        found.append(_largest(overlap, latents, n))
    return CoFiring(np.concatenate([f[0] for f in found]), np.concatenate([f[1] for f in found]), len(fires.indptr) - 1)


@dataclass(frozen=True)
class ClassMoments:
    """Mean and standard deviation of the images' activations in each class, with the zeros of images without firing.

    From them comes the standardised difference of any two classes, (μ_a - μ_b) / √((σ_a² + σ_b²) / 2), Cohen's d.
    """

    images: Int[np.ndarray, " classes"]
    """Images of each class."""
    mean: Float[np.ndarray, "classes num_latents"]
    std: Float[np.ndarray, "classes num_latents"]


def class_moments(firing: Firing, labels: Int[np.ndarray, " images"], classes: range) -> ClassMoments:
    """Of a range of the classes, so that not all of (classes, num_latents) need be in memory."""
    chosen = np.flatnonzero((labels >= classes.start) & (labels < classes.stop))
    own = labels[chosen] - classes.start
    images = np.bincount(own, minlength=len(classes))
    member = sparse.csr_array((np.ones(len(own)), (own, np.arange(len(own)))), (len(classes), len(own)))
    acts = firing.by_image[chosen].astype(np.float64)
    share = 1 / np.maximum(images, 1)[:, None]
    mean = (member @ acts).toarray() * share
    square = (member @ acts.multiply(acts)).toarray() * share
    return ClassMoments(images, mean, np.sqrt(np.maximum(square - mean**2, 0)))
