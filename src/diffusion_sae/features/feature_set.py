"""Features of one layer at one timestep or several, addressed by row: what trainers and metrics take."""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from typing import Self

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._files import fingerprint_of
from ..provenance import Provenance
from .columns import StringColumn
from .layout import MappedRows


class FeatureSet:
    """N rows of features, memory-mapped or in memory, with labels, image ids and where they come from.

    For pooled features a row is an image; for token features a row is one position of an image, and `image_index` and
    `positions` say which. For `pooling="none"` a row is an image's whole activation (C, h, w).

    Of several timesteps the rows stand one timestep after another, each with all images in the same order: `timesteps`
    says which a row is of, and an image is the same one at all of them.
    """

    def __init__(
        self,
        blocks: Sequence[Tensor | MappedRows],
        *,
        rows_per_image: int = 1,
        labels: Tensor | None = None,
        image_ids: Sequence[str] | None = None,
        class_names: Sequence[str] | None = None,
        provenance: Provenance | None = None,
        timesteps: Sequence[int] = (),
    ) -> None:
        """
        Args:
            blocks: the rows, in parts.
            rows_per_image: over all positions and timesteps of an image.
            labels, image_ids: one an image.
            class_names: what the labels mean.
            provenance: the extraction that made them.
            timesteps: that the rows are of, if known: each has the same number of rows.

        Raises:
            ValueError: if there are no rows, or the numbers do not fit one another.
        """
        if not blocks or sum(map(len, blocks)) == 0:
            raise ValueError("A FeatureSet needs at least one row, got none.")
        if rows_per_image % max(1, len(timesteps)):
            raise ValueError(
                f"An image must have the same number of rows at each timestep: {rows_per_image} rows an image, "
                f"{len(timesteps)} timesteps. Give the rows of all timesteps together as rows_per_image."
            )
        self._blocks = list(blocks)
        self._arrays: list[np.ndarray | None] = [None] * len(self._blocks)
        self._starts = np.cumsum([0, *map(len, blocks)])
        self._row_shape = torch.Size(blocks[0].shape[1:])
        self.in_memory = not any(isinstance(block, MappedRows) for block in blocks)
        """Whether the rows were given as tensors; else they are on the disk."""
        self.rows_per_image = rows_per_image
        """Over all positions and timesteps of an image."""
        self.num_images = len(self) // rows_per_image
        self.of_timesteps = tuple(timesteps)
        """In the order of the rows; empty where they are not known."""
        for name, values in (("labels", labels), ("image_ids", image_ids)):
            if values is not None:
                self._require_one_an_image(name, values)
        self.image_labels = labels
        self.image_ids = image_ids if image_ids is None or isinstance(image_ids, StringColumn) else list(image_ids)
        self.class_names = None if class_names is None else list(class_names)
        self.provenance = provenance

    @classmethod
    def from_tensor(
        cls, features: Tensor, labels: Tensor | Sequence[int] | None = None, class_names: Sequence[str] | None = None
    ) -> Self:
        """Plain tensors as a FeatureSet: features (N, d_in) or (N, C, h, w), integer labels (N,)."""
        return cls([features], labels=None if labels is None else torch.as_tensor(labels), class_names=class_names)

    def _require_one_an_image(self, name: str, values: Tensor | Sequence[str]) -> None:
        if len(values) != self.num_images:
            raise ValueError(f"{name} must have one entry an image: {self.num_images} images, {len(values)} {name}.")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        several = f", t={self.of_timesteps}" if len(self.of_timesteps) > 1 else ""
        return f"FeatureSet({len(self)} rows of {tuple(self.row_shape)}, {self.num_images} images{several})"

    @property
    def row_shape(self) -> torch.Size:
        return self._row_shape

    @property
    def d_in(self) -> int:
        """Width of the features: channels, which come first in (C,) and (C, h, w) and last in (T, C)."""
        return self.row_shape[-1] if len(self.row_shape) == 2 else self.row_shape[0]

    def _block(self, number: int) -> Tensor:
        """Memory-mapped when first touched."""
        block = self._blocks[number]
        if isinstance(block, MappedRows):
            block = self._blocks[number] = block.map()
        return block

    def __getitem__(self, rows: Tensor | slice | Sequence[int]) -> Float[Tensor, "n ..."]:
        """The given rows in fp32, in the given order; also a slice, or a mask of all rows."""
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            return self._between(start, stop) if step == 1 else self._gather(np.arange(start, stop, step))
        if isinstance(rows, Tensor) and rows.dtype == torch.bool:
            if rows.shape != (len(self),):
                raise IndexError(f"A mask must have one entry a row, {len(self)}, got the shape {tuple(rows.shape)}.")
            return self._gather(torch.nonzero(rows).flatten().numpy())
        return self._gather(torch.as_tensor(rows, dtype=torch.long).cpu().numpy())

    def _between(self, start: int, stop: int) -> Float[Tensor, "n ..."]:
        out = torch.empty(max(0, stop - start), *self.row_shape)
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        done = 0
        for number in range(first, len(self._blocks)):
            if done == len(out):
                break
            begin = start + done - int(self._starts[number])
            part = self._block(number)[begin : begin + len(out) - done]
            out[done : done + len(part)] = part
            done += len(part)
        return out

    def _gather(self, index: np.ndarray) -> Float[Tensor, "n ..."]:
        """Rows in any order: sorted once, so that each block that has some is read once and front to back."""
        if not len(index):
            return torch.empty(0, *self.row_shape)
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= len(self):
            raise IndexError(f"Rows must lie in 0…{len(self) - 1}, got {low}…{high}.")
        if len(self._blocks) == 1:
            return self._block(0).index_select(0, torch.from_numpy(index)).float()
        order = np.argsort(index)
        gathered = self._stored(index[order])
        place = np.empty(len(index), np.int64)
        place[order] = np.arange(len(index))
        # back into the wanted order while the rows are in their stored type, which may be half of fp32
        return self._as_tensor(gathered.take(place, axis=0)).float()

    def stored(self, ascending: Int[Tensor, " n"]) -> Float[Tensor, "n ..."]:
        """The given rows, whose numbers must ascend, in the type they are stored in, with no second copy of them."""
        return self._as_tensor(self._stored(ascending.numpy()))

    def _stored(self, ascending: np.ndarray) -> np.ndarray:
        """Each block is read front to back; bf16 as int16."""
        first, last = np.searchsorted(self._starts, ascending[[0, -1]], side="right") - 1
        cuts = np.searchsorted(ascending, self._starts[first : last + 2]).tolist()
        rows = np.empty((len(ascending), *self.row_shape), self._array(int(first)).dtype)
        for number in range(int(first), int(last) + 1):
            begin, end = cuts[number - first : number - first + 2]
            if begin < end:
                local = ascending[begin:end] - self._starts[number]
                # all are in range; to find out, numpy would write to `out` through a buffer
                self._array(number).take(local, axis=0, out=rows[begin:end], mode="clip")
        return rows

    def _as_tensor(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(rows).view(self._block(0).dtype)

    def _array(self, number: int) -> np.ndarray:
        """A block for numpy, whose `take` needs a third of the time of torch's `index_select`; bf16 as int16."""
        array = self._arrays[number]
        if array is None:
            block = self._block(number).detach()
            array = (block.view(torch.int16) if block.dtype == torch.bfloat16 else block).numpy()
            self._arrays[number] = array
        return array

    def batches(self, batch_size: int) -> Iterator[Float[Tensor, "b ..."]]:
        """All rows in order, in fp32, without holding more than a batch."""
        for start in range(0, len(self), batch_size):
            yield self[start : start + batch_size]

    def to_tensor(self) -> Float[Tensor, "N ..."]:
        return self[:]

    @property
    def num_timesteps(self) -> int:
        """1 also where it is not known which."""
        return max(1, len(self.of_timesteps))

    @property
    def rows_per_timestep(self) -> int:
        """Rows of all images at one timestep."""
        return len(self) // self.num_timesteps

    @property
    def positions_per_image(self) -> int:
        return self.rows_per_image // self.num_timesteps

    def rows_at(self, timestep: int) -> range:
        """The rows of one timestep."""
        if timestep not in self.of_timesteps:
            raise ValueError(f"These features are of the timesteps {self.of_timesteps}, not of {timestep}.")
        first = self.of_timesteps.index(timestep) * self.rows_per_timestep
        return range(first, first + self.rows_per_timestep)

    @property
    def image_index(self) -> Int[Tensor, " N"]:
        """Which image each row belongs to."""
        once = torch.arange(self.num_images).repeat_interleave(self.positions_per_image)
        return once.repeat(self.num_timesteps)

    @property
    def positions(self) -> Int[Tensor, " N"]:
        """Position within its image of each row, row-major over the grid; all 0 for pooled features."""
        return torch.arange(self.positions_per_image).repeat(self.num_images * self.num_timesteps)

    @property
    def timesteps(self) -> Int[Tensor, " N"] | None:
        """Timestep of each row; None for plain tensors, of which it is not known."""
        known = self.of_timesteps
        return torch.tensor(known).repeat_interleave(self.rows_per_timestep) if known else None

    def timesteps_of(self, rows: Int[Tensor, " n"]) -> Int[Tensor, " n"] | None:
        """`timesteps[rows]`, without the timesteps of all rows."""
        return torch.tensor(self.of_timesteps)[rows // self.rows_per_timestep] if self.of_timesteps else None

    @property
    def labels(self) -> Int[Tensor, " N"] | None:
        """Label of each row: its image's."""
        return None if self.image_labels is None else self.image_labels[self.image_index]

    def image_batches(self, images: int) -> Iterator[Float[Tensor, "b rows_per_image ..."]]:
        """All images in order, so many at a time, each with all its rows: its positions, timestep by timestep."""
        at_once = self.positions_per_image
        for first in range(0, self.num_images, images):
            last = min(first + images, self.num_images)
            parts = [
                self[start + first * at_once : start + last * at_once].unflatten(0, (-1, at_once))
                for start in range(0, len(self), self.rows_per_timestep)
            ]
            yield parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def with_labels(self, labels: Tensor, class_names: Sequence[str] | None = None) -> Self:
        """The same rows with other labels, one entry an image: (images,) or, for several labels, (images, labels)."""
        self._require_one_an_image("labels", labels)
        relabelled = copy.copy(self)
        relabelled.image_labels = labels
        relabelled.class_names = None if class_names is None else list(class_names)
        return relabelled

    def mean(self, rows: range | None = None) -> Float[Tensor, " d_in"]:
        """Mean row, of all or of a range without steps, accumulated in fp64."""
        rows = range(len(self)) if rows is None else rows
        total = torch.zeros(self.row_shape, dtype=torch.float64)
        for start in range(rows.start, rows.stop, 8192):
            total += self[start : min(start + 8192, rows.stop)].double().sum(0)
        return (total / len(rows)).float()

    def require_finite(self, what: str) -> None:
        """Raise if any value is NaN or infinite, saying in which rows."""
        if not self.in_memory:  # a store's writer has looked at each
            return
        for start, batch in zip(range(0, len(self), 8192), self.batches(8192), strict=True):
            finite = torch.isfinite(batch.flatten(1)).all(1)
            if not finite.all():
                bad = (torch.nonzero(~finite).flatten()[:5] + start).tolist()
                raise ValueError(
                    f"{what} holds NaN or infinite values, first in rows {bad} of {len(self)}. Extract them again "
                    "(in float32 or bfloat16 if float16 overflowed) or remove these rows."
                )

    def fingerprint(self) -> str:
        """Hash that tells one set from another: extraction, number of rows, labels, 64 rows spread over all."""
        spread = torch.arange(64) * (len(self) - 1) // 63
        content = hashlib.sha256(self[spread].numpy().tobytes())
        if self.image_labels is not None:
            content.update(self.image_labels.numpy().tobytes())
        extraction = None if self.provenance is None else self.provenance.fingerprint
        return fingerprint_of({"extraction": extraction, "rows": len(self), "content": content.hexdigest()})


def as_feature_set(features: "FeatureSet | Tensor") -> FeatureSet:
    return FeatureSet.from_tensor(features) if isinstance(features, Tensor) else features
