"""The new files: staged in a hidden folder beside the target, flushed, and made visible by one rename.

Nothing exists under the target's name until everything is written and flushed to disk (files, folders, and the folder
that holds them), so a crash at any instant leaves the target whole or absent. The staging folder is locked while a
run lives; one that a killed run left behind is recognised by its mark (`staging_mark`) and by the lock being free, and
cleared. What does not bear the mark is not ours and is never touched.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from tierewrite import interrupts
from tierewrite.errors import SystemFailure, UsageError, shown, system_errors
from tierewrite.output.files import is_finished_shard
from tierewrite.output.staging_mark import (
    Mark,
    Sizes,
    keep_mode,
    keep_permissions,
    refuse_not_ours,
    remove_tree,
    sizes_in,
)
from tierewrite.output.target import Target, aside_of, beside_of, is_on_overlay, staging_of
from tierewrite.source.table import STAGING_MARK_NAME
from tierewrite.stores.local import sync_folder
from tierewrite.stores.mirror import RemoteFolder
from tierewrite.stores.places import FilePath, store_of

log = logging.getLogger(__name__)
_RENAME_EXCHANGE = 2


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
        """Writes a small file, or replaces it. Raises SystemFailure."""

    def expect(self, files: Sizes) -> None:
        """What must be there at the commit, besides what came through `put`: names and sizes in bytes."""

    def view(self) -> Path | RemoteFolder:
        """The output as a checkpoint that can be opened, though it has not appeared."""

    def kept(self) -> list[FilePath]:
        """The files that are there already: with `resume`, what a killed run left."""

    def commit(self, done: Callable[[], None] = lambda: None) -> None:
        """Makes it appear; `done` is called once that is not taken back.

        Raises:
            SystemFailure: it cannot, or what is expected is not there. UsageError.
        """

    def __enter__(self) -> Staged: ...

    def __exit__(self, *exc: Any) -> None: ...


class Staging:
    """A locked hidden folder beside the target; a context manager that leaves nothing behind unless committed.

    Args:
        target: what it becomes.
        resume: keep the finished shards that a killed run left, for the caller to check.
        source: what the output is made from, for the mark.

    Raises on entry:
        UsageError: another run is writing to the same target, or a folder that is not ours has the name.
        SystemFailure: the folder cannot be made.
    """

    held_back: tuple[str, ...] = ()

    def __init__(self, target: Target, resume: bool = False, source: str = "") -> None:
        self.target = target
        self.mark = Mark(source)
        self._expected: dict[str, int] | None = None
        self._put: dict[str, int] = {}
        self.resume = resume
        self.path = staging_of(target.path)
        self._lock = -1
        self._old_lock = -1  # of what is swapped out
        self._made_parents: list[Path] = []
        self._committed = False
        self._beside = False  # the mark is beside the folder
        self._in_doubt = False  # a swap failed and could not be taken back: then nothing is removed

    def __enter__(self) -> Staging:
        try:
            with interrupts.held(), system_errors("making the staging folder", self.path):
                missing = []
                parent = self.path.parent
                while not parent.exists():
                    missing.append(parent)
                    parent = parent.parent
                for folder in reversed(missing):
                    folder.mkdir()
                    self._made_parents.append(folder)
                self._acquire()
            self._refuse_immovable()
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
            except OSError as error:
                if made:
                    self.path.rmdir()
                if error.errno in (errno.ELOOP, errno.ENOTDIR):  # a link, or no folder at all
                    refuse_not_ours(self.target.path, self.path, aside_of(self.target.path))
                raise
            try:
                if not _locked(lock, self.target.path):
                    log.warning("this file system has no locks: do not start a second run into %s", self.target.path)
            except UsageError:
                os.close(lock)
                raise
            except OSError:
                os.close(lock)
                if made:
                    self.path.rmdir()
                raise
            try:
                same = os.path.samestat(os.fstat(lock), os.stat(self.path, follow_symlinks=False))
            except FileNotFoundError:
                same = False
            if same:
                try:
                    mark = refuse_not_ours(self.target.path, self.path, aside_of(self.target.path))
                    self._recover()
                except BaseException:
                    os.close(lock)
                    if made:
                        self.path.rmdir()
                    raise
                self._lock = lock
                self._clear()
                self.mark.put(self.path)
                if mark is not None:
                    beside_of(self.target.path).unlink(missing_ok=True)
                return
            os.close(lock)  # the other run renamed its folder into place before we got the lock

    def _refuse_immovable(self) -> None:
        """Finds before the work that what is to be swapped out cannot be moved: an overlay holds folders of its lower
        layers (an image's) where they are.

        Asked by a rename that never succeeds: with its mark in it, the staging folder is not empty.

        Raises:
            SystemFailure: it cannot be moved.
        """
        target = self.target.path
        with system_errors("moving it out of its place", target):
            if not (self.target.overwrite and target.exists() and any(target.iterdir()) and is_on_overlay(target)):
                return
            try:
                os.rename(target, self.path)
            except OSError as error:
                if error.errno == errno.EXDEV:
                    raise
            else:  # somebody emptied the staging folder meanwhile: what moved goes back
                os.rename(self.path, target)
                raise FileNotFoundError(errno.ENOENT, "it was removed while the run was using it", str(self.path))

    def _recover(self) -> None:
        """Ends a swap in two renames that a killed run began: what it had moved aside goes back, or is removed.

        Raises:
            UsageError: DST is back, and may not be overwritten; or the run that swaps lives.
        """
        target, aside = self.target.path, aside_of(self.target.path)
        if not aside.exists():
            return
        lock = os.open(aside, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _locked(lock, target)  # a run that lives may still take its swap back
            if target.exists():
                remove_tree(aside)  # the swap was complete
                return
            os.rename(aside, target)
        finally:
            os.close(lock)
        log.warning("a run was killed while it swapped out %s; the old one is back in its place", target)
        if not self.target.overwrite:
            raise UsageError(
                "a run was killed while it swapped out this folder; it is back in its place, and not empty: choose "
                "another folder, or use --overwrite",
                file=target,
            )

    def _clear(self) -> None:
        leftovers = [entry for entry in self.path.iterdir() if entry.name != STAGING_MARK_NAME]
        if self.resume:
            leftovers = [entry for entry in leftovers if not is_finished_shard(entry)]
        elif leftovers:
            log.warning(
                "a run into this DST was killed; starting again from the start (--resume would use what it finished)"
            )
        for entry in leftovers:
            if entry.is_dir() and not entry.is_symlink():
                remove_tree(entry)
            else:
                entry.unlink()

    @property
    def folder(self) -> Path:
        """See `Staged`."""
        return self.path

    def put(self, name: str, data: bytes) -> None:
        """See `Staged`."""
        path = self.path / name
        store_of(path).put(path, data)
        self._put[name] = len(data)

    def expect(self, files: Sizes) -> None:
        """See `Staged`."""
        self._expected = dict(files)

    def view(self) -> Path:
        """See `Staged`."""
        return self.path

    def kept(self) -> list[FilePath]:
        """See `Staged`."""
        with system_errors("listing", self.path):
            return [entry for entry in self.path.iterdir() if entry.name != STAGING_MARK_NAME]

    def _refuse_changed(self) -> None:
        """What was written is still there, in the folder that was locked, and nothing else is.

        Raises:
            SystemFailure: somebody removed, exchanged or changed it meanwhile.
        """
        advice = "nothing else may write there while a run works: run again"
        with system_errors("looking at what is staged", self.path):
            try:
                same = os.path.samestat(os.fstat(self._lock), os.stat(self.path, follow_symlinks=False))
            except FileNotFoundError:
                same = False
            if not same:
                self._in_doubt = True  # what has the name now is not ours to remove
                raise SystemFailure("was removed or exchanged while the run worked", file=self.path, advice=advice)
            there = sizes_in(self.path)
        wanted = {**(self._expected or {}), **self._put}
        for name, size in wanted.items():
            if there.get(name) != size:
                found = "is missing" if name not in there else f"has {there[name]:,} bytes"
                what = f"{found}; {size:,} bytes were written"
                raise SystemFailure(what, file=self.path / name, advice=advice)
        if self._expected is not None and (more := sorted(there.keys() - wanted.keys())):
            raise SystemFailure("was put there by somebody else", file=self.path / more[0], advice=advice)

    def commit(self, done: Callable[[], None] = lambda: None) -> None:
        """Flushes the folder and makes it the target, by one rename.

        Raises:
            SystemFailure: the rename or a flush failed; the target is what it was.
            UsageError: something appeared in the target meanwhile.
        """
        interrupts.check()
        target = self.target.path
        self._refuse_changed()
        old = target if target.exists() else None
        if self.target.keep_permissions and old is not None:
            with system_errors("keeping permissions", old):
                keep_permissions(self.path, old)
        for folder, _, _ in os.walk(self.path, topdown=False):
            with system_errors("flushing", folder):
                sync_folder(Path(folder))
        with interrupts.held(), system_errors("moving the new checkpoint into place", target):
            staged = self.path
            replace(self.mark, new=sizes_in(staged), old=sizes_in(target)).put_beside(staged, target)
            self._beside = True
            if self.target.keep_permissions and old is not None:
                keep_mode(staged, old)
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
            done()
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
            try:
                os.rename(staged, target)
            except OSError as error:
                if error.errno != errno.ENOTEMPTY or any(target.iterdir()):
                    raise
                target.rmdir()  # an empty subvolume of Btrfs goes, but nothing replaces it
                os.rename(staged, target)

            def out_again() -> None:
                os.rename(target, staged)
                if was_there:
                    target.mkdir()

            return out_again
        if not self.target.overwrite:
            raise UsageError("something was put into DST while this run was working; choose another", file=target)
        # After the swap it has the name of the staging folder: no other run may take it for what a killed one left.
        self._old_lock = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        _locked(self._old_lock, target)
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

    def _end(self) -> SystemFailure | None:
        """Removes what must not stay, undisturbed by signals; the lock goes last. Returns what stays all the same."""
        if self._lock < 0:
            self._remove_parents()
            return None
        failed = None
        with interrupts.held():
            if not self._in_doubt and not (self._committed and self.path == self.target.backup) and self._has_ours():
                failed = self._remove()
            if self._beside and failed is None and not self._in_doubt:
                self._remove_mark()
            if not self._committed:
                self._remove_parents()
            for lock in (self._lock, self._old_lock):
                if lock >= 0:
                    os.close(lock)
            self._lock = self._old_lock = -1
        return failed

    def _has_ours(self) -> bool:
        """Whether the staging folder is the one that was locked, or what was swapped out: not a next run's."""
        try:
            there = os.stat(self.path, follow_symlinks=False)
        except OSError:
            return False
        return any(lock >= 0 and os.path.samestat(os.fstat(lock), there) for lock in (self._lock, self._old_lock))

    def _remove_mark(self) -> None:
        """Removes the mark beside DST; if that fails, the next run into DST does it."""
        beside = beside_of(self.target.path)
        try:
            beside.unlink(missing_ok=True)
            sync_folder(beside.parent)
        except OSError as error:
            log.warning("%s could not be removed: %s; remove it by hand", shown(beside), error.strerror or error)

    def _remove(self) -> SystemFailure | None:
        """Removes the staging folder: what was staged, or after the swap what DST held before."""
        try:
            remove_tree(self.path)
        except OSError as error:
            what = "DST is complete, and what it held before" if self._committed else "what was staged"
            return SystemFailure(
                f"{what} could not be removed ({error.strerror or error}: '{shown(error.filename)}') and is left here",
                file=self.path,
                advice="remove it by hand",
            )
        return None

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
        left = self._end()
        if left is not None and exc is None:
            raise left
        if left is not None:
            log.warning("%s", left)


def _locked(folder: int, target: Path) -> bool:
    """Takes an open folder for this run; False where the file system has no locks.

    Raises:
        UsageError: another run has it. OSError: the system does not say.
    """
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(
            "another run is writing to this DST; wait for it to end, or choose another DST", file=target
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.EBADF, errno.ENOLCK, errno.EINVAL):
            raise
        return False
    return True


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
