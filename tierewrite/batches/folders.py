"""Which checkpoints lie at or below a folder, or the URL of one.

A checkpoint is a folder that holds an index or a `*.safetensors` file; what lies below it belongs to it, since a
rewrite carries it along. Passed over are hidden folders (our own staging folders are such), `X.bak` beside `X` (the
original that `--in-place` keeps), and the folder that the results go into. Links are followed, and each folder counts
once, under the name that needs no link if it has one. What people keep beside checkpoints is named and skipped:
`no_models`.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tierewrite.batches.no_models import PIPELINE_NAME, no_model, pointers
from tierewrite.errors import SourceError, SystemFailure, shown, system_errors
from tierewrite.source.folder import natural_key, safetensors_among
from tierewrite.source.table import INDEX_NAME
from tierewrite.stores.places import chain, is_local, is_remote, located
from tierewrite.stores.remote import RemotePath, listing

log = logging.getLogger(__name__)

MAX_FOLDERS = 1_000_000


@dataclass(frozen=True)
class Found:
    """A folder that holds a checkpoint, or what people keep beside them.

    Attributes:
        below: its path below the collection, "" for the collection itself.
        skipped: why it is no checkpoint that could be rewritten; None where it may be one.
    """

    below: str
    skipped: str | None = None


def below_folder(root: Path, into: str | None) -> list[Found]:
    """What is at or below a folder, in natural order.

    Raises:
        SourceError: nothing, or too many folders. SystemFailure: it cannot be listed.
    """
    found: list[Found] = []
    without_weights: list[Found] = []
    seen: set[tuple[int, int]] = set()
    output = None if into is None else located(into)
    left_out = _identity(output) if is_local(output) else None
    # All that can be reached without a link comes first: the name that stays is the one that needs none.
    waiting: deque[tuple[str, Path]] = deque([("", root)])
    links: deque[tuple[str, Path]] = deque()
    while waiting or links:
        name, folder = waiting.popleft() if waiting else links.popleft()
        here = _identity(folder)
        if here is None or here in seen or (here == left_out and name):
            continue
        seen.add(here)
        if len(seen) > MAX_FOLDERS:
            raise SourceError(f"holds more than {MAX_FOLDERS:,} folders; name one further down", file=root)
        try:
            with system_errors("listing", folder), os.scandir(folder) as entries:
                folders, files = _folders_and_files(entries)
        except SystemFailure:
            if not name:
                raise
            found.append(Found(name))  # unreadable: its own rewrite fails, and says why
            continue
        why = no_model(files)
        if _ends_here(files):
            found.append(Found(name, why or pointers(folder, files)))
            continue
        if why is not None:
            without_weights.append(Found(name, why))
        names = {entry.name for entry in folders}
        for entry in sorted(folders, key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            if entry.name.endswith(".bak") and entry.name.removesuffix(".bak") in names:
                log.info("left out: %s, the backup of a rewrite in place", entry.path)
                continue
            (links if entry.is_symlink() else waiting).append((os.path.join(name, entry.name), Path(entry.path)))
    return _all(found, without_weights, len(seen), root)


def _all(found: list[Found], without_weights: list[Found], folders: int, root: object) -> list[Found]:
    """What was found; of folders without weights those that hold nothing else below them.

    Raises:
        SourceError: nothing was found.
    """
    holders = {above for one in found for above in _above(one.below)}
    found = [*found, *(one for one in without_weights if one.below not in holders)]
    if not found:
        hold = "folder holds" if folders == 1 else "folders hold"
        raise SourceError(
            f"no checkpoint at or below it: {folders:,} {hold} neither {INDEX_NAME} nor a *.safetensors file (hidden "
            "folders were not looked into)",
            file=root,
        )
    return sorted(found, key=lambda one: natural_key(one.below))


def _ends_here(files: Sequence[str]) -> bool:
    """Whether what lies below a folder with files of these names belongs to it."""
    return INDEX_NAME in files or PIPELINE_NAME in files or bool(safetensors_among(files))


def _folders_and_files(entries: Iterator[os.DirEntry[str]]) -> tuple[list[os.DirEntry[str]], list[str]]:
    """Folders, links to such included, and the names of all else."""
    folders: list[os.DirEntry[str]] = []
    files: list[str] = []
    for entry in entries:
        try:
            is_folder = entry.is_dir()
        except OSError:  # a link that leads to itself
            is_folder = False
        if is_folder:
            folders.append(entry)
        else:
            files.append(entry.name)
    return folders, files


def _identity(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from all others; None if it is not there."""
    try:
        status = os.stat(folder)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def below_url(root: RemotePath, into: str | None) -> list[Found]:
    """As `below_folder`, in a store: from one listing of all that is there, without looking into files."""
    folders: dict[str, list[str]] = {}
    for path in listing(root):
        parts = path.split("/")
        if "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in parts):
            raise SourceError(
                f"'{shown(path)}' is no name that a file could have in a folder; remove or rename that object",
                file=root,
            )
        if not any(part.startswith(".") for part in parts):
            folders.setdefault("/".join(parts[:-1]), []).append(parts[-1])
    output = None if into is None else located(into)
    found: dict[str, Found] = {}
    without_weights: list[Found] = []
    for folder in sorted(folders, key=lambda name: (name.count("/") + bool(name), name)):
        if is_remote(output) and folder and chain(output)[0] in chain(root / folder):
            continue
        if not found.keys().isdisjoint(_above(folder)):
            continue
        why = no_model(folders[folder])
        if _ends_here(folders[folder]):
            found[folder] = Found(folder, why)
        elif why is not None:
            without_weights.append(Found(folder, why))
    return _all([*found.values()], without_weights, len(folders), root)


def _above(key: str) -> Iterator[str]:
    """`key` and every folder that holds it, the nameless one too."""
    while key:
        yield key
        key = key.rpartition("/")[0]
    yield ""
