"""A place is parsed once: a path of this machine's or a URL; what tells it from all others; and each path's store.

Two texts may name one place: links, mounts, `S3://b/x/` and `s3://b/x`, `file:///x` and `/x`. So places are compared by
`chain`, never as texts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tierewrite.errors import TierewriteError, UsageError
from tierewrite.stores.base import PathLike, Store
from tierewrite.stores.local import LocalStore
from tierewrite.stores.remote import RemotePath, redacted
from tierewrite.stores.remote_store import RemoteStore

if TYPE_CHECKING:
    from typing_extensions import TypeIs

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(?:::[A-Za-z][A-Za-z0-9+.-]*)*://")
_LOCAL = re.compile(r"(?:file|local)://", re.IGNORECASE)
_ESCAPE = re.compile(r"%[0-9A-Fa-f]{2}")
_WITH_BUCKET = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "hf", "http", "https"})
"""Kinds of URL that begin with a bucket, a container or a host."""

_LONGEST = 4095  # Linux' PATH_MAX without the NUL at its end
_LONGEST_PART = 255  # NAME_MAX; of a key in a store, what no name of a checkpoint comes near

FilePath = Path | RemotePath

_LOCAL_STORE = LocalStore()
_REMOTE_STORE = RemoteStore()


def is_local(path: object) -> TypeIs[Path]:
    """Whether `path` is of this machine's file system, for what only that can do: links, locks, reading ahead."""
    return isinstance(path, Path)


def is_remote(path: object) -> TypeIs[RemotePath]:
    """Whether `path` is a URL of a store."""
    return isinstance(path, RemotePath)


def store_of(path: FilePath) -> Store[Any]:
    """The store that a path belongs to."""
    return _LOCAL_STORE if is_local(path) else _REMOTE_STORE


def located(where: PathLike | RemotePath) -> FilePath:
    """`where` as a path: a URL of a file system other than this machine's is remote, all else is local.

    Raises:
        UsageError: a URL that names no folder, or whose path could be understood in several ways; or a name that no
            file can have.
    """
    if isinstance(where, RemotePath):
        return where
    text = os.fspath(where)
    if isinstance(text, bytes):
        raise UsageError("a path is given as bytes; give a text (os.fsdecode makes one)", file=os.fsdecode(text))
    _refuse_impossible(text)
    if not isinstance(where, str) or not _URL.match(text):
        return Path(where)
    if text.rstrip("/").endswith(":"):
        raise UsageError("this URL names no folder; write it as s3://bucket/folder", file=redacted(text))
    if _is_local_url(text):
        return _local_of(text)
    if "?" in text:
        raise UsageError(
            "the URL of a folder has no query ('?...'); credentials belong into the settings of the file system: "
            "environment, configuration files, or fsspec's",
            file=redacted(text),
        )
    return RemotePath("::".join(_normalised(part, text) for part in text.split("::")))


def _local_of(text: str) -> Path:
    """The path in a URL of this machine's. Raises UsageError: it holds another host, or percent signs."""
    path = text.partition("://")[2]
    if path.startswith("localhost/"):
        path = path.removeprefix("localhost")
    if not path.startswith("/"):
        what = "the URL of a folder of this machine's has an absolute path: file:///folder"
        raise UsageError(what, file=redacted(text))
    if _ESCAPE.search(path):
        # Some programs decode it, fsspec does not: either may be meant.
        raise UsageError("holds a percent sign that may stand for a character; give the path itself", file=text)
    return Path(path)


def _normalised(part: str, text: str) -> str:
    """One of the URLs that are chained by "::": its scheme in lower case, no slash at its end.

    Raises:
        UsageError: a segment of its path is empty, "." or "..": file systems disagree about what that means.
    """
    scheme, separator, path = part.partition("://")
    if not separator:
        return part
    path = path.rstrip("/")
    segments = path.split("/")
    if segments[0] == "" and scheme.lower() not in _WITH_BUCKET:
        segments = segments[1:]  # an absolute path
    for segment in segments:
        if segment in ("", ".", ".."):
            what = "an empty segment ('//')" if segment == "" else f"a segment '{segment}'"
            raise UsageError(
                f"its path holds {what}, which stores take in different ways; write it without", file=redacted(text)
            )
    return f"{scheme.lower()}://{path}"


def local_file(where: PathLike, what: str) -> Path:
    """A file of this machine's, by its path or its URL; `what` it is, for messages.

    Raises:
        UsageError: it is of a store.
    """
    path = located(where)
    if is_remote(path):
        raise UsageError(f"{what} has to be a file of this machine's, and this is a URL; copy it first", file=path)
    return path


def chain(path: FilePath) -> tuple[Hashable, ...]:
    """A place and all folders above it, each as what tells it from all others, under whatever name it is given.

    On this machine that is device and inode, so that links and mounts do not matter; of what is not there, the names
    below the last folder that is. In a store it is the file system and the path in it.
    """
    if is_remote(path):
        try:
            system, text = path.opened()
        except TierewriteError:  # whoever opens it says what is wrong
            system, text = path.url.partition("://")[::2]
        parts = tuple(part for part in text.split("/") if part)
        return tuple((system, parts[:count]) for count in range(len(parts), 0, -1))
    try:
        real = Path(os.path.realpath(path))
    except (OSError, ValueError):
        real = Path(os.path.abspath(path))
    missing: list[str] = []
    found: list[tuple[int, int]] = []
    for folder in (real, *real.parents):
        try:
            status = os.stat(folder)
        except (OSError, ValueError):
            missing.append(folder.name)
            continue
        found.append((status.st_dev, status.st_ino))
    names = tuple(reversed(missing))
    absent = [(found[0] if found else None, names[:count]) for count in range(len(names), 0, -1)]
    return (*absent, *((one, ()) for one in found))


def _refuse_impossible(text: str) -> None:
    """Raises UsageError for a name that no system call takes: with a NUL, not of bytes, or longer than PATH_MAX."""
    if not text:
        raise UsageError("a path is an empty text; name a folder ('.' is the current one)")
    problem = None
    try:
        # Bytes of a file's name that are no text are half surrogates in Python; no URL has any.
        length = len(text.encode() if _URL.match(text) else os.fsencode(text))
    except UnicodeEncodeError:
        problem = "its name holds a character that is no text (half of a surrogate pair)"
    else:
        if "\0" in text:
            problem = "its name holds a NUL character"
        elif length > _LONGEST:
            problem = f"its name has {length} bytes; a path has at most {_LONGEST}"
        elif (longest := max(len(os.fsencode(part)) for part in text.split("/"))) > _LONGEST_PART:
            problem = f"a part of its name has {longest} bytes; a name has at most {_LONGEST_PART}"
    if problem is not None:
        raise UsageError(f"{problem}; correct the name", file=redacted(text))


def _is_local_url(text: str) -> bool:
    return _LOCAL.match(text) is not None


def without_scheme(where: PathLike) -> PathLike:
    """`where`, with the URL of a folder of this machine's as that folder's path."""
    return str(located(where)) if isinstance(where, str) and _is_local_url(where) else where
