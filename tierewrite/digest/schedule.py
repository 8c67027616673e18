"""The launches that hash a batch of byte ranges on a GPU, as plain data: NumPy alone, no device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tierewrite.digest.spans import CHUNK, Columns

FAN = 1024
"""Chaining values that one block of `parents` joins."""
_ROOT_BIT = np.uint64(1 << 63)

Table = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Level:
    """One launch of `parents`: rows of the job table (from `row`, 4 columns of `jobs` each), and its blocks."""

    row: int
    jobs: int
    groups: int


@dataclass(frozen=True)
class Schedule:
    """The launches for a batch of jobs, as plain data.

    Attributes:
        table: uint64, flat: for `chunks`, then for each level of `parents`, 4 rows of as many jobs (see kernels).
            Addresses count from the start of the data.
        jobs: byte ranges, which is also digests out.
        chunks: chunks of all jobs, each with a chaining value.
        levels: launches of `parents`, from the leaves up.
    """

    table: Table
    jobs: int
    chunks: int
    levels: tuple[Level, ...]

    @property
    def groups(self) -> int:
        """Chaining values that pass between levels of `parents`."""
        return sum(level.groups for level in self.levels)


def _before(counts: Table) -> tuple[Table, int]:
    """Exclusive prefix sums, and the sum."""
    ends = np.cumsum(counts, dtype=np.uint64)
    return ends - counts, int(ends[-1]) if len(ends) else 0


def schedule(start: Table, length: Table, counter: Table, root: npt.NDArray[np.bool_]) -> Schedule:
    """Plans the launches for n >= 1 jobs.

    Args:
        start, length: uint64 (n,), bytes.
        counter: uint64 (n,), BLAKE3's number of each job's first chunk within its tensor.
        root: bool (n,), whether the job is a whole tensor: then its result is a digest, else a chaining value.
    """
    chunks = np.maximum(np.uint64(1), (length + np.uint64(CHUNK - 1)) // np.uint64(CHUNK))
    first, total = _before(chunks)
    flag = np.where(root, _ROOT_BIT, np.uint64(0))
    parts = [start, length, first, counter | flag]
    many = chunks > 1
    target = np.arange(len(start), dtype=np.uint64) | flag
    rows, levels = _levels(first[many], chunks[many], target[many], 4 * len(start))
    return Schedule(np.concatenate(parts + rows), len(start), total, levels)


def schedule_of(spans: Columns, root: npt.NDArray[np.bool_]) -> Schedule:
    """`schedule` for spans, int64 (n, 5), that start at addresses: each a whole tensor, or at most a PIECE of one."""
    _, start, length, _, position = spans.T.astype(np.uint64)
    return schedule(start, length, position // np.uint64(CHUNK), root)


def joining(count: Table) -> Schedule:
    """Plans the launches of `parents` alone that make digests of tensors which were cut.

    Args:
        count: uint64 (n,), chaining values of the pieces of each tensor, at least 2. They lie one after the other.
    """
    first, total = _before(count)
    rows, levels = _levels(first, count, np.arange(len(count), dtype=np.uint64) | _ROOT_BIT, 0)
    return Schedule(np.concatenate(rows), len(count), total, levels)


def _levels(source: Table, count: Table, target: Table, row: int) -> tuple[list[Table], tuple[Level, ...]]:
    """Rows of the table, from `row` on, and launches that join `count` values each, the first of them `source`."""
    rows: list[Table] = []
    levels: list[Level] = []
    while len(source):
        groups = (count + np.uint64(FAN - 1)) // np.uint64(FAN)
        place, blocks = _before(groups)
        rows += [source, count, place, target]
        levels.append(Level(row, len(source), blocks))
        row += 4 * len(source)
        more = groups > 1
        source, count, target = place[more], groups[more], target[more]
    return rows, tuple(levels)


def bounds(jobs: int, data: int) -> tuple[int, int]:
    """The largest `Schedule.table`, and the largest number of chaining values between launches.

    For at most `jobs` jobs over at most `data` bytes: (uint64 words, values of 32 bytes).
    """
    chunks = data // CHUNK + jobs
    rows, values = jobs, chunks
    width = 1  # chunks under one input value of the level
    while chunks // width:
        here = min(jobs, chunks // width)
        rows += here
        width *= FAN
        values += chunks // width + here
    return 4 * rows, values
