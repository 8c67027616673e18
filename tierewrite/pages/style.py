"""How pictures look: colours, sizes, the settings of matplotlib, and how names and ratios are written on them."""

from __future__ import annotations

import html
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tierewrite.errors import UsageError, shown
from tierewrite.units import percent

INK, MUTED, LINE = "#17202e", "#5d6878", "#dde2e9"
BEFORE, AFTER = "#a9b4c4", "#0f8b8d"
NEVER, ONE_SIDE = "#d1345b", "#9aa3ad"
PAPER = "#ffffff"
VARIABLES = {
    INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)", BEFORE: "var(--before)", AFTER: "var(--after)",
    NEVER: "var(--never)", ONE_SIDE: "var(--one-side)", PAPER: "var(--panel)",
}  # fmt: skip
"""Colour of the light theme -> the page's variable for it."""

COLOURS = "viridis"
WIDTH = 10.4  # inches of every picture
MAX_BARS = 12
MAX_ROWS = 14
MAX_HEATMAPS = 6
MAX_CELLS = 1024  # layers or experts that a heatmap shows

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same everywhere
    "font.size": 9,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "image.interpolation": "none",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
}


@contextmanager
def drawing(salt: str) -> Iterator[None]:
    """matplotlib with our settings alone; raises the UsageError where it is missing."""
    try:
        import matplotlib
    except ImportError:
        raise UsageError(
            "pictures are drawn by matplotlib, which is not installed: pip install 'tierewrite[report]' "
            "(--json needs none)"
        ) from None
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that the font lacks: the browser has them
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE | {"svg.hashsalt": salt})
        yield


def escaped(text: object) -> str:
    """Text for HTML, attributes included; control and direction characters are spelled out, long names cut."""
    return html.escape(shown(text), quote=True)


def label(name: str, width: int = 34) -> str:
    """`name` as it is drawn: printable characters only, cut in the middle to `width` characters."""
    text = "".join(c if c.isprintable() else "?" for c in shown(name))
    return text if len(text) <= width else f"{text[: width // 2 - 1]}…{text[-(width - width // 2) :]}"


def change(before: int, after: int) -> str:
    """The change from `before` to `after`, with a minus as it is printed: "−42.1%"."""
    return percent(before, after).replace("-", "−")


def times(ratio: float | None) -> str:
    """A ratio for people: "2.26x", "18.4x", "1,250x"; a dash for none."""
    if ratio is None:
        return "–"
    if ratio >= 1e6 or math.isinf(ratio):
        return f"{ratio:.1e}×" if math.isfinite(ratio) else "∞×"
    return f"{ratio:.2f}×" if ratio < 10 else f"{ratio:.1f}×" if ratio < 100 else f"{ratio:,.0f}×"


def ratio_top(ratio: float) -> float:
    """The end of a logarithmic axis that starts at 1."""
    return min(max(ratio, 1.05), 1e6)
