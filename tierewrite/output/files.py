"""New files on this machine: created, written, flushed, and under their own name only once they are complete."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tierewrite.errors import system_errors
from tierewrite.stores import local
from tierewrite.stores.base import Copied, Sink, SourceFile
from tierewrite.stores.local import flush, part_path, write_all
from tierewrite.stores.places import FilePath, store_of

_READ_BYTES = 8 << 20
_FLUSHERS = 2
"""Threads that wait for the disk."""


def is_finished_shard(path: Path) -> bool:
    """Whether `path` in a staging folder is a shard that a run completed and flushed."""
    return path.suffix == ".safetensors" and path.is_file() and not path.is_symlink()


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
        held: numbers of files that `complete` leaves as they are until they are let go: bytes are to come that wait
            for something else.

    Raises:
        SystemFailure: one cannot be opened.
    """

    def __init__(self, paths: Mapping[int, Path], held: Iterable[int] = ()) -> None:
        self._held = set(held)
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
        self._begin_writeback(file, len(data))

    def take(self, number: int, source: SourceFile, start: int, end: int, position: int) -> Copied:
        """Puts a range of a source file into one that is not complete, without reading it; see `SourceFile.give`.

        Raises:
            SourceChanged: it is shorter. SystemFailure.
        """
        file = self._files[number]
        with file.writing, system_errors("writing", file.path):
            copied = source.give(file.fd, start, end, position)
        self._begin_writeback(file, copied.in_kernel)
        return copied

    def put(self, number: int, source: SourceFile, start: int, end: int, position: int) -> Copied:
        """As `take`, but what cannot be done so is read and written."""
        copied = self.take(number, source, start, end, position)
        if not copied:
            piece = memoryview(bytearray(min(_READ_BYTES, end - start)))
            for at in range(start, end, _READ_BYTES):
                part = piece[: end - at]
                source.read_runs([(at, at + len(part))], part)
                self.write(number, part, at - start + position)
        return copied

    def _begin_writeback(self, file: _Growing, nbytes: int) -> None:
        """`nbytes` more wait for the disk, which begins once they are many."""
        with self._lock:
            file.gathered += nbytes
            if file.gathered < local.WRITEBACK_BYTES or not (file.waiting is None or file.waiting.done()):
                return
            file.gathered = 0
            file.waiting = self._pool.submit(local.start_writeback, file.fd)

    def complete(self, number: int) -> None:
        """All of a file is written: it is flushed, and gets its own name, while others go on. Not if it is held."""
        if number in self._held:
            return
        file = self._files.pop(number)
        self._finishing.append(self._pool.submit(self._finish, file))

    def let_go(self, number: int) -> None:
        """What a held file waited for is written, and so it is complete."""
        self._held.remove(number)
        self.complete(number)

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


def open_sink(path: FilePath, size: int, token: str = "") -> Sink:
    """A new file, wherever it is to be.

    Args:
        path: its name.
        size: its bytes.
        token: of who writes: a local file is not under its name before it is complete, and two that write the same
            file do not meet. (In a store no file is there before it is complete.)
    """
    return store_of(path).create(path, size, token)
