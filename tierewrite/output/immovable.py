"""What cannot be swapped out whatever its modes say: found before hours of work, and not at the swap after it."""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

from tierewrite.errors import SystemFailure, system_errors

_GET_FLAGS = 0x80086601  # FS_IOC_GETFLAGS of Linux, ioctl_iflags(2)
_LINUX_FIXED = 0x10 | 0x20  # FS_IMMUTABLE_FL, FS_APPEND_FL
_BSD_FIXED = stat.UF_IMMUTABLE | stat.UF_APPEND | stat.SF_IMMUTABLE | stat.SF_APPEND
_FLAGGED = "is immutable or append-only"
_UNFLAG = "take that away (chattr -i -a; chflags on macOS), or write to another place"


def refuse_immovable(folder: Path, removed: bool) -> None:
    """Refuses what is to be swapped out, as far as it can be known that it cannot.

    Args:
        folder: a real path that is there.
        removed: what it holds is removed after the swap, and not kept as a backup.

    Raises:
        SystemFailure: it is immutable, lies in a folder from which we may take nothing, or (`removed`) holds such.
    """
    with system_errors("looking at", folder):
        parent = folder.parent
        if _is_fixed(parent):
            raise SystemFailure(f"{_FLAGGED}, and nothing in it can be swapped", file=parent, advice=_UNFLAG)
        if _is_fixed(folder):
            raise SystemFailure(f"{_FLAGGED}, and cannot be swapped", file=folder, advice=_UNFLAG)
        user, above = os.geteuid(), parent.stat()
        if above.st_mode & stat.S_ISVTX and user not in (0, above.st_uid, folder.stat().st_uid):
            what = "belongs to another user, in a folder where only owners move things (sticky)"
            raise SystemFailure(what, file=folder, advice="run as its owner, or write to another place")
        for place, folders, files in os.walk(folder) if removed else ():
            ours = user in (0, os.stat(place).st_uid) or os.access(place, os.W_OK | os.X_OK)
            if (folders or files) and not ours:
                what = "belongs to another user, and what it holds could not be removed after the swap"
                raise SystemFailure(what, file=place, advice="run as its owner, or write to another place")
            for name in (*folders, *files):
                path = Path(place, name)
                if _is_fixed(path):
                    what = f"{_FLAGGED}, and could not be removed after the swap"
                    raise SystemFailure(what, file=path, advice=_UNFLAG)


def _is_fixed(path: Path) -> bool:
    """Whether a file or folder may neither be moved nor removed; False where that is not known, and of links."""
    status = path.lstat()
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        return False
    if getattr(status, "st_flags", 0) & _BSD_FIXED:
        return True
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        flags = fcntl.ioctl(file, _GET_FLAGS, bytes(8))
    except OSError:  # a file system without such flags
        return False
    finally:
        os.close(file)
    return bool(int.from_bytes(flags[:4], "little") & _LINUX_FIXED)
