"""An output that is not written: its bytes by ranges, for whoever streams it, and for whoever checks it as a folder.

The bytes are those that `output.shards` would write: survivors as they are in the source, all else by
`values.content.fill`.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from tierewrite.output.metadata import header_metadata, index_metadata
from tierewrite.output.safetensors import index_bytes, shard_header
from tierewrite.planning.plan import OutShard, OutTensor, RewritePlan
from tierewrite.source.bytes import open_source, runs_of
from tierewrite.source.table import INDEX_NAME, Checkpoint, SideFile
from tierewrite.stores.base import SourceFile
from tierewrite.stores.places import store_of
from tierewrite.values.content import COPY, Content, fill, needs_source


class UnwrittenOutput:
    """The bytes of a plan's shards. A context manager that holds the source's files open; any thread may read.

    Args:
        checkpoint: the source.
        plan: a plan that its bytes confirm.
        contents: output key -> what would be written, where that is no copy.
    """

    def __init__(self, checkpoint: Checkpoint, plan: RewritePlan, contents: Mapping[str, Content]) -> None:
        self.checkpoint = checkpoint
        self.plan = plan
        self.contents = contents
        self._sources: dict[int, SourceFile] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> UnwrittenOutput:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for source in self._sources.values():
            source.close()
        self._sources = {}

    def source(self, number: int) -> SourceFile:
        """A shard of the source, opened. Raises SourceChanged, SystemFailure."""
        with self._lock:
            if number not in self._sources:
                self._sources[number] = open_source(self.checkpoint.shards[number])
            return self._sources[number]

    def finish(self) -> None:
        """All is read: raises SourceChanged unless each file that was read is still the one whose header was read."""
        for source in self._sources.values():
            source.finish()

    def read(self, shard: OutShard, start: int, end: int, into: memoryview) -> None:
        """Fills `into` with the bytes `start` to `end` of the data section of an output shard.

        Raises:
            SourceChanged: a file is not what it was when its header was read, or a scale changed.
            SystemFailure: reading failed.
        """
        first = int(np.searchsorted(shard.end, start, side="right"))
        stop = int(np.searchsorted(shard.end, end, side="left")) + 1
        tensors = [tensor for tensor in shard.tensors[first:stop] if tensor.end > tensor.start]
        for number, group in itertools.groupby(tensors, key=self._read_from):
            if number >= 0:
                self._copy(number, list(group), start, end, into)
        for tensor in tensors:
            content = self.contents.get(tensor.name, COPY)
            if content is not COPY:
                low, high = max(tensor.start, start), min(tensor.end, end)
                fill(into[low - start : high - start], content, low - tensor.start)

    def _read_from(self, tensor: OutTensor) -> int:
        """The source shard whose bytes an output tensor begins with; -1 where it is made without them."""
        if tensor.added or not needs_source(self.contents.get(tensor.name, COPY)):
            return -1
        return int(self.checkpoint.tensors.shard[self.checkpoint.tensors.row[tensor.source]])

    def _copy(self, number: int, tensors: list[OutTensor], start: int, end: int, into: memoryview) -> None:
        """Puts the source's bytes of neighbours of one source shard into their place."""
        table = self.checkpoint.tensors
        ranges = []
        for tensor in tensors:
            base = int(table.start[table.row[tensor.source]]) - tensor.start
            ranges.append((base + max(tensor.start, start), base + min(tensor.end, end)))
        place = max(tensors[0].start, start) - start
        length = min(tensors[-1].end, end) - start - place
        self.source(number).read_runs(runs_of(ranges), into[place : place + length])

    def files(self) -> dict[str, ReadableFile]:
        """Every file that a rewrite would write but the manifest, by its path below the output's folder.

        Raises:
            UsageError: a header would be longer than the format allows.
        """
        checkpoint = self.checkpoint
        metadata, _ = header_metadata(checkpoint, self.plan)
        found: dict[str, ReadableFile] = {}
        for side in checkpoint.side_files:
            found[side.name] = ReadableFile(side.size, _reader(side))
        for shard in self.plan.shards:
            header = shard_header(shard, metadata)
            found[shard.name] = ReadableFile(len(header) + shard.nbytes, self._shard_reader(shard, header))
        index = index_bytes(self.plan.shards, index_metadata(checkpoint, self.plan))
        found[INDEX_NAME] = ReadableFile(len(index), lambda start, end: index[start:end])
        return found

    def _shard_reader(self, shard: OutShard, header: bytes) -> Callable[[int, int], bytes]:
        """A function that gives a range of a shard's file."""
        size = len(header)

        def read(start: int, end: int) -> bytes:
            if end <= size:
                return header[start:end]
            data = bytearray(end - max(start, size))
            self.read(shard, max(start, size) - size, end - size, memoryview(data))
            return header[start:size] + bytes(data)

        return read


@dataclass(frozen=True)
class ReadableFile:
    """A file of an output that is not written.

    Attributes:
        size: bytes.
        read: gives the bytes from a start to an end.
    """

    size: int
    read: Callable[[int, int], bytes]


def _reader(side: SideFile) -> Callable[[int, int], bytes]:
    """A function that gives a range of a side file."""

    def read(start: int, end: int) -> bytes:
        data = bytearray(end - start)
        with store_of(side.path).open(side) as file:
            file.read_runs([(start, end)], memoryview(data))
        return bytes(data)

    return read
