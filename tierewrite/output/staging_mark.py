"""The mark of a staging folder: what bears it is ours, and nothing else is ever cleared, renamed or taken over.

It lies in the staging folder while that grows. Before the swap it moves beside it, as `.DST.tierewrite-mark`, and then
lists what the new folder and what the one that is swapped out hold: so a next run knows both, wherever a crash left
them. An empty folder is taken as it is, since nothing in it can be lost.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tierewrite
from tierewrite.errors import UsageError, shown, system_errors
from tierewrite.output.target import beside_of
from tierewrite.source.folder import safetensors_among
from tierewrite.source.table import STAGING_MARK_NAME
from tierewrite.stores.local import sync_folder, write_file

_SCHEMA = "tierewrite/staging/1"
_MOVING_NAME = f"{STAGING_MARK_NAME}.part"
_MOST_BYTES = 256 << 20

Sizes = Mapping[str, int]
"""Names below a folder -> bytes of the files."""


@dataclass(frozen=True)
class Mark:
    """Whose a staging folder is.

    Attributes:
        run: of the run that made it.
        source: what it was made from, for people.
        new, old: what the new folder and the one that it replaces hold; {} before the swap.
    """

    source: str
    run: str = field(default_factory=lambda: secrets.token_hex(8))
    new: Sizes = field(default_factory=dict)
    old: Sizes = field(default_factory=dict)

    def text(self) -> bytes:
        """The mark as a file."""
        tool = {"name": "tierewrite", "version": tierewrite.__version__}
        source = self.source.encode("utf-8", "backslashreplace").decode()
        found = {"schema": _SCHEMA, "run": self.run, "tool": tool, "source": source, "new": self.new, "old": self.old}
        return json.dumps(found).encode() + b"\n"

    def put(self, staging: Path) -> None:
        """Marks a folder; an earlier mark is there until this one is. Raises SystemFailure."""
        path = staging / _MOVING_NAME
        with system_errors("marking the staging folder", path):
            if os.path.lexists(path):
                path.unlink()
            write_file(path, self.text())
            os.rename(path, staging / STAGING_MARK_NAME)

    def put_beside(self, staging: Path, target: Path) -> None:
        """Moves the mark from the folder to its place beside it; at every instant one of them is there.

        Raises:
            UsageError: something is in its place. SystemFailure: it cannot be written.
        """
        moving, beside = staging / _MOVING_NAME, beside_of(target)
        if os.path.lexists(beside):
            raise UsageError(f"'{shown(beside)}' appeared while this run was working; move it away", file=target)
        with system_errors("marking the swap", moving):
            write_file(moving, self.text())
            os.rename(moving, beside)
            sync_folder(beside.parent)
            (staging / STAGING_MARK_NAME).unlink()
            sync_folder(staging)

    def tells(self, folder: Path, *listings: Sizes) -> bool:
        """Whether a folder holds nothing but what one of the `listings` has."""
        there = sizes_in(folder)
        return any(listing and there.items() <= listing.items() for listing in listings)


def read_mark(path: Path) -> Mark | None:
    """The mark in a file; None if there is none, or something else."""
    try:
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_BYTES:
            return None
        found: Any = json.loads(path.read_bytes())
        if found["schema"] != _SCHEMA:
            return None
        return Mark(str(found["source"]), str(found["run"]), dict(found["new"]), dict(found["old"]))
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, RecursionError):
        return None


def refuse_not_ours(target: Path, staging: Path, aside: Path) -> Mark | None:
    """Refuses where a name that we derive from `target` is taken by what does not bear our mark.

    Returns:
        The mark beside the folder, which a run left that was killed within its swap.

    Raises:
        UsageError: such a file or folder. SystemFailure: it cannot be looked at.
    """
    beside = beside_of(target)
    with system_errors("looking for our mark", staging):
        mark = read_mark(beside)
        if mark is None and os.path.lexists(beside):
            raise _not_ours(beside, target)
        for path in (staging, aside):
            if os.path.lexists(path) and not _is_ours(path, mark):
                raise _not_ours(path, target)
    return mark


def _is_ours(path: Path, mark: Mark | None) -> bool:
    if path.is_symlink() or not path.is_dir():
        return False
    if set(os.listdir(path)) <= {STAGING_MARK_NAME, _MOVING_NAME} or read_mark(path / STAGING_MARK_NAME) is not None:
        return True
    return mark is not None and mark.tells(path, mark.new, mark.old)


def _not_ours(path: Path, target: Path) -> UsageError:
    return UsageError(
        f"'{shown(path)}' is needed for writing this DST and bears no mark of a tierewrite run; it is not touched: "
        "move it away or choose another DST (if an older tierewrite left it, remove it)",
        file=target,
    )


def sizes_in(folder: Path) -> dict[str, int]:
    """The files below a folder, but for our mark, with their sizes in bytes; links count as what they lead to."""
    found: dict[str, int] = {}
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)
            try:
                size = os.stat(path).st_size
            except OSError:  # a link to nothing
                size = os.lstat(path).st_size
            found[os.path.relpath(path, folder)] = size
    found.pop(STAGING_MARK_NAME, None)
    return found


def remove_tree(folder: Path) -> None:
    """Removes a folder of ours and all below it, read-only folders too. Raises OSError: something stays."""
    if not os.path.lexists(folder):
        return
    _make_writable(folder)
    for place, folders, _ in os.walk(folder):
        for name in folders:
            _make_writable(Path(place, name))
    shutil.rmtree(folder)


def _make_writable(folder: Path) -> None:
    mode = os.lstat(folder).st_mode
    if stat.S_ISDIR(mode) and mode & 0o700 != 0o700:
        try:
            os.chmod(folder, stat.S_IMODE(mode) | 0o700)
        except PermissionError:  # another user's: the removal says what it cannot do
            return


def keep_permissions(new: Path, old: Path) -> None:
    """Gives what is below `new` the modes of what `old` has under the same names, and the owners where that is allowed.

    Files that `old` lacks are like its first shard, folders like `old` itself. The mode of `new` itself comes last of
    all, by `keep_mode`. Raises OSError.
    """
    shards = (old / name for name in sorted(safetensors_among(os.listdir(old))))
    default = next(filter(Path.is_file, shards), None)
    for place, folders, names in os.walk(new, topdown=False):
        for name in (*names, *folders):
            path = Path(place, name)
            like = old / path.relative_to(new)
            if name in names and not like.is_file():
                if default is None:
                    continue
                like = default
            elif name in folders and not like.is_dir():
                like = old
            keep_mode(path, like)


def keep_mode(new: Path, old: Path) -> None:
    """Gives a file or folder the owner, where that is allowed, and the mode of another. Raises OSError."""
    was, now = old.stat(), new.stat()
    if (was.st_uid, was.st_gid) != (now.st_uid, now.st_gid):
        for owner in ((was.st_uid, was.st_gid), (-1, was.st_gid)):
            try:
                os.chown(new, *owner)
                break
            except PermissionError:
                continue
    if stat.S_IMODE(was.st_mode) != stat.S_IMODE(new.stat().st_mode):
        os.chmod(new, stat.S_IMODE(was.st_mode))
