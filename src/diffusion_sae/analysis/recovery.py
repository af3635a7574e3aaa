"""Features with a known dictionary, and how much of it a decoder has found."""

import dataclasses
import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .._config import check, check_integer, check_number

FOUND_ABOVE = 0.9
_BLOCK = 1024


@dataclass(frozen=True, kw_only=True)
class SyntheticDictionary:
    """Rows that are sums of few known directions (superposition; Sharkey et al. 2022, Elhage et al. 2022):

        x = Σ_i a_i m_i f_i,    a_i ~ Bernoulli(p_i),    m_i ~ U(0.5, 1.5)

    with random directions f_i of unit norm and frequencies p_i = min(1, c i^-exponent), independent of each other; c is
    such that Σ p_i = `active`. All numbers follow from the seeds; the global random state is not used.
    """

    num_features: int = 512
    d_in: int = 64
    active: float = 8.0
    """Directions in a row, on average."""
    exponent: float = 1.0
    """Of the frequencies' power law; 0: all are equally frequent."""
    seed: int = 0
    """Seed of the directions."""
    directions: Float[Tensor, "num_features d_in"] = dataclasses.field(init=False, repr=False, compare=False)
    frequencies: Float[Tensor, " num_features"] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_integer("num_features", self.num_features, 1)
        check_integer("d_in", self.d_in, 1)
        check_number("active", self.active, 0, self.num_features, open_low=True)
        check_number("exponent", self.exponent, 0)
        check_integer("seed", self.seed, 0)
        drawn = torch.randn(self.num_features, self.d_in, generator=_generator("directions", self.seed))
        object.__setattr__(self, "directions", drawn / drawn.norm(dim=1, keepdim=True))
        object.__setattr__(self, "frequencies", power_law(self.num_features, self.active, self.exponent))

    def rows(self, count: int, seed: int) -> Float[Tensor, "count d_in"]:
        """Rows by their seed alone: other rows of the same dictionary with another seed."""
        check_integer("count", count, 0)
        check_integer("seed", seed, 0)
        generator = _generator("rows", self.seed, seed)
        drawn = torch.rand(count, self.num_features, generator=generator)
        row, feature = (drawn < self.frequencies).nonzero(as_tuple=True)
        code = torch.zeros_like(drawn)
        code[row, feature] = torch.rand(len(row), generator=generator) + 0.5
        return code @ self.directions


def _generator(*names: object) -> torch.Generator:
    """One for these names: from the bare seed an SAE of the same `init_seed` would begin with the true directions."""
    digest = hashlib.sha256(repr(names).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def power_law(count: int, total: float, exponent: float) -> Float[Tensor, " count"]:
    """min(1, c i^-exponent) for i = 1 … count, with the sum `total`."""
    check(0 < total <= count, f"{count} frequencies of at most 1 cannot have the sum {total}.")
    shape = torch.arange(1, count + 1, dtype=torch.float64) ** -exponent
    always = 0  # how many frequencies are 1
    while True:
        rest = shape[always:]
        scaled = rest * ((total - always) / rest.sum()) if len(rest) else rest
        more = int((scaled > 1).sum())  # of the falling shape these are the first ones
        if not more:
            return torch.cat([torch.ones(always, dtype=torch.float64), scaled]).float()
        always += more


@dataclass(frozen=True)
class Recovery:
    """How much of a known dictionary was found."""

    mean_max_cosine: float
    """Mean over the true directions of the cosine with the nearest decoder row."""
    found: float
    """Share of the true directions whose nearest decoder row has a cosine above 0.9."""


@torch.no_grad()
def recovery(W_dec: Float[Tensor, "num_latents d_in"], directions: Float[Tensor, "num_features d_in"]) -> Recovery:
    """Compare decoder rows with the true directions; neither needs unit norm, and a row of zeros finds nothing.

    Signs count: a latent that writes −f has not found f. One row may be the nearest of several directions.

    Raises:
        ValueError: if the widths differ, or one of the two has no rows.
    """
    if W_dec.ndim != 2 or directions.ndim != 2 or W_dec.shape[1] != directions.shape[1]:
        shapes = f"{tuple(W_dec.shape)} and {tuple(directions.shape)}"
        raise ValueError(f"W_dec and directions must be (rows, d_in) of the same d_in, got {shapes}.")
    if not len(W_dec) or not len(directions):
        raise ValueError(f"Nothing to compare: {len(W_dec)} decoder rows and {len(directions)} directions.")
    rows = torch.nn.functional.normalize(W_dec.float(), dim=1)
    true = torch.nn.functional.normalize(directions.float(), dim=1)
    best = torch.cat([(part @ rows.T).amax(1) for part in true.split(_BLOCK)])
    return Recovery(best.mean().item(), (best > FOUND_ABOVE).float().mean().item())
