"""Some images of a FeatureSet, without a copy of their rows."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from .feature_set import FeatureSet


class ImageSubset(FeatureSet):
    """All rows of some images, read when they are asked for: as `FeatureSet`, over another one."""

    def __init__(self, features: FeatureSet, images: Int[Tensor, " n"]) -> None:
        at_once = torch.arange(features.positions_per_image)
        starts = torch.arange(0, len(features), features.rows_per_timestep)
        rows = starts[:, None, None] + images[None, :, None] * features.positions_per_image + at_once
        self._features, self._rows = features, rows.flatten().numpy()
        self._ascend = bool((images[1:] > images[:-1]).all())
        super().__init__(
            [torch.empty(len(self._rows), *features.row_shape, device="meta")],
            rows_per_image=features.rows_per_image,
            labels=None if features.image_labels is None else features.image_labels[images],
            image_ids=None if features.image_ids is None else [features.image_ids[i] for i in images.tolist()],
            class_names=features.class_names,
            provenance=features.provenance,
            timesteps=features.of_timesteps,
        )
        self.in_memory = features.in_memory

    def _between(self, start: int, stop: int) -> Float[Tensor, "n ..."]:
        return self._gather(np.arange(start, stop))

    def _gather(self, index: np.ndarray) -> Float[Tensor, "n ..."]:
        if len(index) and (index.min() < 0 or index.max() >= len(self)):
            raise IndexError(f"Rows must lie in 0…{len(self) - 1}, got {index.min()}…{index.max()}.")
        return self._features[torch.from_numpy(self._rows[index])]

    def stored(self, ascending: Int[Tensor, " n"]) -> Float[Tensor, "n ..."]:
        rows = torch.from_numpy(self._rows[ascending.numpy()])
        if self._ascend:
            return self._features.stored(rows)
        order = rows.argsort()
        return self._features.stored(rows[order])[order.argsort()]
