"""A checkpoint of a store as a folder of this machine without its weights: headers, configs and small tensors."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

from tierewrite.consumers.folder import Folder
from tierewrite.source.bytes import read_tensors
from tierewrite.source.table import TensorEntry

SMALL = 64
"""Elements of a tensor whose bytes loaders may look at: scales of tensors and of channels' groups, not of blocks."""


@contextmanager
def as_local_folder(folder: Folder) -> Iterator[Path]:
    """The folder itself, or where it is a store's a copy: files of full size with holes in the place of weights.

    Raises:
        SourceChanged, SystemFailure: a tensor cannot be read, or the copy not be written.
    """
    if folder.copies is None:
        yield folder.root
        return
    with tempfile.TemporaryDirectory(prefix="tierewrite-sparse-") as name:
        copy = Path(name)
        for file in folder.root.iterdir():
            if file.is_file() and file.suffix != ".safetensors":
                shutil.copyfile(file, copy / file.name)
        repeated = [entry for entries in folder.repeated.values() for entry in entries]
        once = [entry for entry in folder.entries.values() if entry.name not in folder.repeated]
        by_shard: dict[int, list[TensorEntry]] = {number: [] for number in range(len(folder.shards))}
        for entry in (*once, *repeated):
            by_shard[entry.shard].append(entry)
        for number, entries in by_shard.items():
            shard = folder.shards[number]
            _write(copy / shard.name, folder, sorted(entries, key=lambda e: e.start), shard.metadata)
        yield copy


def _write(path: Path, folder: Folder, entries: list[TensorEntry], metadata: Any) -> None:
    """A safetensors file with these tensors, of which the small ones have their bytes."""
    small = {entry.name: entry for entry in entries if prod(entry.shape) <= SMALL}
    data = read_tensors(folder.as_checkpoint(small), small)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    places: dict[str, int] = {}
    end = 0
    for entry in entries:
        places[entry.name] = end
        end += entry.nbytes
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [places[entry.name], end]}
    text = json.dumps(header).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        file.truncate(start + end)
        for key, content in data.items():
            file.seek(start + places[key])
            file.write(content)
