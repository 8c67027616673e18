"""Bytes of one file of this machine put into another by the kernel: shared by both files, or copied.

FICLONERANGE (Linux, man 2 ioctl_ficlonerange) lets two files of one file system share blocks until one of them is
written to; copy_file_range (man 2) copies in the kernel, or on the server of a network file system. What a file system
can is found out by trying it, not by its name.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import sys
from pathlib import Path

BLOCK_BYTES = 4096
"""What is shared begins and ends at multiples of so many bytes, at the same offset modulo this in both files."""
_FICLONERANGE = 0x4020940D
_RANGE = struct.Struct("=qQQQ")  # source descriptor, its offset, length, offset in the other file
_REFUSALS = frozenset(
    {
        errno.EXDEV,
        errno.EOPNOTSUPP,
        errno.EINVAL,
        errno.ENOTTY,
        errno.ENOSYS,
        errno.EPERM,
        errno.EBADF,
        errno.ETXTBSY,
    }
)
"""The file system or the kernel does not do that; nothing is wrong with file or disk."""


def clone(source: int, fd: int, start: int, end: int, position: int) -> bool:
    """Whether the kernel lets `fd` share a range of `source`, which is whole blocks, at `position`.

    Raises:
        OSError: something is wrong with file or disk.
    """
    if sys.platform != "linux":
        return False
    try:
        fcntl.ioctl(fd, _FICLONERANGE, _RANGE.pack(source, start, end - start, position))
    except OSError as error:
        if error.errno in _REFUSALS:
            return False
        raise
    return True


def copy_range(source: int, fd: int, start: int, end: int, position: int) -> int | None:
    """Lets the kernel copy a range of `source` to `position` of `fd`.

    Returns:
        How far it came: less than `end` where `source` ends before. None: it does not copy these; then any of the
        bytes may be there.

    Raises:
        OSError: something is wrong with file or disk.
    """
    if sys.platform != "linux":
        return None
    while start < end:
        try:
            done = os.copy_file_range(source, fd, end - start, start, position)
        except OSError as error:
            if error.errno in _REFUSALS:
                return None
            raise
        if done == 0:
            break
        start, position = start + done, position + done
    return start


def whole_blocks(start: int, end: int) -> tuple[int, int]:
    """The part of a range that is whole blocks; empty where there are none."""
    first = -(-start // BLOCK_BYTES) * BLOCK_BYTES
    return first, max(first, end // BLOCK_BYTES * BLOCK_BYTES)


def nameless(folder: Path) -> int:
    """A new file in `folder`, for writing, without a name, so that nothing of it stays. Raises OSError."""
    if sys.platform == "linux":
        try:
            return os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        except OSError as error:  # a network file system
            if error.errno not in (*_REFUSALS, errno.EISDIR):
                raise
    path = folder / f".tierewrite-{os.getpid()}"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    path.unlink()
    return fd
