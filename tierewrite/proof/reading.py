"""Digests of everything, each byte read once, in bounded memory; and a file that changes meanwhile is noticed."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from tierewrite import formats
from tierewrite.errors import SourceChanged
from tierewrite.formats import Role
from tierewrite.proof.values import BLOBS
from tierewrite.source.table import Checkpoint, Shard, SideFile, TensorEntry
from tierewrite.source.threads import io_threads
from tierewrite.stores.places import store_of

_READ_BYTES = 8 << 20  # bytes read at once
_RUN = 64 << 20  # bytes that one thread takes at a time; a larger tensor is a run of its own


@dataclass(frozen=True, slots=True)
class Contents:
    """BLAKE3 of every tensor, and the bytes of those few whose values count."""

    digests: dict[str, bytes]
    values: dict[str, bytes]


def is_scale(key: str) -> bool:
    """Whether values of tensors of that name count: any family merges them, or they scale an NVFP4 weight.

    Only their bytes are kept in memory.
    """
    return _MERGED_ENDINGS.search(key) is not None or key.endswith(_SCALES_OF_BLOBS)


def _merged_endings() -> re.Pattern[str]:
    rows = [row for family in formats.FAMILIES.values() for row in (*family.companions, *family.fused, *family.kv)]
    endings = {
        row.suffix.replace("{leaf}", "").rpartition(".")[2] for row in rows if row.role in (Role.ACTIVATION, Role.KV)
    }
    return re.compile("(?:" + "|".join(sorted(map(re.escape, endings - {""}))) + r")\Z")


_MERGED_ENDINGS = _merged_endings()
_SCALES_OF_BLOBS = tuple(f".{parts[2]}" for parts in BLOBS)


def hash_tensors(checkpoint: Checkpoint, values: Collection[str], advance: Callable[[int], None] | None) -> Contents:
    """Digests of all tensors of `checkpoint`, read in file order by several threads.

    Raises:
        SourceChanged: a shard is not the file any more whose header was read. SystemFailure: it cannot be read.
    """
    runs: list[tuple[Shard, list[TensorEntry]]] = []
    previous: tuple[int, int] | None = None
    taken = 0
    for entry in checkpoint.tensors.values():
        if previous != (entry.shard, entry.start) or taken + entry.nbytes > _RUN:
            runs.append((checkpoint.shards[entry.shard], []))
            taken = 0
        runs[-1][1].append(entry)
        taken += entry.nbytes
        previous = (entry.shard, entry.end)
    contents = Contents({}, {})
    with ThreadPoolExecutor(max_workers=io_threads()) as pool:
        for digests, kept in pool.map(lambda run: _hash_run(run[0], run[1], values, advance), runs):
            contents.digests.update(digests)
            contents.values.update(kept)
    return contents


def _hash_run(
    shard: Shard, entries: Sequence[TensorEntry], values: Collection[str], advance: Callable[[int], None] | None
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Digests of neighbouring tensors of one shard; each byte is read once."""
    digests: dict[str, bytes] = {}
    kept: dict[str, bytes] = {}
    with Reader(shard, advance) as reader:
        reader.seek(entries[0].start, entries[-1].end)
        for entry in entries:
            if entry.nbytes <= len(reader.piece):  # nearly all of half a million small ones
                data = reader.at_hand(entry.nbytes)
                digests[entry.name] = blake3(data).digest()
                if entry.name in values:
                    kept[entry.name] = bytes(data)
                continue
            hasher = blake3(max_threads=blake3.AUTO) if entry.nbytes > _RUN else blake3()
            pieces: list[bytes] | None = [] if entry.name in values else None
            for piece in reader.take(entry.nbytes):
                hasher.update(piece)
                if pieces is not None:
                    pieces.append(bytes(piece))
            digests[entry.name] = hasher.digest()
            if pieces is not None:
                kept[entry.name] = b"".join(pieces)
        reader.finish()
    return digests, kept


class Reader:
    """A file that must not change, read once from one offset to another in bounded pieces."""

    def __init__(self, file: Shard | SideFile, advance: Callable[[int], None] | None = None) -> None:
        self.path = file.path
        self.source = store_of(file.path).open(file)
        self.advance = advance
        self.piece = memoryview(b"")
        self.position = self.end = 0

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.source.close()

    def finish(self) -> None:
        """Raises SourceChanged: the file is not what it was when its header or folder was read."""
        self.source.finish()

    def seek(self, start: int, end: int) -> None:
        """Goes on from `start`, and no further than `end`."""
        self.position, self.end = start, end
        self.piece = memoryview(b"")

    def at_hand(self, count: int) -> memoryview:
        """The next `count` bytes, of which `piece` has that many."""
        data, self.piece = self.piece[:count], self.piece[count:]
        return data

    def take(self, count: int) -> Iterator[memoryview]:
        """The next `count` bytes."""
        while count:
            if not self.piece:
                size = min(_READ_BYTES, self.end - self.position)
                if not size:
                    raise SourceChanged("shrank while it was verified", file=self.path)
                self.piece = memoryview(bytearray(size))
                self.source.read_runs([(self.position, self.position + size)], self.piece)
                self.position += size
                if self.advance is not None:
                    self.advance(size)
            part = self.piece[:count]
            self.piece = self.piece[len(part) :]
            count -= len(part)
            yield part


def hash_file(side: SideFile, advance: Callable[[int], None] | None) -> bytes:
    """BLAKE3 of a whole file."""
    hasher = blake3()
    with Reader(side, advance) as reader:
        reader.seek(0, side.size)
        for piece in reader.take(side.size):
            hasher.update(piece)
        reader.finish()
    return hasher.digest()


def hash_files(sides: Sequence[SideFile], advance: Callable[[int], None] | None) -> dict[str, bytes]:
    """BLAKE3 of whole files, by name.

    Raises:
        SourceChanged: one is not what was listed. SystemFailure: it cannot be read.
    """
    with ThreadPoolExecutor(max_workers=io_threads()) as pool:
        digests = pool.map(lambda side: hash_file(side, advance), sides)
        return dict(zip([side.name for side in sides], digests, strict=True))


def read_array(checkpoint: Checkpoint, key: str) -> npt.NDArray[Any]:
    """The bytes of one tensor in its shape; E4M3 as bytes."""
    entry = checkpoint.tensors[key]
    shard = checkpoint.shards[entry.shard]
    data = bytearray()
    with Reader(shard) as reader:
        reader.seek(entry.start, entry.end)
        for piece in reader.take(entry.nbytes):
            data += piece
    return np.frombuffer(data, "<f4" if entry.dtype == "F32" else np.uint8).reshape(entry.shape)
