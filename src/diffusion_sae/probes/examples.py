"""Features as heads take them, example by example: a row, or an image with all its positions and inputs."""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..features import AlignedFeatures, FeatureSet
from ..features.layout import tensor_name
from ..features.order import generator_of, held_out_images

Features = Tensor | dict[str, Tensor]
"""Of a head, (N, …); of fusion one for each input by its name `layer@timestep`."""


class Examples:
    """The examples of a FeatureSet or AlignedFeatures, addressed by number.

    An example is a row, or with `whole_images` an image at one timestep: where the rows are positions, all of them as
    (T, C). AlignedFeatures are taken by image in any case.
    """

    def __init__(self, features: FeatureSet | AlignedFeatures, *, whole_images: bool) -> None:
        self.features, self.num_images = features, features.num_images
        several = isinstance(features, AlignedFeatures)
        self._sets = {tensor_name(*key): one for key, one in features.items()} if several else {"": features}
        self._several = several
        self._whole = several or whole_images
        if not several and (not self._whole or features.positions_per_image == 1):
            self._whole = False
            self.image_index = features.image_index
        else:
            timesteps = 1 if several else features.num_timesteps
            self.image_index = torch.arange(self.num_images).repeat(timesteps)

    def __len__(self) -> int:
        return len(self.image_index)

    @property
    def labels(self) -> Tensor:
        """One entry an example: its image's."""
        if self.features.image_labels is None:
            raise ValueError(
                "A probe needs labels, and these features have none. Extract from class folders or labelled data."
            )
        return self.features.image_labels[self.image_index]

    def batch(self, numbers: Int[Tensor, " n"]) -> Features:
        """The examples with these numbers, in this order."""
        got = {name: self._of(one, numbers) for name, one in self._sets.items()}
        return got if self._several else got[""]

    def _of(self, features: FeatureSet, numbers: Int[Tensor, " n"]) -> Tensor:
        at_once = features.positions_per_image
        if not self._whole or at_once == 1:
            return features[numbers]
        # an example's rows stand together: timestep by timestep, image by image
        rows = numbers[:, None] * at_once + torch.arange(at_once)
        return features[rows.flatten()].unflatten(0, (len(numbers), at_once))  # (n·T, C) -> (n, T, C)

    def batches(self, numbers: Int[Tensor, " n"] | None = None, size: int = 256) -> Iterator[Features]:
        """All examples, or those with the given numbers, in order."""
        numbers = torch.arange(len(self)) if numbers is None else numbers
        for part in numbers.split(size):
            yield self.batch(part)

    def hold_out(self, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
        """(training numbers, held-out numbers). Whole images are held out: the examples of one are alike."""
        count = max(1, round(self.num_images * fraction))
        held = held_out_images(self.num_images, count, seed=seed)[self.image_index]
        return torch.nonzero(~held).flatten(), torch.nonzero(held).flatten()


class Views:
    """Augmented views of examples: in each epoch one of them stands for an image, drawn by (seed, epoch)."""

    def __init__(self, views: Sequence[Examples]) -> None:
        self.views = views

    def __len__(self) -> int:
        return len(self.views)

    def batch(self, numbers: Int[Tensor, " n"], *, seed: int, epoch: int) -> Features:
        """The examples with these numbers, each of the view that its image has in this epoch."""
        of_images = _drawn(len(self.views), self.views[0].num_images, seed, epoch)
        drawn = of_images[self.views[0].image_index[numbers]]
        used = drawn.unique().tolist()
        parts = [self.views[view].batch(numbers[drawn == view]) for view in used]
        # back into the order of the numbers
        places = torch.cat([torch.nonzero(drawn == view).flatten() for view in used]).argsort()
        if isinstance(parts[0], Tensor):
            return torch.cat(parts)[places]  # type: ignore[arg-type]
        return {name: torch.cat([part[name] for part in parts])[places] for name in parts[0]}  # type: ignore[index]


@lru_cache(maxsize=2)  # every step of an epoch asks for it
def _drawn(views: int, images: int, seed: int, epoch: int) -> Int[Tensor, " images"]:
    """A view an image; the generator is none that orders of rows use, whose epochs are not below -1."""
    return torch.randint(views, (images,), generator=generator_of(seed=seed, epoch=-2 - epoch))


def by_name(features: Mapping[Any, Tensor]) -> dict[str, Tensor]:
    """The inputs of fusion by their names, whether given so or by (layer, timestep)."""
    return {key if isinstance(key, str) else tensor_name(*key): value for key, value in features.items()}


def to_device(features: Features, device: torch.device) -> Features:
    if isinstance(features, Tensor):
        return features.to(device)
    return {name: value.to(device) for name, value in features.items()}


def split(features: Features, size: int) -> Iterator[Features]:
    """Batches of what is in memory."""
    if isinstance(features, Tensor):
        yield from features.split(size)
        return
    parts = {name: value.split(size) for name, value in features.items()}
    for one in zip(*parts.values(), strict=True):
        yield dict(zip(parts, one, strict=True))
