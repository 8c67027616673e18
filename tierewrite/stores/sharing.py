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
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
        _uninterrupted(fcntl.ioctl, fd, _FICLONERANGE, _RANGE.pack(source, start, end - start, position))
    except OSError as error:
        if error.errno in _REFUSALS:
            return False
        raise
    return True


def copy_range(source: int, fd: int, start: int, end: int, position: int) -> bool:
    """Whether the kernel copies a range of `source` to `position` of `fd`; if not, any of the bytes may be there.

    It says that nothing is left where `source` was cut, and for files of some file systems though all is there: whoever
    reads the range finds out.

    Raises:
        OSError: something is wrong with file or disk.
    """
    if sys.platform != "linux":
        return False
    while start < end:
        try:
            done = _uninterrupted(os.copy_file_range, source, fd, end - start, start, position)
        except OSError as error:
            if error.errno in _REFUSALS:
                return False
            raise
        if done == 0:
            return False
        start, position = start + done, position + done
    return True


def _uninterrupted(call: Callable[..., int], *given: Any) -> int:
    """Makes a system call that Python does not repeat by itself when a signal interrupts it."""
    while True:
        try:
            return call(*given)
        except InterruptedError:
            continue


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
    fd, path = tempfile.mkstemp(prefix=".tierewrite-", dir=folder)
    os.unlink(path)
    return fd
