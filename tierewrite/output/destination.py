"""Where the output goes: a folder that is swapped in by a rename, or a store where the index comes last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tierewrite.output.staging import Staged, Staging
from tierewrite.output.store_staging import RemoteStaging, RemoteTarget
from tierewrite.output.target import Target, check_space
from tierewrite.source.table import Shard
from tierewrite.stores.places import FilePath, is_local


class Destination(Protocol):
    """A place that was found fit to be written; what is done there does not depend on its kind."""

    @property
    def backup(self) -> Path | None:
        """Where what was there stays once the new one is in its place; None: nowhere."""

    def check_space(self, needed: int, sources: Sequence[Shard], shareable: Mapping[int, int]) -> int:
        """How many of `needed` bytes take space; see `target.check_space`. (A store does not say what it has left.)

        Raises:
            SystemFailure: they do not fit.
        """

    def staging(self, resume: bool, source: str = "") -> Staged:
        """Where the output of `source` grows until it is complete; `resume` keeps what a killed run finished."""


@dataclass(frozen=True)
class FolderDestination:
    """A folder of this machine's."""

    target: Target

    @property
    def backup(self) -> Path | None:
        """See `Destination`."""
        return self.target.backup

    def check_space(self, needed: int, sources: Sequence[Shard], shareable: Mapping[int, int]) -> int:
        """See `Destination`."""
        return check_space(self.target.path, needed, sources, shareable)

    def staging(self, resume: bool, source: str = "") -> Staged:
        """See `Destination`."""
        return Staging(self.target, resume, source)


@dataclass(frozen=True)
class StoreDestination:
    """A folder of a store."""

    target: RemoteTarget
    backup: Path | None = None

    def check_space(self, needed: int, sources: Sequence[Shard], shareable: Mapping[int, int]) -> int:
        """See `Destination`."""
        return needed

    def staging(self, resume: bool, source: str = "") -> Staged:
        """See `Destination`."""
        return RemoteStaging(self.target, resume)


def destination_in_place(src: Path, backup: bool) -> Destination:
    """The source itself. Raises UsageError: it cannot be swapped."""
    return FolderDestination(Target.in_place(src, backup))


def destination(src: FilePath, dst: FilePath, overwrite: bool, resume: bool) -> Destination:
    """Decides whether `dst` can be written.

    Raises:
        UsageError: `src` and `dst` are the same or inside one another, or something is there that may not go.
        SystemFailure: it cannot be looked at.
    """
    if is_local(dst):
        return FolderDestination(Target.check(src, dst, overwrite))
    return StoreDestination(RemoteTarget.check(src, dst, overwrite, resume))
