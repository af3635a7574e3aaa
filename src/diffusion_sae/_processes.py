"""The processes that `accelerate launch` or `torchrun` started, where there are several."""

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

Result = TypeVar("Result")
# what torchrun and accelerate set, and the MPIs that accelerate knows
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def _leave() -> None:
    """At exit: a process whose group still has threads then may abort ("terminate called"), all its work done."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


class ProcessesFailedError(RuntimeError):
    """This process did its part, but others did not; their own errors say why."""


class Processes:
    """Rank and number of the processes of this run. In a single one nothing is initialised and nothing waits."""

    def __init__(self, *, cpu: bool) -> None:
        """`cpu`: whether the model runs on the CPU, so that the processes must not talk through accelerators."""
        self.rank, self.count = 0, 1
        if any(int(os.environ.get(name) or 1) > 1 for name in WORLD_SIZES):
            from accelerate import PartialState
            from torch import distributed

            ours = not distributed.is_initialized()
            # a fast process may wait for a slow one longer than torch's ten minutes
            state = PartialState(cpu=cpu, timeout=timedelta(days=7))
            if ours:
                atexit.register(_leave)
            self.rank, self.count = state.process_index, state.num_processes

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share_of(self, items: list[int]) -> list[int]:
        """Every count-th of what is to do, from the rank-th on."""
        return items[self.rank :: self.count]

    def from_main(self, compute: Callable[[], Result]) -> Result:
        """What the main process computes, in all of them; if it fails there, it fails in all."""
        if self.count == 1:
            return compute()
        from accelerate.utils import broadcast_object_list

        message: list[Any] = [False, None]
        try:
            if self.is_main:
                message = [True, compute()]
        finally:  # also after an error: the others would wait for ever
            broadcast_object_list(message)
        if not message[0]:
            raise ProcessesFailedError(f"The main process failed; process {self.rank} stops with it.")
        return message[1]

    @contextmanager
    def together(self) -> Iterator[None]:
        """The block ends in all processes at once. Where it fails in some, all raise after finishing their own."""
        failed = True
        try:
            yield
            failed = False
        finally:
            others = self._gather([self.rank] if failed else [])
        if others:
            raise ProcessesFailedError(
                f"Process {', '.join(map(str, others))} of {self.count} failed; see its own error. What the others "
                "made is kept: start again to go on."
            )

    def _gather(self, ranks: list[int]) -> list[int]:
        if self.count == 1:
            return []
        from accelerate.utils import gather_object

        return gather_object(ranks)
