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
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import msgspec
from blake3 import blake3

from tierewrite.kept_files import KeptFiles
from tierewrite.output.engine import Hasher
from tierewrite.source.table import Checkpoint

log = logging.getLogger(__name__)

SCHEMA = "tierewrite/digests/1"
_KEPT = 32
"""Checkpoints that are remembered; the one that was used longest ago goes first."""
_MOST_BYTES = 64 << 20
"""Of one file: half a million digests."""
_ALL_BYTES = 512 << 20
_SETTLED_NS = 2 * 10**9
"""A file that was changed so short a time ago may change again within the resolution of its times."""


class _Kept(msgspec.Struct):
    """What a file holds; names are keys of the source, digests hexadecimal."""

    schema: str
    source: str
    digests: dict[str, str]


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
        hasher.update(repr(row).encode() + b"\n")  # a path need not be text: repr escapes what is none
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
        files = KeptFiles(self._folder, _KEPT, _MOST_BYTES, _ALL_BYTES)
        with _locked(files, name):
            known = _read(files, name)
            found = {key: known[key] for key in wanted & known.keys()}
            new = self._hashed(source, wanted - known.keys(), phase)
            if new and _is_settled(source):
                _write(files, name, {**known, **new})
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
def _locked(files: KeptFiles, name: str) -> Iterator[None]:
    """One process of the host at a time; where no lock can be had, each works for itself."""
    fd = -1
    try:
        files.make_folder()
        with files.own_folder() as folder:  # in another's, whoever can write there could hold the lock for ever
            lock = files.path(name).with_suffix(".lock").name
            fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=folder)
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


def _read(files: KeptFiles, name: str) -> Mapping[str, bytes]:
    """The digests that are kept for a source; {} where there are none that can be trusted."""
    text = files.read(name)
    if not text:
        return {}
    try:
        kept = msgspec.json.decode(text, type=_Kept)
        if (kept.schema, kept.source) != (SCHEMA, name):
            raise ValueError("it is of another source or version")
        digests = {key: bytes.fromhex(value) for key, value in kept.digests.items()}
        if any(len(value) != blake3.digest_size for value in digests.values()):
            raise ValueError("a digest has another length")
    except (ValueError, msgspec.MsgspecError) as error:
        files.ignored(name, error)
        return {}
    return digests


def _write(files: KeptFiles, name: str, digests: Mapping[str, bytes]) -> None:
    """Keeps digests, whole or not at all; that it cannot is no error."""
    kept = _Kept(SCHEMA, name, {key: value.hex() for key, value in digests.items()})
    files.keep(name, msgspec.json.encode(kept))
