"""Shuffled batches of a FeatureSet, also of one larger than the memory."""

import hashlib
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._config import check, check_integer
from .._files import fingerprint_of
from ..provenance import Provenance
from .buffered import NUMBERS_BYTES, BufferedBatches
from .feature_set import FeatureSet
from .moments import Moments, moments_of
from .order import BlockOrder
from .subset import ImageSubset

BUFFER_BYTES = 2**30
BLOCK_BYTES = 2**18


class ShuffledBatches(BufferedBatches):
    """Each row of a FeatureSet once an epoch, in an order that depends on (seed, epoch) alone: a `FeatureSource`.

    Random rows of a file that is larger than the memory cost one access to the disk each. Here contiguous blocks of
    rows are permuted, a group of blocks fills a buffer by reading each front to back, and the rows in it are permuted
    (see `BlockOrder`). Rows that fit into a buffer, or are in memory already, are permuted as a whole. By default a
    buffer has about 4096 blocks: batches of 256 rows are as mixed as those of a uniform shuffle, and one of 4096 has
    rows of two thirds as many images. Memory: two buffers, as the next is read while one is served, and the numbers of
    `rows`; a process that serves a share of each batch keeps its share of the buffers.
    """

    def __init__(
        self,
        features: FeatureSet,
        batch_size: int,
        *,
        seed: int = 0,
        rows: Int[Tensor, " n"] | None = None,
        buffer_bytes: int = BUFFER_BYTES,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        """
        Args:
            features: pooled or token features.
            batch_size: rows a batch, of all processes together.
            seed: of the order.
            rows: numbers of the rows to serve, each once, such as the training rows of `hold_out_images`; None: all.
            buffer_bytes: size of a buffer. The larger, the nearer to a uniform shuffle.
            block_bytes: read front to back. The smaller, the more images a buffer holds rows of, and the slower a disk.

        Raises:
            ValueError: for activations (C, h, w), row numbers that are not there or repeat, fewer rows than a batch, or
                a buffer smaller than a batch or block.
        """
        check(
            len(features.row_shape) == 1,
            f"Batches are of rows (d_in,), these rows are {tuple(features.row_shape)}. Extract with pooling 'mean', "
            "'max' or 'tokens'.",
        )
        for name, given in (("buffer_bytes", buffer_bytes), ("block_bytes", block_bytes)):
            check_integer(name, given, 1)
        self.features = features
        self._mean: Tensor | None = None
        self._moments: Moments | None = None
        self.rows = None if rows is None else _checked(rows, len(features))
        count = len(features) if self.rows is None else len(self.rows)
        order = {"count": count, "batch_size": batch_size, "seed": seed}
        if features.in_memory:
            super().__init__(BlockOrder(**order, block_rows=1, buffer_rows=count), ahead=False)
        else:
            row_bytes = features.d_in * features.stored(torch.tensor([0])).element_size()
            block_rows = max(1, block_bytes // row_bytes)
            buffer_rows = max(1, buffer_bytes // (row_bytes + NUMBERS_BYTES))
            super().__init__(BlockOrder(**order, block_rows=block_rows, buffer_rows=buffer_rows), ahead=True)

    @property
    def d_in(self) -> int:
        return self.features.d_in

    @property
    def provenance(self) -> Provenance | None:
        return self.features.provenance

    def __repr__(self) -> str:
        order = self.order
        return (
            f"ShuffledBatches({order.count} rows of {self.d_in}, batches of {order.batch_size}, "
            f"{order.num_groups} buffers an epoch, seed {order.seed})"
        )

    def rows_of(self, step: int, rank: int = 0, world: int = 1) -> Int[Tensor, " b"]:
        """Row numbers of `batch(step, rank, world)` in `features`."""
        return self._numbers(self.order.rows_of(step, rank, world))

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Float[Tensor, "b d_in"]:
        if self.features.in_memory:
            return self.features[self.rows_of(step, rank, world)]
        return super().batch(step, rank, world)

    def timesteps_of(self, step: int, rank: int = 0, world: int = 1) -> Int[Tensor, " b"] | None:
        """See `FeatureSource.timesteps_of`."""
        return self.features.timesteps_of(self.rows_of(step, rank, world))

    def mean(self) -> Float[Tensor, " d_in"]:
        """Of all rows that are served, accumulated in fp64: at the first call reads each once, front to back."""
        if self._mean is None:
            total = torch.zeros(self.d_in, dtype=torch.float64)
            for rows in self._in_order():
                total += self.features[rows].double().sum(0)
            self._mean = (total / len(self)).float()
        return self._mean

    def moments(self) -> Moments:
        """Of the rows of `mean`."""
        if self._moments is None:
            parts = ((self.features[rows], self.features.timesteps_of(rows)) for rows in self._in_order())
            self._moments = moments_of(parts, self.features.of_timesteps, self.d_in)
        return self._moments

    def _in_order(self) -> Iterator[Int[Tensor, " n"]]:
        """Numbers of all rows that are served, some at a time."""
        for first in range(0, len(self), 8192):
            yield self._numbers(torch.arange(first, min(first + 8192, len(self))))

    def held_out(self) -> FeatureSet | None:
        """See `FeatureSource.held_out`."""
        features = self.features
        held = torch.ones(features.num_images, dtype=torch.bool)
        if self.rows is not None:
            held[self.rows % features.rows_per_timestep // features.positions_per_image] = False
        return ImageSubset(features, torch.nonzero(held).flatten()) if self.rows is not None and held.any() else None

    def fingerprint(self) -> str:
        """See `FeatureSource.fingerprint`."""
        served = None if self.rows is None else hashlib.sha256(self.rows.numpy().tobytes()).hexdigest()
        return fingerprint_of({"features": self.features.fingerprint(), "served": served, **self.order.record()})

    def _numbers(self, places: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        return places if self.rows is None else self.rows[places]

    def _read(self, rows: Int[Tensor, " n"]) -> Float[Tensor, "n d_in"]:
        return self.features.stored(self._numbers(rows))


def _checked(rows: Int[Tensor, " n"], available: int) -> Int[Tensor, " n"]:
    """In ascending order, and on the CPU."""
    check(
        rows.dtype == torch.long and rows.ndim == 1 and len(rows) > 0,
        f"rows must be the numbers of rows, at least one, as a tensor (n,) of int64; got {rows.dtype} of shape "
        f"{tuple(rows.shape)}. A mask becomes numbers with torch.nonzero(mask).flatten().",
    )
    rows = rows.cpu().sort().values
    low, high = int(rows[0]), int(rows[-1])
    check(low >= 0 and high < available, f"rows must lie in 0…{available - 1}, got {low}…{high}.")
    repeated = rows[1:][rows[1:] == rows[:-1]]
    check(len(repeated) == 0, f"rows must not repeat, got {repeated[:5].tolist()} more than once.")
    return rows
