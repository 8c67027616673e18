"""Whether the output may be written where it is wanted, whether it fits there, and whether SRC is unchanged."""

from __future__ import annotations

import logging
import os
import shutil
import stat
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tierewrite.errors import SourceChanged, SourceError, SystemFailure, UsageError, shown, system_errors
from tierewrite.output.immovable import refuse_immovable
from tierewrite.planning.plan import OutShard
from tierewrite.source.table import INDEX_NAME, Checkpoint, Shard
from tierewrite.stores.local import can_share
from tierewrite.stores.places import FilePath, chain, is_local

log = logging.getLogger(__name__)

_LONGEST_NAME = 255
"""Bytes, in the file systems of Linux and macOS."""
_MOST_FOLDERS = 10_000
"""Below SRC or DST that are looked at for mounts."""
_MOUNTED = "a file system or folder is mounted at {}, so that nothing can be moved to this name"


@dataclass(frozen=True)
class Target:
    """Where the output goes, checked before anything else happens.

    Attributes:
        path: the real path of DST (links resolved); absent or an empty folder, unless `overwrite`.
        overwrite: swap out what is there once the new one is complete.
        backup: where what was there goes when it is swapped out; None removes it.
        keep_permissions: the new one gets the modes and owners of what was there.
    """

    path: Path
    overwrite: bool = False
    backup: Path | None = None
    keep_permissions: bool = False

    @classmethod
    def in_place(cls, src: Path, backup: bool) -> Target:
        """The target is the source itself; what was there is kept as SRC.bak if `backup`.

        Raises:
            UsageError: SRC.bak exists already, or SRC cannot be moved.
            SystemFailure: see `refuse_immovable`.
        """
        with system_errors("looking at SRC", src):
            real = src.resolve()
            if not real.name:
                raise UsageError("SRC is the root of the file system and cannot be swapped; give a DST", file=src)
            if _is_mounted(real):
                advice = "give a DST, or mount the folder that SRC is in"
                raise UsageError(_MOUNTED.format("SRC"), file=src, advice=advice)
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
        if real.is_dir():
            refuse_immovable(real, removed=not backup)
            _warn_of_current_folder(real)
        return cls(real, True, kept if backup else None, keep_permissions=True)

    @classmethod
    def check(cls, src: FilePath, dst: Path, overwrite: bool) -> Target:
        """Decides whether `dst` can be written.

        Raises:
            UsageError: SRC and DST are the same or inside one another, or DST is not an empty or absent folder.
            SystemFailure: see `refuse_immovable`.
        """
        with system_errors("looking at DST", dst):
            try:
                real = dst.resolve()
            except RuntimeError as error:  # a loop of symbolic links, before Python 3.13
                raise UsageError("DST is a loop of symbolic links; choose another folder", file=dst) from error
            if dst.is_symlink() and not real.exists():
                what = f"DST is a link to '{shown(real)}', which does not exist"
                raise UsageError(what, file=dst, advice="make that folder, or remove the link")
            if is_local(src):
                _refuse_overlap(src, dst, real)
            if not real.name:
                raise UsageError("DST is the root of the file system; name a folder in it", file=dst)
            if (longest := max(len(os.fsencode(path.name)) for path in staging_names(real))) > _LONGEST_NAME:
                most = len(os.fsencode(real.name)) - (longest - _LONGEST_NAME)
                what = f"the name of DST has {len(os.fsencode(real.name))} bytes; it may have {most}"
                raise UsageError(what, file=dst, advice="hidden folders with longer names are made beside it")
            if real.exists():
                if not real.is_dir():
                    raise UsageError("DST exists and is not a folder; choose another name", file=dst)
                if _is_mounted(real):
                    raise UsageError(_MOUNTED.format("DST"), file=dst, advice="name a folder inside it")
                if not overwrite and any(real.iterdir()):
                    raise UsageError("DST is not empty; choose another folder, or use --overwrite", file=dst)
                refuse_immovable(real, removed=True)
                _warn_of_current_folder(real)
        return cls(real, overwrite)


def staging_of(target: Path) -> Path:
    """Where the new checkpoint grows; hidden, and on the same file system."""
    return target.with_name(f".{target.name}.tierewrite")


def aside_of(target: Path) -> Path:
    """Where a target is for the moment between two renames, on a kernel that cannot exchange two folders in one."""
    return target.with_name(f".{target.name}.tierewrite-old")


def beside_of(target: Path) -> Path:
    """Where the mark of a staging folder lies during the swap."""
    return target.with_name(f".{target.name}.tierewrite-mark")


def staging_names(target: Path) -> tuple[Path, Path, Path]:
    """All names beside a target that a rewrite into it uses."""
    real = Path(os.path.realpath(target))
    return staging_of(real), aside_of(real), beside_of(real)


def _refuse_overlap(src: Path, dst: Path, real: Path) -> None:
    """Raises UsageError if `dst`, which is the folder `real`, is `src`, or one lies in the other."""
    source, target = chain(src), chain(real)
    if source[0] == target[0]:
        raise UsageError("SRC and DST are the same folder; write to another one", file=dst)
    if source[0] in target or _holds(src, target):
        raise UsageError(f"DST lies inside SRC '{shown(src)}'; write outside of it", file=dst)
    if target[0] in source or _holds(real, source):
        raise UsageError(f"SRC '{shown(src)}' lies inside DST; write somewhere else", file=dst)
    for taken in staging_names(real):
        if chain(taken)[0] in source:
            what = f"SRC '{shown(src)}' lies where this DST would be staged ('{shown(taken)}'); choose another DST"
            raise UsageError(what, file=dst)


def _warn_of_current_folder(real: Path) -> None:
    """Whoever stands in a folder that is replaced stands in the old one afterwards, or in none, and `.` names that."""
    try:
        current = chain(Path.cwd())
    except FileNotFoundError:  # removed: what is relative to it fails by itself
        return
    if chain(real)[0] in current:
        log.warning(
            "the current folder is '%s', or lies in it, and is replaced when this is done: go to it again before the "
            "next command (cd '%s')",
            shown(real),
            shown(real),
        )


def _is_mounted(folder: Path) -> bool:
    """Whether something is mounted at `folder`, a real path: then a rename can neither move nor replace it."""
    mounts = _mounts()
    if mounts is None:
        return os.path.ismount(folder)
    name = os.fsencode(folder)
    for special in b"\\ \t\n":
        name = name.replace(bytes([special]), b"\\%03o" % special)
    return any(line.split(b" ", 5)[4] == name for line in mounts)


def is_on_overlay(folder: Path) -> bool:
    """Whether `folder` is seen through an overlay, as a container's root is; False where the system does not tell."""
    device = os.stat(folder).st_dev
    number = b"%d:%d" % (os.major(device), os.minor(device))
    here = [line for line in _mounts() or () if line.split(b" ", 3)[2] == number]
    return any(line.partition(b" - ")[2].startswith(b"overlay ") for line in here)


def _mounts() -> list[bytes] | None:
    """The lines of proc_pid_mountinfo(5); None where there is no such file."""
    try:
        return Path("/proc/self/mountinfo").read_bytes().splitlines()  # of a Btrfs subvolume `ismount` says yes too
    except OSError:
        return None


def _holds(outer: Path, inner: tuple[Hashable, ...]) -> bool:
    """Whether a folder below `outer` is mounted elsewhere, where it holds the place whose `chain` is given."""
    for number, (place, _, _) in enumerate(os.walk(outer)):
        if number > _MOST_FOLDERS:
            return False
        if number and chain(Path(place))[0] in inner:
            return True
    return False


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
                except OSError:  # a link to nothing or to itself; or gone meanwhile
                    status = os.lstat(path)
                times = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
                if stat.S_ISDIR(status.st_mode):
                    times = (0, 0, 0)
                found[os.path.relpath(path, folder)] = (status.st_ino, *times)
    return found


def still_as_listed(folder: Path, before: Mapping[str, tuple[int, int, int, int]]) -> None:
    """SRC is what the new checkpoint was made from: before it is swapped out, and where a proof finds otherwise.

    Raises:
        SourceChanged: something was added, removed or changed since `before`.
    """
    now = listing(folder)
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            what = "was added" if name not in before else "was removed" if name not in now else "changed"
            raise SourceChanged(
                f"{what} while the checkpoint was rewritten; nothing was made or swapped: run again when nothing "
                "writes to SRC",
                file=folder / name,
            )


def check_space(target: Path, needed: int, sources: Sequence[Shard], shareable: Mapping[int, int]) -> int:
    """Refuses before the first byte when the disk of `target` cannot hold what is to be written.

    What a killed run left beside it counts as free: it is used (--resume) or removed.

    Args:
        needed: bytes of the output.
        sources: the shards of the source.
        shareable: number of one of them -> bytes of it that take no space if the file system shares them.

    Returns:
        How many bytes take space.

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
        local = {number: sources[number] for number in shareable if is_local(sources[number].path)}
        if local:
            needed -= sum(shareable[number] for number in can_share(local, folder))
    if needed > free:
        raise SystemFailure(
            f"the output needs {needed:,} bytes and the disk has {free:,} free; make room, or choose another disk",
            file=folder,
        )
    return needed
