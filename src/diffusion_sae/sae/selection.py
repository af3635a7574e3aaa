"""Which latents are active: the largest or all positive scores, exactly, of a block of rows at a time.

Weights are latent-major here, (num_latents, d_in): one latent is one contiguous row. All functions run on any device,
and none holds a tensor of rows × latents.
"""

import math
import threading

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Bool, Float, Int
from torch import Tensor

SCORE_BYTES = {"cpu": 2**27}  # in much smaller blocks the product is slower
OTHER_SCORE_BYTES = 2**28


def row_block(rows: int, latents: int, device: torch.device, itemsize: int) -> int:
    """How many rows are scored at a time."""
    budget = SCORE_BYTES.get(device.type, OTHER_SCORE_BYTES)
    return max(1, min(rows, max(512, budget // max(1, latents * itemsize))))


_kept = threading.local()


def _buffer(rows: int, columns: int, like: Tensor) -> Tensor:
    """Memory for scores, kept for each thread: a new CPU tensor of this size is page-faulted anew at every step."""
    elements = rows * columns
    kept = getattr(_kept, "buffer", None)
    if kept is None or kept.numel() < elements or kept.dtype != like.dtype or kept.device != like.device:
        with torch.inference_mode(False):  # else no later call outside of it may write to this memory
            _kept.buffer = kept = torch.empty(elements, dtype=like.dtype, device=like.device)
    return kept[:elements].view(rows, columns)


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


def group_size(latents: int, k: int) -> int:
    """Elements a group for `top_k`, near 1.6 √(n / k): more groups cost more in finding the largest maxima, larger ones
    in looking through their members. A multiple of 32 where it can be, over which `amax` runs in whole vectors.
    """
    best = 1.6 * math.sqrt(latents / k)
    return 16 if best < 16 else 32 * max(1, min(4, round(best / 32)))


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
    maxima, chosen = group_maxima(scores, members).topk(k, dim=1, sorted=False)
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
    if members % 32:  # no whole vectors for `amax`, which is slower there than pooling
        return F.max_pool1d(scores[:, None], members)[:, 0]  # (r, 1, n) -> (r, 1, groups)
    return scores.view(len(scores), -1, members).amax(2)


def pad_rows(row: Tensor, rows: int, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """(row, index, value) triples, sorted by row, as rectangles (rows, most entries of a row).

    Free places hold the value −∞ and the index 0.
    """
    counts = torch.bincount(row, minlength=rows)
    width = max(1, int(counts.max())) if rows else 1
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


def encode_top_k(
    features: Float[Tensor, "N d_in"], W_enc: Float[Tensor, "n d_in"], b_enc: Float[Tensor, " n"], k: int
) -> tuple[Float[Tensor, "N k"], Int[Tensor, "N k"]]:
    """The k largest of W_enc x + b_enc and which they are, in no order, without gradient."""
    rows, latents = len(features), len(W_enc)
    values = features.new_empty(rows, k)
    indices = torch.empty(rows, k, dtype=torch.long, device=features.device)
    features, W_enc, b_enc = _for_product(features, W_enc, b_enc)
    members = group_size(latents, k)
    # the last group is filled up with −∞; with rows of a multiple of 64 bytes: into rows that begin anywhere the
    # product is 1.4 times slower
    columns = -(-latents // members) * members
    block = row_block(rows, columns, features.device, features.element_size())
    buffer = _buffer(block, columns, features)
    if columns > latents:
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
    rows, latents, dtype = len(features), len(W_enc), features.dtype
    features, W_enc, b_enc = _for_product(features, W_enc, b_enc)
    floor = threshold.clamp_min(0)
    block = row_block(rows, latents, features.device, features.element_size())
    buffer = _buffer(block, latents, features)
    found = []
    for start in range(0, max(1, rows), block):
        part = features[start : start + block]
        scores = scores_of(part, W_enc, b_enc, buffer[: len(part)])
        row, column = torch.nonzero(scores > floor, as_tuple=True)
        found.append((row + start, column, scores[row, column].to(dtype)))
    row, column, value = (torch.cat(parts) for parts in zip(*found, strict=True))
    return pad_rows(row, rows, value, column)
