"""Which neighbours of an output shard a store copies by itself."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from tierewrite.planning.plan import OutShard
from tierewrite.values.content import Content

_LEAST_BYTES = 10 << 20
"""Of a run: up to 5 MiB of it pass through this machine, since a store takes no smaller part."""
_PIECE_BYTES = 64 << 20
"""Of one request, at most: it ends soon, and several go at once."""


class CopiedRun(NamedTuple):
    """Neighbours in an output shard that are neighbours in one source shard too, and are copied unchanged.

    Attributes:
        first, stop: their positions in the output shard.
        shard: number of the source shard.
        start, end: absolute byte range there.
    """

    first: int
    stop: int
    shard: int
    start: int
    end: int

    def pieces(self) -> Iterator[tuple[int, int]]:
        """The range, cut into equal ranges that are one request each."""
        size = self.end - self.start
        count = -(-size // _PIECE_BYTES)
        cuts = [self.start + size * at // count for at in range(count + 1)]
        return itertools.pairwise(cuts)


def copied_runs(shard: OutShard, contents: Mapping[str, Content], sources: Collection[int]) -> tuple[CopiedRun, ...]:
    """The runs of `shard` that are worth a request of their own.

    Args:
        contents: output key -> what is written, where that is no copy.
        sources: numbers of the source shards that can be copied from.
    """
    tensors, rows = shard.source, shard.rows
    number, start, end = tensors.shard[rows], tensors.start[rows], tensors.end[rows]
    plain = ~shard.added & np.isin(number, list(sources))
    plain[[at for at, name in enumerate(shard.names) if name in contents]] = False
    joined = np.zeros(len(rows) + 1, bool)  # with the one before
    joined[1:-1] = plain[1:] & plain[:-1] & (number[1:] == number[:-1]) & (start[1:] == end[:-1])
    bounds = np.flatnonzero(~joined).tolist()
    return tuple(
        CopiedRun(first, stop, int(number[first]), int(start[first]), int(end[stop - 1]))
        for first, stop in itertools.pairwise(bounds)
        if plain[first] and end[stop - 1] - start[first] >= _LEAST_BYTES
    )
