"""The new files in a store that cannot rename: objects under their own names, the index last.

A marker (`tierewrite.incomplete.json`) stands there for as long as a rewrite works. Whoever finds it without an index
knows that the rest is half-written: every reader of ours refuses it, and a next run takes it over (`--resume`) or
clears it (`--overwrite`). The configurations come last but one, so that no loader takes the half for the whole. A
committed checkpoint is never overwritten: it could not be swapped in one step.

The marker names its run. A run that finds another's name there stops and touches nothing more. Of two that start within
the same instant one has the marker, where the store can refuse to overwrite an object (S3 and GCS do); elsewhere, and
where both take over the same killed run, the later one has it, and the other stops at its end.
"""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType

from tierewrite import interrupts
from tierewrite.errors import SourceError, SystemFailure, TierewriteError, UsageError, shown
from tierewrite.source.folder import is_half_written
from tierewrite.source.table import CONFIG_NAMES, INCOMPLETE_NAME, INDEX_NAME
from tierewrite.stores.mirror import RemoteFolder
from tierewrite.stores.places import FilePath, chain, is_remote
from tierewrite.stores.remote import RemotePath, listing, with_timeout

log = logging.getLogger(__name__)

_LATE = (*CONFIG_NAMES, INDEX_NAME)
"""Without them no loader begins: they are written once all else is there, in this order."""

INCOMPLETE_SCHEMA = "tierewrite/incomplete/1"


@dataclass(frozen=True)
class RemoteTarget:
    """Where the output goes, checked before anything else happens.

    Attributes:
        path: the folder; nothing is there, or what a killed run left.
        left: a killed run left something.
        clear: whether that may go.
    """

    path: RemotePath
    left: bool = False
    clear: bool = False

    @classmethod
    def check(cls, src: FilePath, dst: RemotePath, overwrite: bool, resume: bool) -> RemoteTarget:
        """Decides whether `dst` can be written.

        Raises:
            UsageError: SRC and DST are the same or inside one another, or something is there that may not go.
            SystemFailure: the store cannot be asked.
        """
        if is_remote(src):
            source, target = chain(src), chain(dst)
            if source[0] == target[0]:
                raise UsageError("SRC and DST are the same folder; write to another one", file=dst)
            if source[0] in target or target[0] in source:
                raise UsageError("one of SRC and DST lies inside of the other; write somewhere else", file=dst)
        there = listing(dst)
        if not there:
            return cls(dst)
        if not is_half_written(list(there)):
            raise UsageError(
                f"something is there already ('{shown(next(iter(there)))}'), and a store that cannot rename cannot "
                "swap a checkpoint in one step; choose another place, or remove it first",
                file=dst,
            )
        if not (overwrite or resume):
            raise UsageError(
                "holds what a run left that was killed, or is still going: go on from it with --resume, or start again "
                "with --overwrite",
                file=dst,
            )
        return cls(dst, True, not resume)


class RemoteStaging:
    """An output on its way into a store; see `output.staging.Staged`."""

    held_back = _LATE

    def __init__(self, target: RemoteTarget, resume: bool = False) -> None:
        self.target = target
        self.resume = resume
        self.folder: RemotePath = target.path
        self.token = secrets.token_hex(8)
        self._late: dict[str, bytes] = {}
        self._expected: dict[str, int] = {}
        self._put: dict[str, int] = {}
        self._marked = False
        self._committed = False

    @property
    def _marker(self) -> RemotePath:
        return self.folder / INCOMPLETE_NAME

    def __enter__(self) -> RemoteStaging:
        text = {
            "schema": INCOMPLETE_SCHEMA,
            "run": self.token,
            "note": f"a tierewrite run is writing here; without {INDEX_NAME} what is here is not complete",
        }
        try:
            self._marked = True
            write = self._marker.write_bytes if self.target.left else self._marker.write_new
            write(json.dumps(text, indent=2).encode() + b"\n")
            self.still_ours()
            if self.target.clear:
                self._remove(keep=(INCOMPLETE_NAME,))
        except BaseException:
            self._end()
            raise
        return self

    def still_ours(self) -> None:
        """Raises UsageError if another run has begun to write to the same place."""
        try:
            run = json.loads(self._marker.read_bytes()).get("run")
        except (SourceError, ValueError, AttributeError):  # it is gone, or no marker of ours
            run = None
        if run != self.token:
            self._marked = False  # what is there is not ours to remove any more
            raise UsageError(
                "another run has begun to write to this DST; wait for it to end, or choose another DST",
                file=self.folder,
            )

    def put(self, name: str, data: bytes) -> None:
        """See `Staged`."""
        if name in _LATE:
            self._late[name] = data
        else:
            (self.folder / name).write_bytes(data)
            self._put[name] = len(data)

    def expect(self, files: Mapping[str, int]) -> None:
        """See `Staged`."""
        self._expected = dict(files)

    def view(self) -> RemoteFolder:
        """See `Staged`."""
        return RemoteFolder(self.folder, dict(self._late))

    def kept(self) -> list[FilePath]:
        """See `Staged`."""
        return [self.folder / name for name in listing(self.folder) if name != INCOMPLETE_NAME]

    def commit(self, done: Callable[[], None] = lambda: None) -> None:
        """Writes the configurations and then the index, which makes it a checkpoint.

        A signal that arrives from the index on is held back until the marker is gone.

        Raises:
            SystemFailure: the store does not take them. UsageError: another run writes there.
        """
        interrupts.check()
        self.still_ours()
        self._refuse_changed()
        for name in CONFIG_NAMES:
            if name in self._late:
                interrupts.check()
                (self.folder / name).write_bytes(self._late[name])
        interrupts.check()  # the last moment at which nothing is a checkpoint yet
        # A signal that left this half-way would clean up while the store still carries out what it was asked.
        with interrupts.held():
            (self.folder / INDEX_NAME).write_bytes(self._late[INDEX_NAME])
            self._committed = True
            done()
            try:
                self._marker.unlink(missing_ok=True)
            except SystemFailure as error:
                log.warning("the checkpoint is complete, but its %s may be left: %s", INCOMPLETE_NAME, error)

    def _refuse_changed(self) -> None:
        """Raises SystemFailure: an object that was written is not there any more, or has another size."""
        there = listing(self.folder)
        for name, size in {**self._expected, **self._put}.items():
            if name not in self._late and there.get(name, {}).get("size") != size:
                found = "is missing" if name not in there else f"has {there[name].get('size')} bytes"
                raise SystemFailure(
                    f"{found}; {size:,} bytes were written",
                    file=self.folder / name,
                    advice="nothing else may write there while a run works: run again",
                )

    def _remove(self, keep: tuple[str, ...] = ()) -> None:
        there = listing(self.folder)
        for name in sorted(there, key=lambda name: name != INDEX_NAME):  # the index first: the rest is no checkpoint
            if name not in keep:
                (self.folder / name).unlink(missing_ok=True)

    def _end(self) -> None:
        """Removes what must not stay, the marker last."""
        if self._committed or not self._marked:
            return
        if not with_timeout(self.still_ours):
            if self._marked:
                log.warning(
                    "%s cannot be cleaned up: the store does not answer. If anything is there, it is marked as "
                    "half-written: a next run uses it (--resume) or removes it (--overwrite)",
                    self.folder,
                )
            return
        with contextlib.suppress(TierewriteError):  # an error is being told already; the marker stays with the rest
            self._remove(keep=(INCOMPLETE_NAME,))
            self._marker.unlink(missing_ok=True)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()
