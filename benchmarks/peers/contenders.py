"""What all contenders share: shapes, data, the learning rate, and the table of them."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

LEARNING_RATE = 4e-4
MODULES = {  # contender: the module beside this one that has its step
    "limit": "limit_step",
    "ours": "our_step",
    "ours-fp32": "our_fp32_step",
    "sparsify": "sparsify_step",
    "sae-lens": "saelens_step",
    "sae-lens-sparse": "saelens_sparse_step",
    "dictionary-learning": "dictionary_learning_step",
    "overcomplete": "overcomplete_step",
    "revelio": "revelio_step",
}
OURS = ("ours", "ours-fp32")
HERE = ("limit", *OURS, "revelio")
"""Contenders that run in our own environment."""
PEERS = tuple(name for name in MODULES if name not in ("limit", *OURS))


class Shape(NamedTuple):
    rows: int
    d_in: int
    num_latents: int
    k: int

    def __str__(self) -> str:
        return ",".join(map(str, self))

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """From `rows,d_in,num_latents,k`."""
        return cls(*map(int, text.split(",")))

    def weight_bytes(self) -> int:
        """W_enc, W_dec, b_enc and b_dec in fp32."""
        return 4 * (2 * self.d_in * self.num_latents + self.num_latents + self.d_in)


class Recipe(NamedTuple):
    """How a contender trains: for speed at a constant rate, by its own loss and clipping."""

    learning_rate: float | None = LEARNING_RATE
    """None: the library's own recipe: optimiser, rate, schedule and what it does for dead latents by default."""
    steps: int = 10**6


FOR_SPEED = Recipe()


class Learned(NamedTuple):
    """What a contender has learned, to be measured."""

    W_dec: Tensor
    """(num_latents, d_in)"""
    encode: Callable[[Tensor], Tensor]
    """(N, d_in) → dense codes (N, num_latents)."""
    decode: Callable[[Tensor], Tensor]


class Training(NamedTuple):
    step: Callable[[Tensor], float]
    """One whole training step on a batch; returns the loss."""
    learned: Callable[[], Learned] | None = None
    """None: it learns nothing."""


class Contender(Protocol):
    """A module of `MODULES`."""

    DISTRIBUTION: str
    """The package whose version is recorded."""
    COMPRISES: str
    """What its step does, in order."""

    @staticmethod
    def build(shape: Shape, device: torch.device, recipe: Recipe = FOR_SPEED) -> Training: ...


def batch_of(shape: Shape, number: int, device: torch.device) -> Tensor:
    """Batch `number` of synthetic superposed features: the same in every environment.

    Each row is a sum of 32 of 4 · d_in unit directions with random strengths, around a common mean.
    """
    fixed = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(4 * shape.d_in, shape.d_in, generator=fixed), dim=1)
    mean = torch.randn(shape.d_in, generator=fixed) / shape.d_in**0.5
    own = torch.Generator().manual_seed(number + 1)
    which = torch.randint(len(directions), (shape.rows, 32), generator=own)
    strengths = torch.rand(shape.rows, 32, generator=own)
    rows = F.embedding_bag(which, directions, per_sample_weights=strengths, mode="sum")
    return rows.add_(mean).to(device)
