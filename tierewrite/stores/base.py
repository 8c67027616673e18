"""What a store can do: the interface that folders of this machine and object stores have in common.

`tests/test_stores_conform.py` holds every store to it; README.md here says how to add one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, Union, get_args

PathLike = Union[str, "os.PathLike[str]"]
P = TypeVar("P", contravariant=True)
CopyMode = Literal["auto", "never"]
"""Whether bytes that need not pass through this process are shared or copied by system or store."""
COPY_MODES: tuple[CopyMode, ...] = get_args(CopyMode)


class Stamped(Protocol):
    """A file as it was when it was looked at; `Shard` and `SideFile` are such.

    Attributes:
        path: where it is.
        size: bytes.
        mtime_ns, inode, ctime_ns: as `os.stat` gives them; 0 in a store.
        version: what changes when an object of a store does; "" on this machine.
    """

    @property
    def path(self) -> Any: ...
    @property
    def size(self) -> int: ...
    @property
    def mtime_ns(self) -> int: ...
    @property
    def version(self) -> str: ...


@dataclass(frozen=True)
class FileStamp:
    """A file as it is now; see `Stamped`."""

    path: Any
    size: int
    mtime_ns: int = 0
    inode: int = 0
    ctime_ns: int = 0
    version: str = ""


@dataclass(frozen=True)
class Copied:
    """Bytes of new files that did not pass through this process, by means.

    Attributes:
        shared: both files have the same blocks of a disk.
        in_kernel: copied by the kernel, or by the server of a network file system.
        by_store: copied by an object store.
    """

    shared: int = 0
    in_kernel: int = 0
    by_store: int = 0

    def __add__(self, other: Copied) -> Copied:
        return Copied(self.shared + other.shared, self.in_kernel + other.in_kernel, self.by_store + other.by_store)

    def __bool__(self) -> bool:
        return self.shared + self.in_kernel + self.by_store > 0


class SourceFile(Protocol):
    """An open file that must not change; any thread may read."""

    def read_runs(self, runs: Sequence[tuple[int, int]], into: memoryview) -> None:
        """Fills `into` with the ranges `runs` (start, end), one after the other.

        Raises:
            SourceChanged: the file ends before that.
            SystemFailure: reading failed.
        """

    def give(self, fd: int, start: int, end: int, position: int) -> Copied:
        """Puts a range at `position` of a new file of this machine without reading it: shared, else copied.

        Returns:
            How many bytes by which means; what is shared has up to a block at each end that is written. None by any
            means: it cannot be done, and whoever asked has to read and write the range.

        Raises:
            SourceChanged: the file ends before that. OSError: something is wrong with file or disk.
        """

    def finish(self) -> None:
        """All is read: raises SourceChanged unless it is still the file that was looked at."""

    def close(self) -> None:
        """Lets go of it."""

    def __enter__(self) -> SourceFile: ...

    def __exit__(self, *exc: object) -> None: ...


class Sink(Protocol):
    """One new file, written from its first byte to its last."""

    def write(self, data: memoryview) -> None:
        """The next bytes. Raises SystemFailure."""

    def commit(self) -> None:
        """All is written: the file is complete, durable and under its name. Raises SystemFailure."""

    def abort(self) -> None:
        """Leaves nothing of it."""


class CopyingSink(Sink, Protocol):
    """A new file that takes ranges of other files too, which the store copies by itself."""

    def copy(self, source: SourceFile, start: int, end: int) -> Copied:
        """The next bytes are those of a range of `source`.

        Returns:
            How many of them were copied, and by what; the others passed through this process.

        Raises:
            SourceChanged: `source` is not what was looked at. SystemFailure.
        """


class Store(Protocol[P]):
    """Files by path. Every error is of the family in errors.py and names the file.

    Attributes:
        read_gap_bytes: two ranges with a smaller gap are cheaper as one read.
        read_most_bytes: of one such read.
    """

    read_gap_bytes: int
    read_most_bytes: int

    def names(self, folder: P) -> list[str]:
        """Every file at or below `folder`, by its path below it, sorted; [] if nothing is there."""

    def stamp(self, path: P) -> FileStamp:
        """The file as it is now. Raises SourceError or SystemFailure: it is not there."""

    def open(self, file: Any) -> SourceFile:
        """The file for reading ranges. Raises SourceChanged: it is not what `file` says."""

    def chunks(self, file: Any) -> Iterator[bytes]:
        """A file from its first byte to its last. Raises SourceChanged: it is not what `file` says."""

    def create(self, path: P, size: int, token: str = "") -> Sink:
        """A new file of `size` bytes.

        With a `token` nothing is under its name before `Sink.commit`, where the store streams (all but fsspec's
        memory:// do); what an output must not be without comes last in any case.
        """

    def copying(self, sources: Sequence[Stamped], path: P, size: int, token: str = "") -> CopyingSink | None:
        """As `create`, for a file that takes ranges of `sources`; None: this store cannot copy them by itself.

        No request is made before the first byte.
        """
        return None

    def read(self, path: P) -> bytes:
        """The whole of a small file."""

    def put(self, path: P, data: bytes) -> None:
        """A small file, whole and durable; what was there is replaced."""

    def remove(self, path: P, missing_ok: bool = False) -> None:
        """Removes a file."""

    def make_folder(self, path: P) -> None:
        """Makes a folder and those above it, where there are folders."""
