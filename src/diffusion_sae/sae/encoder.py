"""Which latents are active: the largest or all positive pre-activations, exactly, of a block of rows at a time.

Weights are latent-major here, (num_latents, d_in): one latent is one contiguous row. All functions run on any device,
and none holds a tensor of rows × latents.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .scratch import scratch
from .screening import screened_above, screened_top_k, screens
from .selection import group_size, pad_rows, top_k, whole_groups

SCORE_BYTES = {"cpu": 2**27}  # in much smaller blocks the product is slower
OTHER_SCORE_BYTES = 2**28
FEWEST_PER_ACTIVE = 32  # latents of an active one: of fewer, too many are in question after a product in bf16


def row_block(rows: int, latents: int, device: torch.device, itemsize: int) -> int:
    """How many rows are scored at a time."""
    budget = SCORE_BYTES.get(device.type, OTHER_SCORE_BYTES)
    return max(1, min(rows, max(512, budget // max(1, latents * itemsize))))


def _for_product(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In autocast's type where autocast is on: it does not see a product into a given buffer."""
    device = tensors[0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensors[0].dtype
    return tuple(tensor.to(dtype) for tensor in tensors)


def scores_of(
    features: Float[Tensor, "r d_in"], W_enc: Float[Tensor, "n d_in"], b_enc: Float[Tensor, " n"], out: Tensor
) -> Float[Tensor, "r n"]:
    """W_enc x + b_enc of a block of rows, written to `out`."""
    return torch.addmm(b_enc, features, W_enc.T, out=out)


def encode_top_k(
    features: Float[Tensor, "N d_in"], W_enc: Float[Tensor, "n d_in"], b_enc: Float[Tensor, " n"], k: int
) -> tuple[Float[Tensor, "N k"], Int[Tensor, "N k"]]:
    """The k largest of W_enc x + b_enc and which they are, in no order, without gradient."""
    if len(W_enc) < FEWEST_PER_ACTIVE * k or not screens(features, len(W_enc)):
        return _top_k_of_scores(features, W_enc, b_enc, k)
    values, indices, redo = screened_top_k(features, W_enc, b_enc, k)
    if len(redo):
        values[redo], indices[redo] = _top_k_of_scores(features[redo], W_enc, b_enc, k)
    return values, indices


def _top_k_of_scores(features: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`encode_top_k` by all scores in the features' own type."""
    rows, latents = len(features), len(W_enc)
    values = features.new_empty(rows, k)
    indices = torch.empty(rows, k, dtype=torch.long, device=features.device)
    features, W_enc, b_enc = _for_product(features, W_enc, b_enc)
    members = group_size(latents, k)
    columns = whole_groups(latents, members)
    block = row_block(rows, columns, features.device, features.element_size())
    buffer = scratch("scores", block, columns, features.dtype, features.device)
    buffer[:, latents:] = -math.inf
    for start in range(0, rows, block):
        part = features[start : start + block]
        scores = buffer[: len(part)]
        scores_of(part, W_enc, b_enc, scores[:, :latents])
        values[start : start + block], indices[start : start + block] = top_k(scores, k, members)
    return values, indices.clamp_max_(latents - 1)  # where latents are at −∞ too, filling columns may be chosen


def encode_above(
    features: Float[Tensor, "N d_in"],
    W_enc: Float[Tensor, "n d_in"],
    b_enc: Float[Tensor, " n"],
    threshold: Float[Tensor, "*n"],
) -> tuple[Float[Tensor, "N most"], Int[Tensor, "N most"]]:
    """What of W_enc x + b_enc is larger than max(threshold, 0), without gradient.

    `most` is the largest number of a row; free places of the others hold the value −∞ and the index 0.
    """
    floor, rows = threshold.clamp_min(0), len(features)
    if not screens(features, len(W_enc)):
        row, latent, value = _above_by_scores(features, W_enc, b_enc, floor)
    else:
        (row, latent, value), redo = screened_above(features, W_enc, b_enc, floor)
        if len(redo):
            again, *others = _above_by_scores(features[redo], W_enc, b_enc, floor)
            row, latent, value = _merged((row, latent, value), (redo[again], *others))
    return pad_rows(row, rows, value, latent)


def _merged(some: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Two lists of triples, sorted by row, as one."""
    if not len(some[0]) or not len(others[0]):
        return others if len(others[0]) else some
    row, latent, value = (torch.cat(both) for both in zip(some, others, strict=True))
    row, order = row.sort(stable=True)
    return row, latent[order], value[order]


def _above_by_scores(
    features: Tensor, W_enc: Tensor, b_enc: Tensor, floor: Tensor
) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"], Float[Tensor, " pairs"]]:
    """(row, latent, score) of what is larger than `floor`, by all scores in the features' own type."""
    rows, latents, dtype = len(features), len(W_enc), features.dtype
    features, W_enc, b_enc = _for_product(features, W_enc, b_enc)
    block = row_block(rows, latents, features.device, features.element_size())
    buffer = scratch("scores", block, latents, features.dtype, features.device)
    found = []
    for start in range(0, max(1, rows), block):
        part = features[start : start + block]
        scores = scores_of(part, W_enc, b_enc, buffer[: len(part)])
        row, column = torch.nonzero(scores > floor, as_tuple=True)
        found.append((row + start, column, scores[row, column].to(dtype)))
    row, column, value = (torch.cat(parts) for parts in zip(*found, strict=True))
    return row, column, value
