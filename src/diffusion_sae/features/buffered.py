"""Batches in the order of a `BlockOrder`, served from buffers that are filled one after another."""

from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .order import BlockOrder, Group

NUMBERS_BYTES = 16
"""What a buffer needs beside each row: its number, in the order of the file and in that of the batches."""
Key = tuple[Group, int, int]


@dataclass(frozen=True)
class _Buffer:
    rows: Int[Tensor, " n"]
    """Numbers, ascending."""
    content: Float[Tensor, "n d_in"]

    def take(self, rows: Int[Tensor, " b"]) -> Float[Tensor, "b d_in"]:
        return self.content.index_select(0, torch.searchsorted(self.rows, rows)).float()


class BufferedBatches(ABC):
    """`batch(step)` of a `BlockOrder`; subclasses say how the rows of a buffer are got.

    A buffer holds the rows of one group of blocks, of which only those that this process serves. With `ahead` the next
    buffer is filled by a thread while the current one is served, so that there are at most two; else at most one. All
    is a function of the step: after a jump the batch is the same, and only the buffer it lies in is filled. Where all
    rows fit into one buffer, it is filled once and stays.
    """

    def __init__(self, order: BlockOrder, *, ahead: bool) -> None:
        self.order = order
        self._ahead = ahead
        self._pool: ThreadPoolExecutor | None = None
        self._buffers: dict[Key, Future[_Buffer]] = {}

    @abstractmethod
    def _read(self, rows: Int[Tensor, " n"]) -> Float[Tensor, "n d_in"]:
        """Rows by their numbers in the order, which ascend, in the type they are kept in."""

    @property
    def batch_size(self) -> int:
        return self.order.batch_size

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    def __len__(self) -> int:
        return self.order.count

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Float[Tensor, "b d_in"]:
        """See `FeatureSource.batch`.

        Raises:
            ValueError: for a step below 0, a rank that is not in 0…world - 1, or a batch that does not divide.
        """
        parts = self.order.parts(step, rank, world)
        return torch.cat([self._buffer(group, rank, world).take(rows) for group, rows in parts])

    def _buffer(self, group: Group, rank: int, world: int) -> _Buffer:
        """Gives up all buffers but this and the one after it before another is filled."""
        following = self.order.after(group) if self._ahead else None
        if self.order.num_groups == 1:
            rank, world = 0, 1  # all rows, of which every process has its own
        wanted = [(of, rank, world) for of in (group, following) if of is not None]
        for key in set(self._buffers) - set(wanted):
            self._buffers.pop(key).cancel()
        for key in wanted:
            if key not in self._buffers:
                self._buffers[key] = self._fill(key)
        return self._buffers[wanted[0]].result()

    def _fill(self, key: Key) -> "Future[_Buffer]":
        rows = self.order.used_of(*key)
        if self._ahead:
            # one thread: what is being filled in vain after a jump is gone before the next is begun
            self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="buffer")
            return self._pool.submit(lambda: _Buffer(rows, self._read(rows)))
        done: Future[_Buffer] = Future()
        done.set_result(_Buffer(rows, self._read(rows)))
        return done

    def close(self) -> None:
        """See `FeatureSource.close`."""
        self._buffers.clear()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
