"""A folder that exists in this process alone: files that are functions, under a URL that fsspec opens.

For readers that take a folder's place, where the folder is not written. No other process can open such a URL.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from fsspec import AbstractFileSystem, register_implementation

from tierewrite.stores.remote import RemotePath

PROTOCOL = "tierewrite-in-process"


class ReadableFile(Protocol):
    """A file by ranges.

    Attributes:
        size: bytes.
        read: gives the bytes from a start to an end.
    """

    @property
    def size(self) -> int: ...
    @property
    def read(self) -> Callable[[int, int], bytes]: ...


_FOLDERS: dict[str, Mapping[str, ReadableFile]] = {}


@contextlib.contextmanager
def served(files: Mapping[str, ReadableFile]) -> Iterator[RemotePath]:
    """A folder that holds `files`, by their paths below it, for as long as the body runs."""
    register_implementation(PROTOCOL, InProcessFileSystem, clobber=True)
    token = secrets.token_hex(8)
    _FOLDERS[token] = files
    try:
        yield RemotePath(f"{PROTOCOL}://{token}")
    finally:
        del _FOLDERS[token]


class InProcessFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """What fsspec asks of a file system that is only read."""

    protocol = PROTOCOL
    cachable = False

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        """The files and folders in `path`, as fsspec's info, or their paths. Raises FileNotFoundError."""
        token, _, below = self._strip_protocol(path).partition("/")
        prefix = f"{below}/" if below else ""
        found: dict[str, dict[str, Any]] = {}
        for name, file in _FOLDERS.get(token, {}).items():
            if name == below:
                found[name] = self._entry(token, name, file)
            elif name.startswith(prefix):
                part, inside, _ = name.removeprefix(prefix).partition("/")
                here = prefix + part
                folder = {"name": f"{token}/{here}", "size": 0, "type": "directory"}
                found[here] = folder if inside else self._entry(token, here, file)
        if not found:
            raise FileNotFoundError(path)
        return list(found.values()) if detail else [entry["name"] for entry in found.values()]

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        """What fsspec wants to know of a file. Raises FileNotFoundError."""
        text = self._strip_protocol(path)
        token, _, name = text.partition("/")
        file = _FOLDERS.get(token, {}).get(name)
        if file is not None:
            return self._entry(token, name, file)
        self.ls(text)
        return {"name": text, "size": 0, "type": "directory"}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        """A range of a file. Raises FileNotFoundError."""
        token, _, name = self._strip_protocol(path).partition("/")
        file = _FOLDERS.get(token, {}).get(name)
        if file is None:
            raise FileNotFoundError(path)
        return file.read(start or 0, file.size if end is None else min(end, file.size))

    @staticmethod
    def _entry(token: str, name: str, file: ReadableFile) -> dict[str, Any]:
        # Without a tag `identity` is the size: what is behind the file refuses a change by itself.
        return {"name": f"{token}/{name}", "size": file.size, "type": "file"}
