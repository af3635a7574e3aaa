"""How an SAE brings each row to its own scale, by name; SAEs and the probes on their latents share it.

| name | x becomes | x̂ becomes | source |
|---|---|---|---|
| `none` | x | x̂ | |
| `layer_norm` | (x − μ) / s, s = √(mean (x − μ)²) + ε | μ + s x̂ | z-scores of a row |
| `sample_layer_norm` | (x − μ) / (σ + ε), σ with d − 1 | μ + σ x̂ | `layer_norm` of SAELens, `input_unit_norm` |
| `constant_norm` | x √d / ‖x‖ | x̂ ‖x‖ / √d | `constant_norm_rescale` of SAELens |

ε = 1e-5. The last two are what other libraries compute, to the letter, so that their SAEs convert exactly;
`input_unit_norm` is SAeUron's.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

INPUT_NORMS = ("none", "layer_norm", "sample_layer_norm", "constant_norm")
EPS = 1e-5


class RowNorm(NamedTuple):
    """x becomes (x − shift) / divisor, and x̂ shift + scale · x̂. None: nothing to do."""

    shift: Float[Tensor, "N 1"] | None
    divisor: Float[Tensor, "N 1"] | None
    scale: Float[Tensor, "N 1"] | None


def row_norm(rows: Float[Tensor, "N d_in"], input_norm: str) -> RowNorm:
    """Moments of each row that `input_norm` asks for."""
    if input_norm == "none":
        return RowNorm(None, None, None)
    if input_norm == "constant_norm":
        length = torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
        scale = length / rows.shape[1] ** 0.5
        return RowNorm(None, scale, scale)
    shift = rows.mean(1, keepdim=True)
    squares = (rows - shift).square()
    if input_norm == "sample_layer_norm":
        deviation = (squares.sum(1, keepdim=True) / (rows.shape[1] - 1)).sqrt()
        return RowNorm(shift, deviation + EPS, deviation)
    scale = squares.mean(1, keepdim=True).sqrt() + EPS
    return RowNorm(shift, scale, scale)
