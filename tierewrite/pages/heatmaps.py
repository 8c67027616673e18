"""Heatmaps of ratios: layer by expert for each projection, the others together by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tierewrite.pages.facts import Divergence, Facts, Scale
from tierewrite.pages.style import (
    COLOURS,
    MAX_CELLS,
    MAX_HEATMAPS,
    MAX_ROWS,
    MUTED,
    NEVER,
    ONE_SIDE,
    WIDTH,
    drawing,
    label,
    ratio_top,
    times,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


_MARGIN = 0.025 * WIDTH
_TITLE, _NO_TITLE = 0.48, 0.08
"""Inches above the grid, with a title and without."""
_FEWEST_COLUMNS = 4
"""A grid is at least as wide as so many columns, for the words below it."""


class Heatmap:
    """One grid of ratios: rows of layers (or projections) by columns of experts (or layers).

    A cell that several scales fall into shows the largest of them. Cells without a scale are empty.
    """

    def __init__(
        self, title: str, rows: Sequence[str], columns: Sequence[str], axes: tuple[str, str], top: float, note: str
    ) -> None:
        self.title, self.rows, self.columns, self.axes, self.top, self.note = title, rows, columns, axes, top, note
        self.cells: dict[tuple[int, int], Scale] = {}

    def put(self, row: int, column: int, scale: Scale) -> None:
        """Enters a scale; a ratio outdoes a missing one, and "one side only" outdoes "never calibrated"."""
        other = self.cells.get((row, column))
        if other is None or _weight(scale) > _weight(other):
            self.cells[row, column] = scale

    @property
    def height(self) -> float:
        """Inches, with the title."""
        return 0.98 + self._cell * len(self.rows)

    @property
    def height_without_title(self) -> float:
        """Inches."""
        return self.height - _TITLE + _NO_TITLE

    @property
    def _cell(self) -> float:
        named = self.axes[0] == "projection"
        return 0.24 if named else min(0.24, max(0.085, 3.2 / len(self.rows)))

    @property
    def width(self) -> float:
        """Inches that the grid and its labels take; at most `WIDTH`."""
        return self._left + self._grid + _MARGIN

    @property
    def _left(self) -> float:
        return (0.245 if self.axes[0] == "projection" else 0.062) * WIDTH

    @property
    def _grid(self) -> float:
        """Inches of the grid: few columns make no wider cells than three times their height."""
        return min(WIDTH - self._left - _MARGIN, 3 * self._cell * max(len(self.columns), _FEWEST_COLUMNS))

    def draw(self, figure: Figure | SubFigure, width: float, titled: bool) -> None:
        """Draws it on `figure`, which has `height` and is `width` inches wide.

        Args:
            titled: write title and note above it; on a page they are text beside the picture.
        """
        import numpy as np
        from matplotlib import colormaps

        colours = colormaps[COLOURS]
        grid = np.zeros((len(self.rows), len(self.columns), 4), np.uint8)
        scale_by = math.log(self.top)
        for (row, column), scale in self.cells.items():
            if scale.ratio is not None:
                share = min(math.log(scale.ratio) / scale_by, 1.0) if math.isfinite(scale.ratio) else 1.0
                grid[row, column] = colours(share, bytes=True)
            else:
                grid[row, column] = _rgba(ONE_SIDE if scale.calibrated else NEVER)
        height = self.height if titled else self.height_without_title
        above = _TITLE if titled else _NO_TITLE
        axes = figure.add_axes((self._left / width, 0.45 / height, self._grid / width, 1 - (0.45 + above) / height))
        axes.imshow(grid, aspect="auto", interpolation="none")
        self._ticks(axes)
        if titled:
            top = 1 - 0.2 / height
            figure.text(0.004, top, label(self.title, 60), ha="left", va="center", fontsize=10.5, weight="bold")
            figure.text(0.975, top, self.note, ha="right", va="center", color=MUTED, fontsize=8.5)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.tick_params(length=0)
        axes.set_xlabel(self.axes[1], loc="left")
        if self.axes[0] != "projection":
            axes.set_ylabel(self.axes[0])

    def _ticks(self, axes: Axes) -> None:
        every = max(1, -(-len(self.columns) // 33))
        step = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128) if s >= every)
        axes.set_xticks(range(0, len(self.columns), step), self.columns[::step])
        tall = max(1, math.ceil(0.15 / self._cell))
        axes.set_yticks(range(0, len(self.rows), tall), self.rows[::tall])


def _weight(scale: Scale) -> float:
    return scale.ratio if scale.ratio is not None else float(scale.calibrated) - 1


def _rgba(colour: str) -> tuple[int, int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16), 255


def scale_top(facts: Facts) -> float:
    """Where the colours of all heatmaps end, so that they can be compared."""
    return ratio_top(facts.overall.max or 1)


def heatmaps(facts: Facts) -> list[Heatmap]:
    """Layer by expert for each projection that has experts, largest ratios first; the others together, by layer."""
    top = scale_top(facts)
    found: list[Heatmap] = []
    dense: list[Divergence] = []
    for row in facts.divergence:
        if not any(s.expert is not None and s.layer is not None for s in row.scales):
            if any(s.layer is not None for s in row.scales):
                dense.append(row)
            continue
        placed = [s for s in row.scales if s.layer is not None and s.expert is not None]
        layers = sorted({s.layer for s in placed if s.layer is not None})[:MAX_CELLS]
        experts = sorted({s.expert for s in placed if s.expert is not None})[:MAX_CELLS]
        heat = Heatmap(row.projection, _texts(layers), _texts(experts), ("layer", "expert"), top, _note(row))
        _fill(heat, placed, layers, experts)
        found.append(heat)
    found = found[:MAX_HEATMAPS]
    if dense:
        dense = dense[: 2 * MAX_ROWS]
        layers = sorted({s.layer for d in dense for s in d.scales if s.layer is not None})[:MAX_CELLS]
        title = "Projections without experts" if found else "All projections"
        names = [label(d.projection) for d in dense]
        heat = Heatmap(title, names, _texts(layers), ("projection", "layer"), top, "")
        column = {layer: i for i, layer in enumerate(layers)}
        for i, row in enumerate(dense):
            for scale in row.scales:
                if scale.layer in column:
                    heat.put(i, column[scale.layer], scale)
        found.append(heat)
    return found


def _fill(heat: Heatmap, scales: Sequence[Scale], layers: Sequence[int], experts: Sequence[int]) -> None:
    row = {layer: i for i, layer in enumerate(layers)}
    column = {expert: i for i, expert in enumerate(experts)}
    for scale in scales:
        if scale.layer in row and scale.expert in column:
            heat.put(row[scale.layer], column[scale.expert], scale)


def _texts(numbers: Sequence[int]) -> list[str]:
    return [str(n) for n in numbers]


def _note(row: Divergence) -> str:
    parts = [f"{len(row.scales):,} scales", f"median {times(row.median)}", f"max {times(row.max)}"]
    if row.one_sided:
        parts.append(f"{row.one_sided:,} one-sided")
    if row.never:
        parts.append(f"{row.never:,} never calibrated")
    return "  ·  ".join(parts)


def gradient(stops: int = 9) -> list[str]:
    """The heatmaps' colours from 1x to the largest ratio, for a legend."""
    with drawing("tierewrite"):
        from matplotlib import colormaps
        from matplotlib.colors import to_hex

        return [to_hex(colormaps[COLOURS](i / (stops - 1))) for i in range(stops)]
