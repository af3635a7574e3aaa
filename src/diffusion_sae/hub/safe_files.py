"""Reading weights that anyone may have written: what is looked at before a file is believed.

A safetensors file is a table of names, types, shapes and places, and bytes: reading it runs nothing. What a hostile one
can still do is ask for much memory or time, or hold numbers that poison what is computed with them.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

MAX_HEADER_BYTES = 1 << 20  # a tensor takes about 100: an SAE has 4 to 7, a probe a few dozen
MAX_JSON_BYTES = 16 << 20  # of a config or an index; read whole
SHARD = re.compile(r"[\w.-]+\.safetensors")
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class DamagedFileError(ValueError):
    """A weights file that is cut off, or no weights file."""


class TensorInfo(NamedTuple):
    dtype: str
    """As safetensors calls it: F32, I64, …"""
    shape: tuple[int, ...]


def tensor_table(path: str | Path) -> dict[str, TensorInfo]:
    """Names, types and shapes of a safetensors file, from its header alone.

    Raises:
        DamagedFileError: if the file is damaged.
        ValueError: if its header is larger than a million bytes.
    """
    path = Path(path)
    damaged = f"{path.name} is no safetensors file, or it is damaged"
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError(
                f"{path.name} has a header of {length:,} bytes, which lists far more tensors than an SAE or a probe "
                f"has (at most {MAX_HEADER_BYTES:,} bytes are read). It is damaged or not what it says it is."
            )
        content = file.read(length)
    try:
        table = json.loads(content)
        return {
            str(name): TensorInfo(str(entry["dtype"]), tuple(int(size) for size in entry["shape"]))
            for name, entry in table.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise DamagedFileError(f"{damaged} ({type(error).__name__} in its header). Download it again.") from error


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a file.

    Raises:
        ValueError: if the file is damaged or lists too many.
    """
    tensor_table(path)
    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(f"{Path(path).name} is damaged ({error}). Download it again.") from error


def shards_of(index: str | Path) -> dict[str, str]:
    """Tensor → file, from `model.safetensors.index.json`: files beside the index and nowhere else.

    Raises:
        ValueError: for a damaged index, or one that names a file in another folder.
    """
    path = Path(index)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes; at most {MAX_JSON_BYTES:,} are read.")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not valid JSON ({error}). Download it again.") from error
    weights = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not weights:
        raise ValueError(f"{path.name} is damaged: it has no weight_map of tensors and files. Download it again.")
    for name, file in weights.items():
        if not isinstance(file, str) or not SHARD.fullmatch(file) or file.startswith("."):
            raise ValueError(
                f"{path.name} says that {name} lies in {file!r}. A shard is a .safetensors file beside the index; "
                "nothing else is opened. Do not use this artifact, or save it again."
            )
    return weights


def refuse_not_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise ValueError if a tensor holds NaN or infinity: every number computed with it would be wrong."""
    for name, tensor in tensors.items():
        # a sum is a third of the time of looking at each; if it overflows, they are looked at
        floating = tensor.is_floating_point() and not tensor.is_meta
        if floating and not bool(torch.isfinite(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"{where}: {name} holds NaN or infinite values. The weights are damaged, or the training diverged: "
                "take an earlier checkpoint."
            )
