"""Where a training's checkpoint lies: one file, or with latents shared out over processes one of each."""

from pathlib import Path

import torch
from torch import Tensor

from .._files import read_json, remove_leftovers, write_json
from .._training import CHECKPOINT, CHECKPOINT_INDEX, load_checkpoint, save_checkpoint
from .modeling import KSparseAutoencoder
from .processes import SAEProcesses, ShardProcesses

BEST = "best.safetensors"
History = list[dict[str, float]]


class Checkpoints:
    """The checkpoint of a run in its folder, written by the main process and read by all."""

    def __init__(self, folder: Path, run: str, processes: SAEProcesses) -> None:
        self.folder, self.run, self.processes = folder, run, processes
        self.best = folder / BEST
        """Weights of the best evaluation."""
        self.writes = processes.is_main
        """Whether this process writes files."""

    @classmethod
    def of(cls, folder: Path, run: str, processes: SAEProcesses) -> "Checkpoints":
        kind = ShardCheckpoints if isinstance(processes, ShardProcesses) else Checkpoints
        return kind(folder, run, processes)

    def load(
        self, sae: KSparseAutoencoder, optimizer: torch.optim.Optimizer, history: History
    ) -> dict[str, Tensor] | None:
        """As `load_checkpoint`."""
        _refuse(self.folder / CHECKPOINT_INDEX, "with")
        with self.processes.main_first():
            return load_checkpoint(self.folder, sae, optimizer, run=self.run, history=history)

    def save(
        self,
        sae: KSparseAutoencoder,
        optimizer: torch.optim.Optimizer,
        extra: dict[str, Tensor],
        history: History,
        step: int,  # noqa: ARG002  in the file
    ) -> None:
        if self.writes:
            save_checkpoint(self.folder, sae, optimizer, extra, run=self.run, history=history)


class ShardCheckpoints(Checkpoints):
    """The checkpoint of latents that are shared out over processes: a file of each, and an index that names the set.

    The files of a step are written beside those of the last one, and count when the index, replaced by the main process
    when all are whole, says so: killed at any moment, the processes find a set of one step.
    """

    def __init__(self, folder: Path, run: str, processes: SAEProcesses) -> None:
        super().__init__(folder, run, processes)
        self.index = folder / CHECKPOINT_INDEX
        self.best = folder / f"best-{self._part()}.safetensors"
        self.writes = True

    def _part(self) -> str:
        return f"{self.processes.rank + 1:05d}-of-{self.processes.count:05d}"

    def _name(self, step: int) -> str:
        return f"checkpoint-{step}-{self._part()}.safetensors"

    def load(
        self, sae: KSparseAutoencoder, optimizer: torch.optim.Optimizer, history: History
    ) -> dict[str, Tensor] | None:
        """As `load_checkpoint`, of this process's part.

        Raises:
            ValueError: also for the checkpoint of another number of processes, or of a run with whole latents.
        """
        with self.processes.together():
            if self.processes.is_main:  # before any other process writes or reads
                remove_leftovers(self.folder, "*.safetensors", "*.json")
                self._remove_all_but(read_json(self.index)["step"] if self.index.exists() else None, "*")
        with self.processes.together():
            return self._load(sae, optimizer, history)

    def _load(
        self, sae: KSparseAutoencoder, optimizer: torch.optim.Optimizer, history: History
    ) -> dict[str, Tensor] | None:
        _refuse(self.folder / CHECKPOINT, "without")
        if not self.index.exists():
            return None
        index = read_json(self.index)
        if index["processes"] != self.processes.count:
            raise ValueError(
                f"{self.index} is of {index['processes']} processes, each with its share of the latents, but this run "
                f"has {self.processes.count}. Start {index['processes']} processes, or choose another output_dir."
            )
        name = self._name(index["step"])
        if not (self.folder / name).exists():
            raise ValueError(
                f"{self.index} names {name}, which is missing. All processes must see the same output_dir; restore the "
                f"file, or delete {self.index.name} to train anew."
            )
        return load_checkpoint(self.folder, sae, optimizer, run=self.run, history=history, name=name)

    def save(
        self,
        sae: KSparseAutoencoder,
        optimizer: torch.optim.Optimizer,
        extra: dict[str, Tensor],
        history: History,
        step: int,
    ) -> None:
        with self.processes.together():
            save_checkpoint(self.folder, sae, optimizer, extra, run=self.run, history=history, name=self._name(step))
        with self.processes.together():
            if self.processes.is_main:
                write_json(self.index, {"step": step, "processes": self.processes.count})
        self._remove_all_but(step, self._part())

    def _remove_all_but(self, step: int | None, part: str) -> None:
        for path in self.folder.glob(f"checkpoint-*-{part}.safetensors"):
            if step is None or not path.name.startswith(f"checkpoint-{step}-"):
                path.unlink()


def _refuse(other: Path, how: str) -> None:
    if other.exists():
        raise ValueError(
            f"{other} is the checkpoint of a run {how} shard_latents. Choose another output_dir, or delete the "
            "checkpoint to train anew there."
        )
