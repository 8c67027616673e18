"""Which neighbours of an output shard need not pass through this process: kernel or store copies them, or shares."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from tierewrite.planning import alignment
from tierewrite.planning.plan import Action, OutShard, RewritePlan
from tierewrite.stores.sharing import BLOCK_BYTES
from tierewrite.values.content import Content

STORE_RUN_BYTES = 10 << 20
"""Of a run, at least: up to 5 MiB of it pass through this machine, since a store takes no smaller part."""
_PIECE_BYTES = 64 << 20
"""Of one request, at most: it ends soon, and several go at once."""


class CopiedRun(NamedTuple):
    """Neighbours in an output shard that are neighbours in one source shard too, and are copied unchanged.

    Attributes:
        first, stop: their positions in the output shard.
        shard: number of the source shard.
        start, end: absolute byte range there.
        position: absolute byte offset in the file of the output.
    """

    first: int
    stop: int
    shard: int
    start: int
    end: int
    position: int

    def pieces(self) -> Iterator[tuple[int, int]]:
        """The range, cut into ranges of much the same size that are one request each; they end with a block."""
        size = self.end - self.start
        count = -(-size // _PIECE_BYTES)
        inner = [self.start + size * at // count for at in range(1, count)]
        return itertools.pairwise([self.start, *(cut - cut % BLOCK_BYTES for cut in inner), self.end])

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.end - self.start

    @property
    def can_be_shared(self) -> bool:
        """Whether its blocks lie in both files alike."""
        return (self.position - self.start) % BLOCK_BYTES == 0


def copied_runs(
    shard: OutShard, contents: Mapping[str, Content], allowed: np.ndarray, data_start: int, least: int
) -> tuple[CopiedRun, ...]:
    """The runs of `shard` of at least `least` bytes.

    Args:
        contents: output key -> what is written, where that is no copy.
        allowed: bool [tensors of the source], which may be in a run.
        data_start: absolute offset of the data section.
    """
    tensors, rows = shard.source, shard.rows
    number, start, end = tensors.shard[rows], tensors.start[rows], tensors.end[rows]
    plain = ~shard.added & allowed[rows]
    plain[[at for at, name in enumerate(shard.names) if name in contents]] = False
    position = data_start + shard.start
    bounds = alignment.run_bounds(tensors, rows, plain).tolist()
    return tuple(
        CopiedRun(first, stop, int(number[first]), int(start[first]), int(end[stop - 1]), int(position[first]))
        for first, stop in itertools.pairwise(bounds)
        if plain[first] and end[stop - 1] - start[first] >= least
    )


def rows_of(plan: RewritePlan, runs: Mapping[int, tuple[CopiedRun, ...]]) -> np.ndarray:
    """bool [tensors of the source], which of them are in `runs`, by the number of their shard in the plan."""
    found = np.zeros(len(plan.source), bool)
    for index, some in runs.items():
        for run in some:
            found[plan.shards[index].rows[run.first : run.stop]] = True
    return found


def shareable_runs(plan: RewritePlan) -> dict[int, int]:
    """Shard of the source -> about how many bytes of it the output can share, as far as the plan tells."""
    allowed = ~plan.merged & (plan.action != Action.REPACK.code)
    found: dict[int, int] = {}
    for shard in plan.shards:
        if shard.data_start is None:
            continue
        for run in copied_runs(shard, {}, allowed, shard.data_start, alignment.RUN_BYTES):
            if run.can_be_shared:
                found[run.shard] = found.get(run.shard, 0) + max(0, run.nbytes - 2 * BLOCK_BYTES)
    return found
