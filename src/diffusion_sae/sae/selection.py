"""The largest of scores that are there: exactly, in less time than `torch.topk` over all columns takes."""

import math

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .scratch import scratch

PART_BYTES = 2**21


def group_size(latents: int, k: int) -> int:
    """Elements a group for `top_k`, near 1.6 √(n / k): more groups cost more in finding the largest maxima, larger ones
    in looking through their members. A multiple of 32 where it can be, over which `amax` runs in whole vectors.
    """
    best = 1.6 * math.sqrt(latents / k)
    return 16 if best < 16 else 32 * max(1, min(4, round(best / 32)))


def whole_groups(latents: int, members: int) -> int:
    """Columns for so many latents: the last group is filled up, and rows are of a multiple of 64 bytes (32 in half
    precision): into rows that begin anywhere the product is 1.4 times slower.
    """
    return -(-latents // members) * members


def top_k(scores: Float[Tensor, "r n"], k: int, members: int) -> tuple[Float[Tensor, "r k"], Int[Tensor, "r k"]]:
    """The k largest of each row and their columns, in no order; exactly those of `torch.topk`.

    Column j belongs to group j div `members`, and n must be a multiple of `members`. The k groups with the largest
    maxima hold the k largest elements, and the smallest of these maxima is a lower bound of all of them. So
    `torch.topk` sees the maxima, and then the few elements above the bound; over all columns it would take up to half
    as long as the product.
    """
    rows, columns = scores.shape
    groups = columns // members
    if groups <= k:
        values, indices = scores.topk(k, dim=1, sorted=False)
        return values, indices
    maxima, chosen = group_maxima(scores, members).to(scores.dtype).topk(k, dim=1, sorted=False)
    table = scores.reshape(rows * groups, members)  # of whole groups, which are copied together
    places = chosen + torch.arange(0, rows * groups, groups, device=scores.device)[:, None]
    candidates = F.embedding(places, table).view(rows, k * members)
    row, place = torch.nonzero(candidates >= maxima.amin(1, keepdim=True), as_tuple=True)
    values, places = pad_rows(row, rows, candidates[row, place], place)
    if values.shape[1] < k or bool((values[:, k - 1] == -math.inf).any()):  # a row with NaN, which is not ≥ anything
        values, places = candidates, torch.arange(k * members, device=scores.device).expand(rows, -1)
    values, best = values.topk(k, dim=1, sorted=False)
    places = places.gather(1, best)
    return values, chosen.gather(1, places // members) * members + places % members


def group_maxima(scores: Float[Tensor, "r n"], members: int) -> Float[Tensor, "r groups"]:
    """The largest of each group of neighbours; of half precision in fp32."""
    if scores.dtype in (torch.bfloat16, torch.float16) and scores.device.type == "cpu":
        return _maxima_of_halves(scores, members)
    if members % 32:  # no whole vectors for `amax`, which is slower there than pooling
        return F.max_pool1d(scores[:, None], members)[:, 0]  # (r, 1, n) -> (r, 1, groups)
    return scores.view(len(scores), -1, members).amax(2)


def _maxima_of_halves(scores: Tensor, members: int) -> Tensor:
    """In fp32, some rows at a time: `amax` and pooling have no vectors of halves and take longer than both."""
    rows, columns = scores.shape
    maxima = torch.empty(rows, columns // members)
    step = max(1, PART_BYTES // (4 * columns))
    part = scratch("maxima", min(step, rows), columns, torch.float32, scores.device)
    for start in range(0, rows, step):
        halves = scores[start : start + step]
        maxima[start : start + step] = group_maxima(part[: len(halves)].copy_(halves), members)
    return maxima


def pad_rows(row: Tensor, rows: int, values: Tensor, indices: Tensor, least: int = 1) -> tuple[Tensor, Tensor]:
    """(row, index, value) triples, sorted by row, as rectangles of rows × entries: as many as the fullest row has, or
    `least` where that is more.

    Free places hold the value −∞ and the index 0.
    """
    counts = torch.bincount(row, minlength=rows)
    width = max(least, int(counts.max())) if rows else least
    place = row * width + torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    padded = values.new_full((rows * width,), -math.inf).scatter_(0, place, values)
    padded_indices = indices.new_zeros(rows * width).scatter_(0, place, indices)
    return padded.view(rows, width), padded_indices.view(rows, width)


def in_few_places(
    values: Float[Tensor, "N width"], indices: Int[Tensor, "N width"], chosen: Bool[Tensor, "N width"]
) -> tuple[Float[Tensor, "N most"], Int[Tensor, "N most"]]:
    """The chosen ones, in as many places as the row with most of them needs; free places hold −∞.

    What follows takes time by the place.
    """
    most = max(1, int(chosen.sum(1).max())) if len(chosen) else 1
    values, best = values.masked_fill(~chosen, -math.inf).topk(most, dim=1, sorted=False)
    return values, indices.gather(1, best)
