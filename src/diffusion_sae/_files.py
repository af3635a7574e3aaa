"""Writing files so that a kill at any moment leaves either the old file or the new one."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends without an error, removed otherwise."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _usual_mode(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _usual_mode(path: Path) -> None:
    """mkstemp gives 0600, and so does safetensors; a finished file gets what open() would have given it."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    with atomic_path(path) as temporary:
        write(temporary)


def remove_leftovers(folder: str | Path, *names: str) -> None:
    """Delete what killed runs left half-written of files with these names (patterns of glob)."""
    own = (f".{name}.*.tmp" for name in names)  # as `atomic_path` names them
    for pattern in (*own, ".tmp??????"):  # the last is what safetensors itself writes to first
        for leftover in Path(folder).glob(pattern):
            if leftover.is_file():
                leftover.unlink()


def write_json(path: str | Path, content: Any) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: str | Path) -> Any:
    return parse_json(Path(path).read_bytes(), str(path))


def parse_json(text: bytes, where: str) -> Any:
    """Content of a JSON file, which an error calls `where`."""
    try:
        return json.loads(text.decode("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON ({error}). Restore it or delete it and make it anew.") from error


def fingerprint_of(content: Mapping[str, Any]) -> str:
    """First 16 hex digits of the SHA-256 of the content as canonical JSON."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, read in blocks."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_writable_folder(folder: str | Path) -> Path:
    """The folder, made if need be; found out before the long work starts, not after it."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PermissionError(
            f"Cannot write to the output folder {str(folder)!r} ({error.strerror}). "
            "Choose a folder you may write to, or change its permissions."
        ) from error
    return folder


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder beside `folder`; its files move into place when the block ends without an error.

    A new folder appears in one step. In an existing one each file is replaced whole, `config.json` last, so that an
    interrupted save is either the old artifact or found out by its strict loading.
    """
    folder = Path(folder)
    require_writable_folder(folder.parent)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent) as name:
        temporary = Path(name, "content")
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _usual_mode(file)
        if not folder.exists():
            temporary.replace(folder)
            return
        require_writable_folder(folder)
        files = sorted((p for p in temporary.rglob("*") if p.is_file()), key=lambda p: p.name == "config.json")
        for file in files:
            target = folder / file.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
