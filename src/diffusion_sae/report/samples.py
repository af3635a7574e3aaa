"""Which images stand for a latent: the strongest, some of each quarter of its activations, and some at random.

The strongest alone mislead: a latent may be about something else wherever it fires weakly.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from ..analysis.firing import Firing

TOP, QUARTERS, A_QUARTER, RANDOM = 12, 4, 3, 8
SAMPLES = TOP + QUARTERS * A_QUARTER + RANDOM
BINS = 24
"""Of the histogram of activations, from 0 to the latent's largest."""


@dataclass(frozen=True)
class LatentSamples:
    """Of m latents."""

    images: Int[np.ndarray, "m samples"]
    """TOP strongest, then A_QUARTER of each quarter from the strongest on, then RANDOM of all; -1 where there are no
    more."""
    acts: Float[np.ndarray, "m samples"]
    histogram: Int[np.ndarray, "m bins"]
    """Images a bin."""
    classes: Int[np.ndarray, "m classes"]
    """Images of each class in which it fires."""


def draw_samples(
    firing: Firing,
    latents: Int[np.ndarray, " m"],
    labels: Int[np.ndarray, " images"] | None,
    classes: int,
    seed: int = 0,
) -> LatentSamples:
    """The draw of a latent depends on (seed, latent) alone."""
    images = np.full((len(latents), SAMPLES), -1, np.int32)
    acts = np.zeros((len(latents), SAMPLES), np.float32)
    histogram = np.zeros((len(latents), BINS), np.int32)
    by_class = np.zeros((len(latents), classes), np.int32)
    for row, latent in enumerate(latents.tolist()):
        own_images, own_acts = firing.latent(latent)
        places, chosen = _choose(own_acts, np.random.default_rng((seed, latent)))
        images[row, places], acts[row, places] = own_images[chosen], own_acts[chosen]
        histogram[row] = np.histogram(own_acts, BINS, (0, own_acts.max()))[0]
        if labels is not None:
            by_class[row] = np.bincount(labels[own_images], minlength=classes)
    return LatentSamples(images, acts, histogram, by_class)


def _choose(acts: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Places among the samples, and which of the firing images stand there."""
    strongest = np.argsort(-acts, kind="stable")
    parts = [strongest[:TOP]]
    for quarter in np.array_split(strongest, QUARTERS):
        drawn = rng.choice(len(quarter), min(len(quarter), A_QUARTER), replace=False)
        parts.append(quarter[np.sort(drawn)])
    parts.append(rng.choice(len(acts), min(len(acts), RANDOM), replace=False))
    starts = [0, *(TOP + i * A_QUARTER for i in range(QUARTERS)), SAMPLES - RANDOM]
    places = [start + np.arange(len(part)) for start, part in zip(starts, parts, strict=True)]
    return np.concatenate(places), np.concatenate(parts)
