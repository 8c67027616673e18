"""Where the bytes of an output tensor come from, and the one function that puts them into a buffer.

Decided once, before a byte moves (`merged`, `filled`, `reencoded`), and carried out by `fill`, whichever executor runs:
one pass over the source, or jobs on other machines.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from blake3 import blake3

from tierewrite.errors import SourceChanged
from tierewrite.numbers import nvfp4
from tierewrite.source.bytes import open_source
from tierewrite.source.table import Checkpoint, Shard

_CHUNK_BLOCKS = 1 << 19
"""Blocks that are encoded at a time: 4 MiB of codes."""
_MADE_BYTES = 8 << 20
"""Bytes that `made_of` holds at a time."""


@dataclass(frozen=True, slots=True)
class Copy:
    """The bytes of the source tensor that the plan names."""


@dataclass(frozen=True, slots=True)
class Patch:
    """Other bytes in the place of a source tensor's: a merged, filled or unified scale.

    Attributes:
        data: the bytes to write.
        original: the source's bytes that `data` was computed from; same length.
        key: the source tensor.
    """

    data: bytes
    original: bytes
    key: str


@dataclass(frozen=True, slots=True)
class Added:
    """Bytes of a tensor that the source does not have."""

    data: bytes


class Range(NamedTuple):
    """Bytes `start` to `end` of a source file, absolute, end exclusive."""

    shard: Shard
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Blob:
    """An NVFP4 weight of the source.

    Attributes:
        codes: two elements a byte, uint8.
        block_scales: E4M3, one byte a block.
        scale: `weight_scale_2`, or with `reciprocal` compressed-tensors' `weight_global_scale`: F32, 4 bytes.
    """

    codes: Range
    block_scales: Range
    scale: bytes
    reciprocal: bool

    @property
    def width(self) -> int:
        """Bytes of codes in a block; 0 if there is none."""
        return self.codes.nbytes // self.block_scales.nbytes if self.block_scales.nbytes else 0


@dataclass(frozen=True, slots=True)
class Encode:
    """The codes or the block scales of an NVFP4 weight, re-encoded to another scale.

    Attributes:
        blob: the weight.
        others: the other sides that the result stands for; how far their weights move counts too.
        scale: the new scale's four bytes.
        codes: True for the codes, False for the block scales.
    """

    blob: Blob
    others: tuple[Blob, ...]
    scale: bytes
    codes: bool

    @property
    def shards(self) -> set[str]:
        """Names of the source files that are read for it."""
        blobs = (self.blob, *self.others) if self.codes else (self.blob,)
        return {place.shard.name for blob in blobs for place in (blob.codes, blob.block_scales)}


@dataclass(frozen=True, slots=True)
class Duplicate:
    """The bytes of a source tensor that the output holds under another name as well."""

    place: Range

    @property
    def shards(self) -> set[str]:
        """Names of the source files that are read for it."""
        return {self.place.shard.name}


Content = Copy | Patch | Encode | Added | Duplicate
COPY = Copy()


def needs_source(content: Content) -> bool:
    """Whether `fill` has to be given the source's bytes."""
    return isinstance(content, (Copy, Patch))


@dataclass
class Moved:
    """How far decoded weights moved: the sums of what re-encoding changed."""

    largest: float = 0.0
    squares: float = 0.0
    elements: int = 0

    def add(self, change: nvfp4.Change, elements: int) -> None:
        """Enters the change of so many elements."""
        self.largest = max(self.largest, change.largest)
        self.squares += change.rms**2 * elements
        self.elements += elements

    @property
    def rms(self) -> float:
        """Root of the mean square over all elements; 0 where there are none."""
        return (self.squares / self.elements) ** 0.5 if self.elements else 0.0


def fill(buffer: memoryview, content: Content, position: int = 0, moved: Moved | None = None) -> None:
    """Puts bytes of an output tensor, from its byte `position` on, into `buffer`.

    Args:
        buffer: for Copy and Patch it holds the source's bytes of the same range; else it may hold anything.
        moved: adds up how far weights move where codes are re-encoded.

    Raises:
        SourceChanged: what was read is not what a patch was computed from, or a file changed.
        SystemFailure: reading failed.
    """
    part = slice(position, position + len(buffer))
    if isinstance(content, Patch):
        if buffer != content.original[part]:
            raise SourceChanged(
                "a scale changed while the checkpoint was rewritten; run again when nothing writes to SRC",
                tensor=content.key,
            )
        buffer[:] = content.data[part]
    elif isinstance(content, Added):
        buffer[:] = content.data[part]
    elif isinstance(content, Encode):
        _encode(buffer, content, position, moved)
    elif isinstance(content, Duplicate):
        buffer[:] = _read(content.place, position, position + len(buffer)).data


@dataclass(frozen=True, slots=True)
class Made:
    """What was written for a tensor that is no plain copy.

    Attributes:
        digest: BLAKE3 of it.
        moved: how far weights moved, where codes were re-encoded.
    """

    digest: bytes
    moved: Moved


class Maker:
    """Fills the buffers of one output tensor from its first byte to its last, and keeps their digest."""

    def __init__(self, content: Content) -> None:
        self.content = content
        self._hasher = blake3()
        self._moved = Moved()
        self._position = 0

    def fill(self, buffer: memoryview) -> None:
        """The next bytes. Raises what `fill` raises."""
        fill(buffer, self.content, self._position, self._moved)
        self._hasher.update(buffer)
        self._position += len(buffer)

    def made(self) -> Made:
        """What was made, once all of the tensor is."""
        return Made(self._hasher.digest(), self._moved)


def made_of(content: Patch | Encode | Added | Duplicate, nbytes: int) -> Made:
    """What would be written for a tensor of `nbytes` bytes, without writing it.

    Raises:
        SourceChanged, SystemFailure: reading failed.
    """
    if isinstance(content, (Patch, Added)):
        return Made(blake3(content.data).digest(), Moved())
    maker = Maker(content)
    buffer = memoryview(bytearray(min(nbytes, _MADE_BYTES)))
    for position in range(0, nbytes, _MADE_BYTES):
        maker.fill(buffer[: nbytes - position])
    return maker.made()


def range_of(checkpoint: Checkpoint, key: str) -> Range:
    """Where the bytes of a source tensor are."""
    entry = checkpoint.tensors[key]
    return Range(checkpoint.shards[entry.shard], entry.start, entry.end)


def blocks_of(blob: Blob) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Codes [blocks, bytes a block] and block scales [blocks, 1] of a blob, uint8, a few megabytes at a time."""
    for start, stop in _chunks(0, blob.block_scales.nbytes):
        yield _codes(blob, start, stop), _block_scales(blob, start, stop)


def has_sound_scales(blob: Blob) -> bool:
    """Whether all block scales of a blob can be re-encoded: none is NaN or negative. Reads them.

    Raises:
        SourceChanged, SystemFailure: reading failed.
    """
    return all(
        nvfp4.are_sound(_block_scales(blob, start, stop)) for start, stop in _chunks(0, blob.block_scales.nbytes)
    )


def scale_value(data: bytes) -> np.ndarray:
    """The value of a scale of four bytes."""
    return np.frombuffer(data, "<f4")


def _encode(buffer: memoryview, content: Encode, position: int, moved: Moved | None) -> None:
    """Re-encodes the blocks that the bytes from `position` on belong to, a few megabytes at a time."""
    blob, unit = content.blob, content.blob.width if content.codes else 1
    if not len(buffer):
        return
    end = position + len(buffer)
    new = scale_value(content.scale)
    for start, stop in _chunks(position // unit, -(-end // unit)):
        scales = _block_scales(blob, start, stop)
        # New block scales follow from the old ones alone: the codes need not be read for them.
        codes = _codes(blob, start, stop) if content.codes else np.zeros((stop - start, blob.width), np.uint8)
        encoded = nvfp4.repack(codes, scales, scale_value(blob.scale), new, reciprocal=blob.reciprocal)
        data = encoded[0 if content.codes else 1].tobytes()
        at = start * unit
        low, high = max(at, position), min(stop * unit, end)
        buffer[low - position : high - position] = data[low - at : high - at]
        if moved is not None and content.codes:
            sides = [(codes, scales, scale_value(blob.scale))]
            for other in content.others:
                read = _codes(other, start, stop), _block_scales(other, start, stop)
                sides.append((*read, scale_value(other.scale)))
            for side in sides:
                moved.add(nvfp4.change(side, (*encoded, new), reciprocal=blob.reciprocal), codes.size * 2)


def _chunks(start: int, stop: int) -> Iterator[tuple[int, int]]:
    for at in range(start, stop, _CHUNK_BLOCKS):
        yield at, min(stop, at + _CHUNK_BLOCKS)


def _codes(blob: Blob, start: int, stop: int) -> np.ndarray:
    return _read(blob.codes, start * blob.width, stop * blob.width).reshape(stop - start, blob.width)


def _block_scales(blob: Blob, start: int, stop: int) -> np.ndarray:
    return _read(blob.block_scales, start, stop).reshape(stop - start, 1)


def _read(place: Range, start: int, stop: int) -> np.ndarray:
    """Bytes `start` to `stop` of `place`, uint8."""
    data = np.empty(stop - start, np.uint8)
    with open_source(place.shard) as source:
        source.read_runs([(place.start + start, place.start + stop)], data.data)
    return data
