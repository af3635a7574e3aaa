"""Tensors of a `.pt` or `.pth` file, by `torch.load(weights_only=True)` alone.

That reader knows tensors and plain containers and calls nothing else. What it leaves open is looked at here: members
of the archive that unpack to more than they hold, and tensors whose shape claims more than their bytes.
"""

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAX_PROGRAM_BYTES = 1 << 20  # the pickle itself; the numbers of its tensors lie beside it
# what the reader raises over damaged bytes; its own error by way of torch, as no module here imports pickle
UNREADABLE = (
    torch.serialization.pickle.UnpicklingError,  # type: ignore[attr-defined]
    *(AssertionError, AttributeError, EOFError, IndexError, KeyError, NotImplementedError, OSError, OverflowError),
    *(RecursionError, RuntimeError, TypeError, UnicodeError, ValueError, MemoryError, struct.error),
)
ADVICE = (
    "In the environment that made it, save the tensors alone, and give k and the like as options:\n"
    '    checkpoint = torch.load(path, weights_only=False); torch.save(checkpoint["state_dict"], "weights.pt")'
)


def read_pickle(path: str | Path) -> Any:
    """Content of the file.

    Raises:
        ValueError: if it needs more than tensors and containers, is damaged, or claims to hold more than it does.
    """
    path = Path(path)
    _check_archive(path)
    try:
        needed = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (*UNREADABLE, zipfile.BadZipFile) as error:
        raise ValueError(f"{path.name} is damaged ({type(error).__name__}: {error}). Download it again.") from error
    if needed:
        raise ValueError(
            f"{path.name} needs {', '.join(sorted(needed)[:3])}{' and more' if len(needed) > 3 else ''} to be read: it "
            "holds objects of a program beside tensors, and reading those runs code of whoever wrote the file, so it "
            f"is refused.\n{ADVICE}"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise ValueError(
            f"{path.name} cannot be read as tensors alone ({type(error).__name__}: {error}), and nothing else of a "
            f"pickle is read. It is damaged, or needs more.\n{ADVICE}"
        ) from error


def _check_archive(path: Path) -> None:
    """torch.save writes an uncompressed zip archive: no member may hold more bytes than it takes in the file."""
    try:
        is_archive = zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        is_archive = True  # one of several disks, of which ZipFile says so below
    if not is_archive:
        raise ValueError(
            f"{path.name} is no archive of torch.save (since PyTorch 1.6, a zip file). Save it again with a newer "
            "PyTorch, or as safetensors."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, *UNREADABLE) as error:
        raise ValueError(f"{path.name} is damaged ({error}). Download it again.") from error
    packed = [member.filename for member in members if member.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise ValueError(
            f"{path.name} holds compressed members ({', '.join(packed[:3])}), which torch.save does not write: they "
            "may unpack to any size. Save it again with torch.save."
        )
    size = path.stat().st_size
    if sum(member.file_size for member in members) > size:
        raise ValueError(f"{path.name} has {size:,} bytes, and its members claim more. It is damaged.")
    for member in members:
        if member.filename.endswith("data.pkl") and member.file_size > MAX_PROGRAM_BYTES:
            raise ValueError(
                f"{path.name} describes its tensors in {member.file_size:,} bytes, far more than an SAE needs "
                f"(at most {MAX_PROGRAM_BYTES:,} are read)."
            )


def tensors_of(content: Any, where: str) -> dict[str, Tensor]:
    """The state dict in what was read: the dict itself, or the one under `state_dict` or, in backups, `ae`.

    Raises:
        ValueError: if there is none, or a tensor is not dense or claims more numbers than it has bytes.
    """
    for key in ("state_dict", "ae"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{where} holds a {type(content).__name__}, not a state dict of named tensors.")
    tensors = {}
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(  # noqa: TRY004  a file's fault, not an argument's
                f"{where} holds {name!r}: {type(value).__name__} where a state dict has tensors.\n{ADVICE}"
            )
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise ValueError(f"{where}: {name} is no dense tensor ({value.layout}). Save it as one.")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(
                f"{where}: {name} has the shape {tuple(value.shape)} over {value.untyped_storage().nbytes():,} bytes: "
                "it repeats them and would unpack to more. Save it with .contiguous()."
            )
        tensors[name] = value
    return tensors
