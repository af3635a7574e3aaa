"""The largest pre-activations by a product in bf16 first: exact, and faster than by that in fp32 (docs/speed.md).

On processors with instructions for bf16 the product of all rows and latents takes much less time than in fp32. It
cannot tell which pre-activations are the largest, but how far each is from its value in fp32 is bounded, so that it
tells which few *can* be. These alone are formed in fp32, and chosen among. A row of which too many are in question is
left to the product in fp32; `counted` tells how many were.
"""

import functools
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .scratch import distances, row_parts, scratch
from .selection import group_maxima, group_size, pad_rows, whole_groups

UNIT = 2.0**-8  # the largest relative error of rounding to bf16
UNIT_FP32 = 2.0**-24
SMALLEST = 1e-30  # products below it may be flushed to zero
ROUNDINGS = 6  # one or two of the score, as many of the k-th one, and one of the bound
MOST_GROUPS = 6  # times k; beyond, forming the scores in question takes about as long as the product in fp32
MEMBERS_ABOVE, FEWEST_GROUPS_SKIPPED = 16, 4  # groups of latents, of which at most a fourth is looked through
MIN_ROWS, MIN_WIDTH, MIN_LATENTS = 256, 128, 2048  # below, rounding W_enc or the choice takes what the product saves
SCORE_BYTES = 2**25  # the product in bf16 is as fast in small blocks


@dataclass
class Screened:
    """How many rows were chosen by way of bf16, and how many of these were redone in fp32."""

    rows: int = 0
    redone: int = 0

    def describe(self) -> str:
        return f"{self.rows:,} rows screened in bf16, {self.redone / max(1, self.rows):.2%} of them redone in fp32"


_counting: ContextVar[Screened | None] = ContextVar("screened", default=None)
_allowed: ContextVar[bool] = ContextVar("screening_allowed", default=True)


@contextmanager
def counted(total: Screened | None = None) -> Iterator[Screened]:
    """Count what is screened within; it is added to `total`, and to what counts around it."""
    around, count = _counting.get(), Screened()
    token = _counting.set(count)
    try:
        yield count
    finally:
        _counting.reset(token)
        for other in (total, around):
            if other is not None:
                other.rows += count.rows
                other.redone += count.redone


@contextmanager
def without_screening() -> Iterator[None]:
    """Have all pre-activations formed in fp32 within, as on a processor without bf16."""
    token = _allowed.set(False)
    try:
        yield
    finally:
        _allowed.reset(token)


@functools.cache
def _warn_of_sparse_tensors_once() -> None:
    """PyTorch does so at the first one, that they are in beta state; here, where nobody need see it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.long), torch.tensor([]), (1, 1))


@functools.cache
def cpu_has_bf16() -> bool:
    """Whether this processor multiplies in bf16; elsewhere PyTorch emulates it, more slowly than fp32."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def screens(features: Float[Tensor, "N d_in"], latents: int) -> bool:
    """Whether these may be screened: fp32 on a CPU with bf16, and large enough to gain by it."""
    rows, width = features.shape
    return (
        _allowed.get()
        and features.dtype == torch.float32
        and features.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and rows >= MIN_ROWS
        and width >= MIN_WIDTH
        and latents >= MIN_LATENTS
        and cpu_has_bf16()
    )


def screened_top_k(
    features: Float[Tensor, "N d_in"], W_enc: Float[Tensor, "n d_in"], b_enc: Float[Tensor, " n"], k: int
) -> tuple[Float[Tensor, "N k"], Int[Tensor, "N k"], Int[Tensor, " redo"]]:
    """(values, indices) of the k largest of W_enc x + b_enc, and the rows for which they are still to be found.

    Let a score be at most e from what the product in bf16 makes of it before that is rounded. The latents are in
    groups, and the k-th largest maximum of a group, L, is a lower bound of the k-th largest rounded score: k scores are
    at least L − e, so that a latent whose rounded score is below L − 2 e is none of the k largest, both less a few
    roundings. The others are in groups whose maximum is not below it.
    """
    values, indices = features.new_zeros(len(features), k), torch.zeros(len(features), k, dtype=torch.long)
    certain = torch.zeros(len(features), dtype=torch.bool)
    members = group_size(len(W_enc), k)
    for rows, scores, errors in _scores_in_bf16(features, W_enc, b_enc, members):
        maxima = group_maxima(scores, members)
        bound = maxima.topk(k, dim=1, sorted=False).values.amin(1)
        below = bound - 2 * errors - ROUNDINGS * UNIT * (bound.abs() + 2 * errors)
        row, latent, certain[rows] = _not_below(scores, maxima, below, None, min(MOST_GROUPS * k, maxima.shape[1] // 2))
        exact = _in_fp32(row, latent, features[rows], W_enc, b_enc)
        of_row, of_latent = pad_rows(row, len(scores), exact, latent, least=k)
        values[rows], best = of_row.topk(k, dim=1, sorted=False)
        indices[rows] = of_latent.gather(1, best)
        if _seldom(certain[rows]):
            break
    return values, indices, _count(~certain)


def screened_above(
    features: Float[Tensor, "N d_in"], W_enc: Float[Tensor, "n d_in"], b_enc: Float[Tensor, " n"], floor: Tensor
) -> tuple[tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"], Float[Tensor, " pairs"]], Int[Tensor, " redo"]]:
    """(row, latent, score) of what of W_enc x + b_enc is larger than `floor`, one for all latents or one of each, and
    the rows for which they are still to be found.
    """
    latents, found = len(W_enc), []
    certain = torch.zeros(len(features), dtype=torch.bool)
    members = MEMBERS_ABOVE
    lower = torch.full((whole_groups(latents, members),), math.inf)
    lower[:latents] = floor - ROUNDINGS * UNIT * floor.abs()
    lower = lower.view(-1, members)
    for rows, scores, errors in _scores_in_bf16(features, W_enc, b_enc, members):
        below, maxima = -errors * (1 + ROUNDINGS * UNIT), group_maxima(scores, members)
        row, latent, certain[rows] = _not_below(scores, maxima, below, lower, len(lower) // FEWEST_GROUPS_SKIPPED)
        exact = _in_fp32(row, latent, features[rows], W_enc, b_enc)
        kept = torch.nonzero(exact > (floor[latent] if floor.ndim else floor)).flatten()
        found.append((row[kept] + rows.start, latent[kept], exact[kept]))
        if _seldom(certain[rows]):
            break
    row, latent, value = (torch.cat(parts) for parts in zip(*found, strict=True))
    return (row, latent, value), _count(~certain)


def _seldom(certain: Bool[Tensor, " r"]) -> bool:
    """Whether so few rows could be screened that the others are not worth a trial."""
    return 2 * int(certain.sum()) < len(certain)


def _count(redo: Bool[Tensor, " N"]) -> Int[Tensor, " redo"]:
    found = torch.nonzero(redo).flatten()
    count = _counting.get()
    if count is not None:
        count.rows += len(redo)
        count.redone += len(found)
    return found


def _scores_in_bf16(
    features: Float[Tensor, "N d_in"], W_enc: Float[Tensor, "n d_in"], b_enc: Float[Tensor, " n"], members: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Of a block of rows at a time: which they are, their scores (r, whole groups of columns) rounded to bf16, and how
    far from W_enc x + b_enc each can have been before it was rounded, (r,). The scores are gone with the next block.
    """
    latents, width = W_enc.shape
    b_half, W_half = b_enc.bfloat16(), scratch("W_enc in bf16", latents, width, torch.bfloat16, W_enc.device)
    of_latent, off_latent = (of_each.amax() for of_each in _round(W_enc, W_half))
    columns = whole_groups(latents, members)
    block = max(MIN_ROWS, SCORE_BYTES // (2 * columns))
    buffer = scratch("scores", block, columns, torch.bfloat16, W_enc.device)
    buffer[:, latents:] = -math.inf
    ends = [*range(MIN_ROWS, len(features), block), len(features)]  # few rows at first, as a trial
    for start, end in pairwise([0, *ends]):
        part = features[start:end]
        half = torch.empty_like(part, dtype=torch.bfloat16)
        length, off = _round(part, half)
        # |x·w − x̃·w̃| ≤ ‖x − x̃‖ ‖w‖ + ‖x̃‖ ‖w − w̃‖ (Cauchy and Schwarz); a sum of d products in fp32, of which there
        # are two, is off by at most d roundings of ‖x‖ ‖w‖; b_enc is rounded, and may be added to a rounded sum, which
        # is at most |b_enc| larger than the score
        errors = off * of_latent + (length + off) * off_latent + 2 * UNIT * b_enc.abs().amax() + SMALLEST
        errors += 2 * width * UNIT_FP32 * (length + off) * (of_latent + off_latent)
        scores = buffer[: len(part)]
        torch.addmm(b_half, half, W_half.T, out=scores[:, :latents])
        yield slice(start, end), scores, errors


def _round(values: Tensor, out: Tensor) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Round to bf16 into `out`; the length of each row, and that of what rounding changed."""
    lengths = values.new_empty(len(values))
    for part, half, length in row_parts(values, out, lengths):
        half.copy_(part)
        torch.linalg.vector_norm(part, dim=1, out=length)
    return lengths, distances(values, out)


def _not_below(
    scores: Float[Tensor, "r columns"],
    maxima: Float[Tensor, "r groups"],
    below: Float[Tensor, " r"],
    lower: Float[Tensor, "groups members"] | None,
    most: int,
) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"], Bool[Tensor, " r"]]:
    """(row, column) of all scores from `below` upwards, or `below` + `lower` of the column, in order.

    And of which rows: of those with such scores in at most `most` groups, and without NaN, which is not ≥ anything.
    """
    members = scores.shape[1] // maxima.shape[1]
    wanted = maxima >= (below[:, None] if lower is None else below[:, None] + lower.amin(1))
    certain = (wanted.sum(1) <= most) & maxima.amax(1).isfinite() & below.isfinite()
    row, group = torch.nonzero(wanted & certain[:, None], as_tuple=True)
    found = F.embedding(row * maxima.shape[1] + group, scores.view(-1, members))  # groups are copied whole
    bound = below[row, None] if lower is None else below[row, None] + lower[group]
    pair, member = torch.nonzero(found >= bound.to(found.dtype), as_tuple=True)
    return row[pair], group[pair] * members + member, certain


def _in_fp32(row: Tensor, latent: Tensor, features: Tensor, W_enc: Tensor, b_enc: Tensor) -> Float[Tensor, " pairs"]:
    """The scores of these (row, latent) pairs, which are in order of the row."""
    _warn_of_sparse_tensors_once()
    rows = len(features)
    starts = torch.searchsorted(row, torch.arange(rows + 1))
    pattern = torch.sparse_csr_tensor(starts, latent, b_enc[latent], (rows, len(W_enc)), check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, features, W_enc.T).values()
