"""Where a checkpoint comes from: a folder, a URL of any fsspec file system, or a hub id; headers only.

Of a remote folder the listing, the index, the configurations and the headers are read, each header by one request for
the first 100,000 bytes of its file and another one if it is longer. Copies of the small files lie in a temporary folder
for as long as the checkpoint is in use, for transformers to read.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tierewrite.errors import HeaderError, ShardIndexError, TierewriteError, UsageError, shown
from tierewrite.source import hub
from tierewrite.source.folder import assembled, open_folder, safetensors_among
from tierewrite.source.header import digest_of, header_length, parse_header, read_header
from tierewrite.source.index import MAX_INDEX_BYTES
from tierewrite.source.table import CONFIG_NAMES, INDEX_NAME, MANIFEST_NAME, Checkpoint, Header, Shard, SideFile
from tierewrite.stores.base import PathLike
from tierewrite.stores.mirror import Mirror, Place, RemoteFolder, folder_of, is_remote_folder
from tierewrite.stores.places import FilePath, is_local, is_remote, located, store_of, without_scheme
from tierewrite.stores.remote import RemoteFile, RemotePath, identity

_COPIED = (*CONFIG_NAMES, "generation_config.json", MANIFEST_NAME, INDEX_NAME)
_GUESS_BYTES = 100_000


def name_in_messages(where: Place) -> str:
    """What messages call it: as given, without credentials."""
    found = folder_of(where)
    return str(found.base) if is_remote_folder(found) else os.fspath(where)  # type: ignore[arg-type]


def fetched(src: PathLike, *, revision: str | None = None, bars: bool = False) -> FilePath:
    """The folder that `src` stands for: itself, or the snapshot of a hub id. See `hub.fetched`."""
    path = located(src)
    if is_remote(path):
        _no_revision(path, revision)
        return path
    return hub.fetched(without_scheme(src), revision=revision, bars=bars)


def local_only(src: PathLike, doing: str) -> None:
    """Raises UsageError if `src` is a URL or a hub id; `doing` is what cannot be done with one."""
    path = located(src)
    if is_remote(path):
        raise UsageError(f"{doing} needs a folder of this machine's; name a DST to write to", file=path)
    hub.local_only(without_scheme(src), doing)


def _no_revision(path: RemotePath, revision: str | None) -> None:
    if revision is not None:
        raise UsageError("a revision belongs to a hub id (org/name), and this is a URL; leave it out", file=path)


def open_checkpoint(
    src: Place,
    *,
    revision: str | None = None,
    ignore_unindexed: bool = False,
    trust_remote_code: bool = False,
    plain: bool = False,
) -> Checkpoint:
    """The headers of a folder, URL or hub id.

    Args:
        src: the folder.
        revision: branch, tag or commit of a hub id; None: its main branch.
        ignore_unindexed: as in `folder.open_folder`.
        trust_remote_code: fetch its Python files too, for the model class to be asked.
        plain: it is no hub id.

    Raises:
        As `folder.open_folder`, `hub.fetched` and `remote.listing`.
    """
    found = folder_of(src)
    if is_local(found):
        assert not is_remote(src)
        assert not is_remote_folder(src)
        if plain:
            return open_folder(found, ignore_unindexed=ignore_unindexed)
        return hub.open_checkpoint(
            without_scheme(src),
            revision=revision,
            ignore_unindexed=ignore_unindexed,
            trust_remote_code=trust_remote_code,
        )
    _no_revision(found.base, revision)
    return RemoteCheckpoint(found, python=trust_remote_code).checkpoint(ignore_unindexed)


class RemoteCheckpoint:
    """A remote folder's headers, with copies of its index and configurations; see `Mirror`.

    Args:
        folder: where.
        python: copy its Python files too, for the model class to be asked.
    """

    def __init__(self, folder: RemoteFolder, python: bool = False) -> None:
        self.mirror = Mirror(folder, lambda name: name in _COPIED or (python and name.endswith(".py")), MAX_INDEX_BYTES)
        self.folder, self.infos = folder, self.mirror.infos
        self.root, self.top = self.mirror.root, self.mirror.top

    def checkpoint(self, ignore_unindexed: bool) -> Checkpoint:
        """All that `open_folder` would read, and nothing more."""
        shards = safetensors_among(self.top)
        with rename_in_errors(self.folder.base, self.root), self.headers(shards) as header:
            return assembled(
                self.root,
                self.top,
                self._indexed,
                header,
                lambda listed, warnings: self._others(listed),
                ignore_unindexed=ignore_unindexed,
                origin=self.folder.base,
                copies=self.mirror,
            )

    def headers(self, names: Iterable[str]) -> contextlib.AbstractContextManager[Callable[[str, int], Header]]:
        """A function (name, number) that gives a header; see `hub.prefetched`."""
        return hub.prefetched(names, self.header)

    def header(self, name: str) -> Header:
        """The header of one file. Raises what `remote_header` raises."""
        return remote_header(self.folder.base / name, self.infos[name])

    def _indexed(self, name: str) -> None:
        if name not in self.infos:
            raise ShardIndexError(f"names '{shown(name)}', which is not there", file=self.folder.base / INDEX_NAME)

    def _others(self, listed: set[str]) -> tuple[tuple[SideFile, ...], tuple[str, ...]]:
        sides = [
            SideFile(name, self.folder.base / name, info.get("size") or 0, 0, identity(info))
            for name, info in self.infos.items()
            if name not in listed and name not in self.folder.overlay
        ]
        for name in self.folder.overlay:
            if name not in listed:
                now = store_of(self.root / name).stamp(self.root / name)
                sides.append(SideFile(name, now.path, now.size, now.mtime_ns, inode=now.inode, ctime_ns=now.ctime_ns))
        return tuple(sorted(sides, key=lambda side: side.name)), hub.folders_of(self.infos)


def remote_header(path: RemotePath, info: Mapping[str, Any], shard: int = 0) -> Header:
    """Reads and validates the header of one remote safetensors file; see `header.read_header`.

    Args:
        path: the file.
        info: what its file system says of it.
        shard: the number that its tensors carry.
    """
    size = info.get("size")
    if size is None:
        raise HeaderError("its file system does not say how long it is; copy it to one that does", file=path)
    file = RemoteFile(path, size, "")
    start = file.read(0, min(size, _GUESS_BYTES))
    length = header_length(start[:8], size, path)
    base = 8 + length
    header = start[8:base] if len(start) >= base else start[8:] + file.read(len(start), base)
    metadata, tensors = parse_header(header, size - base, file=path, shard=shard, base=base)
    found = Shard(path.name, path, size, 0, 0, base, metadata, version=identity(info), header_digest=digest_of(header))
    return found, tensors


def header_of(path: FilePath) -> Header:
    """The header of one file, wherever it is."""
    if is_local(path):
        return read_header(path)
    return remote_header(path, path.info())


@contextlib.contextmanager
def rename_in_errors(origin: FilePath | None, root: Path) -> Iterator[None]:
    """Inside, errors about a copy in `root` name the remote file instead, if `origin` is remote."""
    try:
        yield
    except TierewriteError as error:
        remote = is_remote(origin)
        if remote and error.file is not None and error.file.startswith(str(root)):
            error.file = f"{origin}{error.file.removeprefix(str(root))}"
        raise
