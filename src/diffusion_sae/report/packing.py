"""Arrays and texts as files that a page opened from the disk can load: it may run scripts, but not fetch.

A file calls `report(name, {"text": …, "arrays": [[name, type, shape], …]}, "base64 of the deflated arrays")`.
"""

import base64
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

LONGEST_TEXT = 300
TYPES = {"uint8": "u1", "uint16": "u2", "int32": "i4", "float32": "f4"}
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def clean(text: str) -> str:
    """Control characters and broken Unicode (of undecodable file names) made visible; a very long text is cut off."""
    text = _UNPRINTABLE.sub("\ufffd", text[: LONGEST_TEXT + 1])
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"


def _cleaned(content: Any) -> Any:
    if isinstance(content, str):
        return clean(content)
    if isinstance(content, Mapping):
        return {clean(str(key)): _cleaned(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_cleaned(value) for value in content]
    return content


@dataclass(frozen=True)
class DataFolder:
    """Where files go; `within` gives the same for those of one SAE."""

    root: Path
    prefix: str = ""

    def within(self, name: str) -> "DataFolder":
        return DataFolder(self.root, f"{self.prefix}{name}/")

    def write(self, name: str, text: Any = None, arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """One file; `text` is anything that is JSON, `arrays` are of the `TYPES`.

        Raises:
            ValueError: for an array of another type, and for numbers in `text` that are not finite.
        """
        name = self.prefix + name
        described, body = [], b""
        for key, array in (arrays or {}).items():
            if array.dtype.name not in TYPES:
                raise ValueError(f"{key} of {name} is of the type {array.dtype}; a page reads {', '.join(TYPES)}.")
            described.append([key, TYPES[array.dtype.name], list(array.shape)])
            body += np.ascontiguousarray(array).tobytes()
            body += bytes(-len(body) % 4)  # the page views each array in place, and 4-byte types must be aligned
        header = json.dumps({"text": _cleaned(text), "arrays": described}, allow_nan=False, separators=(",", ":"))
        packed = base64.b64encode(zlib.compress(body, 6)).decode() if body else ""
        path = self.root / f"{name}.js"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'report({json.dumps(name)},{header},"{packed}");\n', encoding="ascii")
