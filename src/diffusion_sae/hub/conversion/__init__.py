"""Checkpoints of other libraries: plain tensors and settings in, those of a KSparseAutoencoder out, and back.

One module a format. What cannot be said exactly by a config of this library is refused with the reason; nothing is
approximated. `docs/conversion.md` has the table, measured against the released libraries.
"""

from .options import ForeignOptions
from .registry import format_at, read_foreign, write_foreign

__all__ = ["ForeignOptions", "format_at", "read_foreign", "write_foreign"]
