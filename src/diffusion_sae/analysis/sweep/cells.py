"""One cell of a sweep: what identifies it, what was measured, and the file that holds it."""

import base64
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from ..._config import exact_keys
from ..._files import fingerprint_of, read_json, write_json


@dataclass(frozen=True)
class Cell:
    """The columns of the results that do not depend on the seed."""

    kind: str
    """cell, or the baseline it is: pixels, latents, shuffled."""
    model: str
    weights: str
    draw: int
    prompt: str
    prompt_of: str
    """own or other, if it is filled with a class: such a cell needs the label, and is never taken for the best."""
    layer: str
    """Empty for pixels and latents."""
    timestep: int
    """-1 for pixels and latents."""
    head: str
    label: str


@dataclass(frozen=True)
class SeedResult:
    """A fit: chosen on validation, measured once on test."""

    seed: int
    validation_accuracy: float
    validation_loss: float
    test_accuracy: float | None
    l2: float | None
    """The strength chosen, of heads that have one."""
    epoch: int | None
    """The epoch chosen, of heads that are trained in epochs."""
    seconds: float
    correct: str
    """Which test images (validation, where there is no test split) were classified right, as packed bits in base64."""


@dataclass(frozen=True)
class CellResult:
    cell: Cell
    num_labels: int
    rows: dict[str, int]
    """Images a role; of train, those of one seed."""
    width: int
    """Numbers an image has as features."""
    seeds: list[SeedResult]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def read(cls, path: Path) -> "CellResult":
        content = exact_keys(cls, read_json(path), str(path))
        seeds = [SeedResult(**exact_keys(SeedResult, seed, str(path))) for seed in content["seeds"]]
        return cls(**{**content, "cell": Cell(**exact_keys(Cell, content["cell"], str(path))), "seeds": seeds})

    def write(self, path: Path) -> None:
        write_json(path, self.to_dict())

    def hits(self) -> Bool[Tensor, "S n"]:
        """Of each seed and measured image: whether it was classified right."""
        count = self.rows["test" if self.seeds[0].test_accuracy is not None else "validation"]
        return torch.stack([unpack(seed.correct, count) for seed in self.seeds])

    @property
    def validation(self) -> float:
        """Mean over the seeds: what everything is chosen by."""
        return sum(seed.validation_accuracy for seed in self.seeds) / len(self.seeds)


def pack(correct: Bool[Tensor, " n"]) -> str:
    return base64.b64encode(np.packbits(correct.numpy()).tobytes()).decode()


def unpack(text: str, count: int) -> Bool[Tensor, " n"]:
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=count)
    return torch.from_numpy(bits.astype(bool))


def path_of(folder: Path, cell: Cell, decides: dict[str, Any]) -> Path:
    """The file of a cell, named by a hash of all that decides its numbers: after a change it is another file."""
    return folder / "cells" / f"{fingerprint_of({'cell': dataclasses.asdict(cell), **decides})}.json"


def read_cells(paths: Sequence[Path]) -> list[CellResult]:
    return [CellResult.read(path) for path in paths]
