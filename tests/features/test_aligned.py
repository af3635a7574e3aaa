"""AlignedFeatures: several layers and timesteps of the same images, and what is no such thing."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffusion_sae.features import AlignedFeatures, FeatureSet
from diffusion_sae.provenance import Provenance

PROVENANCE = Provenance(
    model="owner/model", layers=("mid", "up"), timesteps=(25, 100), image_size=64, weights="0123456789abcdef"
)
KEYS = [(layer, t) for layer in ("up", "mid") for t in (25, 100)]


def make_set(key: tuple[str, int], *, images: int = 4, provenance: Provenance = PROVENANCE, **given: Any) -> FeatureSet:
    width = 3 if key[0] == "mid" else 5
    settings = {"labels": torch.arange(images), "image_ids": [f"image-{i}" for i in range(images)]} | given
    return FeatureSet([torch.full((images, width), float(key[1]))], provenance=provenance.select(*key), **settings)


def make_sets(**changed: FeatureSet) -> dict[tuple[str, int], FeatureSet]:
    sets = {key: make_set(key) for key in KEYS}
    return {key: changed.get(f"{key[0]}{key[1]}", one) for key, one in sets.items()}


def test_inputs_provenance_and_labels() -> None:
    aligned = AlignedFeatures(make_sets())
    assert list(aligned.inputs.items()) == [("mid@100", 3), ("mid@25", 3), ("up@100", 5), ("up@25", 5)]
    assert (aligned.d_in, len(aligned), aligned.num_images) == (16, 4, 4)
    assert aligned.provenance.fingerprint == PROVENANCE.fingerprint
    assert torch.equal(aligned.image_labels, torch.arange(4))
    assert torch.equal(aligned["up", 100][:1], torch.full((1, 5), 100.0))
    relabelled = aligned.with_labels(torch.zeros(4, 2))
    assert all(one.image_labels.shape == (4, 2) for one in relabelled.values())
    assert relabelled.provenance == aligned.provenance
    assert relabelled.fingerprint() != aligned.fingerprint()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mid100": make_set(("mid", 100), images=5)}, "mid@100 is of other images than up@25"),
        ({"mid25": make_set(("mid", 25), image_ids=list("abcd"))}, "mid@25 is of other images than up@25"),
        ({"up100": make_set(("up", 100), labels=None)}, "up@100 has other labels than up@25"),
        ({"up100": make_set(("up", 25))}, "The features given as up@100 are of .* t=25"),
        (
            {"up100": make_set(("up", 100), provenance=dataclasses.replace(PROVENANCE, seed=3))},
            r"(?s)of one extraction, and differ in layer and timestep alone.*seed 3",
        ),
    ],
)
def test_what_does_not_belong_together_is_refused(changed: dict[str, FeatureSet], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AlignedFeatures(make_sets(**changed))


def test_a_grid_with_a_hole_is_refused() -> None:
    sets = make_sets()
    del sets["mid", 100]
    with pytest.raises(ValueError, match="every layer at every timestep; mid@100 is missing"):
        AlignedFeatures(sets)
    with pytest.raises(ValueError, match="at least one FeatureSet"):
        AlignedFeatures({})


def test_broken_values_are_named_by_input() -> None:
    values = torch.zeros(4, 5)
    values[2, 1] = float("nan")
    broken = FeatureSet([values], labels=torch.arange(4), provenance=PROVENANCE.select("up", 100))
    with pytest.raises(ValueError, match=r"The features \(up@100\) holds NaN or infinite values, first in rows \[2\]"):
        AlignedFeatures(make_sets(up100=broken)).require_finite("The features")


def test_of_a_store(make_sd_extractor: Any, images: list[Image.Image], tmp_path: Path) -> None:
    extractor = make_sd_extractor(layers=("bottleneck", "up_ft1"), timesteps=(25, 100))
    store = extractor.extract(images[:5], tmp_path, progress=False)
    aligned = store.aligned()
    assert set(aligned) == {(layer, t) for layer in store.layers for t in store.timesteps}
    assert aligned.provenance.fingerprint == store.provenance.fingerprint
    for key, features in extractor(images[:5]).items():
        torch.testing.assert_close(aligned[key][:], features, atol=1e-5, rtol=1e-5)
    part = store.aligned(["up_ft1"])
    assert list(part) == [("up_ft1", 25), ("up_ft1", 100)]
    assert part.provenance.layers == ("up_ft1",)
    with pytest.raises(ValueError, match="layer must be one of 'bottleneck', 'up_ft1', got 'up_ft9'"):
        store.aligned(["up_ft9"])
