"""Which checkpoints a batch is about: found below folders, or listed in files; each with its DST and options.

A folder (or the URL of one) is a collection. A checkpoint in it is a folder that holds an index or a `*.safetensors`
file; what lies below a checkpoint belongs to it, since a rewrite carries it along. Passed over are hidden folders (our
own staging folders are such), `X.bak` beside `X` (the original that `--in-place` keeps), and the folder that the
results go into. Links are followed, and each folder counts once, under the name that needs no link if it has one.

A list is a text file: blank lines and lines that begin with `#` are left out, every other one is a SRC, or a JSON
object with `src`, `dst` and options of `rewrite`. Relative paths in it are relative to the file's own folder.
"""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tierewrite.errors import SourceError, SystemFailure, UsageError, shown, system_errors
from tierewrite.output.target import staging_names
from tierewrite.planning.policy import OPTIONS, Policy, of_type, type_names
from tierewrite.rewriting.options import ITEM_TYPES
from tierewrite.source import hub
from tierewrite.source.folder import natural_key
from tierewrite.source.strict_json import unique_members
from tierewrite.source.table import INDEX_NAME
from tierewrite.stores.base import PathLike
from tierewrite.stores.places import chain, is_local, is_remote, located
from tierewrite.stores.remote import RemotePath, listing

log = logging.getLogger(__name__)

MAX_LIST_BYTES = 64 << 20
MAX_FOLDERS = 1_000_000


@dataclass(frozen=True)
class Item:
    """One checkpoint of a batch.

    Attributes:
        src: folder, URL or hub id, as `rewrite` takes it.
        dst: folder or URL; None where nothing is written.
        options: of `rewrite`, what was chosen for all of them included.
        policy: those among them that decide content, and what the consumer needs.
        name: what it is called while the batch runs.
        origin: where it was named, for messages: "list.txt, line 3".
    """

    src: str
    dst: str | None
    options: Mapping[str, Any]
    policy: Policy
    name: str
    origin: str


@dataclass(frozen=True)
class Gatherer:
    """Makes items of what a batch is given.

    Args:
        into: folder or URL below which each DST is; None: every item names its own, or nothing is written.
        options: chosen for all of them.
        plan_only: nothing is written, so that no DST is needed.
    """

    into: str | None
    options: Mapping[str, Any]
    plan_only: bool = False

    def gather(self, given: Iterable[PathLike | Mapping[str, Any]]) -> list[Item]:
        """The items of all that is given, in order.

        Raises:
            UsageError: a list is wrong, an option is, a DST is missing, or two items would meet in one place.
            SourceError: there is no checkpoint in a collection.
            SystemFailure: a list or a folder cannot be read.
        """
        items: list[Item] = []
        for number, one in enumerate(given, 1):
            if isinstance(one, Mapping):
                items.append(self._described(one, "", f"item {number}"))
            else:
                items += self._named(one)
        if not items:
            raise UsageError("there is nothing to do; name folders, or files that list checkpoints")
        if not self.plan_only:
            refuse_clashes(items)
        return items

    def _named(self, one: PathLike) -> list[Item]:
        path = located(one)
        if is_remote(path):
            below = _below_url(path, self.into)
            return [self._found(f"{path.url}/{name}" if name else path.url, name, str(path)) for name in below]
        text = os.fspath(one)
        if path.is_dir():
            return [
                self._found(os.path.join(path, name) if name else os.fspath(path), name, text)
                for name in _below(path, self.into)
            ]
        if path.exists():
            return self._listed(path)
        if hub.repo_id(one) is not None:
            return [self._item(text, None, {}, "the command")]
        raise UsageError(
            "does not exist; expected a folder with checkpoints at or below it, a file that lists checkpoints, a URL "
            "or a hub id (org/name)",
            file=text,
        )

    def _found(self, src: str, below: str, collection: str) -> Item:
        return self._item(src, None, {}, f"collection {shown(collection)}", below)

    def _listed(self, path: Path) -> list[Item]:
        items: list[Item] = []
        folder = os.fspath(path.parent)
        for number, line in _lines(path):
            origin = f"{shown(path)}, line {number}"
            if not line.startswith("{"):
                items.append(self._item(_from(folder, line, origin), None, {}, origin))
                continue
            try:
                described = json.loads(line, object_pairs_hook=unique_members)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{origin}: no valid JSON object: {shown(error)}") from None
            items.append(self._described(described, folder, origin))
        if not items:
            raise UsageError("lists no checkpoint; each line is a SRC or a JSON object with `src`", file=path)
        return items

    def _described(self, described: Mapping[str, Any], folder: str, origin: str) -> Item:
        """An item of a JSON object, or of a mapping that the library was given (`folder` is "" then)."""
        options = dict(described)
        src, dst = options.pop("src", None), options.pop("dst", None)
        for name, value in (("src", src), ("dst", dst)):
            given = isinstance(value, (str, os.PathLike)) and os.fspath(value)
            if not given and (name == "src" or value is not None):
                raise UsageError(f"{origin}: `{name}` is {shown(json.dumps(value, default=str))}; expected a path")
        for name, value in options.items():
            _check(name, value, origin)
        src = _from(folder, os.fspath(src), origin)
        if dst is not None:
            dst = _joined(folder, os.fspath(dst), origin)
        if folder and "ties" in options:
            options["ties"] = _joined(folder, options["ties"], origin)
        return self._item(src, dst, options, origin)

    def _item(self, src: str, dst: str | None, own: Mapping[str, Any], origin: str, below: str = "") -> Item:
        options = {**self.options, **own}
        try:
            policy = policy_of(options)
        except UsageError as error:
            raise UsageError(f"{origin}: {error}") from error
        name = below or last_name(src)
        if dst is None and self.into is not None:
            if not name:
                raise UsageError(f"{origin}: '{shown(src)}' has no name that its DST could get; give its `dst`")
            into = located(self.into)
            dst = f"{into.url}/{name}" if is_remote(into) else os.path.join(self.into, name)
        if dst is None and not self.plan_only:
            raise UsageError(f"{origin}: nothing says where '{shown(src)}' goes; give --into OUT, or a `dst` in a list")
        return Item(src, None if self.plan_only else dst, options, policy, name or src, origin)


def policy_of(options: Mapping[str, Any]) -> Policy:
    """The policy among the options of one checkpoint. Raises UsageError: one of them is wrong."""
    return Policy.of(options.get("consumer"), **{name: options[name] for name in OPTIONS if name in options})


def _check(name: str, value: Any, origin: str) -> None:
    """Raises UsageError: there is no such option for one checkpoint, or its value is of another type."""
    types = ITEM_TYPES.get(name)
    if types is None:
        raise UsageError(
            f"{origin}: there is no option '{shown(name)}' for one checkpoint; expected src, dst, "
            f"{', '.join(sorted(ITEM_TYPES))}"
        )
    if name == "ties" and isinstance(value, os.PathLike):
        return
    if not of_type(value, types):
        found = shown(json.dumps(value, default=str))
        raise UsageError(f"{origin}: `{name}` is {found}; expected {type_names(types)}")


def last_name(src: str) -> str:
    """The last part of a folder's, a URL's or a hub id's name; "" if it has none."""
    path = located(src)
    name = path.name if is_remote(path) else os.path.basename(os.path.abspath(src))
    return "" if name in (".", "..") else name


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a list that say something, with their numbers."""
    if path.suffix == ".safetensors":
        raise UsageError("is a safetensors file; name the folder that holds it", file=path)
    with system_errors("reading the list", path), open(path, "rb") as file:
        raw = file.read(MAX_LIST_BYTES + 1)
    if len(raw) > MAX_LIST_BYTES:
        raise UsageError(f"is no list of checkpoints: it has more than {MAX_LIST_BYTES:,} bytes", file=path)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"is no list of checkpoints: not UTF-8 at byte {error.start}", file=path) from None
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if line and not line.startswith("#"):
            yield number, line


def _joined(folder: str, text: str, origin: str) -> str:
    if "\0" in text:
        raise UsageError(f"{origin}: '{shown(text)}' holds a NUL character")
    path = located(text)
    return path.url if is_remote(path) else os.path.join(folder, path)


def _from(folder: str, text: str, origin: str) -> str:
    """A SRC of a list: what its folder has of that name, else a hub id."""
    path = _joined(folder, text, origin)
    if os.path.lexists(path):
        return path
    if hub.repo_id(text) is not None:
        return text
    # Joined to the list's folder, a path that does not exist may look like a hub id: "./" says that it is none.
    return os.path.join(os.curdir, path) if hub.repo_id(path) is not None else path


def _below(root: Path, into: str | None) -> list[str]:
    """The checkpoints at or below a folder, by their paths below it ("" for itself), in natural order."""
    found: list[str] = []
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
            found.append(name)  # unreadable: its own rewrite fails, and says why
            continue
        if is_checkpoint(files):
            found.append(name)
            continue
        names = {entry.name for entry in folders}
        for entry in sorted(folders, key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            if entry.name.endswith(".bak") and entry.name.removesuffix(".bak") in names:
                log.info("left out: %s, the backup of a rewrite in place", entry.path)
                continue
            (links if entry.is_symlink() else waiting).append((os.path.join(name, entry.name), Path(entry.path)))
    if not found:
        raise _empty(len(seen), root)
    return sorted(found, key=natural_key)


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


def is_checkpoint(files: Iterable[str]) -> bool:
    """Whether a folder with files of these names is one."""
    return any(
        name == INDEX_NAME or (name.endswith(".safetensors") and not name.startswith(".")) for name in files
    )


def _identity(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from all others; None if it is not there."""
    try:
        status = os.stat(folder)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def _below_url(root: RemotePath, into: str | None) -> list[str]:
    """As `_below`, in a store; one listing of all that is there."""
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
    found: set[str] = set()
    for folder in sorted(folders, key=lambda name: (name.count("/") + bool(name), name)):
        if is_remote(output) and folder and chain(output)[0] in chain(root / folder):
            continue
        if is_checkpoint(folders[folder]) and found.isdisjoint(_above(folder, root=True)):
            found.add(folder)
    if not found:
        raise _empty(len(folders), root)
    return sorted(found, key=natural_key)


def _empty(folders: int, root: object) -> SourceError:
    hold = "folder holds" if folders == 1 else "folders hold"
    return SourceError(
        f"no checkpoint at or below it: {folders:,} {hold} neither {INDEX_NAME} nor a *.safetensors file (hidden "
        "folders were not looked into)",
        file=root,
    )


Chain = tuple[Hashable, ...]
"""Of a place; see `places.chain`."""


def refuse_clashes(items: Sequence[Item]) -> None:
    """No DST may be, or lie in or around, another's DST or anybody's SRC.

    Raises:
        UsageError: two items, or a SRC and a DST, would meet.
    """
    sources: dict[Hashable, tuple[Item, Chain]] = {}
    targets: dict[Hashable, tuple[Item, Chain]] = {}
    staged: dict[Hashable, Item] = {}
    for item in items:
        if hub.repo_id(item.src) is None:
            at = chain(located(item.src))
            sources.setdefault(at[0], (item, at))
        assert item.dst is not None
        place = located(item.dst)
        at = chain(place)
        if at[0] in targets:
            other = targets[at[0]][0]
            raise _clash(item, other, "the same DST, '{dst}'; give one of them a `dst` of its own in a list")
        targets[at[0]] = item, at
        if is_local(place):
            staged.update(dict.fromkeys((chain(name)[0] for name in staging_names(place)), item))
    for item, at in targets.values():
        for above in at:
            if above in targets and targets[above][0] is not item:
                raise _clash(item, targets[above][0], "DSTs that lie inside one another ('{dst}')")
            if above in sources:
                other = sources[above][0]
                raise _clash(item, other, "a DST ('{dst}') that is, or lies inside of, the SRC of the other")
            if above in staged:
                raise _clash(item, staged[above], "a DST ('{dst}') that lies where the other's DST is staged")
    for item, at in sources.values():
        for above in at:
            if above in targets:
                raise _clash(targets[above][0], item, "a DST ('{dst}') that holds the SRC of the other")
            if above in staged:
                raise _clash(staged[above], item, "a DST ('{dst}') that is staged where the SRC of the other lies")


def _clash(one: Item, other: Item, what: str) -> UsageError:
    text = what.format(dst=shown(located(one.dst or "")))
    if one is other:
        return UsageError(f"'{shown(located(one.src))}' ({one.origin}) has {text}")
    return UsageError(
        f"'{shown(located(one.src))}' ({one.origin}) and '{shown(located(other.src))}' ({other.origin}) have {text}"
    )


def _above(key: str, root: bool = False) -> Iterator[str]:
    """`key` and every folder that holds it; with `root`, the nameless one too."""
    yield key
    while "/" in key.rstrip("/"):
        key = key.rstrip("/").rpartition("/")[0]
        if key:
            yield key
    if root:
        yield ""
