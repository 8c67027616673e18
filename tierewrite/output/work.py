"""The work of one pass, as a table: which bytes of the source are read, hashed, replaced and written where.

The source's tensors that are hashed or written, in their order, cut into tasks. A `Task` is a batch of neighbours,
small enough for one buffer, or one larger tensor that streams through it. Bytes that are neither hashed nor written are
not read.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tierewrite.output.copied import CopiedRun
from tierewrite.output.result import BUFFER_BYTES
from tierewrite.planning.plan import OutShard
from tierewrite.source.table import Checkpoint
from tierewrite.values.content import Content, needs_source

_TENSORS_PER_TASK = 4096


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """Neighbours in one source shard, together at most a buffer, or one larger tensor.

    Equal and hashed by identity: a task is one piece of work.

    Attributes:
        number: its place in the source's order.
        shard: index of the source shard.
        first, stop: its tensors, as positions in the columns of `Work`.
        nbytes: of all of them.
        outs: the output shards that it writes to.
    """

    number: int
    shard: int
    first: int
    stop: int
    nbytes: int
    outs: frozenset[int]


@dataclass(frozen=True, slots=True, eq=False)
class MadeTask:
    """One tensor of the output that is made without the source's bytes of that range.

    Attributes:
        name: its key in the output.
        content: Encode, Added or Duplicate.
        out: index of the output shard.
        position: absolute byte offset in that file.
        nbytes: its size.
    """

    name: str
    content: Content
    out: int
    position: int
    nbytes: int

    @property
    def outs(self) -> frozenset[int]:
        """Indices of the output shards that it writes to: one."""
        return frozenset((self.out,))


@dataclass(frozen=True, slots=True, eq=False)
class CopyTask:
    """A range of a source shard that is copied without being hashed.

    Attributes:
        shard: index of the source shard.
        start, end: absolute byte range there.
        out: index of the output shard.
        position: absolute byte offset in that file.
    """

    shard: int
    start: int
    end: int
    out: int
    position: int

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.end - self.start

    @property
    def outs(self) -> frozenset[int]:
        """Indices of the output shards that it writes to: one."""
        return frozenset((self.out,))


AnyTask = Task | MadeTask | CopyTask


class ReadColumns(NamedTuple):
    """The tensors that a pass reads, ordered by shard, then offset; arrays of one length.

    Attributes:
        row: int64, its row in the source's table.
        start, end: int64, absolute byte range in the source shard.
        hashed: bool, whether its digest is wanted.
        out: int32, index of the output shard it is written to, or -1.
        position: int64, absolute byte offset in that file; 0 if there is none.
    """

    row: np.ndarray
    start: np.ndarray
    end: np.ndarray
    hashed: np.ndarray
    out: np.ndarray
    position: np.ndarray


class Steps(NamedTuple):
    """What is to be done with a task that fits into a buffer.

    Attributes:
        reads: runs of the source (start, end); the buffer holds them one after the other.
        hashed: int64 [n, 5], the tensors whose digests are wanted, as `digest.Span`.
        patched: tensors whose bytes are replaced: output key, content, start and end in the buffer.
        writes: runs of the buffer: index of the output shard, start, end, and position in that file.
    """

    reads: list[tuple[int, int]]
    hashed: np.ndarray
    patched: list[tuple[str, Content, int, int]]
    writes: list[tuple[int, int, int, int]]


class Work:
    """All that one pass does.

    Attributes:
        checkpoint: the source.
        columns: the tensors that are read.
        tasks: large tensors and what is made first, since each is one worker's work, then the rest, `_mixed`.
        nbytes: of all tasks.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        columns: ReadColumns,
        patches: Mapping[int, tuple[str, Content]],
        made: Iterable[MadeTask | CopyTask] = (),
    ) -> None:
        self.checkpoint = checkpoint
        self.columns = columns
        lengths = columns.end - columns.start
        before = np.concatenate(([0], np.cumsum(lengths)))  # bytes, of each
        shard = checkpoint.tensors.shard[columns.row]
        first = np.array(_cuts(before.tolist(), shard, len(checkpoint.shards)), np.int64)
        stop = np.append(first[1:], len(lengths))[: len(first)]
        batch = np.repeat(np.arange(len(first)), stop - first)
        place = before[:-1] - before[first][batch]  # in the buffer
        self._reads = _Runs.of(_reads(columns, first), first, stop)
        self._writes = _Runs.of(_writes(columns, place, lengths, first), first, stop)
        hashed = np.flatnonzero(columns.hashed)
        spans = np.stack([columns.row, place, lengths, lengths, np.zeros_like(place)], axis=1)[hashed]
        self._hashed = _Runs.of((hashed, spans), first, stop)
        replaced = np.zeros(len(checkpoint.tensors), bool)
        replaced[list(patches)] = True
        patched = np.flatnonzero(replaced[columns.row] & (columns.out >= 0))
        self._patches = patches
        where = np.stack([columns.row, place, place + lengths], axis=1)[patched]
        self._patched = _Runs.of((patched, where), first, stop)
        self.tasks = self._ordered(first, stop, before, shard, batch, made)
        self.nbytes = sum(task.nbytes for task in self.tasks)

    def _ordered(
        self,
        first: np.ndarray,
        stop: np.ndarray,
        before: np.ndarray,
        shard: np.ndarray,
        batch: np.ndarray,
        made: Iterable[MadeTask | CopyTask],
    ) -> list[AnyTask]:
        outs: list[set[int]] = [set() for _ in first]
        pairs = np.stack([batch, self.columns.out], axis=1)[self.columns.out >= 0]
        new = np.ones(len(pairs), bool)
        new[1:] = (pairs[1:] != pairs[:-1]).any(axis=1)  # most tensors go where the one before goes
        for number, out in pairs[new].tolist():
            outs[number].add(out)
        sizes = before[stop] - before[first]
        rows = zip(shard[first].tolist(), first.tolist(), stop.tolist(), sizes.tolist(), outs, strict=True)
        tasks = [
            Task(number, source, one, end, size, frozenset(to))
            for number, (source, one, end, size, to) in enumerate(rows)
        ]
        large: list[AnyTask] = [task for task in tasks if task.nbytes > BUFFER_BYTES]
        large += made
        large.sort(key=lambda task: -task.nbytes)
        return large + _mixed([task for task in tasks if task.nbytes <= BUFFER_BYTES])

    def steps(self, task: Task) -> Steps:
        """What is to be done with a task that fits into a buffer."""
        return Steps(
            self._reads[task.number].tolist(),
            self._hashed[task.number],
            [(*self._patches[row], start, end) for row, start, end in self._patched[task.number].tolist()],
            self._writes[task.number].tolist(),
        )

    def patch(self, row: int) -> tuple[str, Content] | None:
        """Output key and content of a tensor of the source whose bytes are replaced."""
        return self._patches.get(row)


class _Runs:
    """Rows of a table, by the task that they belong to."""

    def __init__(self, table: np.ndarray, bounds: list[int]) -> None:
        self._table, self._bounds = table, bounds

    @classmethod
    def of(cls, found: tuple[np.ndarray, np.ndarray], first: np.ndarray, stop: np.ndarray) -> _Runs:
        """`found`: ascending positions in the columns, and a row for each."""
        at, table = found
        return cls(table, np.searchsorted(at, np.append(first, stop[-1:])).tolist())

    def __getitem__(self, task: int) -> np.ndarray:
        return self._table[self._bounds[task] : self._bounds[task + 1]]


def work_of(
    checkpoint: Checkpoint,
    hashed: Iterable[str],
    shards: Sequence[OutShard] = (),
    data_starts: Sequence[int] = (),
    finished: Collection[int] = (),
    contents: Mapping[str, Content] | None = None,
    copied: Mapping[int, Sequence[CopiedRun]] | None = None,
    shared: Mapping[int, Sequence[CopiedRun]] | None = None,
) -> Work:
    """The pass that hashes `hashed` and writes everything that `shards` hold.

    Args:
        checkpoint: the source.
        hashed: source keys whose digests are wanted.
        shards: output shards to write; empty to hash only.
        data_starts: for each output shard, the absolute offset of its data section.
        finished: indices of output shards that need no writing.
        contents: output key -> what is written, where that is no copy.
        copied: index of an output shard -> runs of it that are not hashed: whoever can copies them without reading.
        shared: index of an output shard -> runs of it that are not written in this pass.

    Raises:
        KeyError: a key that the source does not have.
    """
    contents = contents or {}
    tensors = checkpoint.tensors
    out = np.full(len(tensors), -1, np.int32)
    position = np.zeros(len(tensors), np.int64)
    patches: dict[int, tuple[str, Content]] = {}
    made: list[MadeTask | CopyTask] = []
    for index, shard in enumerate(shards):
        if index in finished:
            continue
        begin = data_starts[index]
        plain = np.ones(len(shard.names), bool)
        start, end = begin + shard.start, begin + shard.end
        for at in [at for at, name in enumerate(shard.names) if name in contents]:
            name = shard.names[at]
            if needs_source(contents[name]):
                patches[int(shard.rows[at])] = name, contents[name]
            else:
                plain[at] = False
                made.append(MadeTask(name, contents[name], index, int(start[at]), int(end[at] - start[at])))
        for run in (shared or {}).get(index, ()):
            plain[run.first : run.stop] = False
        for run in (copied or {}).get(index, ()):
            plain[run.first : run.stop] = False
            pieces = run.pieces()
            made += [CopyTask(run.shard, low, high, index, low - run.start + run.position) for low, high in pieces]
        out[shard.rows[plain]] = index
        position[shard.rows[plain]] = start[plain]
    wanted = np.zeros(len(tensors), bool)
    wanted[[tensors.row[key] for key in hashed]] = True
    row = np.flatnonzero(wanted | (out >= 0))
    columns = ReadColumns(row, tensors.start[row], tensors.end[row], wanted[row], out[row], position[row])
    return Work(checkpoint, columns, patches, made)


def _cuts(before: list[int], shard: np.ndarray, shards: int) -> list[int]:
    """Where each task begins: as full as a buffer allows, and within one source shard.

    Args:
        before: bytes that stand before each tensor, and after the last.
        shard: of each tensor, ascending.
    """
    cuts: list[int] = []
    bounds = np.searchsorted(shard, np.arange(shards + 1)).tolist()
    for at, end in itertools.pairwise(bounds):
        while at < end:
            cuts.append(at)
            full = bisect_right(before, before[at] + BUFFER_BYTES, at, end + 1) - 1
            at = max(at + 1, min(full, at + _TENSORS_PER_TASK))
    return cuts


def _reads(columns: ReadColumns, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Runs of neighbours in the source: where each begins in the columns, and its bytes (start, end)."""
    new = np.ones(len(columns.row), bool)
    new[1:] = columns.start[1:] != columns.end[:-1]
    new[first] = True
    at = np.flatnonzero(new)
    last = np.append(at[1:], len(new))[: len(at)] - 1
    return at, np.stack([columns.start[at], columns.end[last]], axis=1)


def _writes(
    columns: ReadColumns, place: np.ndarray, lengths: np.ndarray, first: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Runs that go to one place: where each begins in the columns, and its row of `Steps.writes`."""
    out, position = columns.out, columns.position
    new = np.ones(len(out), bool)
    new[1:] = (out[1:] != out[:-1]) | ((out[1:] >= 0) & (position[1:] != position[:-1] + lengths[:-1]))
    new[first] = True
    at = np.flatnonzero(new)
    last = np.append(at[1:], len(new))[: len(at)] - 1
    table = np.stack([out[at], place[at], place[last] + lengths[last], position[at]], axis=1)
    written = out[at] >= 0
    return at[written], table[written]


def _mixed(work: Sequence[Task]) -> list[Task]:
    """`work` in such an order that neighbours write to different files, or one of them only hashes.

    A file system lets one writer at a time into a file. Of each file's tasks the same share is done at any moment, in
    the order of the source.
    """
    total: dict[int, int] = {}
    positions: list[tuple[int, int]] = []
    for task in work:
        out = max(task.outs, default=-1)
        positions.append((out, total.get(out, 0)))
        total[out] = total.get(out, 0) + task.nbytes
    share = [position / (total[out] or 1) for out, position in positions]
    return [work[i] for i in sorted(range(len(work)), key=share.__getitem__)]
