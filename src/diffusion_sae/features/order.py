"""Orders of rows that depend on a seed and an epoch alone, so that any step's rows are known without those before."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from .._config import check, check_integer


def generator_of(*, seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


@lru_cache(maxsize=2)  # every step of an epoch asks for it; 10 million rows take a second to permute
def epoch_order(count: int, *, seed: int, epoch: int) -> Int[Tensor, " count"]:
    """A permutation of the rows that depends on (seed, epoch) alone."""
    return torch.randperm(count, generator=generator_of(seed=seed, epoch=epoch))


def held_out_images(count: int, held_out: int, *, seed: int) -> Bool[Tensor, " count"]:
    """Which of the images are held out, by a seed alone.

    Raises:
        ValueError: if no image would be left to train on.
    """
    if held_out >= count:
        raise ValueError(
            f"{count} images are too few to hold out {held_out} of them. Give more images, or give the held-out "
            "features yourself."
        )
    held = torch.zeros(count, dtype=torch.bool)
    held[epoch_order(count, seed=seed, epoch=-1)[:held_out]] = True
    return held


class Group(NamedTuple):
    """The rows of one buffer: the number-th of an epoch's groups of blocks."""

    epoch: int
    number: int


class _Epoch(NamedTuple):
    blocks: list[Tensor]
    """Of each group, in ascending order."""
    starts: list[int]
    """At which place of the epoch each group begins, and the end."""
    seeds: list[int]
    """Of the order within each group."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockOrder:
    """An order of `count` rows in which each stretch of an epoch needs few places of a file.

    Contiguous blocks of rows are permuted and dealt into groups of about equal size, each of at most `buffer_rows`
    rows; within a group the rows are permuted. Where all rows are one group that is a uniform permutation of them, the
    one of `epoch_order`. Rows left over at the end of an epoch, fewer than a batch, wait for the next order.
    """

    count: int
    batch_size: int
    seed: int
    block_rows: int
    buffer_rows: int

    def __post_init__(self) -> None:
        for name in ("batch_size", "block_rows", "buffer_rows"):
            check_integer(name, getattr(self, name), 1)
        check_integer("seed", self.seed, 0)
        check(
            self.batch_size <= self.count,
            f"A batch of {self.batch_size} rows cannot be had from {self.count} rows. Choose a smaller batch_size, or "
            "give more rows.",
        )
        check(
            self.num_groups == 1 or max(self.batch_size, self.block_rows) <= self.buffer_rows,
            f"A buffer of {self.buffer_rows} rows is too small for batches of {self.batch_size} rows and blocks of "
            f"{self.block_rows}. Choose a larger buffer, or smaller batches or blocks.",
        )

    @property
    def steps_per_epoch(self) -> int:
        return self.count // self.batch_size

    @property
    def num_blocks(self) -> int:
        return -(-self.count // self.block_rows)

    def record(self) -> dict[str, Any]:
        """What decides the order; of one group the sizes do not."""
        sizes = None if self.num_groups == 1 else [self.block_rows, self.buffer_rows]
        return {"count": self.count, "batch_size": self.batch_size, "seed": self.seed, "sizes": sizes}

    @cached_property
    def num_groups(self) -> int:
        if self.count <= self.buffer_rows:
            return 1
        return -(-self.num_blocks // max(1, self.buffer_rows // self.block_rows))

    def rows_of(self, step: int, rank: int = 0, world: int = 1) -> Int[Tensor, " b"]:
        """Rows of a step's batch, or the share that process `rank` of `world` has of it."""
        return torch.cat([rows for _, rows in self.parts(step, rank, world)])

    def parts(self, step: int, rank: int = 0, world: int = 1) -> list[tuple[Group, Int[Tensor, " n"]]]:
        """`rows_of`, by the groups that they are in, one after another."""
        check_integer("step", step, 0)
        share = self._share(rank, world)
        epoch, first = step // self.steps_per_epoch, step % self.steps_per_epoch * self.batch_size + rank * share
        if self.num_groups == 1:
            return [(Group(0, 0), self._permuted(epoch, 0)[first : first + share])]
        starts, last = self._epoch(epoch).starts, first + share
        found = []
        for number in range(bisect_right(starts, first) - 1, bisect_right(starts, last - 1)):
            begin, end = (place - starts[number] for place in (max(first, starts[number]), last))
            found.append((Group(epoch, number), self._permuted(epoch, number)[begin:end]))
        return found

    def used_of(self, group: Group, rank: int = 0, world: int = 1) -> Int[Tensor, " n"]:
        """The rows of a group that the batches, or a process's shares of them, hold, in ascending order.

        Where all rows are one group they are all of them, since the next epoch uses others.
        """
        share = self._share(rank, world)
        if self.num_groups == 1:
            return torch.arange(self.count)
        start, end = self._epoch(group.epoch).starts[group.number :][:2]
        places = torch.arange(start, end)
        used = (places < self.steps_per_epoch * self.batch_size) & (places % self.batch_size // share == rank)
        return self._permuted(*group)[used].sort().values

    def after(self, group: Group) -> Group | None:
        """The group that comes next; None where there is only one."""
        if self.num_groups == 1:
            return None
        starts, following = self._epoch(group.epoch).starts, group.number + 1
        # the last ones may hold nothing but rows that are left over
        if following < self.num_groups and starts[following] < self.steps_per_epoch * self.batch_size:
            return Group(group.epoch, following)
        return Group(group.epoch + 1, 0)

    def _share(self, rank: int, world: int) -> int:
        """Rows that each process has of a batch."""
        check_integer("world", world, 1)
        check_integer("rank", rank, 0, world - 1)
        check(
            self.batch_size % world == 0,
            f"A batch of {self.batch_size} rows cannot be shared equally by {world} processes. Choose a batch_size "
            f"that is a multiple of {world}.",
        )
        return self.batch_size // world

    # of each order its own: several readers would drive each other's out
    @cached_property
    def _epoch(self) -> Callable[[int], _Epoch]:
        return lru_cache(maxsize=2)(self._deal)

    @cached_property
    def _permuted(self) -> Callable[[int, int], Tensor]:
        return lru_cache(maxsize=2)(self._permute)

    def _deal(self, epoch: int) -> _Epoch:
        generator = generator_of(seed=self.seed, epoch=epoch)
        blocks = torch.randperm(self.num_blocks, generator=generator)
        groups = [group.sort().values for group in blocks.tensor_split(self.num_groups)]
        seeds = torch.randint(2**31, (self.num_groups,), generator=generator).tolist()
        last, lacking = self.num_blocks - 1, self.num_blocks * self.block_rows - self.count
        starts = [0]
        for group in groups:
            starts.append(starts[-1] + len(group) * self.block_rows - (lacking if group[-1] == last else 0))
        return _Epoch(groups, starts, seeds)

    def _permute(self, epoch: int, number: int) -> Int[Tensor, " n"]:
        if self.num_groups == 1:
            return epoch_order(self.count, seed=self.seed, epoch=epoch)
        blocks, seed = self._epoch(epoch).blocks[number], self._epoch(epoch).seeds[number]
        rows = (blocks[:, None] * self.block_rows + torch.arange(self.block_rows)).flatten()
        rows = rows[rows < self.count]
        return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
