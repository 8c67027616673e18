"""New files on this machine: created, written, flushed, and under their own name only once they are complete."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from tierewrite.errors import system_errors
from tierewrite.stores.remote import FilePath, RemotePath, Upload

_WRITE_BYTES = 256 << 10
"""Of one system call, at most. The page cache takes pages as large as the call, up to megabytes, and these are the ones
that a virtual machine's host has to give back first: calls of 8 MiB took three times as long, on 2 cores and ext4."""
_WRITEBACK_BYTES = 128 << 20
"""The disk is told to begin whenever so much has gathered in a file: it is asked for large pieces by few."""
_FLUSHERS = 2
"""Threads that wait for the disk."""
_SYNC_FILE_RANGE_WRITE = 2


def part_path(path: Path, token: str = "") -> Path:
    """The name of a shard until it is complete and flushed; `token` tells several that write it apart."""
    return path.with_name(f"{path.name}{token and '.'}{token}.part")


def is_finished_shard(path: Path) -> bool:
    """Whether `path` in a staging folder is a shard that a run completed and flushed."""
    return path.suffix == ".safetensors" and path.is_file() and not path.is_symlink()


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


def _start_writeback(fd: int) -> None:
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


class Sink(Protocol):
    """One new file, written from its first byte to its last."""

    def write(self, data: memoryview) -> None:
        """The next bytes. Raises SystemFailure."""

    def commit(self) -> None:
        """All is written: the file is complete, durable and under its name. Raises SystemFailure."""

    def abort(self) -> None:
        """Leaves nothing of it."""


@dataclass
class _Growing:
    """A file that is being written, and the thread that waits for the disk."""

    path: Path
    fd: int
    writing: threading.Lock = field(default_factory=threading.Lock)
    gathered: int = 0  # bytes written since the disk was told to begin
    waiting: Future[None] | None = None


class PartFiles:
    """New files that threads write in any order, each `part_path(path)` until it is complete and flushed.

    Whoever writes waits for the page cache only: a few threads of its own keep the disk at work, and flush. A context
    manager; files that are not durable when it ends keep the name of a part.

    Args:
        paths: by number; the parts exist already.

    Raises:
        SystemFailure: one cannot be opened.
    """

    def __init__(self, paths: Mapping[int, Path]) -> None:
        self._files: dict[int, _Growing] = {}
        self._lock = threading.Lock()
        self._finishing: list[Future[int]] = []
        self._given_up = False
        self._pool = ThreadPoolExecutor(_FLUSHERS, thread_name_prefix="tierewrite-flush")
        try:
            for number, path in paths.items():
                with system_errors("opening", path):
                    fd = os.open(part_path(path), os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                self._files[number] = _Growing(path, fd)
        except BaseException:
            self.close()
            raise

    def incomplete(self) -> list[int]:
        """The numbers of the files that are not complete yet."""
        return list(self._files)

    def write(self, number: int, data: memoryview, position: int) -> None:
        """Writes to a file that is not complete. Raises SystemFailure."""
        file = self._files[number]
        # The kernel lets one writer at a time into a file, and the others spin: here they sleep.
        with file.writing, system_errors("writing", file.path):
            write_all(file.fd, data, position)
        with self._lock:
            file.gathered += len(data)
            if file.gathered < _WRITEBACK_BYTES or not (file.waiting is None or file.waiting.done()):
                return
            file.gathered = 0
            file.waiting = self._pool.submit(_start_writeback, file.fd)

    def complete(self, number: int) -> None:
        """All of a file is written: it is flushed, and gets its own name, while others go on."""
        file = self._files.pop(number)
        self._finishing.append(self._pool.submit(self._finish, file))

    def _finish(self, file: _Growing) -> int:
        """Returns the bytes of the file."""
        try:
            if file.waiting is not None:
                file.waiting.result()  # it began before this did
            if self._given_up:
                return 0
            with system_errors("flushing", file.path):
                flush(file.fd)
                os.rename(part_path(file.path), file.path)
                return os.fstat(file.fd).st_size
        finally:
            os.close(file.fd)

    def durable(self, advance: Callable[[int], None] = lambda n: None) -> None:
        """Waits until all files that are complete are on the disk, under their names.

        Args:
            advance: called with the bytes of each.

        Raises:
            SystemFailure: flushing failed.
        """
        for future in self._finishing:
            advance(future.result())

    def close(self) -> None:
        """Waits for the threads, and lets go of the files. Idempotent."""
        self._given_up = True
        self._pool.shutdown(wait=True)
        for file in self._files.values():
            os.close(file.fd)
        self._files.clear()

    def __enter__(self) -> PartFiles:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


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
        with system_errors("writing", self.path):
            write_all(self._fd, data, self._size)
        self._size += len(data)
        self._gathered += len(data)
        if self._gathered >= _WRITEBACK_BYTES:
            _start_writeback(self._fd)
            self._gathered = 0

    def commit(self) -> None:
        with system_errors("flushing", self.path):
            flush(self._fd)
            self._close()
            if self.under != self.path:
                os.rename(self.under, self.path)

    def abort(self) -> None:
        self._close()
        with contextlib.suppress(OSError):
            self.under.unlink()

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def open_sink(path: FilePath, size: int, token: str = "") -> Sink:
    """A new file, wherever it is to be.

    Args:
        path: its name.
        size: its bytes.
        token: of who writes: a local file is not under its name before it is complete, and two that write the same
            file do not meet. (In a store no file is there before it is complete.)
    """
    if isinstance(path, RemotePath):
        return Upload(path, size)
    return LocalSink(path, part_path(path, token) if token else None)


def write_file(path: Path, data: bytes) -> None:
    """Writes and flushes a small file."""
    with system_errors("writing", path):
        fd = create(path)
        try:
            write_all(fd, data, 0)
            flush(fd)
        finally:
            os.close(fd)
