"""What can be wrong with any figure: text that is cut off, that lies on other text, or that is too small."""

import itertools
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text


def drawn_texts(figure: Any) -> list[Text]:
    """All that is seen when the figure is drawn."""
    FigureCanvasAgg(figure).draw()
    found = figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_visible() and artist.get_text())
    unseen = _undrawn_labels(figure)
    return [text for text in dict.fromkeys(found) if text not in unseen]


def _undrawn_labels(figure: Any) -> set[Text]:
    """Labels of ticks that are left from before, lie beyond an axis' limits, or are of axes that are switched off."""
    unseen = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            in_use = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            low, high = sorted(axis.get_view_interval())
            for tick in {*axis.majorTicks, *axis.minorTicks, *in_use}:
                inside = low - 1e-9 <= tick.get_loc() <= high + 1e-9
                if not (axes.axison and tick in in_use and inside):
                    unseen |= {tick.label1, tick.label2}
    return unseen


def texts(figure: Any) -> list[str]:
    return [text.get_text() for text in drawn_texts(figure)]


def box(text: Text) -> Any:
    return text.get_window_extent(text.figure.canvas.get_renderer())


def check_text(figure: Any, smallest: float = 8.5) -> None:
    """No text leaves the figure, none touches another, none is smaller than 8.5 points."""
    shown = drawn_texts(figure)
    frame = figure.bbox
    for text in shown:
        own = box(text)
        inside = own.x0 >= -1 and own.y0 >= -1 and own.x1 <= frame.x1 + 1 and own.y1 <= frame.y1 + 1
        assert inside, f"{text.get_text()!r} leaves the figure: {own} of {frame}"
        assert text.get_fontsize() >= smallest, text.get_text()
    for one, other in itertools.combinations(shown, 2):
        a, b = box(one).padded(-1), box(other).padded(-1)
        assert not (a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1), (one.get_text(), other.get_text())
