"""Memory that is used again, in every call or for every part of the rows.

A new CPU tensor of megabytes is page-faulted anew at every step, which takes longer than its arithmetic.
"""

import threading
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

PART_BYTES = 2**20

_kept = threading.local()


def scratch(name: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows, columns) of what is kept by this name for each thread, with any content."""
    size = rows * columns * dtype.itemsize
    kept = getattr(_kept, name, None)
    if kept is None or kept.numel() < size or kept.device != device:
        with torch.inference_mode(False):  # else no later call outside of it may write to this memory
            kept = torch.empty(size, dtype=torch.uint8, device=device)
        setattr(_kept, name, kept)
    return kept[:size].view(dtype).view(rows, columns)


def row_parts(*arrays: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each, a megabyte of the first at a time."""
    rows = max(1, PART_BYTES // max(1, arrays[0].shape[1] * arrays[0].element_size()))
    return zip(*(array.split(rows) for array in arrays), strict=True)


def of_sums(values: Tensor) -> torch.dtype:
    """The type in which values are summed: fp32, or fp64 for fp64."""
    return torch.promote_types(values.dtype, torch.float32)


def distances(some: Float[Tensor, "N d"], others: Float[Tensor, "N d"]) -> Float[Tensor, " N"]:
    """‖some − others‖ of each row, without gradient; of halves in fp32: in fp16 a sum of squares is soon too large.

    The results' memory is from before that of the differences: between these, each would keep the next difference from
    the memory of the last.
    """
    lengths = some.new_empty(len(some), dtype=torch.promote_types(of_sums(some), of_sums(others)))
    for one, other, length in row_parts(some.detach(), others.detach(), lengths):
        torch.linalg.vector_norm(one - other, dim=1, dtype=lengths.dtype, out=length)
    return lengths
