"""Which checkpoints a batch is about: found below folders, or listed in files; each with its DST and options.

A folder (or the URL of one) is a collection; `folders` says what is found in it. A list is a text file: blank lines and
lines that begin with `#` are left out, every other one is a SRC, or a JSON object with `src`, `dst` and options of
`rewrite`. Relative paths in it are relative to the file's own folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tierewrite.batches.clashes import refuse_clashes
from tierewrite.batches.folders import Found, below_folder, below_url
from tierewrite.batches.item import Item
from tierewrite.batches.no_models import why_skipped
from tierewrite.errors import UsageError, shown, system_errors
from tierewrite.planning.policy import OPTIONS, Policy, of_type, type_names
from tierewrite.rewriting.options import ITEM_TYPES
from tierewrite.source import hub
from tierewrite.source.strict_json import unique_members
from tierewrite.stores.base import PathLike
from tierewrite.stores.places import chain, is_local, is_remote, located

MAX_LIST_BYTES = 64 << 20


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
        if self.plan_only:
            return _each_once(items)
        refuse_clashes([item for item in items if item.skipped is None])
        return items

    def _named(self, one: PathLike) -> list[Item]:
        path = located(one)
        if is_remote(path):
            return [
                self._found(f"{path.url}/{found.below}" if found.below else path.url, found, str(path))
                for found in below_url(path, self.into)
            ]
        text = os.fspath(one)
        if path.is_dir():
            return [
                self._found(os.path.join(path, found.below) if found.below else os.fspath(path), found, text)
                for found in below_folder(path, self.into)
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

    def _found(self, src: str, found: Found, collection: str) -> Item:
        item = self._item(src, None, {}, f"collection {shown(collection)}", found.below)
        return replace(item, skipped=found.skipped)

    def _listed(self, path: Path) -> list[Item]:
        items: list[Item] = []
        folder = os.fspath(path.parent)
        for number, line in _lines(path):
            origin = f"{shown(path)}, line {number}"
            if not line.startswith("{"):
                items.append(self._listed_item(_from(folder, line, origin), None, {}, origin))
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
        if folder and isinstance(options.get("ties"), str):
            options["ties"] = _joined(folder, options["ties"], origin)
        return self._listed_item(src, dst, options, origin)

    def _listed_item(self, src: str, dst: str | None, own: Mapping[str, Any], origin: str) -> Item:
        place = located(src)
        skipped = why_skipped(place) if is_local(place) and hub.repo_id(src) is None else None
        return replace(self._item(src, dst, own, origin), skipped=skipped)

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


def _each_once(items: Iterable[Item]) -> list[Item]:
    """`items`, each checkpoint once for the same options, by whatever names: else its savings would count twice."""
    seen: dict[Hashable, list[Mapping[str, Any]]] = {}
    found: list[Item] = []
    for item in items:
        place = item.src if hub.repo_id(item.src) is not None else chain(located(item.src))[0]
        others = seen.setdefault(place, [])
        if item.options not in others:
            others.append(item.options)
            found.append(item)
    return found


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
    if name == "ties" and isinstance(value, (os.PathLike, Mapping)):
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
