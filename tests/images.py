"""File systems of other kinds in a file, mounted: what a test or a benchmark of sharing needs. Linux, as root."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

MKFS = {"xfs": ["mkfs.xfs", "-q", "-m", "reflink=1"], "btrfs": ["mkfs.btrfs", "-q"]}
_FIEMAP, _SYNC, _LAST, _SHARED = 0xC020660B, 1, 1, 0x2000
_EXTENT = struct.Struct("=QQQQQIIII")  # logical, physical, length, 2 reserved, flags, 3 reserved


class Unavailable(Exception):
    """This machine does not let us mount one; the text says why."""


@contextlib.contextmanager
def mounted(kind: str, megabytes: int, below: Path | None = None) -> Iterator[Path]:
    """An empty file system of `kind`, for as long as the body runs.

    Args:
        megabytes: its size; the file is sparse.
        below: the folder where its file and the mount point are made.

    Raises:
        Unavailable: it cannot be made or mounted here.
    """
    if shutil.which(MKFS[kind][0]) is None:
        raise Unavailable(f"{MKFS[kind][0]} is not installed (Debian: xfsprogs, btrfs-progs)")
    with tempfile.TemporaryDirectory(prefix="tierewrite-image-", dir=below) as folder:
        image, place = Path(folder, "image"), Path(folder, "mounted")
        place.mkdir()
        with image.open("wb") as file:
            file.truncate(megabytes << 20)
        for command in ([*MKFS[kind], str(image)], ["mount", "-o", "loop", str(image), str(place)]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise Unavailable(f"{' '.join(command[:2])}: {done.stderr.strip() or done.stdout.strip()}")
        try:
            place.chmod(0o777)
            yield place
        finally:
            subprocess.run(["umount", str(place)], check=True, capture_output=True)


def shared_bytes(path: Path) -> int:
    """Bytes of a file in extents that another file has too (FS_IOC_FIEMAP)."""
    shared = at = 0
    with path.open("rb") as file:
        os.fsync(file.fileno())
        while True:
            room = 256
            buffer = ctypes.create_string_buffer(32 + room * _EXTENT.size)
            struct.pack_into("=QQIIII", buffer, 0, at, 2**63 - at, _SYNC, 0, room, 0)
            fcntl.ioctl(file.fileno(), _FIEMAP, buffer)
            (count,) = struct.unpack_from("=I", buffer, 20)
            for number in range(count):
                logical, _, length, _, _, flags, *_ = _EXTENT.unpack_from(buffer, 32 + number * _EXTENT.size)
                shared += length if flags & _SHARED else 0
                at = logical + length
                if flags & _LAST:
                    return shared
            if not count:
                return shared
