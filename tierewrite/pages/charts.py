"""The pictures of a page, drawn by matplotlib: as SVG that takes the page's colours, or all on one PNG.

matplotlib is the optional extra `report`; without it everything here raises a UsageError that says so. Drawing is
deterministic: no dates, no random ids, nobody's matplotlibrc. Names come from strangers: they are drawn as plain text,
never as TeX-like formulas, cut to what fits.
"""

from __future__ import annotations

import io
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from tierewrite.consumers.findings import ReadinessReport
from tierewrite.pages.facts import Divergence, Facts, SizeRow
from tierewrite.pages.heatmaps import Heatmap, heatmaps, scale_top
from tierewrite.pages.style import (
    AFTER,
    BEFORE,
    COLOURS,
    INK,
    LINE,
    MAX_BARS,
    MAX_ROWS,
    MUTED,
    NEVER,
    ONE_SIDE,
    PAPER,
    VARIABLES,
    WIDTH,
    change,
    drawing,
    escaped,
    label,
    ratio_top,
    times,
)
from tierewrite.tables import count
from tierewrite.units import size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


def svgs(facts: Facts) -> dict[str, list[str]]:
    """Inline SVG elements by section: "sizes", "ratios", "heatmaps"; a list is empty where there is nothing to draw.

    Raises:
        UsageError: matplotlib is not installed.
    """
    found: dict[str, list[str]] = {"sizes": [], "ratios": [], "heatmaps": []}
    with drawing("tierewrite"):
        if facts.sizes is not None:
            rows = bars(facts.sizes.by_part)
            found["sizes"].append(
                _svg(lambda fig: _draw_sizes(fig, rows, False), _sizes_height(rows), "Size before and after, by part")
            )
        shown_ = [d for d in facts.divergence if d.ratios][:MAX_ROWS]
        if shown_:
            found["ratios"].append(
                _svg(lambda fig: _draw_ratios(fig, shown_), _ratios_height(shown_), "Histogram of ratios by projection")
            )
            for heat in heatmaps(facts):
                found["heatmaps"].append(_captioned(heat))
    return found


def _captioned(heat: Heatmap) -> str:
    """A heatmap with its title and note as text, which stay in view where the picture has to be scrolled."""
    width = heat.width
    picture = _svg(
        lambda figure: heat.draw(figure, width, False),
        heat.height_without_title,
        f"Heatmap of ratios: {label(heat.title)}",
        width,
    )
    note = f" <span>{escaped(heat.note)}</span>" if heat.note else ""
    return f"<figcaption><b>{escaped(heat.title)}</b>{note}</figcaption><div class=scroll>{picture}</div>"


def _svg(draw: Callable[[Figure], None], height: float, title: str, width: float = WIDTH) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=72)
    draw(figure)
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(out.getvalue(), title, None if width == WIDTH else round(width * _PIXELS))


_PIXELS = 98
"""Of an inch, so that text in small pictures is as large as in those that are as wide as the page."""
_SVG_NS = "{http://www.w3.org/2000/svg}"
_XLINK = "{http://www.w3.org/1999/xlink}href"
_DROPPED = {f"{_SVG_NS}metadata"}


def _inline(svg: bytes, title: str, pixels: int | None) -> str:
    """matplotlib's SVG as an element of an HTML page: no namespaces, no metadata, no ids but those that are used, and
    the page's colours.

    Args:
        pixels: how wide it is on the page; None: as wide as the page.
    """
    root = ElementTree.fromstring(svg)
    text = svg.decode()
    used = set(re.findall(r'url\(#([^)"]+)\)', text)) | set(re.findall(r'xlink:href="#([^"]+)"', text))
    # Ids are unique in a page: those of two pictures must not meet.
    prefix = f"{re.sub('[^a-z]+', '-', title.lower())[:40]}-{len(svg)}-"
    for parent in root.iter():
        for child in [c for c in parent if c.tag in _DROPPED]:
            parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.replace(_SVG_NS, "")
        name = element.attrib.pop("id", None)
        if name in used:
            element.set("id", f"{prefix}{name}")
        href = element.attrib.pop(_XLINK, None)
        if href is not None:
            element.set("href", f"#{prefix}{href[1:]}" if href.startswith("#") else href)
        for attribute in ("clip-path", "style", "fill", "stroke"):
            value = element.get(attribute)
            if value:
                value = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}\1)", value)
                element.set(attribute, re.sub("#[0-9a-f]{6}", lambda m: VARIABLES.get(m[0], m[0]), value))
        style = element.get("style", "")
        if "'DejaVu Sans'" in style:
            element.set("style", style.replace("'DejaVu Sans'", "var(--sans)"))
    style_sheet = root.find("defs/style")
    if style_sheet is not None:  # a rule for all elements of the page: ours is in the page's own sheet
        for parent in root.iter("defs"):
            if style_sheet in list(parent):
                parent.remove(style_sheet)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", title)
    root.set("class", "chart" if pixels is None else "chart small")
    if pixels is not None:
        root.set("style", f"width:{pixels}px")
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)


def bars(rows: Sequence[SizeRow], most: int = MAX_BARS) -> list[SizeRow]:
    """The largest rows, the rest of them as one."""
    if len(rows) <= most:
        return list(rows)
    return [*rows[: most - 1], rest_of(rows[most - 1 :])]


def rest_of(rows: Sequence[SizeRow]) -> SizeRow:
    """Many rows as one."""
    return SizeRow(
        f"{len(rows)} others",
        sum(r.before_tensors for r in rows),
        sum(r.before_bytes for r in rows),
        sum(r.after_tensors for r in rows),
        sum(r.after_bytes for r in rows),
    )


def _sizes_height(rows: Sequence[SizeRow]) -> float:
    return 0.62 + 0.34 * len(rows)


def _bar_text(row: SizeRow) -> str:
    if row.before_bytes == row.after_bytes:
        return f"{size(row.after_bytes)} (unchanged)"
    return f"{size(row.before_bytes)} → {size(row.after_bytes)} ({change(row.before_bytes, row.after_bytes)})"


def _draw_sizes(figure: Figure | SubFigure, rows: Sequence[SizeRow], legend: bool) -> None:
    height = _sizes_height(rows)
    axes = figure.add_axes((0.245, 0.02, 0.735, 1 - 0.34 / height))
    largest = max((r.before_bytes for r in rows), default=0) or 1
    at = range(len(rows))
    axes.barh([i - 0.19 for i in at], [r.before_bytes for r in rows], height=0.32, color=BEFORE, label="before")
    axes.barh([i + 0.19 for i in at], [r.after_bytes for r in rows], height=0.32, color=AFTER, label="after")
    for i, row in enumerate(rows):
        axes.text(max(row.before_bytes, row.after_bytes) + largest * 0.012, i, _bar_text(row), va="center", color=MUTED)
    axes.set_yticks(list(at), [label(r.name) for r in rows])
    axes.set_xlim(0, largest * 1.36)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0)
    if legend:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1 - 0.02), ncols=2, fontsize=8.5, labelcolor=MUTED)


def _ratios_height(rows: Sequence[Divergence]) -> float:
    return 0.75 + 0.46 * len(rows)


def ticks(top: float) -> list[float]:
    """Few round values from 1 to `top`, for a logarithmic axis."""
    if top < 1.3:
        steps = [1, 1.02, 1.05, 1.1, 1.2]
    elif top < 6:
        steps = [1, 1.25, 1.5, 2, 3, 4, 5]
    elif top < 200:
        steps = [1, 1.5, 2, 3, 5, 10, 20, 50, 100]
    else:
        steps = [10.0**i for i in range(7)]
    return [s for s in steps if s <= top * 1.0001]


def _tick_text(value: float) -> str:
    return f"{value:g}×" if value < 1e4 else f"{value:.0e}×"


def _draw_ratios(figure: Figure | SubFigure, rows: Sequence[Divergence]) -> None:
    import numpy as np

    height = _ratios_height(rows)
    axes = figure.add_axes((0.245, 0.44 / height, 0.56, 1 - 0.72 / height))
    top = ratio_top(max(d.max or 1 for d in rows))
    edges = np.linspace(0, math.log(top) or 1, 61)
    for i, row in enumerate(rows):
        values = np.log(np.clip(np.array(row.ratios), 1, top))
        counts, _ = np.histogram(values, edges)
        heights = 0.78 * counts / counts.max()
        axes.stairs(i + 0.39 - heights, edges, baseline=i + 0.39, fill=True, color=AFTER, alpha=0.85, linewidth=0)
        axes.plot([0, edges[-1]], [i + 0.4, i + 0.4], color=LINE, linewidth=0.8, zorder=0)
        median, p90 = row.median or 1, row.p90 or 1
        axes.plot([math.log(min(median, top))] * 2, [i - 0.4, i + 0.4], color=INK, linewidth=1.4)
        axes.plot([math.log(min(p90, top))] * 2, [i - 0.1, i + 0.4], color=INK, linewidth=0.9, linestyle=(0, (2, 1.5)))
        axes.plot([math.log(ratio_top(row.max or 1))], [i + 0.4], marker="v", color=NEVER, markersize=5, clip_on=False)
        for x, text, colour in zip(
            (1.12, 1.22, 1.32), (times(median), times(p90), times(row.max)), (INK, MUTED, NEVER), strict=True
        ):
            axes.text(x, i + 0.1, text, transform=axes.get_yaxis_transform(), ha="right", va="center", color=colour)
    for x, text in zip((1.12, 1.22, 1.32), ("median |", "p90 ¦", "max ▾"), strict=True):
        axes.text(x, -0.72, text, transform=axes.get_yaxis_transform(), ha="right", va="center", color=MUTED)
    axes.set_yticks([i + 0.1 for i in range(len(rows))], [f"{label(d.projection)}" for d in rows])
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_xlim(0, edges[-1])
    marks = ticks(top)
    axes.set_xticks([math.log(t) for t in marks], [_tick_text(t) for t in marks])
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xlabel("largest side / smallest side of a scale (logarithmic); the height of a bar is a share of its row")


def png(facts: Facts, dpi: int = 144) -> bytes:
    """Everything on one picture, light theme: headline, key figures, and the pictures of the page.

    Raises:
        UsageError: matplotlib is not installed.
    """
    with drawing("tierewrite"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        parts: list[tuple[str, float, Callable[[Any], None]]] = []
        if facts.sizes is not None:
            rows = bars(facts.sizes.by_part)
            parts.append(("Size by part of the model", _sizes_height(rows), lambda f: _draw_sizes(f, rows, True)))
        shown_ = [d for d in facts.divergence if d.ratios][:MAX_ROWS]
        if shown_:
            parts.append(
                ("How much the sides' activation scales differed", _ratios_height(shown_),
                 lambda f: _draw_ratios(f, shown_))
            )  # fmt: skip
            grids = heatmaps(facts)
            if grids:
                parts.append(("Where they differed", 0.6, lambda f: _draw_legend(f, scale_top(facts))))
            for heat in grids:
                parts.append(("", heat.height, partial(heat.draw, width=WIDTH, titled=True)))
        head, gap, heading = 2.3 + 0.3 * len(facts.consumers), 0.28, 0.42
        total = head + sum(h + gap + (heading if title else 0) for title, h, _ in parts) + 0.1
        figure = Figure(figsize=(WIDTH + 0.9, total), dpi=dpi, facecolor=PAPER)
        FigureCanvasAgg(figure)
        _draw_head(figure, facts, total)
        y = total - head
        for title, height, draw in parts:
            if title:
                figure.text(0.45 / (WIDTH + 0.9), (y - 0.2) / total, title, fontsize=13, weight="bold", va="center")
                y -= heading
            left, right = 0.45 / (WIDTH + 0.9), 1 - 0.45 / (WIDTH + 0.9)
            draw(_Panel(figure, left, (y - height) / total, right - left, height / total))
            y -= height + gap
        out = io.BytesIO()
        figure.savefig(out, format="png", facecolor=PAPER, metadata={"Software": None})
        return out.getvalue()


class _Panel:
    """A rectangle of a figure that is drawn on as if it were one."""

    def __init__(self, figure: Figure, left: float, bottom: float, width: float, height: float) -> None:
        self.figure, self.box = figure, (left, bottom, width, height)

    def add_axes(self, rect: tuple[float, float, float, float]) -> Axes:
        left, bottom, width, height = self.box
        x, y, w, h = rect
        return self.figure.add_axes((left + x * width, bottom + y * height, w * width, h * height))

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        left, bottom, width, height = self.box
        self.figure.text(left + x * width, bottom + y * height, text, **style)


def key_figures(facts: Facts) -> list[tuple[str, str, str]]:
    """What stands at the top: (name, figure, remark)."""
    overall = facts.overall
    found = []
    if facts.sizes is not None:
        total = facts.sizes.total
        less = f"{change(total.before_bytes, total.after_bytes)}, from {size(total.before_bytes)}"
        same = total.before_bytes == total.after_bytes
        found.append(("Size", size(total.after_bytes), "unchanged" if same else less))
        found.append(("Tensors", f"{total.after_tensors:,}", f"from {total.before_tensors:,}"))
        found.append(("Shards", str(facts.sizes.shards), f"from {facts.source_shards}"))
    groups = sum(facts.count(s) for s in ("rewritten", "canonical", "kept"))
    kept = facts.count("kept")
    beside = f"{count(len(facts.kept), 'name')} not confirmed" if facts.kept else "all confirmed"
    left = f"{kept:,} kept on every side" if kept else beside
    found.append(("Tied parameters", f"{groups:,}", left))
    if facts.scales:
        one = f"{overall.one_sided:,} had one side only" if overall.one_sided else "activation scales"
        found.append(("Scales merged", f"{len(facts.scales):,}", one))
        most = f"median; {times(overall.max)} at most" if overall.max is not None else "no scale has two sides"
        found.append(("Sides differ by", times(overall.median), most))
        never = "on any side" if overall.never else "every scale has a value"
        found.append(("Never calibrated", f"{overall.never:,}", never))
    return found


def verdict(report: ReadinessReport) -> str:
    """What a check found, on one line."""
    who = f"{report.consumer} {report.consumer_version}".strip()
    if not report.findings:
        return f"{who}: nothing found"
    return f"{who}: {count(len(report.errors), 'error')}, {count(len(report.warnings), 'warning')}"


def _draw_head(figure: Figure, facts: Facts, total: float) -> None:
    wide = WIDTH + 0.9
    x = 0.45 / wide
    figure.text(x, 1 - 0.42 / total, "tierewrite report", color=AFTER, fontsize=10, weight="bold", va="center")
    figure.text(x, 1 - 0.78 / total, label(facts.name, 60), fontsize=20, weight="bold", va="center")
    for i, report in enumerate(facts.consumers):
        figure.text(
            x, 1 - (1.12 + 0.3 * i) / total, verdict(report), color=NEVER if report.errors else AFTER, fontsize=11
        )
    below = 0.3 * len(facts.consumers)
    figures = key_figures(facts)
    step = (1 - 2 * x) / max(len(figures), 1)
    for i, (name, value, remark) in enumerate(figures):
        at = x + i * step
        figure.text(at, 1 - (1.28 + below) / total, name, color=MUTED, fontsize=8.5)
        figure.text(at, 1 - (1.58 + below) / total, value, fontsize=15, weight="bold")
        figure.text(at, 1 - (1.82 + below) / total, remark, color=MUTED, fontsize=7)


def _draw_legend(panel: _Panel, top: float) -> None:
    import numpy as np

    axes = panel.add_axes((0.062, 0.45, 0.3, 0.28))
    axes.imshow(np.linspace(0, 1, 256)[None, :], aspect="auto", cmap=COLOURS, extent=(0, math.log(top), 0, 1))
    marks = ticks(top)
    axes.set_xticks([math.log(t) for t in marks], [_tick_text(t) for t in marks])
    axes.set_yticks([])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    keys = ((0.42, ONE_SIDE, "one side only"), (0.55, NEVER, "never calibrated on any side"), (0.77, PAPER, "no scale"))
    for x, colour, text in keys:
        swatch = panel.add_axes((x, 0.45, 0.016, 0.28))
        swatch.set_facecolor(colour)
        swatch.set_xticks([])
        swatch.set_yticks([])
        for spine in swatch.spines.values():
            spine.set_visible(colour == PAPER)
        panel.text(x + 0.024, 0.59, text, color=MUTED, fontsize=8.5, va="center")
