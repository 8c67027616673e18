"""Copies of a remote folder's small files, for readers that need paths of this machine."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tierewrite.errors import SourceError, shown
from tierewrite.stores.base import PathLike
from tierewrite.stores.places import is_remote, located
from tierewrite.stores.remote import RemotePath, listing

if TYPE_CHECKING:
    from typing_extensions import TypeIs

_PARALLEL = 8


@dataclass(frozen=True)
class RemoteFolder:
    """A folder of a remote file system.

    Attributes:
        base: where.
        overlay: contents of files that are to be seen in it, though they are not there (yet).
    """

    base: RemotePath
    overlay: Mapping[str, bytes] = field(default_factory=dict)


Place = PathLike | RemotePath | RemoteFolder
"""What can be opened as a checkpoint's folder, besides a hub id."""


def folder_of(where: Place) -> Path | RemoteFolder:
    """`where` as a path of this machine or as a folder of a store."""
    if is_remote_folder(where):
        return where
    path = located(where)
    return RemoteFolder(path) if is_remote(path) else path


def is_remote_folder(where: object) -> TypeIs[RemoteFolder]:
    """Whether `where` is a folder of a store."""
    return isinstance(where, RemoteFolder)


class Mirror:
    """A remote folder, with copies of its small files on this machine.

    Args:
        folder: where.
        wanted: whether a file of this name is copied.
        most: bytes of a file that is copied; a larger one is refused.

    Attributes:
        infos: what the store says of each file.
        root: holds the copies; removed with the mirror and with what was opened from it.
        top: names of the files and folders at its top.
    """

    def __init__(self, folder: RemoteFolder, wanted: Callable[[str], bool], most: int) -> None:
        self.most = most
        self.folder = folder
        self.infos = listing(folder.base)
        if not self.infos and not folder.overlay:
            raise SourceError("nothing is there; check the URL", file=folder.base)
        for name in self.infos:
            # "::" and "?" mean something else in fsspec's URLs.
            strange = any(sign in name for sign in ("\\", "\0", "::", "?"))
            if strange or any(part in ("", ".", "..") for part in name.split("/")):
                raise SourceError(
                    f"'{shown(name)}' is no name that a file may have in a checkpoint; remove or rename that object",
                    file=folder.base,
                )
        names = sorted({*self.infos, *folder.overlay})
        self.top = sorted({name.partition("/")[0] for name in names})
        self.root = Path(tempfile.mkdtemp(prefix="tierewrite-"))
        self._kept = weakref.finalize(self, shutil.rmtree, self.root, ignore_errors=True)
        copied = [name for name in names if wanted(name)]
        with ThreadPoolExecutor(_PARALLEL, thread_name_prefix="remote") as pool:
            for name, data in zip(copied, pool.map(self._small, copied), strict=True):
                path = self.root / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)

    def _small(self, name: str) -> bytes:
        if name in self.folder.overlay:
            return self.folder.overlay[name]
        size = self.infos[name].get("size") or 0
        if size > self.most:
            raise SourceError(f"has {size} bytes; at most {self.most} are read", file=self.folder.base / name)
        return (self.folder.base / name).read_bytes()
