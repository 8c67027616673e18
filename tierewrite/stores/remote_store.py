"""The store of all URLs: files of an fsspec file system behind the interface that folders have too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tierewrite.stores.base import CopyingSink, FileStamp, Sink, SourceFile, Stamped
from tierewrite.stores.remote import RemoteFile, RemotePath, Upload, identity, listing
from tierewrite.stores.s3_copy import CopyingUpload, can_copy

_CHUNK_BYTES = 8 << 20  # a request


class RemoteStore:
    """Files of an fsspec file system; see `base.Store`."""

    read_gap_bytes = 1 << 20
    read_most_bytes = 2 * _CHUNK_BYTES

    def names(self, folder: RemotePath) -> list[str]:
        """See `Store`."""
        return list(listing(folder))

    def stamp(self, path: RemotePath) -> FileStamp:
        """See `Store`."""
        info = path.info()
        return FileStamp(path, info.get("size") or 0, version=identity(info))

    def open(self, file: Stamped) -> SourceFile:
        """See `Store`."""
        return RemoteFile(_remote(file), file.size, file.version)

    def chunks(self, file: Stamped) -> Iterator[bytes]:
        """See `Store`."""
        remote = RemoteFile(_remote(file), file.size, file.version)
        for start in range(0, file.size, _CHUNK_BYTES):
            yield remote.read(start, min(file.size, start + _CHUNK_BYTES))
        remote.finish()

    def create(self, path: RemotePath, size: int, token: str = "") -> Sink:
        """`token` is not needed: no object is there before it is complete."""
        return Upload(path, size)

    def copying(self, sources: Sequence[Stamped], path: RemotePath, size: int, token: str = "") -> CopyingSink | None:
        """See `Store`; S3 can, from what the same credentials read at the same endpoint."""
        return CopyingUpload(path, size) if can_copy(sources, path) else None

    def read(self, path: RemotePath) -> bytes:
        """See `Store`."""
        return path.read_bytes()

    def put(self, path: RemotePath, data: bytes) -> None:
        """See `Store`."""
        path.write_bytes(data)

    def remove(self, path: RemotePath, missing_ok: bool = False) -> None:
        """See `Store`."""
        path.unlink(missing_ok)

    def make_folder(self, path: RemotePath) -> None:
        """Nothing: a store has no folders but in names."""


def _remote(file: Stamped) -> RemotePath:
    assert isinstance(file.path, RemotePath)
    return file.path
