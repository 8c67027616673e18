"""Regular files opened for reading, and nothing else: no device, no FIFO, no file exchanged underneath."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from tierewrite.errors import SourceError, SystemFailure, TierewriteError


def kind_of_file(mode: int) -> str:
    """What a file of this mode is, if it is no regular one; for messages."""
    for test, text in (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISBLK, "a block device"),
    ):
        if test(mode):
            return text
    return "no regular file"


def to_source_error(e: OSError | ValueError, path: Path) -> TierewriteError:
    """The error that an exception of the system stands for: a wrong source, or a system that does not let us
    read.
    """
    if isinstance(e, ValueError):
        return SourceError("has a NUL character in its name", file=path)
    if e.errno == errno.ELOOP:
        return SourceError("is a link that leads to itself; remove it, or put the file there", file=path)
    if e.errno in (errno.ENOENT, errno.ENOTDIR):
        what = "is a link to nothing; remove it, or put the file there" if path.is_symlink() else "does not exist"
        return SourceError(what, file=path)
    if e.errno in (errno.ENAMETOOLONG, errno.ENXIO):
        return SourceError(f"cannot be opened: {e.strerror}", file=path)
    advice = "check its permissions, or read it as another user" if e.errno in (errno.EACCES, errno.EPERM) else None
    return SystemFailure(f"cannot be read: {e.strerror or e}", file=path, advice=advice)


def resolved_path(path: Path) -> Path:
    """`path` with every link resolved; it exists."""
    try:
        return Path(os.path.realpath(path, strict=True))
    except (OSError, ValueError) as e:
        raise to_source_error(e, path) from None


def stat_of(path: Path, given: Path) -> os.stat_result:
    """`os.stat(path)`; errors name `given`, the path that the user knows it by. Raises SourceError, SystemFailure."""
    try:
        return os.stat(path)
    except (OSError, ValueError) as e:
        raise to_source_error(e, given) from None


def names_in(path: Path) -> list[str]:
    """The names in a folder, sorted. Raises SourceError, SystemFailure."""
    try:
        return sorted(os.listdir(path))
    except OSError as e:
        raise to_source_error(e, path) from None


@contextlib.contextmanager
def opened(resolved: Path, given: Path) -> Iterator[int]:
    """A descriptor, for reading, of a regular file whose links are resolved already.

    Looked at before it is opened, because opening a device can do things; opened without waiting, because
    opening a FIFO waits for its writer; looked at again, because it may have been exchanged in between.
    """
    try:
        info = os.stat(resolved)
        fd = -1
        if stat.S_ISREG(info.st_mode):
            fd = os.open(resolved, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY)
            info = os.fstat(fd)
    except (OSError, ValueError) as e:
        raise to_source_error(e, given) from None
    try:
        if fd < 0 or not stat.S_ISREG(info.st_mode):
            raise SourceError(f"is {kind_of_file(info.st_mode)}; expected a regular file", file=given)
        yield fd
    finally:
        if fd >= 0:
            os.close(fd)


def read_from(fd: int, count: int, path: Path) -> bytes:
    """`count` bytes from where `fd` stands, fewer only where the file ends."""
    pieces: list[bytes] = []
    try:
        while count:
            piece = os.read(fd, count)
            if not piece:
                break
            pieces.append(piece)
            count -= len(piece)
    except OSError as e:
        raise to_source_error(e, path) from None
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def read_bounded(path: Path, limit: int) -> bytes:
    """A whole file that the user names, which may be a pipe (`<(jq ...)`).

    Raises:
        OSError, ValueError: it cannot be read, or has more than `limit` bytes (/dev/zero has no end).
    """
    with open(path, "rb") as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise ValueError(f"it has more than {limit:,} bytes")
    return raw


def read_small(path: Path, limit: int, error: type[SourceError]) -> bytes:
    """A whole file of at most `limit` bytes."""
    with opened(resolved_path(path), path) as fd:
        size = os.fstat(fd).st_size
        if size > limit:
            raise error(f"has {size} bytes; at most {limit} are read", file=path)
        raw = read_from(fd, limit + 1, path)
    if len(raw) > limit:
        raise error(f"has more than {limit} bytes", file=path)
    return raw
