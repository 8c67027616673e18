"""The order of the tensors in a file of the output: large runs where the file system can share them.

A file system shares whole blocks. So bytes of the source can be shared only where their offset in the output is the
same modulo the block's size. Of each file the largest run gets such an offset by spaces at the end of the header, which
the format allows, and those behind it by small tensors of the same file that are put between them. The order depends on
the plan alone, never on the file system: the same input gives the same bytes everywhere.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tierewrite.source.table import Tensors
from tierewrite.stores.sharing import BLOCK_BYTES

RUN_BYTES = 1 << 20
"""A smaller run is not worth another order: writing it takes a millisecond."""
_HEADER_UNIT = 8
"""A header's size is a multiple of so many bytes."""


class Arranged(NamedTuple):
    """The tensors of a file in their order.

    Attributes:
        order: int64, positions in the file's `rows`.
        data_start: offset of the data section in the file, modulo `BLOCK_BYTES`; None: any.
    """

    order: np.ndarray
    data_start: int | None


class _Run(NamedTuple):
    """Neighbours in one source file that are copied unchanged.

    Attributes:
        first, stop: their positions in the file's `rows`.
        start, end: absolute byte range in the source file.
    """

    first: int
    stop: int
    start: int
    end: int


def arranged(tensors: Tensors, rows: np.ndarray, width: np.ndarray, copied: np.ndarray) -> Arranged:
    """The order of one file: wide dtypes first, as safetensors' own serializer has it, then the runs.

    A file without a large run has wide dtypes first, and nothing else. Every tensor stays aligned to its element.

    Args:
        tensors: the source.
        rows: int64 [n], the file's tensors; those of one source file in its order.
        width: int64 [n], bytes an element; 0 for less than one.
        copied: bool [n], whether the source's bytes are written as they are.
    """
    usual = np.argsort(-width, kind="stable")
    runs = _runs(tensors, rows, width, copied)
    if not runs:
        return Arranged(usual, None)
    sizes = tensors.nbytes[rows]
    by_size = sorted(runs, key=lambda run: run.end - run.start)
    while by_size:
        found = _placed(sorted(by_size), usual, sizes, width)
        if found is not None:
            return found
        by_size = by_size[(len(by_size) + 1) // 2 :]  # fewer runs need less between them, and leave more to fill it
    return Arranged(usual, None)


def _placed(runs: Sequence[_Run], usual: np.ndarray, sizes: np.ndarray, width: np.ndarray) -> Arranged | None:
    """The order with the largest of `runs` where blocks meet, and as many others as small tensors allow.

    None: the header, a multiple of `_HEADER_UNIT`, cannot bring the largest there.
    """
    inside = np.zeros(len(usual), bool)
    for run in runs:
        inside[run.first : run.stop] = True
    filler = _Filler(sizes, width, usual[~inside[usual]])
    largest = max(runs, key=lambda run: run.end - run.start)
    behind, end = list(range(largest.first, largest.stop)), largest.end
    for run in runs:
        between = filler.take((run.start - end) % BLOCK_BYTES, end) if run is not largest else None
        if between is not None:
            behind += [*between, *range(run.first, run.stop)]
            end = run.end
    placed = np.zeros(len(usual), bool)
    placed[behind] = True
    before = int(sizes[~placed].sum())
    last = filler.take((before - largest.start) % _HEADER_UNIT, end)
    if last is None:
        return None
    placed[last] = True
    before -= int(sizes[last].sum())
    order = np.concatenate([usual[~placed[usual]], np.array([*behind, *last], np.int64)])
    return Arranged(order, (largest.start - before) % BLOCK_BYTES)


def data_start_of(tensors: Tensors, rows: np.ndarray) -> int | None:
    """`Arranged.data_start` of a file that stays as it is in the source: `rows`, all of its tensors in their order."""
    if tensors.nbytes[rows].sum() < RUN_BYTES or tensors.start[rows[0]] % _HEADER_UNIT:
        return None
    return int(tensors.start[rows[0]]) % BLOCK_BYTES


def has_runs(tensors: Tensors, rows: np.ndarray, width: np.ndarray, copied: np.ndarray) -> bool:
    """Whether a file of these tensors has a run that is worth sharing; arguments as for `arranged`."""
    return bool(_runs(tensors, rows, width, copied))


def _runs(tensors: Tensors, rows: np.ndarray, width: np.ndarray, copied: np.ndarray) -> list[_Run]:
    """The runs of at least `RUN_BYTES`, in the order of the source.

    Small tensors with which a run would begin are left to fill gaps.
    """
    start, end = tensors.start[rows], tensors.end[rows]
    # At the same offset modulo a block a tensor is aligned to its element if it is so in the source.
    fit = copied & (start % np.maximum(width, 1) == 0)
    bounds = run_bounds(tensors, rows, fit)
    large = np.append(np.flatnonzero(end - start >= BLOCK_BYTES), len(rows))
    firsts = np.minimum(large[np.searchsorted(large, bounds[:-1])], bounds[1:] - 1)
    return [
        _Run(first, stop, int(start[first]), int(end[stop - 1]))
        for first, stop in zip(firsts.tolist(), bounds[1:].tolist(), strict=True)
        if fit[first] and end[stop - 1] - start[first] >= RUN_BYTES
    ]


def run_bounds(tensors: Tensors, rows: np.ndarray, fit: np.ndarray) -> np.ndarray:
    """int64, positions in `rows` at which a run begins, and len(rows): neighbours in one file, all of them `fit`.

    A tensor that is not fit (bool [n]) is by itself.
    """
    shard, start, end = tensors.shard[rows], tensors.start[rows], tensors.end[rows]
    joined = np.zeros(len(rows) + 1, bool)  # with the one before
    joined[1:-1] = fit[1:] & fit[:-1] & (shard[1:] == shard[:-1]) & (start[1:] == end[:-1])
    return np.flatnonzero(~joined)


class _Filler:
    """Small tensors that may stand between two runs.

    Args:
        sizes, width: int64 [n], bytes of each tensor and of its element.
        positions: of the tensors that may be taken.
    """

    def __init__(self, sizes: np.ndarray, width: np.ndarray, positions: np.ndarray) -> None:
        small = positions[(sizes[positions] > 0) & (sizes[positions] < BLOCK_BYTES)]
        self._left: dict[tuple[int, int], deque[int]] = {}
        for size, wide, position in zip(sizes[small].tolist(), width[small].tolist(), small.tolist(), strict=True):
            self._left.setdefault((size, wide), deque()).append(position)
        self._kinds = sorted(self._left, reverse=True)
        self._widths = sorted({wide for _, wide in self._left if wide})

    def take(self, nbytes: int, at: int) -> list[int] | None:
        """Positions of tensors that fill just `nbytes` bytes from an offset `at` on; None: there are none that do.

        Large ones are tried first; that does not find every way to fill a gap, but with scales of one element each way.
        Where `at` is no place for wide elements, narrow ones bring them to one.
        """
        for first in ({}, self._up_to_wide(at)):
            counts = self._filling(nbytes, at, first)
            if counts is not None:
                return [self._left[kind].popleft() for kind, count in counts for _ in range(count)]
        return None

    def _up_to_wide(self, at: int) -> dict[tuple[int, int], int]:
        """How many tensors of one element each, narrow ones first, lead from `at` to where a wide one can stand."""
        counts: dict[tuple[int, int], int] = {}
        for narrow, wide in itertools.pairwise(self._widths):
            count, rest = divmod(-at % wide, narrow)
            if rest or count > len(self._left.get((narrow, narrow), ())):
                break
            counts[narrow, narrow] = count
            at += count * narrow
        return counts

    def _filling(
        self, nbytes: int, at: int, first: Mapping[tuple[int, int], int]
    ) -> list[tuple[tuple[int, int], int]] | None:
        """Kinds, in their order, and how many of each fill just `nbytes`, `first` before others; None: none do."""
        taken = sum(size * count for (size, _), count in first.items())
        nbytes, at = nbytes - taken, at + taken
        counts: dict[tuple[int, int], int] = {}
        for kind in self._kinds:
            size, wide = kind
            if nbytes >= size and at % max(wide, 1) == 0:
                counts[kind] = min(len(self._left[kind]) - first.get(kind, 0), nbytes // size)
                nbytes -= counts[kind] * size
        if nbytes:
            return None
        return [*first.items(), *sorted(counts.items(), key=lambda item: -item[0][1])]
