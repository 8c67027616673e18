"""Digests of a source that were computed once on this host: kept in a file, under the identity of the source's files.

Several processes that load one checkpoint, such as the ranks of a tensor-parallel server, ask at once: the first to
get the lock hashes, the others wait and read what it found. What is kept is never trusted when anything differs: the
path, size, times and inode (in a store: the tag) of every file of the source are its name, and a file that is not
exactly what was written, or that another user could have written, is ignored.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import msgspec
from blake3 import blake3

from tierewrite.output.engine import Hasher
from tierewrite.source.table import Checkpoint

log = logging.getLogger(__name__)

SCHEMA = "tierewrite/digests/1"
_KEPT = 32
"""Checkpoints that are remembered; the one that was used longest ago goes first."""
_MOST_BYTES = 64 << 20
"""Of one file: half a million digests."""
_SETTLED_NS = 2 * 10**9
"""A file that was changed so short a time ago may change again within the resolution of its times."""


class _Kept(msgspec.Struct):
    """What a file holds; names are keys of the source, digests hexadecimal."""

    schema: str
    source: str
    digests: dict[str, str]


def cache_folder() -> Path | None:
    """Where digests are kept: below TIEREWRITE_CACHE, else XDG_CACHE_HOME/tierewrite; None: nowhere, if it is empty."""
    given = os.environ.get("TIEREWRITE_CACHE")
    if given is None:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        given = os.path.join(home, "tierewrite")
    return Path(given) / "digests" if os.path.isabs(given) else None


def identity_of(source: Checkpoint) -> str:
    """What changes when any file of a source does: hexadecimal."""
    hasher = blake3()
    for shard in source.shards:
        row = (
            str(shard.path),
            shard.size,
            shard.mtime_ns,
            shard.ctime_ns,
            shard.inode,
            shard.version,
            shard.data_start,
        )
        hasher.update(msgspec.json.encode(row) + b"\n")
    return hasher.hexdigest()


class Digests:
    """Hashes tensors, unless their digests are kept.

    Args:
        hasher: who hashes.
        folder: where digests are kept; None: nowhere.

    Attributes:
        nbytes: bytes of the source that were hashed.
    """

    def __init__(self, hasher: Hasher, folder: Path | None = None) -> None:
        self.nbytes = 0
        self._hasher = hasher
        self._folder = folder

    def hash(self, source: Checkpoint, keys: Iterable[str], phase: str) -> dict[str, bytes]:
        """See `Hasher`."""
        wanted = set(keys)
        if self._folder is None or not wanted:
            return self._hashed(source, wanted, phase)
        name = identity_of(source)
        path = self._folder / f"{name}.json"
        with _locked(path):
            known = _read(path, name)
            found = {key: known[key] for key in wanted & known.keys()}
            new = self._hashed(source, wanted - known.keys(), phase)
            if new and _is_settled(source):
                _write(path, name, {**known, **new})
        return {**found, **new}

    def _hashed(self, source: Checkpoint, keys: set[str], phase: str) -> dict[str, bytes]:
        if not keys:
            return {}
        self.nbytes += sum(source.tensors[key].nbytes for key in keys)
        return self._hasher.hash(source, keys, phase)


def _is_settled(source: Checkpoint) -> bool:
    """Whether no file changed within the resolution of its times."""
    newest = max((max(shard.mtime_ns, shard.ctime_ns) for shard in source.shards), default=0)
    return newest < time.time_ns() - _SETTLED_NS


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process of the host at a time; where no lock can be had, each works for itself."""
    fd = -1
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process is hashing this checkpoint; waiting for it")
            fcntl.flock(fd, fcntl.LOCK_EX)
    except OSError as error:
        log.info("digests are not shared with other processes: %s", error)
    try:
        yield
    finally:
        if fd >= 0:
            os.close(fd)


def _read(path: Path, name: str) -> Mapping[str, bytes]:
    """The digests that are kept for a source; {} where there are none that can be trusted."""
    try:
        data = _trusted(path)
    except OSError:
        return {}
    check, _, text = data.partition(b"\n")
    try:
        if check != blake3(text).hexdigest().encode():
            raise ValueError("it is not as it was written")
        kept = msgspec.json.decode(text, type=_Kept)
        if (kept.schema, kept.source) != (SCHEMA, name):
            raise ValueError("it is of another source or version")
        digests = {key: bytes.fromhex(value) for key, value in kept.digests.items()}
        if any(len(value) != blake3.digest_size for value in digests.values()):
            raise ValueError("a digest has another length")
    except (ValueError, msgspec.MsgspecError) as error:
        log.warning("%s is ignored: %s", path, error)
        return {}
    return digests


def _trusted(path: Path) -> bytes:
    """A file that only this user can have written; empty where it is none. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        status = os.fstat(fd)
        ours = status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if not (stat.S_ISREG(status.st_mode) and ours and status.st_size <= _MOST_BYTES):
            log.warning("%s is ignored: it is no file that only this user can write", path)
            return b""
        os.utime(fd)  # used now: others go first
        with open(fd, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(fd)


def _write(path: Path, name: str, digests: Mapping[str, bytes]) -> None:
    """Keeps digests, whole or not at all; that it cannot is no error."""
    text = msgspec.json.encode(_Kept(SCHEMA, name, {key: value.hex() for key, value in digests.items()}))
    data = blake3(text).hexdigest().encode() + b"\n" + text
    if len(data) > _MOST_BYTES:
        return
    try:
        fd, part = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
        try:
            with open(fd, "wb") as file:
                file.write(data)
            os.replace(part, path)
        except BaseException:
            os.unlink(part)
            raise
        _forget(path.parent)
    except OSError as error:
        log.info("digests are not kept: %s", error)


def _forget(folder: Path) -> None:
    """Leaves the `_KEPT` files that were used last."""
    files = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in files[_KEPT:]:
        path.unlink(missing_ok=True)
        path.with_suffix(".lock").unlink(missing_ok=True)
