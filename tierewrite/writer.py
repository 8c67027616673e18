"""The new files: staged in a hidden folder beside the target, flushed, and made visible by one rename.

Nothing exists under the target's name until everything is written and flushed to disk (files, folders, and the folder
that holds them), so a crash at any instant leaves the target whole or absent. The staging folder is locked while a
run lives; one that a killed run left behind is recognised by the lock being free, and cleared.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import json
import logging
import os
import shutil
import signal
import stat
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from tierewrite.checkpoint import INDEX_NAME, MAX_HEADER_BYTES, Checkpoint, SideFile, TensorEntry, gc_paused
from tierewrite.errors import SourceChanged, SourceError, SystemFailure, UsageError, shown, system_errors
from tierewrite.jsontext import quoted
from tierewrite.planning import OutShard
from tierewrite.reading import chunks_of, read_side_file
from tierewrite.remote import FilePath, RemotePath, Upload
from tierewrite.sources import RemoteFolder

log = logging.getLogger(__name__)

_WRITE_BYTES = 256 << 10
"""Of one system call, at most. The page cache takes pages as large as the call, up to megabytes, and these are the ones
that a virtual machine's host has to give back first: calls of 8 MiB took three times as long, on 2 cores and ext4."""
_WRITEBACK_BYTES = 128 << 20
"""The disk is told to begin whenever so much has gathered in a file: it is asked for large pieces by few."""
_FLUSHERS = 2
"""Threads that wait for the disk."""
_RENAME_EXCHANGE = 2
_SYNC_FILE_RANGE_WRITE = 2


@dataclass(frozen=True)
class Target:
    """Where the output goes, checked before anything else happens.

    Attributes:
        path: the real path of DST (links resolved); absent or an empty folder, unless `overwrite`.
        overwrite: swap out what is there once the new one is complete.
        backup: where what was there goes when it is swapped out; None removes it.
    """

    path: Path
    overwrite: bool = False
    backup: Path | None = None

    @classmethod
    def in_place(cls, src: Path, backup: bool) -> Target:
        """The target is the source itself; what was there is kept as SRC.bak if `backup`.

        Raises:
            UsageError: SRC.bak exists already, or SRC cannot be moved.
        """
        with system_errors("looking at SRC", src):
            real = src.resolve()
            if not real.name:
                raise UsageError("SRC is the root of the file system and cannot be swapped; give a DST", file=src)
            kept = real.with_name(real.name + ".bak")
            for moved in (kept, aside_of(real)):
                if not real.exists() and moved.exists():
                    raise UsageError(
                        f"SRC is absent and '{shown(moved)}' exists: a run was killed while it swapped them; that is "
                        "the original, whole: move it back",
                        file=src,
                    )
            if backup and (kept.exists() or kept.is_symlink()):
                raise UsageError(
                    f"'{shown(kept)}' exists already; move it away, or do without a backup (--no-backup). (It is an "
                    "earlier original; or, if a run was killed during its swap, the new checkpoint)",
                    file=src,
                )
        return cls(real, True, kept if backup else None)

    @classmethod
    def check(cls, src: FilePath, dst: Path, overwrite: bool) -> Target:
        """Decides whether `dst` can be written.

        Raises:
            UsageError: SRC and DST are the same or inside one another, or DST is not an empty or absent folder.
        """
        with system_errors("looking at DST", dst):
            try:
                real = dst.resolve()
            except RuntimeError as error:  # a loop of symbolic links, before Python 3.13
                raise UsageError("DST is a loop of symbolic links; choose another folder", file=dst) from error
            if dst.is_symlink() and not real.exists():
                what = f"DST is a link to '{shown(real)}', which does not exist"
                raise UsageError(what, file=dst, advice="make that folder, or remove the link")
            if isinstance(src, Path):
                _apart(src, dst, real)
            if not real.name:
                raise UsageError("DST is the root of the file system; name a folder in it", file=dst)
            if real.exists():
                if not real.is_dir():
                    raise UsageError("DST exists and is not a folder; choose another name", file=dst)
                if not overwrite and any(real.iterdir()):
                    raise UsageError("DST is not empty; choose another folder, or use --overwrite", file=dst)
        return cls(real, overwrite)


class Staged(Protocol):
    """An output on its way: a context manager that leaves nothing behind unless committed.

    Attributes:
        folder: where the files are written.
        held_back: names of files that must come through `put`.
    """

    @property
    def held_back(self) -> tuple[str, ...]: ...

    @property
    def folder(self) -> FilePath: ...

    def put(self, name: str, data: bytes) -> None:
        """Writes a small file, or writes it anew. Raises SystemFailure."""

    def view(self) -> Path | RemoteFolder:
        """The output as a checkpoint that can be opened, though it has not appeared."""

    def kept(self) -> list[FilePath]:
        """The files that are there already: with `resume`, what a killed run left."""

    def commit(self) -> None:
        """Makes it appear. Raises SystemFailure, UsageError."""

    def __enter__(self) -> Staged: ...

    def __exit__(self, *exc: Any) -> None: ...


class Staging:
    """A locked hidden folder beside the target; a context manager that leaves nothing behind unless committed.

    Args:
        target: what it becomes.
        resume: keep the finished shards that a killed run left, for the caller to check.

    Raises on entry:
        UsageError: another run is writing to the same target.
        SystemFailure: the folder cannot be made.
    """

    held_back: tuple[str, ...] = ()

    def __init__(self, target: Target, resume: bool = False) -> None:
        self.target = target
        self.resume = resume
        self.path = staging_of(target.path)
        self._lock = -1
        self._made_parents: list[Path] = []
        self._committed = False
        self._in_doubt = False  # a swap failed and could not be taken back: then nothing is removed

    def __enter__(self) -> Staging:
        try:
            with _signals_deferred(), system_errors("making the staging folder", self.path):
                missing = []
                parent = self.path.parent
                while not parent.exists():
                    missing.append(parent)
                    parent = parent.parent
                for folder in reversed(missing):
                    folder.mkdir()
                    self._made_parents.append(folder)
                self._acquire()
        except BaseException:
            self._end()
            raise
        return self

    def _acquire(self) -> None:
        while True:
            made = True
            try:
                self.path.mkdir()
            except FileExistsError:
                made = False
            try:
                lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # the other run ended between the two calls
            except OSError:
                if made:
                    self.path.rmdir()
                raise
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                raise UsageError(
                    "another run is writing to this DST; wait for it to end, or choose another DST",
                    file=self.target.path,
                ) from None
            except OSError as error:
                if error.errno not in (errno.ENOTSUP, errno.EBADF, errno.ENOLCK, errno.EINVAL):
                    os.close(lock)
                    if made:
                        self.path.rmdir()
                    raise
                log.warning("this file system has no locks: do not start a second run into %s", self.target.path)
            try:
                same = os.path.samestat(os.fstat(lock), os.stat(self.path, follow_symlinks=False))
            except FileNotFoundError:
                same = False
            if same:
                self._lock = lock
                self._recover()
                self._clear()
                return
            os.close(lock)  # the other run renamed its folder into place before we got the lock

    def _recover(self) -> None:
        """Ends a swap in two renames that a killed run began: what it had moved aside goes back, or is removed.

        Raises:
            UsageError: DST is back, and may not be overwritten.
        """
        target, aside = self.target.path, aside_of(self.target.path)
        if not aside.exists():
            return
        if target.exists():
            shutil.rmtree(aside)  # the swap was complete
            return
        os.rename(aside, target)
        log.warning("a run was killed while it swapped out %s; the old one is back in its place", target)
        if not self.target.overwrite:
            raise UsageError(
                "a run was killed while it swapped out this folder; it is back in its place, and not empty: choose "
                "another folder, or use --overwrite",
                file=target,
            )

    def _clear(self) -> None:
        leftovers = list(self.path.iterdir())
        if self.resume:
            leftovers = [entry for entry in leftovers if not is_finished_shard(entry)]
        elif leftovers:
            log.warning("a run into this DST was killed; starting anew (--resume would use what it finished)")
        for entry in leftovers:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    @property
    def folder(self) -> Path:
        return self.path

    def put(self, name: str, data: bytes) -> None:
        path = self.path / name
        if os.path.lexists(path):
            with system_errors("replacing", path):
                path.unlink()
        write_file(path, data)

    def view(self) -> Path:
        return self.path

    def kept(self) -> list[FilePath]:
        with system_errors("listing", self.path):
            return [*self.path.iterdir()]

    def commit(self) -> None:
        """Flushes the folder and makes it the target, by one rename.

        Raises:
            SystemFailure: the rename or a flush failed; the target is what it was.
            UsageError: something appeared in the target meanwhile.
        """
        target = self.target.path
        for folder, _, _ in os.walk(self.path, topdown=False):
            with system_errors("flushing", folder):
                sync_folder(Path(folder))
        with _signals_deferred(), system_errors("moving the new checkpoint into place", target):
            staged = self.path
            undo = self._move_in(target, self.target.backup)
            try:
                for parent in (target.parent, *(made.parent for made in reversed(self._made_parents))):
                    sync_folder(parent)
            except OSError:
                self._in_doubt = True
                undo()
                self._in_doubt = False
                raise
            self._committed = True
            aside = aside_of(target)
            if self.target.backup is None and aside.exists():
                os.rename(aside, staged)  # now it is rubbish, and a next run may know that

    def _move_in(self, target: Path, backup: Path | None) -> Callable[[], None]:
        """Puts what is staged in the target's place; returns what takes it back.

        Whatever instant a crash picks, what was in the target is in its place, or is the backup, or (without a backup,
        where the kernel cannot exchange) is aside, from where the next run puts it back; it is never in a folder that
        the next run would clear before the new one is in place.
        """
        staged = self.path
        if not (target.exists() and any(target.iterdir())):
            was_there = target.exists()
            os.rename(staged, target)

            def out_again() -> None:
                os.rename(target, staged)
                if was_there:
                    target.mkdir()

            return out_again
        if not self.target.overwrite:
            raise UsageError("something was put into DST while this run was working; choose another", file=target)
        if backup is not None:
            if os.path.lexists(backup):
                raise UsageError(f"'{shown(backup)}' appeared while this run was working; move it away", file=target)
            # Under the backup's name before the swap: a staging folder would be cleared by the next run.
            os.rename(staged, backup)
            self.path = backup
        new = self.path
        if _exchange(new, target):

            def swap_back() -> None:
                _exchange(new, target)

            return swap_back
        if backup is not None:
            os.rename(backup, staged)
            self.path = staged
        aside = backup or aside_of(target)
        os.rename(target, aside)
        try:
            os.rename(staged, target)
        except OSError:
            os.rename(aside, target)
            raise

        def back_again() -> None:
            os.rename(target, staged)
            os.rename(aside, target)

        return back_again

    def _end(self) -> None:
        """Removes what must not stay, undisturbed by signals; the lock goes last."""
        if self._lock < 0:
            self._remove_parents()
            return
        with _signals_deferred():
            if not self._in_doubt and not (self._committed and self.path == self.target.backup):
                shutil.rmtree(self.path, ignore_errors=True)
            if not self._committed:
                self._remove_parents()
            os.close(self._lock)
            self._lock = -1

    def _remove_parents(self) -> None:
        for folder in reversed(self._made_parents):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()


def staging_of(target: Path) -> Path:
    """Where the new checkpoint grows; hidden, and on the same file system."""
    return target.with_name(f".{target.name}.tierewrite")


def aside_of(target: Path) -> Path:
    """Where a target is for the moment between two renames, on a kernel that cannot exchange two folders in one."""
    return target.with_name(f".{target.name}.tierewrite-old")


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two folders in one step, so that neither is ever absent; False where the system cannot do that.

    `renameat2` with RENAME_EXCHANGE: Linux 3.15, glibc 2.28; EINVAL on file systems without it (rename(2)).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    at_cwd = -100
    if libc.renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), os.fspath(other))


@contextlib.contextmanager
def _signals_deferred() -> Iterator[None]:
    """Holds SIGINT and SIGTERM back while two renames belong together; they arrive afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    handlers = {
        signum: signal.signal(signum, lambda number, frame: arrived.append(number))
        for signum in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)
        if arrived:
            signal.raise_signal(arrived[0])


def part(path: Path, token: str = "") -> Path:
    """The name of a shard until it is complete and flushed; `token` tells several that write it apart."""
    return path.with_name(f"{path.name}{token and '.'}{token}.part")


def is_finished_shard(path: Path) -> bool:
    """Whether `path` in a staging folder is a shard that a run completed and flushed."""
    return path.suffix == ".safetensors" and path.is_file() and not path.is_symlink()


def sync_folder(path: Path) -> None:
    """Flushes a folder's entries to disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot, and need not
            raise
    finally:
        os.close(fd)


@gc_paused()
def shard_header(shard: OutShard, entries: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> bytes:
    """The length field and JSON header of an output shard, padded to 8 bytes as safetensors' serializer pads.

    Raises:
        UsageError: the header would be longer than the format allows.
    """
    encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
    rows = [f'"__metadata__":{encode(dict(metadata))}'] if metadata else []
    kinds: dict[tuple[str, tuple[int, ...]], str] = {}  # the text of dtype and shape: there are few
    for name, source, start, end, _ in shard.tensors:
        entry = entries[source]
        kind = kinds.get(entry[1:3])
        if kind is None:
            kind = f'"dtype":{encode(entry.dtype)},"shape":{encode(entry.shape)}'
            kinds[entry.dtype, entry.shape] = kind
        rows.append(f'{quoted(name)}:{{{kind},"data_offsets":[{start},{end}]}}')
    text = f"{{{','.join(rows)}}}".encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise UsageError(
            f"the header of '{shard.name}' would be {len(text):,} bytes, more than the {MAX_HEADER_BYTES:,} that the "
            "format allows; use a smaller --max-shard-size"
        )
    return struct.pack("<Q", len(text)) + text


def merged_metadata(checkpoint: Checkpoint) -> tuple[dict[str, str], list[str]]:
    """The union of the shards' `__metadata__`; where two disagree the first shard wins. Returns it with warnings."""
    union: dict[str, str] = {}
    warnings = []
    for shard in checkpoint.shards:
        for key, value in shard.metadata.items():
            if union.setdefault(key, value) != value:
                warnings.append(
                    f"metadata '{shown(key)}' is {shown(union[key])!r} in an earlier shard and {shown(value)!r} in "
                    f"'{shown(shard.name)}'; the first is kept"
                )
    return union, warnings


@gc_paused()
def index_bytes(shards: Sequence[OutShard], metadata: Mapping[str, Any] | None) -> bytes:
    """`model.safetensors.index.json`: canonical names, `total_size` in bytes of tensor data, other metadata kept."""
    about = {**(metadata or {}), "total_size": sum(shard.nbytes for shard in shards)}
    files = [(tensor.name, file) for shard in shards for file in [quoted(shard.name)] for tensor in shard.tensors]
    files.sort(key=itemgetter(0))
    head = json.dumps({"metadata": about}, indent=2, sort_keys=True, ensure_ascii=False).removesuffix("\n}")
    # What json.dumps(indent=2) prints, ten times as fast: the C encoder does not indent.
    rows = ",\n    ".join([f"{quoted(name)}: {file}" for name, file in files])
    body = f"{{\n    {rows}\n  }}" if rows else "{}"
    return f'{head},\n  "weight_map": {body}\n}}\n'.encode()


def create(path: Path) -> int:
    """A new file for writing, with the mode that the umask gives (safetensors' own save_file gives 0600)."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)


def flush(fd: int) -> None:
    """Puts a file's data on the disk itself (on macOS fsync alone leaves it in the drive's cache)."""
    if hasattr(fcntl, "F_FULLFSYNC"):
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fsync(fd)


@functools.cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    try:
        function = ctypes.CDLL(None).sync_file_range  # Linux
    except (AttributeError, OSError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function


def _start_writeback(fd: int) -> None:
    """Lets the disk begin with all that a file has in memory, so that a flush finds little left; only a hint."""
    function = _sync_file_range()
    if function is not None:
        function(fd, 0, 0, _SYNC_FILE_RANGE_WRITE)  # 0 bytes: to its end


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Writes all of `data` at `offset`; a short write is continued."""
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view[:_WRITE_BYTES], offset)
        view = view[done:]
        offset += done


def _apart(src: Path, dst: Path, real: Path) -> None:
    """Raises UsageError if `dst`, which is the folder `real`, is `src`, or one lies in the other."""
    real_src = src.resolve()
    if real == real_src or (real.exists() and real_src.exists() and os.path.samefile(real, real_src)):
        raise UsageError("SRC and DST are the same folder; write to another one", file=dst)
    if real_src in real.parents:
        raise UsageError(f"DST lies inside SRC '{shown(src)}'; write outside of it", file=dst)
    if real in real_src.parents:
        raise UsageError(f"SRC '{shown(src)}' lies inside DST; write somewhere else", file=dst)


class Sink(Protocol):
    """One new file, written from its first byte to its last."""

    def write(self, data: memoryview) -> None:
        """The next bytes. Raises SystemFailure."""

    def commit(self) -> None:
        """All is written: the file is complete, durable and under its name. Raises SystemFailure."""

    def abort(self) -> None:
        """Leaves nothing of it."""


@dataclass
class _Growing:
    """A file that is being written, and the thread that waits for the disk."""

    path: Path
    fd: int
    writing: threading.Lock = field(default_factory=threading.Lock)
    gathered: int = 0  # bytes written since the disk was told to begin
    waiting: Future[None] | None = None


class PartFiles:
    """New files that threads write in any order, each `part(path)` until it is complete and flushed.

    Whoever writes waits for the page cache only: a few threads of its own keep the disk at work, and flush. A context
    manager; files that are not durable when it ends keep the name of a part.

    Args:
        paths: by number; the parts exist already.

    Raises:
        SystemFailure: one cannot be opened.
    """

    def __init__(self, paths: Mapping[int, Path]) -> None:
        self._files: dict[int, _Growing] = {}
        self._lock = threading.Lock()
        self._finishing: list[Future[int]] = []
        self._given_up = False
        self._pool = ThreadPoolExecutor(_FLUSHERS, thread_name_prefix="tierewrite-flush")
        try:
            for number, path in paths.items():
                with system_errors("opening", path):
                    fd = os.open(part(path), os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
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
        with self._lock:
            file.gathered += len(data)
            if file.gathered < _WRITEBACK_BYTES or not (file.waiting is None or file.waiting.done()):
                return
            file.gathered = 0
            file.waiting = self._pool.submit(_start_writeback, file.fd)

    def complete(self, number: int) -> None:
        """All of a file is written: it is flushed, and gets its own name, while others go on."""
        file = self._files.pop(number)
        self._finishing.append(self._pool.submit(self._finish, file))

    def _finish(self, file: _Growing) -> int:
        """Returns the bytes of the file."""
        try:
            if file.waiting is not None:
                file.waiting.result()  # it began before this did
            if self._given_up:
                return 0
            with system_errors("flushing", file.path):
                flush(file.fd)
                os.rename(part(file.path), file.path)
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


class LocalSink:
    """A new file of this machine's, flushed before it is complete.

    Args:
        path: its name.
        under: the name that it has until then; None: its own.
    """

    def __init__(self, path: Path, under: Path | None = None) -> None:
        self.path, self.under = path, under or path
        self._size = self._gathered = 0
        with system_errors("creating", path):
            self._fd = create(self.under)

    def write(self, data: memoryview) -> None:
        with system_errors("writing", self.path):
            write_all(self._fd, data, self._size)
        self._size += len(data)
        self._gathered += len(data)
        if self._gathered >= _WRITEBACK_BYTES:
            _start_writeback(self._fd)
            self._gathered = 0

    def commit(self) -> None:
        with system_errors("flushing", self.path):
            flush(self._fd)
            self._close()
            if self.under != self.path:
                os.rename(self.under, self.path)

    def abort(self) -> None:
        self._close()
        with contextlib.suppress(OSError):
            self.under.unlink()

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def open_sink(path: FilePath, size: int, token: str = "") -> Sink:
    """A new file, wherever it is to be.

    Args:
        path: its name.
        size: its bytes.
        token: of who writes: a local file is not under its name before it is complete, and two that write the same
            file do not meet. (In a store no file is there before it is complete.)
    """
    if isinstance(path, RemotePath):
        return Upload(path, size)
    return LocalSink(path, part(path, token) if token else None)


def write_file(path: Path, data: bytes) -> None:
    """Writes and flushes a small file."""
    with system_errors("writing", path):
        fd = create(path)
        try:
            write_all(fd, data, 0)
            flush(fd)
        finally:
            os.close(fd)


def side_file_clashes(checkpoint: Checkpoint, shards: Sequence[OutShard]) -> None:
    """A side file may not have the name of a file that we write.

    Raises:
        SourceError: a stray file stands where an output shard will.
    """
    ours = {shard.name for shard in shards} | {INDEX_NAME}
    for side in checkpoint.side_files:
        if side.name in ours:
            raise SourceError(
                "this file is not part of the checkpoint's index but has the name of a shard of the output; "
                "move it out of SRC",
                file=side.path,
            )


def copy_side_files(
    side_files: Sequence[SideFile],
    directories: Sequence[str],
    staging: Staged,
    advance: Callable[[int], None] = lambda n: None,
    contents: Mapping[str, bytes] | None = None,
) -> None:
    """Copies every other file of the source, byte for byte; links arrive as files.

    Args:
        contents: name -> bytes to write instead of the file's own.

    Raises:
        SourceChanged: a file's size or modification time is not what it was when the source was opened.
        SystemFailure: reading or writing failed.
    """
    folder = staging.folder
    if isinstance(folder, Path):  # a store has no folders but in names
        for name in directories:
            _make_folder(folder / name)
    for side in side_files:
        if contents is not None and side.name in contents:
            staging.put(side.name, contents[side.name])
            continue
        if side.name in staging.held_back:
            staging.put(side.name, read_side_file(side))
            continue
        path = folder / side.name
        if isinstance(path, Path):
            _make_folder(path.parent)
        sink = open_sink(path, side.size)
        try:
            for chunk in chunks_of(side):
                sink.write(memoryview(chunk))
                advance(len(chunk))
            sink.commit()
        except BaseException:
            sink.abort()
            raise


def _make_folder(path: Path) -> None:
    with system_errors("making a folder", path):
        path.mkdir(parents=True, exist_ok=True)


def listing(folder: Path) -> dict[str, tuple[int, int, int, int]]:
    """Every file below `folder`: inode, size (bytes), modification and change time (ns); of links, what they lead to.

    Raises:
        SystemFailure: the folder cannot be read.
    """
    found: dict[str, tuple[int, int, int, int]] = {}
    with system_errors("listing", folder):
        for place, folders, files in os.walk(folder):
            for name in (*folders, *files):
                path = os.path.join(place, name)
                try:
                    status = os.stat(path)
                except FileNotFoundError:  # a link to nothing; or gone meanwhile
                    status = os.lstat(path)
                times = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
                if stat.S_ISDIR(status.st_mode):
                    times = (0, 0, 0)
                found[os.path.relpath(path, folder)] = (status.st_ino, *times)
    return found


def still_as_listed(folder: Path, before: Mapping[str, tuple[int, int, int, int]]) -> None:
    """What is about to be swapped out holds nothing that the new checkpoint was not made from.

    Raises:
        SourceChanged: something was added, removed or changed since `before`.
    """
    now = listing(folder)
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            what = "was added" if name not in before else "was removed" if name not in now else "changed"
            raise SourceChanged(
                f"{what} while the checkpoint was rewritten in place; SRC is as it is, and nothing was swapped: run "
                "again when nothing writes to it",
                file=folder / name,
            )


def check_space(target: Path, needed: int) -> None:
    """Refuses before the first byte when the disk of `target` cannot hold `needed` bytes.

    What a killed run left beside it counts as free: it is used (--resume) or removed.

    Raises:
        SystemFailure: too little space.
    """
    folder = target.parent
    while not folder.exists():
        folder = folder.parent
    with system_errors("asking for the free space", folder):
        free = shutil.disk_usage(folder).free
        for place, _, names in os.walk(staging_of(target)):
            free += sum(os.lstat(os.path.join(place, name)).st_blocks * 512 for name in names)
    if needed > free:
        raise SystemFailure(
            f"the output needs {needed:,} bytes and the disk has {free:,} free; make room, or choose another disk",
            file=folder,
        )
