"""The data of one SAE's latents: a table of all that are alive, and blocks of what a latent's own page shows."""

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from ..analysis.firing import Firing, HeatMaps, find_firing, grid_of, heat_maps, positions_of
from ..analysis.metrics.interpretability import purity
from ..analysis.relations import ClassMoments, class_moments, most_cofiring, most_similar
from ..sae.modeling import KSparseAutoencoder
from ..sae.sparse_codes import SparseCodes
from .packing import DataFolder
from .samples import RANDOM, TOP, LatentSamples, draw_samples

BLOCK = 64
"""Latents, or images, a file."""
CLASS_BLOCK = 16
IN_GRID = 6
"""Top images that the grid of all latents shows."""
OF_IMAGE = 24
"""Strongest latents that an image's page shows."""
RELATED = 8
PURITY_OF = 10
"""Top images whose labels are compared; latents that fire in fewer have no purity."""


@dataclass(frozen=True)
class Name:
    """What a latent is called."""

    text: str
    score: float | None = None
    """How well the name does, as measured by what gave it."""
    unit: str = ""
    """What the score is."""
    runner_up: str | None = None
    chance: float | None = None
    """Share of random sets of images whose best name does as well."""


@dataclass(frozen=True)
class Words:
    """What a search by text needs: the mean embedding of each latent's top images, less that of all images."""

    clip: str
    """Hub id or folder of the model of texts and images."""
    directions: Float[torch.Tensor, "num_latents d"]


@dataclass(frozen=True)
class Dictionary:
    """An SAE and what it makes of the images of a report."""

    name: str
    sae: KSparseAutoencoder
    encoded: SparseCodes
    """Of all images, in the order of the report's."""
    firing: Firing | None = None
    """Of these codes, where it has been found already."""
    names: Mapping[int, Name] | None = None
    """By latent; where there is none, the most common class of its top images stands for one."""
    words: Words | None = None
    fvu: float | None = None
    path: str | None = None
    """Where the SAE is, for `diffusion-sae browse`."""

    @property
    def layer(self) -> str | None:
        record = self.encoded.provenance
        return None if record is None else record.layers[0]


@dataclass(frozen=True)
class Labels:
    """One label an image."""

    values: Int[np.ndarray, " images"]
    names: Sequence[str]


def write_dictionary(folder: DataFolder, key: str, dictionary: Dictionary, labels: Labels | None) -> dict[str, Any]:
    """Write the files `key/…` and return what the page must know of them."""
    firing = dictionary.firing or find_firing(dictionary.encoded)
    living = np.flatnonzero(firing.images_of).astype(np.int32)
    if not len(living):
        raise ValueError(
            f"No latent of {dictionary.name!r} fires on these images, so that there is nothing to show. Train it first."
        )
    own, classes = folder.within(key), 0 if labels is None else len(labels.names)
    samples = draw_samples(firing, living, None if labels is None else labels.values, classes)
    strongest = _strongest_of_images(firing)
    shape = grid_of(positions_of(dictionary.encoded))
    with tempfile.TemporaryDirectory(dir=folder.root, prefix="maps-") as temporary:
        maps = (
            None
            if shape is None
            else _all_maps(dictionary.encoded, samples, living, strongest[0], shape, Path(temporary))
        )
        _write_latent_blocks(own, firing, dictionary, living, samples, maps)
        _write_image_blocks(own, *strongest, maps)
        del maps  # its file goes with the folder
    overview = _write_table(own, firing, dictionary, living, samples, labels)
    if labels is not None:
        _write_class_blocks(own, firing, living, labels)
    config, manifest = dictionary.sae.config, dictionary.encoded.manifest
    return overview | {
        "key": key,
        "name": dictionary.name,
        "latents": config.num_latents,
        "living": len(living),
        "k": config.k,
        "d_in": config.d_in,
        "fvu": dictionary.fvu,
        "l0": float(firing.active_rows.sum() / manifest.rows),
        "rows": manifest.rows,
        "dead": float((firing.active_rows == 0).mean()),
        "grid": shape,
        "timesteps": list(manifest.timesteps),
        "fingerprint": manifest.sae["weights"],
        "sizes": {"block": BLOCK, "classes": CLASS_BLOCK, "top": TOP, "random": RANDOM, "purity": PURITY_OF},
    }


def _strongest_of_images(firing: Firing) -> tuple[Int[np.ndarray, "images n"], Float[np.ndarray, "images n"]]:
    """The latents that fire most in each image, -1 where there are no more."""
    latents = np.full((firing.num_images, OF_IMAGE), -1, np.int32)
    acts = np.zeros((firing.num_images, OF_IMAGE), np.float32)
    for image in range(firing.num_images):
        own_latents, own_acts = firing.image(image)
        order = np.argsort(-own_acts, kind="stable")[:OF_IMAGE]
        latents[image, : len(order)], acts[image, : len(order)] = own_latents[order], own_acts[order]
    return latents, acts


def _all_maps(
    encoded: SparseCodes,
    samples: LatentSamples,
    living: np.ndarray,
    strongest: np.ndarray,
    shape: tuple[int, int],
    folder: Path,
) -> HeatMaps:
    """Heat maps of everything that shows one, on the disk."""
    of_latents = np.where(
        samples.images < 0, -1, samples.images.astype(np.int64) * encoded.num_latents + living[:, None]
    )
    images = np.arange(len(strongest), dtype=np.int64)[:, None]
    of_images = np.where(strongest < 0, -1, images * encoded.num_latents + strongest)
    pairs = np.unique(np.concatenate([of_latents.ravel(), of_images.ravel()]))
    pairs = pairs[pairs >= 0]
    values = np.memmap(folder / "maps", np.uint8, "w+", shape=(len(pairs), math.prod(shape)))
    return heat_maps(encoded, pairs, values)


def _write_latent_blocks(
    folder: DataFolder,
    firing: Firing,
    dictionary: Dictionary,
    living: np.ndarray,
    samples: LatentSamples,
    maps: HeatMaps | None,
) -> None:
    similar = most_similar(dictionary.sae.W_dec, living, RELATED)
    together = most_cofiring(firing, living, RELATED)
    several = len(firing.rate) > 1
    for start in range(0, len(living), BLOCK):
        own = slice(start, start + BLOCK)
        arrays = {
            "images": samples.images[own],
            "acts": samples.acts[own],
            "histogram": samples.histogram[own],
            "classes": samples.classes[own],
            "similar": similar.latents[own].astype(np.int32),
            "cosines": similar.values[own].astype(np.float32),
            "together": together.latents[own].astype(np.int32),
            "overlaps": together.values[own].astype(np.float32),
        }
        if maps is not None:
            arrays["maps"] = maps.of(samples.images[own], living[own, None])
        if several:
            arrays["rate"] = firing.rate[:, living[own]].T.astype(np.float32)
            arrays["mean"] = firing.mean[:, living[own]].T.astype(np.float32)
        folder.write(f"latents-{start // BLOCK:04d}", None, arrays)


def _write_image_blocks(folder: DataFolder, latents: np.ndarray, acts: np.ndarray, maps: HeatMaps | None) -> None:
    for start in range(0, len(latents), BLOCK):
        own = slice(start, start + BLOCK)
        arrays = {"latents": latents[own], "acts": acts[own]}
        if maps is not None:
            images = np.broadcast_to(np.arange(start, start + len(latents[own]))[:, None], latents[own].shape)
            arrays["maps"] = maps.of(np.where(latents[own] < 0, -1, images), latents[own])
        folder.write(f"images-{start // BLOCK:04d}", None, arrays)


def _write_class_blocks(folder: DataFolder, firing: Firing, living: np.ndarray, labels: Labels) -> None:
    """Mean and standard deviation, in all images and in those of each class."""
    everywhere = class_moments(firing, np.zeros(firing.num_images, np.int64), range(1))
    folder.write("classes-all", None, _moments(everywhere, firing, living))
    for start in range(0, len(labels.names), CLASS_BLOCK):
        chosen = range(start, min(start + CLASS_BLOCK, len(labels.names)))
        moments = class_moments(firing, labels.values, chosen)
        folder.write(f"classes-{start // CLASS_BLOCK:04d}", None, _moments(moments, firing, living))


def _moments(moments: ClassMoments, firing: Firing, living: np.ndarray) -> dict[str, np.ndarray]:
    """As shares of the latent's largest activation, in 16 bits."""
    shares = {"mean": moments.mean, "std": moments.std}
    largest = firing.max_acts[living]
    return {
        name: np.rint(65535 * np.clip(values[:, living] / largest, 0, 1)).astype(np.uint16)
        for name, values in shares.items()
    }


def _write_table(
    folder: DataFolder,
    firing: Firing,
    dictionary: Dictionary,
    living: np.ndarray,
    samples: LatentSamples,
    labels: Labels | None,
) -> dict[str, Any]:
    share, label = _purity(samples, labels)
    names = dictionary.names or {}
    arrays = {
        "index": living,
        "density": (firing.images_of[living] / firing.num_images).astype(np.float32),
        "max": firing.max_acts[living].astype(np.float32),
        "purity": share,
        "label": label,
        "top": samples.images[:, :IN_GRID],
        "topActs": samples.acts[:, :IN_GRID],
    }
    named = [names.get(latent) for latent in living.tolist()]
    text = None
    if names:
        text = {
            "names": [name.text if name else "" for name in named],
            "scores": [name.score if name else None for name in named],
            "runnersUp": [name.runner_up if name else None for name in named],
            "chances": [name.chance if name else None for name in named],
            "unit": next((name.unit for name in named if name), ""),
        }
    folder.write("latents", text, arrays)
    measured = ~np.isnan(share)
    shuffled = None
    if labels is not None:
        order = np.random.default_rng(0).permutation(len(labels.values))
        other, _ = _purity(samples, Labels(labels.values[order], labels.names))
        shuffled = float(other[measured].mean()) if measured.any() else None
    return {
        "purity": float(share[measured].mean()) if measured.any() else None,
        "shuffledPurity": shuffled,
        "measured": int(measured.sum()),
    }


def _purity(samples: LatentSamples, labels: Labels | None) -> tuple[np.ndarray, np.ndarray]:
    """NaN and -1 where a latent fires in too few images, or they have no labels."""
    share = np.full(len(samples.images), np.nan, np.float32)
    label = np.full(len(samples.images), -1, np.int32)
    top = samples.images[:, :PURITY_OF]
    enough = np.flatnonzero(top[:, -1] >= 0)
    if labels is not None and len(enough):
        values, common = purity(torch.from_numpy(labels.values[top[enough]]))
        share[enough], label[enough] = values.numpy(), common.numpy()
    return share, label
