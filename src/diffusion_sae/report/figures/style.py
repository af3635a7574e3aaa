"""One look for all figures: sizes, colours, text, and how a figure is written to a file.

Colours are of Okabe & Ito, and no two series differ by colour alone; colour scales have a luminance that rises from low
to high. So figures can be read with any colour vision, and in grey. matplotlib is imported when a figure is drawn.
"""

import functools
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from PIL import Image

from ..._config import check, check_choice
from ..._files import write_atomically
from ..._optional import missing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
R = TypeVar("R")

WIDTH = 9.0
"""Inches. At 900 pixels, a page's column, text of 9 points is 12 pixels high."""
DPI = 200
TITLE, TEXT, SMALL = 10.0, 9.0, 8.5
"""Points."""
MARGIN, GAP, TITLE_LINE = 0.12, 0.06, 0.34
"""Inches, of sheets of pictures: around them, between two, and of the title."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "X", "v", "P")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
SCALE = "cividis"
"""Colour scale of values that have an order."""
EMPHASIS, QUIET, GRID = "#D55E00", "#555555", "#dddddd"
FORMATS = ("png", "svg", "pdf")

_STYLE: dict[str, Any] = {
    "font.size": TEXT,
    "axes.titlesize": TITLE,
    "axes.titlelocation": "left",
    "axes.labelsize": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "svg.hashsalt": "diffusion-sae",
    "pdf.fonttype": 42,  # text stays text, which journals ask for
    "savefig.dpi": "figure",
}
_FONTS = ("font.family", "font.sans-serif", "font.serif", "font.monospace")


@contextmanager
def _style() -> Iterator[None]:
    """Our settings over matplotlib's defaults, so that a figure does not depend on the user's; fonts are the user's."""
    try:
        import matplotlib
        import matplotlib.figure
        import matplotlib.style
    except ImportError as error:
        raise missing("matplotlib", "plots", "A figure") from error
    fonts = {name: matplotlib.rcParams[name] for name in _FONTS}
    with matplotlib.style.context(["default", fonts | _STYLE]):
        yield


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Of a function that draws: in the common style. It raises ImportError if matplotlib is not installed."""

    @functools.wraps(draw)
    def in_style(*args: P.args, **kwargs: P.kwargs) -> R:
        with _style():
            return draw(*args, **kwargs)

    return in_style


def new_figure(height: float, width: float = WIDTH, layout: Any = "constrained") -> "Figure":
    """An empty white figure, in inches, that belongs to no window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout=layout)


def save_figure(figure: "Figure", path: str | Path, *, dpi: int = DPI, colours: int | None = None) -> Path:
    """Write a figure as PNG, SVG or PDF, by the suffix of `path`.

    Args:
        figure: as a function of this package returns it.
        path: where to.
        dpi, colours: as of `figure_bytes`.

    Raises:
        ValueError: for another suffix, and for `colours` of another format than PNG.
    """
    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    check_choice(f"the suffix of {path.name!r}", kind, FORMATS)
    content = figure_bytes(figure, kind, dpi=dpi, colours=colours)
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
    return path


@styled
def figure_bytes(figure: "Figure", kind: str = "png", *, dpi: int = DPI, colours: int | None = None) -> bytes:
    """The content of a file, for a page or an artifact. There is no time of day in it: the same figure is
    the same bytes.

    Args:
        figure: as a function of this package returns it.
        kind: png, svg or pdf.
        dpi: pixels an inch, of PNG and of pictures in the others.
        colours: of a PNG, at most 256: a fifth of the bytes, and with 256 hardly a difference to the eye.

    Raises:
        ValueError: for another kind, and for `colours` of another than PNG.
    """
    check_choice("kind", kind, FORMATS)
    check(colours is None or kind == "png", f"colours are of PNG files, got {colours} for {kind}.")
    dates = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    drawn = io.BytesIO()
    figure.savefig(drawn, format=kind, metadata=dates[kind], dpi=dpi)
    return (drawn if colours is None else _reduced(drawn, colours)).getvalue()


def _reduced(png: io.BytesIO, colours: int) -> io.BytesIO:
    """The picture with a palette of its own."""
    small = Image.open(png).convert("RGB").quantize(colours, dither=Image.Dither.NONE)
    reduced = io.BytesIO()
    small.save(reduced, "PNG", optimize=True)
    return reduced


def plain_text(text: object) -> str:
    """One line that is drawn as it stands: a `$` begins no formula, and there are no control characters."""
    line = " ".join(str(text).split())
    kept = "".join(c if c.isprintable() else "\ufffd" for c in line)
    return kept.replace("$", r"\$")


def text_width(text: str, size: float = SMALL, weight: str = "normal") -> float:
    """Inches that a line of text takes."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    shown = text.replace(r"\$", "$")
    properties = FontProperties(size=size, weight=weight)
    return text_to_path.get_text_width_height_descent(shown, properties, ismath=False)[0] / 72


def shortened(text: object, inches: float, size: float = SMALL, *, weight: str = "normal", end: bool = False) -> str:
    """The beginning of a text, or its end, as much as fits into a width, with `…` for the rest.

    Args:
        text: any text, which is made plain.
        inches: the width.
        size, weight: of the font.
        end: keep the end, which tells module paths apart.
    """
    line = plain_text(text)
    if len(line) < 500 and text_width(line, size, weight) <= inches:
        return line
    raw = " ".join(str(text).split())
    low, high = 0, min(len(raw), 500)  # no line of a figure has more

    def cut(count: int) -> str:
        return "…" + plain_text(raw[len(raw) - count :]) if end else plain_text(raw[:count]) + "…"

    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text_width(cut(middle), size, weight) <= inches else (low, middle - 1)
    return cut(low)


def ink_on(rgba: Sequence[float]) -> str:
    """Black or white, whichever has the higher contrast on a colour (WCAG's relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgba[:3]]
    luminance = sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return "black" if luminance > 0.179 else "white"


def series_style(number: int) -> dict[str, Any]:
    """Colour, marker and dashes of a series; they differ in all three, and after seven in one at least."""
    turn, place = divmod(number, len(COLOURS))
    shift = (place + turn) % len(COLOURS)
    return {"color": COLOURS[place], "marker": MARKERS[shift], "linestyle": LINES[shift]}


def percent(value: float, _: object = None) -> str:
    """Of a share in 0…1; also a formatter of an axis."""
    return f"{100 * value:.3g} %"


def significant(value: float, digits: int = 3) -> str:
    """A number with so many digits, in whole from 1,000 on."""
    if not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.{digits}g}".rstrip(".")


def legend_below(figure: "Figure", handles: Mapping[str, Any], most: int = 5) -> None:
    """The series by name below all panels, in rows that are not wider than the figure.

    Of long names the beginning is shown, of those without a space, such as module paths, the end.
    """
    if not handles:
        return
    labels = [shortened(name, 2.4, end=" " not in name) for name in handles]
    widest = max(map(text_width, labels)) + 0.55  # the handle and the gaps
    columns = max(1, min(len(labels), most, int((figure.get_figwidth() - 0.3) / widest)))
    columns = math.ceil(len(labels) / math.ceil(len(labels) / columns))  # rows of about the same length
    figure.legend(list(handles.values()), labels, loc="outside lower center", ncols=columns, handlelength=2.6)


def blank_sheet(width: float, height: float, title: str = "") -> tuple["Figure", "Axes"]:
    """A figure whose data are inches from its upper left corner, with a title there."""
    figure = new_figure(height, width, layout=None)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    if title:
        line = shortened(title, width - 2 * MARGIN, TITLE, weight="bold")
        axes.text(MARGIN, MARGIN, line, va="top", fontsize=TITLE, weight="bold")
    return figure, axes


def show_picture(axes: "Axes", pixels: Any, left: float, top: float, size: float) -> None:
    """A square picture on a blank sheet; small ones are enlarged pixel by pixel."""
    kind = "nearest" if len(pixels) <= 64 else "antialiased"
    axes.imshow(pixels, extent=(left, left + size, top + size, top), aspect="auto", interpolation=kind)
