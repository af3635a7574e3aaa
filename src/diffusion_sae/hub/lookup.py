"""Whether a folder or a repository on the Hub holds a file."""

from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from .connection import clear_connection_errors


def find_file(source: str, name: str, *, subfolder: str = "", **hub: Any) -> Path | None:
    """Path of a file in a folder or, downloaded, of a repository; None if there is no such file.

    None as well when offline and not in the cache: what loads the model then says what is missing.

    Args:
        source: folder or Hub id.
        name: of the file.
        subfolder: within the folder or repository.
        **hub: revision, token, cache_dir, local_files_only.
    """
    if Path(source).is_dir():
        path = Path(source, subfolder, name)
        return path if path.is_file() else None
    try:
        with clear_connection_errors(f"downloading {name} of {source!r}"):
            return Path(hf_hub_download(source, name, subfolder=subfolder or None, **hub))
    except EntryNotFoundError:  # LocalEntryNotFoundError, of the offline case, is one
        return None
