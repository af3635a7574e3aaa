"""Features of several layers and timesteps of the same images, side by side."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from .._files import fingerprint_of
from ..provenance import Provenance
from .feature_set import FeatureSet
from .layout import tensor_name


class AlignedFeatures(Mapping[tuple[str, int], FeatureSet]):
    """One FeatureSet for each layer at each timestep; image i is the same image in all of them.

    Widths and spatial sizes may differ. `FeatureStore.aligned` gives those of a store.
    """

    def __init__(self, sets: Mapping[tuple[str, int], FeatureSet]) -> None:
        """
        Raises:
            ValueError: if the sets are of other images, have other labels, are not every layer at every timestep, or
                are of extractions that differ in more than these.
        """
        self._sets = dict(sets)
        _require_grid(list(self._sets))
        first = next(iter(self._sets.values()))
        for key, one in self._sets.items():
            if one.num_images != first.num_images or not same_images(one, first):
                raise ValueError(
                    f"{tensor_name(*key)} is of other images than {tensor_name(*next(iter(self._sets)))}: aligned "
                    "features are of the same images in the same order. Take them from one store."
                )
            if not _same_labels(one.image_labels, first.image_labels):
                raise ValueError(f"{tensor_name(*key)} has other labels than {tensor_name(*next(iter(self._sets)))}.")
        self.num_images = first.num_images
        self.image_ids = first.image_ids
        self.image_labels = first.image_labels
        self.class_names = first.class_names
        self.provenance = self._joint_provenance()
        """Of all the layers and timesteps together; None where one is not known."""

    def __getitem__(self, key: tuple[str, int]) -> FeatureSet:
        return self._sets[key]

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return iter(self._sets)

    def __len__(self) -> int:
        """Number of inputs: layers × timesteps."""
        return len(self._sets)

    def __repr__(self) -> str:
        return f"AlignedFeatures({self.num_images} images, {', '.join(self.inputs)})"

    @property
    def inputs(self) -> dict[str, int]:
        """Width of each input by its name `layer@timestep`, in the order of the names: a fusion probe's `inputs`."""
        return dict(sorted((tensor_name(*key), one.d_in) for key, one in self._sets.items()))

    @property
    def d_in(self) -> int:
        """The widths together."""
        return sum(self.inputs.values())

    def with_labels(self, labels: Tensor, class_names: Sequence[str] | None = None) -> Self:
        """The same features with other labels, one entry an image."""
        return type(self)({key: one.with_labels(labels, class_names) for key, one in self._sets.items()})

    def require_finite(self, what: str) -> None:
        """Raise if any value is NaN or infinite, saying in which rows of which input."""
        for key, one in self._sets.items():
            one.require_finite(f"{what} ({tensor_name(*key)})")

    def fingerprint(self) -> str:
        """Hash that tells one collection from another."""
        return fingerprint_of({tensor_name(*key): one.fingerprint() for key, one in self._sets.items()})

    def _joint_provenance(self) -> Provenance | None:
        layers, timesteps = (tuple(dict.fromkeys(part)) for part in zip(*self._sets, strict=True))
        joint = None
        for key, one in self._sets.items():
            if one.provenance is None:
                return None
            if (one.provenance.layers, one.provenance.timesteps) != ((key[0],), (key[1],)):
                raise ValueError(f"The features given as {tensor_name(*key)} are of {one.provenance.describe()}.")
            own = dataclasses.replace(one.provenance, layers=layers, timesteps=timesteps)
            if joint is not None and own.fingerprint != joint.fingerprint:
                raise ValueError(
                    "Aligned features must be of one extraction, and differ in layer and timestep alone; got\n"
                    f"  {joint.describe()}\n  {own.describe()}\nTake them from one store."
                )
            joint = own
        return joint


def _require_grid(keys: list[tuple[str, int]]) -> None:
    if not keys:
        raise ValueError("AlignedFeatures need at least one FeatureSet, got none.")
    grid = {(layer, t) for layer in {key[0] for key in keys} for t in {key[1] for key in keys}}
    missing = sorted(tensor_name(*key) for key in grid - set(keys))
    if missing:  # an extraction computes every layer at every timestep, and is recorded so
        raise ValueError(f"AlignedFeatures need every layer at every timestep; {', '.join(missing)} is missing.")


def same_images(one: FeatureSet | AlignedFeatures, other: FeatureSet | AlignedFeatures) -> bool:
    """Whether image i is the same in both, as far as their ids are known."""
    return one.image_ids is None or other.image_ids is None or list(one.image_ids) == list(other.image_ids)


def _same_labels(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one is other or torch.equal(one, other)
