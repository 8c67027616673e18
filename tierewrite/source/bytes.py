"""Bytes of the source: ranges of shards, wherever they are, each file still the one whose header was read."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from tierewrite.source.table import Checkpoint, Shard, SideFile
from tierewrite.stores.base import SourceFile, Store
from tierewrite.stores.places import store_of


def open_source(shard: Shard) -> SourceFile:
    """A source shard, for reading, that is still the file whose header was read.

    Raises:
        SourceChanged, SystemFailure.
    """
    return store_of(shard.path).open(shard)


def runs_of(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges (start, end) in the order given, with neighbours joined: what is one read."""
    runs: list[tuple[int, int]] = []
    for start, end in ranges:
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((start, end))
    return runs


def read_tensors(checkpoint: Checkpoint, keys: Iterable[str]) -> dict[str, bytes]:
    """The bytes of small tensors (scales), with one read for neighbours.

    Raises:
        SourceChanged, SystemFailure: as `SourceFile.read_runs`.
    """
    tensors = checkpoint.tensors
    rows = np.array([tensors.row[key] for key in dict.fromkeys(keys)], np.int64)
    rows = rows[np.lexsort((tensors.start[rows], tensors.shard[rows]))]
    result: dict[str, bytes] = {}
    for number in np.flatnonzero(np.bincount(tensors.shard[rows])).tolist():
        mine = rows[tensors.shard[rows] == number]
        starts, ends = tensors.start[mine], tensors.end[mine]
        names = list(map(tensors.names.__getitem__, mine.tolist()))
        places = list(zip(names, starts.tolist(), ends.tolist(), strict=True))
        shard = checkpoint.shards[number]
        with open_source(shard) as source:
            for first, stop in _together(starts, ends, store_of(shard.path)):
                base, end = int(starts[first]), int(ends[first:stop].max())  # an empty one may come last
                buffer = bytearray(end - base)
                source.read_runs([(base, end)], memoryview(buffer))
                data = bytes(buffer)  # a slice of it is final; one of the buffer would be copied once more
                result.update([(name, data[at - base : to - base]) for name, at, to in places[first:stop]])
    return result


def _together(
    starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64], store: Store[Any]
) -> Iterator[tuple[int, int]]:
    """Which of the ranges, ascending in one file, are worth one read: positions first, stop."""
    gap, most = store.read_gap_bytes, store.read_most_bytes
    far = (np.flatnonzero(starts[1:] - ends[:-1] >= gap) + 1).tolist()
    for first, stop in itertools.pairwise([0, *far, len(starts)]):
        at = first
        while at < stop:
            full = int(np.searchsorted(ends[at:stop], int(starts[at]) + most)) + at
            following = max(at + 1, full)
            yield at, following
            at = following


def read_side_file(side: SideFile) -> bytes:
    """The whole of a small side file (a config).

    Raises:
        SourceChanged: it is not what was listed. SystemFailure: reading failed.
    """
    return b"".join(chunks_of(side))


def chunks_of(side: SideFile) -> Iterator[bytes]:
    """A side file from its first byte to its last, a piece at a time.

    Raises:
        SourceChanged: it is not what was listed. SystemFailure: reading failed.
    """
    return store_of(side.path).chunks(side)
