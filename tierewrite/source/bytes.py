"""Bytes of the source: ranges of shards, wherever they are, each file still the one whose header was read."""

from __future__ import annotations

import itertools
import logging
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

from tierewrite.errors import SourceChanged, shown, system_errors
from tierewrite.source.table import Checkpoint, Shard, SideFile
from tierewrite.stores.remote import RemoteFile, RemotePath

log = logging.getLogger(__name__)

_GAP_BYTES = 4096  # a few skipped scalars cost less than another read
_RUN_BYTES = 1 << 20
_REMOTE_BYTES = 8 << 20  # a request


class SourceFile(Protocol):
    """An open shard; any thread may read."""

    def read_runs(self, runs: Sequence[tuple[int, int]], into: memoryview) -> None:
        """Fills `into` with the ranges `runs` (start, end), one after the other.

        Raises:
            SourceChanged: the file ends before that.
            SystemFailure: reading failed.
        """

    def finish(self) -> None:
        """All is read: raises SourceChanged unless it is still the file whose header was read."""

    def close(self) -> None:
        """Lets go of it."""

    def __enter__(self) -> SourceFile: ...

    def __exit__(self, *exc: object) -> None: ...


def open_source(shard: Shard) -> SourceFile:
    """A source shard, for reading, that is still the file whose header was read.

    Raises:
        SourceChanged, SystemFailure.
    """
    if isinstance(shard.path, RemotePath):
        return RemoteFile(shard.path, shard.size, shard.version)
    return LocalFile(shard)


class LocalFile:
    """A shard of this machine's, by a read-only descriptor."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        with system_errors("opening", shard.path):
            self.fd = os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # type: ignore[arg-type]
        try:
            self._unchanged()
        except BaseException:
            os.close(self.fd)
            raise

    def _unchanged(self) -> os.stat_result:
        with system_errors("looking at", self.shard.path):
            status = os.fstat(self.fd)
        was = (self.shard.size, self.shard.mtime_ns, self.shard.inode)
        now = (status.st_size, status.st_mtime_ns, status.st_ino)
        if was != now:
            raise SourceChanged(
                f"the file changed while it was being read (size {was[0]:,} then, {now[0]:,} now); run again when "
                "nothing writes to SRC",
                file=self.shard.path,
            )
        return status

    def finish(self) -> None:
        if self._unchanged().st_ctime_ns != self.shard.ctime_ns:
            # Bytes may have been written and the modification time set back; but chmod, a hard link or a rename do this
            # too, and some network file systems make the time up: too little to refuse.
            log.warning(
                "%s was touched while it was read (its modification time is as before); if more than its permissions, "
                "links or name changed, run again, or with --verify",
                shown(self.shard.path),
            )

    def read_runs(self, runs: Sequence[tuple[int, int]], into: memoryview) -> None:
        with system_errors("reading", self.shard.path):
            for start, end in runs:
                self._read(into[: end - start], start)
                into = into[end - start :]

    def _read(self, into: memoryview, offset: int) -> None:
        """Fills `into` from `offset`; a short read is continued."""
        while into:
            done = _pread_into(self.fd, into, offset)
            if done == 0:
                raise SourceChanged(
                    f"the file ends at byte {offset:,}, before the data that its header promises; it was cut while it "
                    "was being read; run again when it is whole",
                    file=self.shard.path,
                )
            into = into[done:]
            offset += done

    def close(self) -> None:
        os.close(self.fd)

    def __enter__(self) -> LocalFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _pread_into(fd: int, into: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, [into], offset)
    data = os.pread(fd, len(into), offset)  # macOS
    into[: len(data)] = data
    return len(data)


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
    for number in np.unique(tensors.shard[rows]).tolist():
        mine = rows[tensors.shard[rows] == number]
        starts, ends = tensors.start[mine], tensors.end[mine]
        names = list(map(tensors.names.__getitem__, mine.tolist()))
        places = list(zip(names, starts.tolist(), ends.tolist(), strict=True))
        shard = checkpoint.shards[number]
        with open_source(shard) as source:
            for first, stop in _together(starts, ends, isinstance(shard.path, RemotePath)):
                base, end = int(starts[first]), int(ends[first:stop].max())  # an empty one may come last
                buffer = bytearray(end - base)
                source.read_runs([(base, end)], memoryview(buffer))
                data = bytes(buffer)  # a slice of it is final; one of the buffer would be copied once more
                result.update([(name, data[at - base : to - base]) for name, at, to in places[first:stop]])
    return result


def _together(starts: np.ndarray, ends: np.ndarray, remote: bool) -> Iterator[tuple[int, int]]:
    """Which of the ranges, ascending in one file, are worth one read: positions first, stop."""
    gap, most = (1 << 20, 2 * _REMOTE_BYTES) if remote else (_GAP_BYTES, _RUN_BYTES)
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
    if isinstance(side.path, RemotePath):
        return b"".join(chunks_of(side))
    with system_errors("reading", side.path):
        data = side.path.read_bytes()
    if len(data) != side.size:
        raise SourceChanged("changed while it was being read; run again", file=side.path)
    return data


def chunks_of(side: SideFile) -> Iterator[bytes]:
    """A side file from its first byte to its last, a piece at a time.

    Raises:
        SourceChanged: it is not what was listed. SystemFailure: reading failed.
    """
    if isinstance(side.path, RemotePath):
        remote = RemoteFile(side.path, side.size, side.version)
        for start in range(0, side.size, _REMOTE_BYTES):
            yield remote.read(start, min(side.size, start + _REMOTE_BYTES))
        remote.finish()
        return
    with system_errors("copying", side.path):
        fd = os.open(side.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        with system_errors("copying", side.path):
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise SourceChanged("is no regular file any more", file=side.path)
        size = 0
        while True:
            with system_errors("copying", side.path):
                chunk = os.read(fd, _RUN_BYTES)
            if not chunk:
                break
            size += len(chunk)
            yield chunk
        with system_errors("copying", side.path):
            changed = os.fstat(fd).st_mtime_ns != side.mtime_ns
    finally:
        os.close(fd)
    if size != side.size or changed:
        raise SourceChanged(
            f"changed while the run was working (it had {side.size:,} bytes then, {size:,} were copied); run again "
            "when nothing writes to SRC",
            file=side.path,
        )
