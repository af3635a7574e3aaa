"""Files of a foreign checkpoint: a folder, one file, or a repository on the Hub."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from ..._files import sha256_of
from ...zoo import embedded_path
from ..connection import clear_connection_errors
from ..safe_files import MAX_JSON_BYTES, read_safetensors, refuse_not_finite
from .options import ForeignOptions
from .pickles import read_pickle, tensors_of

WEIGHTS_SUFFIXES = (".safetensors", ".pt", ".pth")
# what the libraries call their files; of a repository nothing else is downloaded
KNOWN_FILES = (
    *("cfg.json", "config.json", "activation_scaler.json"),
    *("sae_weights.safetensors", "sae.safetensors", "ae.pt", "state_dict.pth"),
)


@dataclass
class Checkpoint:
    folder: Path
    source: str
    """Name to say in errors and in what was made of it: a Hub id, or the file's own name."""
    chosen: str | None = None
    """The weights file that the user named."""
    read: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """State dicts by file name, each read once."""

    @classmethod
    def open(cls, source: str | Path, options: ForeignOptions, **hub: Any) -> "Checkpoint":
        """
        Args:
            source: folder, file or Hub id (owner/name).
            options: subfolder, filename and revision are used here.
            **hub: token, cache_dir, local_files_only.

        Raises:
            FileNotFoundError: if there is no such folder, file or repository, or it may not be read.
        """
        path = Path(source)
        if path.is_file():
            return cls(path.parent, path.name, path.name)
        embedded = embedded_path(str(source))
        if path.is_dir() or embedded is not None:
            folder = (embedded or path) / options.subfolder
            return cls(folder, folder.resolve().name, options.filename)._require(options)
        names = [*KNOWN_FILES, *([options.filename] if options.filename else [])]
        prefix = f"{options.subfolder.strip('/')}/" if options.subfolder else ""
        try:
            with clear_connection_errors(f"downloading {str(source)!r}"):
                folder = snapshot_download(
                    str(source), allow_patterns=[prefix + name for name in names], revision=options.revision, **hub
                )
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            reason = str(error).strip().splitlines()[0]
            raise FileNotFoundError(
                f"No checkpoint at {str(source)!r}: it is no folder and no file, and no repository on the Hub that can "
                f"be read ({type(error).__name__}: {reason})."
            ) from error
        return cls(Path(folder) / options.subfolder, str(source), options.filename)._require(options)

    def _require(self, options: ForeignOptions) -> "Checkpoint":
        if self.chosen is not None and not (self.folder / self.chosen).is_file():
            raise FileNotFoundError(f"{self.source!r} has no file {options.subfolder or '.'}/{self.chosen}.")
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.source!r} has no folder {options.subfolder!r} with an SAE in it.")
        return self

    def has(self, *names: str) -> bool:
        return all((self.folder / name).is_file() for name in names) and self.chosen in (None, *names)

    def json(self, name: str) -> dict[str, Any]:
        """Content of a config file, an object.

        Raises:
            ValueError: if it is too large, damaged or no object.
        """
        path = self.folder / name
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"{name} has {path.stat().st_size:,} bytes; at most {MAX_JSON_BYTES:,} are read.")
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name} is not valid JSON ({error}). Download it again.") from error
        if not isinstance(content, dict):
            raise ValueError(f"{name} holds a {type(content).__name__}, not an object of settings.")  # noqa: TRY004
        return content

    def sole_weights(self) -> str | None:
        """The file that was named, or the only one in the folder that can hold weights."""
        if self.chosen is not None:
            return self.chosen
        found = [path.name for path in sorted(self.folder.iterdir()) if path.suffix in WEIGHTS_SUFFIXES]
        return found[0] if len(found) == 1 else None

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The state dict in a weights file, every number of it finite.

        Raises:
            ValueError: if it is damaged or hostile, or needs more than tensors.
        """
        if name not in self.read:
            path = self.folder / name
            if path.suffix == ".safetensors":
                found = read_safetensors(path)
            elif path.suffix in WEIGHTS_SUFFIXES:
                found = tensors_of(read_pickle(path), name)
            else:
                raise ValueError(f"{name} is no weights file; known are {', '.join(WEIGHTS_SUFFIXES)}.")
            refuse_not_finite(found, name)
            self.read[name] = found
        return self.read[name]

    def origin(self) -> str:
        """Which file the weights were read from, for the config of what is made of it."""
        name = next(iter(self.read))
        file = name if self.source == name else f"{self.source}/{name}"
        return f"{file} (sha256 {sha256_of(self.folder / name)[:16]})"


def whole_number(config: Mapping[str, Any], key: str, where: str) -> int:
    """A positive integer of a config file.

    Raises:
        ValueError: if it is missing or another thing.
    """
    value = config.get(key)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise ValueError(f"{where} must give {key} as a positive integer, got {value!r}.")
    return value
