"""Text tables for the terminal."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[object]], header: Sequence[str] = ()) -> str:
    """Left-aligned columns, two spaces apart."""
    lines = [[str(cell) for cell in row] for row in ([header, *rows] if header else rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
