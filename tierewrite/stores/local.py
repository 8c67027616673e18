"""Files of this machine: read by ranges, written and flushed, under their own name only once they are complete."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import mmap
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from tierewrite.errors import SourceChanged, system_errors
from tierewrite.stores.base import Copied, CopyingSink, FileStamp, Sink, SourceFile, Stamped
from tierewrite.stores.sharing import BLOCK_BYTES, clone, copy_range, nameless, whole_blocks

_WRITE_BYTES = 256 << 10
"""Of one system call, at most. The page cache takes pages as large as the call, up to megabytes, and these are the ones
that a virtual machine's host has to give back first: calls of 8 MiB took three times as long, on 2 cores and ext4."""
WRITEBACK_BYTES = 128 << 20
"""Writing to the disk is begun whenever so many bytes of a file are waiting: few large requests are the fastest."""
_SYNC_FILE_RANGE_WRITE = 2
_CHUNK_BYTES = 1 << 20
_COPY_BYTES = 8 << 20


def part_path(path: Path, token: str = "") -> Path:
    """The name of a shard until it is complete and flushed; `token` distinguishes several that write it."""
    return path.with_name(f"{path.name}{token and '.'}{token}.part")


def sync_folder(path: Path) -> None:
    """Flushes a folder's entries to disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot, and need not
            raise
    finally:
        os.close(fd)


def create(path: Path) -> int:
    """A new file for writing, with the mode that the umask gives (safetensors' own save_file gives 0600)."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)


def flush(fd: int) -> None:
    """Puts a file's data on the disk itself (on macOS fsync alone leaves it in the drive's cache)."""
    if hasattr(fcntl, "F_FULLFSYNC"):
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fsync(fd)


@functools.cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    try:
        function = ctypes.CDLL(None).sync_file_range  # Linux
    except (AttributeError, OSError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function


def start_writeback(fd: int) -> None:
    """Lets the disk begin with all that a file has in memory, so that a flush finds little left; only a hint."""
    function = _sync_file_range()
    if function is not None:
        function(fd, 0, 0, _SYNC_FILE_RANGE_WRITE)  # 0 bytes: to its end


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Writes all of `data` at `offset`; a short write is continued."""
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view[:_WRITE_BYTES], offset)
        view = view[done:]
        offset += done


def write_file(path: Path, data: bytes) -> None:
    """Writes and flushes a small file."""
    with system_errors("writing", path):
        fd = create(path)
        try:
            write_all(fd, data, 0)
            flush(fd)
        finally:
            os.close(fd)


class LocalStamped(Stamped, Protocol):
    """A file of this machine's as it was when it was looked at."""

    @property
    def inode(self) -> int: ...
    @property
    def ctime_ns(self) -> int: ...


def refuse_changed(file: LocalStamped, fd: int) -> None:
    """Refuses a file that is not as it was when it was looked at: size, both times and inode.

    The change time counts because a modification time can be set back after bytes were written.

    Args:
        fd: the file, opened.

    Raises:
        SourceChanged: it changed, or another file has its name now.
        SystemFailure: it cannot be looked at.
    """
    with system_errors("looking at", file.path):
        status = os.fstat(fd)
    was = {"size": file.size, "modified": file.mtime_ns, "inode": file.inode, "touched": file.ctime_ns}
    now = {
        "size": status.st_size,
        "modified": status.st_mtime_ns,
        "inode": status.st_ino,
        "touched": status.st_ctime_ns,
    }
    if not stat.S_ISREG(status.st_mode):
        raise SourceChanged("is no regular file any more", file=file.path)
    if was != now:
        what = {
            "size": f"its size was {was['size']:,} bytes and is {now['size']:,}",
            "modified": "it was written to",
            "inode": "another file has its name now",
            "touched": "it was written to and its time set back, or its permissions, links or name changed",
        }
        first = next(what[name] for name in ("size", "inode", "modified", "touched") if was[name] != now[name])
        raise SourceChanged(
            f"the file changed while it was being read ({first}); run again when nothing writes to it",
            file=file.path,
        )


class LocalFile:
    """A shard of this machine's, by a read-only descriptor."""

    def __init__(self, shard: LocalStamped) -> None:
        self.shard = shard
        with system_errors("opening", shard.path):
            self.fd = os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            refuse_changed(self.shard, self.fd)
        except BaseException:
            os.close(self.fd)
            raise

    def finish(self) -> None:
        """See `SourceFile`."""
        refuse_changed(self.shard, self.fd)

    def read_runs(self, runs: Sequence[tuple[int, int]], into: memoryview) -> None:
        """See `SourceFile`."""
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
                    f"the file ends at byte {offset:,} or before, and its header promises more; it was cut while it "
                    "was being read; run again when it is whole",
                    file=self.shard.path,
                )
            into = into[done:]
            offset += done

    def give(self, fd: int, start: int, end: int, position: int) -> Copied:
        """See `SourceFile`."""
        shared = self._share(fd, start, end, position)
        if not shared and copy_range(self.fd, fd, start, end, position):
            return Copied(in_kernel=end - start)
        return Copied(shared=shared)

    def _share(self, fd: int, start: int, end: int, position: int) -> int:
        """Shares whole blocks and writes what is left at both ends: how many bytes are shared, 0: nothing was done."""
        first, last = whole_blocks(start, end)
        shift = position - start
        if shift % BLOCK_BYTES or first == last or not clone(self.fd, fd, first, last, first + shift):
            return 0
        for low, high in ((start, first), (last, end)):
            edge = bytearray(high - low)
            self.read_runs([(low, high)], memoryview(edge))
            write_all(fd, bytes(edge), low + shift)
        return last - first

    def mapped(self) -> mmap.mmap:
        """The whole file in memory, privately: what is written there never reaches the file. Outlives `close`.

        Raises:
            SystemFailure: the system does not map it.
        """
        with system_errors("mapping", self.shard.path):
            return mmap.mmap(self.fd, self.shard.size, access=mmap.ACCESS_COPY)

    def close(self) -> None:
        """See `SourceFile`."""
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


def can_share(sources: Mapping[int, LocalStamped], folder: Path) -> frozenset[int]:
    """Which of `sources`, by number, a new file in `folder` can share blocks with: one block of each is tried.

    Raises:
        SourceChanged: one is not what it was when it was looked at. SystemFailure: no file can be made there.
    """
    found = set()
    with system_errors("trying what can be shared with a new file", folder):
        fd = nameless(folder)
        try:
            for number, source in sources.items():
                with LocalFile(source) as file:
                    # The second block: a file system whose blocks are larger refuses it.
                    if clone(file.fd, fd, BLOCK_BYTES, 2 * BLOCK_BYTES, BLOCK_BYTES):
                        found.add(number)
        finally:
            os.close(fd)
    return frozenset(found)


class LocalSink:
    """A new file of this machine's, flushed before it is complete.

    Args:
        path: its name.
        under: the name that it has until then; None: its own.
    """

    def __init__(self, path: Path, under: Path | None = None) -> None:
        self.path, self.under = path, under or path
        self._size = self._gathered = 0
        with system_errors("creating", path):
            self._fd = create(self.under)

    def write(self, data: memoryview) -> None:
        """See `Sink`."""
        with system_errors("writing", self.path):
            write_all(self._fd, data, self._size)
        self._size += len(data)
        self._gathered += len(data)
        if self._gathered >= WRITEBACK_BYTES:
            start_writeback(self._fd)
            self._gathered = 0

    def copy(self, source: SourceFile, start: int, end: int) -> Copied:
        """See `CopyingSink`."""
        with system_errors("writing", self.path):
            copied = source.give(self._fd, start, end, self._size)
        if copied:
            self._size += end - start
            return copied
        piece = memoryview(bytearray(min(_COPY_BYTES, end - start)))
        for at in range(start, end, _COPY_BYTES):
            part = piece[: end - at]
            source.read_runs([(at, at + len(part))], part)
            self.write(part)
        return copied

    def commit(self) -> None:
        """See `Sink`."""
        with system_errors("flushing", self.path):
            flush(self._fd)
            self._close()
            if self.under != self.path:
                os.rename(self.under, self.path)

    def abort(self) -> None:
        """See `Sink`."""
        self._close()
        with contextlib.suppress(OSError):
            self.under.unlink()

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class LocalStore:
    """Files of this machine's file system; see `base.Store`."""

    read_gap_bytes = 4096  # a few skipped scalars cost less than another read
    read_most_bytes = _CHUNK_BYTES

    def names(self, folder: Path) -> list[str]:
        """See `Store`."""
        with system_errors("listing", folder):
            return sorted(
                os.path.relpath(os.path.join(place, name), folder)
                for place, _, files in os.walk(folder)
                for name in files
            )

    def stamp(self, path: Path) -> FileStamp:
        """See `Store`."""
        with system_errors("looking at", path):
            status = path.stat()
        return FileStamp(path, status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns)

    def open(self, file: LocalStamped) -> SourceFile:
        """See `Store`."""
        return LocalFile(file)

    def chunks(self, file: LocalStamped) -> Iterator[bytes]:
        """See `Store`."""
        with system_errors("copying", file.path):
            fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            refuse_changed(file, fd)
            size = 0
            while True:
                with system_errors("copying", file.path):
                    chunk = os.read(fd, _CHUNK_BYTES)
                if not chunk:
                    break
                size += len(chunk)
                yield chunk
            refuse_changed(file, fd)
        finally:
            os.close(fd)
        if size != file.size:
            raise SourceChanged(
                f"changed while the run was working (it had {file.size:,} bytes then, {size:,} were copied); run again "
                "when nothing writes to it",
                file=file.path,
            )

    def create(self, path: Path, size: int, token: str = "") -> Sink:
        """With a `token` the file has the name of a part until it is complete: two that write the same do not meet."""
        return LocalSink(path, part_path(path, token) if token else None)

    def copying(self, sources: Sequence[Stamped], path: Path, size: int, token: str = "") -> CopyingSink:
        """See `Store`; what the kernel neither shares nor copies is read and written."""
        return LocalSink(path, part_path(path, token) if token else None)

    def read(self, path: Path) -> bytes:
        """See `Store`."""
        with system_errors("reading", path):
            return path.read_bytes()

    def put(self, path: Path, data: bytes) -> None:
        """See `Store`."""
        if os.path.lexists(path):
            with system_errors("replacing", path):
                path.unlink()
        write_file(path, data)

    def remove(self, path: Path, missing_ok: bool = False) -> None:
        """See `Store`."""
        with system_errors("removing", path):
            path.unlink(missing_ok)

    def make_folder(self, path: Path) -> None:
        """See `Store`."""
        with system_errors("making a folder", path):
            path.mkdir(parents=True, exist_ok=True)
