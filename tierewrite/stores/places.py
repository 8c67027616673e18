"""A place is parsed once: a path of this machine's or a URL; and each path's store."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tierewrite.errors import UsageError
from tierewrite.stores.base import PathLike, Store
from tierewrite.stores.local import LocalStore
from tierewrite.stores.remote import RemotePath, RemoteStore, redacted

if TYPE_CHECKING:
    from typing_extensions import TypeIs

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(?:::[A-Za-z][A-Za-z0-9+.-]*)*://")
_LOCAL = re.compile(r"(?:file|local)://")

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
        UsageError: a URL that names no folder, or a name that no file can have.
    """
    if isinstance(where, RemotePath):
        return where
    text = os.fspath(where)
    _refuse_impossible(text)
    if not isinstance(where, str) or not _URL.match(text):
        return Path(where)
    if text.rstrip("/").endswith(":"):
        raise UsageError("this URL names no folder; write it as s3://bucket/folder", file=redacted(text))
    if _is_local_url(text):
        return Path(os.path.abspath(text.partition("://")[2]))
    if "?" in text:
        raise UsageError(
            "the URL of a folder has no query ('?...'); credentials belong into the settings of the file system: "
            "environment, configuration files, or fsspec's",
            file=redacted(text),
        )
    return RemotePath(text.rstrip("/"))


def _refuse_impossible(text: str) -> None:
    """Raises UsageError for a name that no system call takes: with a NUL, not of bytes, or longer than PATH_MAX."""
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
