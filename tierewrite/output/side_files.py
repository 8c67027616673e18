"""Side files: everything of the source that is not weights or index, copied as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from blake3 import blake3

from tierewrite.output.files import open_sink
from tierewrite.output.manifest import ManifestFile
from tierewrite.output.staging import Staged
from tierewrite.source.bytes import chunks_of, read_side_file
from tierewrite.source.table import Checkpoint
from tierewrite.stores.places import store_of


def copy_side_files(
    checkpoint: Checkpoint,
    staging: Staged,
    advance: Callable[[int], None],
    contents: Mapping[str, bytes] = MappingProxyType({}),
) -> dict[str, ManifestFile]:
    """Copies every other file of the source, byte for byte; links arrive as files.

    Args:
        advance: called with the bytes of each piece.
        contents: name -> bytes to write instead of the file's own.

    Returns:
        What was written, by name.

    Raises:
        SourceChanged: a file is not what it was when the source was opened.
        SystemFailure: reading or writing failed.
    """
    written: dict[str, ManifestFile] = {}
    folder = staging.folder
    store = store_of(folder)
    for name in checkpoint.directories:
        store.make_folder(folder / name)
    for side in checkpoint.side_files:
        if side.name in contents or side.name in staging.held_back:
            own = read_side_file(side)  # also where other bytes are written: it has to be what they were made from
            data = contents.get(side.name, own)
            staging.put(side.name, data)
            written[side.name] = ManifestFile.of(data)
            continue
        path = folder / side.name
        store.make_folder(path.parent)
        sink = open_sink(path, side.size)
        hasher = blake3()
        try:
            for chunk in chunks_of(side):
                hasher.update(chunk)
                sink.write(memoryview(chunk))
                advance(len(chunk))
            sink.commit()
        except BaseException:
            sink.abort()
            raise
        written[side.name] = ManifestFile(side.size, hasher.hexdigest())
    return written
