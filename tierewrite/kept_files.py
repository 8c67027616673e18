"""Files below the user's cache folder that keep what was computed once: read only if this user wrote them, and bounded.

What is kept is a help, never a need: that a file cannot be read or written is no error. A file is one line, the BLAKE3
of the rest, and the rest. It appears whole or not at all, and the last of several writers wins.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from blake3 import blake3

log = logging.getLogger(__name__)

_ABANDONED_NS = 3600 * 10**9
"""So old is the unfinished file of a writer that was killed, or the lock of what was not kept in the end."""
_AHEAD_NS = 3600 * 10**9
"""A time so far ahead is of a clock that was wrong: such files go first, or they would stay and all new ones go."""
_NAME = re.compile(r"[0-9a-f]{64}\.(?:json|lock)|\.[0-9a-f]{64}\.[^.]+\.part")
"""What a file is called that may be removed: the folder that a user names may hold files of theirs."""


def cache_folder(kind: str, source: object) -> Path | None:
    """The folder of what `kind` names: below TIEREWRITE_CACHE, else XDG_CACHE_HOME/tierewrite.

    None: nowhere, where it is empty, or inside `source`, the path of a checkpoint, as where that is a home folder: a
    checkpoint is not written to, and would change while it is read.
    """
    given = os.environ.get("TIEREWRITE_CACHE")
    if given is None:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        given = os.path.join(home, "tierewrite")
    if not os.path.isabs(given) or Path(os.path.realpath(given)).is_relative_to(os.path.realpath(str(source))):
        return None
    return Path(given) / kind


@dataclass(frozen=True)
class KeptFiles:
    """The kept files of one kind.

    Attributes:
        folder: where they are.
        most: how many are kept; the one that was used longest ago goes first.
        most_bytes: of one file; larger ones are neither kept nor read.
        all_bytes: of all of them together.
    """

    folder: Path
    most: int
    most_bytes: int
    all_bytes: int

    def path(self, name: str) -> Path:
        """The file that is kept under `name`, 64 hexadecimal digits."""
        return self.folder / f"{name}.json"

    def read(self, name: str) -> bytes:
        """What is kept under `name`; empty where there is nothing that can be trusted."""
        try:
            with self.own_folder() as folder:
                data = self._trusted(name, folder)
        except OSError:
            return b""
        check, _, text = data.partition(b"\n")
        if data and check != blake3(text).hexdigest().encode():
            self.ignored(name, "it is not as it was written")
            return b""
        return text

    def ignored(self, name: str, why: object) -> None:
        """Says in the log that a file is not used."""
        log.warning("%s is ignored: %s", self.path(name), why)

    def keep(self, name: str, text: bytes) -> None:
        """Keeps `text` under `name`, in place of what was there."""
        data = blake3(text).hexdigest().encode() + b"\n" + text
        if len(data) > self.most_bytes:
            return
        try:
            self.make_folder()
            with self.own_folder():
                pass
            fd, part = tempfile.mkstemp(dir=self.folder, prefix=f".{name}.", suffix=".part")
            try:
                with open(fd, "wb") as file:
                    file.write(data)
                os.replace(part, self.path(name))
            except BaseException:
                os.unlink(part)
                raise
            self._forget()
        except OSError as error:
            log.info("%s is not kept: %s", self.path(name), error)

    def make_folder(self) -> None:
        """Makes the folder, for this user alone. Raises OSError."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    @contextlib.contextmanager
    def own_folder(self) -> Iterator[int]:
        """The folder, opened. Raises OSError: there is none, or others can write to it."""
        fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if not _is_ours(os.fstat(fd)):
                _say_not_ours(self.folder)
                raise PermissionError(f"others can write to {self.folder}")
            yield fd
        finally:
            os.close(fd)

    def _trusted(self, name: str, folder: int) -> bytes:
        """A file that only this user can have written; empty where it is none. Raises OSError."""
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        fd = os.open(self.path(name).name, flags, dir_fd=folder)
        try:
            status = os.fstat(fd)
            if not (stat.S_ISREG(status.st_mode) and _is_ours(status) and status.st_size <= self.most_bytes):
                self.ignored(name, f"it is no file of at most {self.most_bytes:,} bytes that only this user can write")
                return b""
            with contextlib.suppress(OSError):  # as on a read-only file system, where nothing goes
                os.utime(fd)  # used now: others go first
            with open(fd, "rb", closefd=False) as file:
                return file.read(self.most_bytes)
        finally:
            os.close(fd)

    def _forget(self) -> None:
        """Leaves the files that were used last, as many as are kept."""
        found: list[tuple[int, int, Path]] = []
        now = time.time_ns()
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process forgot it
                status = path.stat(follow_symlinks=False)
                if not (_NAME.fullmatch(path.name) and stat.S_ISREG(status.st_mode)):
                    continue
                used = status.st_mtime_ns if status.st_mtime_ns < now + _AHEAD_NS else 0
                if path.suffix == ".json":
                    found.append((used, status.st_size, path))
                elif used < now - _ABANDONED_NS and not path.with_suffix(".json").exists():
                    path.unlink()
        total = 0
        for number, (_, nbytes, path) in enumerate(sorted(found, reverse=True)):
            total += nbytes
            if number >= self.most or total > self.all_bytes:
                path.unlink(missing_ok=True)
                path.with_suffix(".lock").unlink(missing_ok=True)


@lru_cache
def _say_not_ours(folder: Path) -> None:
    """Says it once in a process."""
    log.warning("%s is not used: others can write to it; with `chmod 700` it is, if it is yours", folder)


def _is_ours(status: os.stat_result) -> bool:
    """Whether only this user can write to it."""
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
