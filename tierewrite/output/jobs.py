"""Pieces of work that any process can carry out: an output shard from its first byte to its last, or ranges to hash.

A `Job` is data, cut from the plan, and holds all that is needed: byte ranges of the source, the few bytes that are to
stand in their place, and where the shard is to be. `carry_out` is a function of it: done twice, or begun and killed,
it has the same result, since a shard appears whole or not at all. So jobs may go to threads, or to other machines; and
they write to what takes no byte out of order, such as an upload.

Memory is bounded: a job has `_AHEAD` buffers of 8 MiB.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from blake3 import blake3

from tierewrite.digest import DeviceFailed, Digester, select
from tierewrite.digest import Span as DigestSpan
from tierewrite.digest.spans import Bytes
from tierewrite.output.files import Sink, open_sink
from tierewrite.output.one_pass import BUFFER_BYTES, put_patch
from tierewrite.source.bytes import SourceFile, open_source, runs_of
from tierewrite.source.table import Checkpoint, Shard, TensorEntry
from tierewrite.stores.remote import FilePath
from tierewrite.values.reencoded import Moved, Reencoding, encoded

_AHEAD = 3  # buffers: one being written, the others being read
_PIECES = 4096  # tensors in a buffer, at most


class Stopped(Exception):
    """The job ended because it was told to; nothing of it stays."""


class Piece(NamedTuple):
    """One tensor of a job.

    Attributes:
        key: its name in the source.
        shard: number of its source shard; -1: the source has no such tensor, and `key` is its name in the output.
        start, end: absolute byte range there.
        hashed: whether the digest of the source's bytes is wanted.
    """

    key: str
    shard: int
    start: int
    end: int
    hashed: bool


@dataclass(frozen=True)
class Job:
    """An output shard, or (without `out`) ranges to hash.

    Attributes:
        shards: the source's, by number.
        pieces: in the order of the output.
        out: the shard; None: nothing is written.
        header: what stands before the pieces.
        patches: source key -> bytes to write instead of the source's; same length.
        originals: source key -> the bytes that a patch was computed from; a difference means that SRC changed.
        added: output key -> bytes of a tensor that the source does not have.
        anew: NVFP4 blobs of which a part is encoded anew here.
        entries: headers of the tensors that those need.
        token: of the run; see `writer.open_sink`.
    """

    shards: Mapping[int, Shard]
    pieces: tuple[Piece, ...]
    out: FilePath | None = None
    header: bytes = b""
    patches: Mapping[str, bytes] = field(default_factory=dict)
    originals: Mapping[str, bytes] = field(default_factory=dict)
    added: Mapping[str, bytes] = field(default_factory=dict)
    anew: tuple[Reencoding, ...] = ()
    entries: Mapping[str, TensorEntry] = field(default_factory=dict)
    token: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of its pieces."""
        return sum(piece.end - piece.start for piece in self.pieces)

    @property
    def name(self) -> str:
        """For messages."""
        return self.out.name if self.out is not None else f"{len(self.pieces):,} tensors to hash"


@dataclass
class Result:
    """What a job found out.

    Attributes:
        digests: source key -> BLAKE3 of the source's bytes, for the pieces that were to be hashed.
        encoded: source key -> BLAKE3 of what was written in its place, for parts of blobs encoded anew.
        moved: module -> how far its weights moved, where its codes were encoded here.
    """

    digests: dict[str, bytes] = field(default_factory=dict)
    encoded: dict[str, bytes] = field(default_factory=dict)
    moved: dict[str, Moved] = field(default_factory=dict)


def hash_jobs(checkpoint: Checkpoint, keys: Iterable[str], nbytes: int) -> list[Job]:
    """Jobs of about `nbytes` that hash `keys`, in file order."""
    entries = sorted((checkpoint.tensors[key] for key in keys), key=lambda entry: (entry.shard, entry.start))
    jobs: list[Job] = []
    batch: list[Piece] = []
    size = 0
    for entry in entries:
        if batch and (size + entry.nbytes > nbytes or batch[-1].shard != entry.shard):
            jobs.append(Job(_shards_of(checkpoint, batch), tuple(batch)))
            batch, size = [], 0
        batch.append(Piece(entry.name, entry.shard, entry.start, entry.end, True))
        size += entry.nbytes
    if batch:
        jobs.append(Job(_shards_of(checkpoint, batch), tuple(batch)))
    return jobs


def _shards_of(checkpoint: Checkpoint, pieces: Iterable[Piece]) -> dict[int, Shard]:
    return {number: checkpoint.shards[number] for number in sorted({piece.shard for piece in pieces})}


def carry_out(
    job: Job,
    digester: Digester,
    advance: Callable[[int], None] = lambda n: None,
    stop: threading.Event | None = None,
) -> Result:
    """Carries out a job. A GPU that fails is replaced by the CPU.

    Args:
        digester: where hashing happens.
        advance: called with a number of bytes after each piece.
        stop: once set, the job ends early, and nothing of it stays.

    Raises:
        SourceChanged: a source file is not what it was when its header was read.
        SystemFailure: reading or writing failed.
        Stopped: `stop` was set.
    """
    try:
        return _Work(job, digester, advance, stop or threading.Event()).run()
    except DeviceFailed:
        return _Work(job, select("cpu", threads=1), advance, stop or threading.Event()).run()


class _Part(NamedTuple):
    """Bytes of one piece within a load."""

    number: int
    position: int
    length: int


class _Work:
    """One go at a job."""

    def __init__(
        self, job: Job, digester: Digester, advance: Callable[[int], None], stop: threading.Event
    ) -> None:
        self.job = job
        self.digester = digester
        self.advance = advance
        self.stop = stop
        self.result = Result()
        self.sources: dict[int, SourceFile] = {}
        self.anew = {key: job_ for job_ in job.anew for key in job_.parts}

    def run(self) -> Result:
        job = self.job
        with ExitStack() as cleanup:
            for number, shard in job.shards.items():
                self.sources[number] = source = open_source(shard)
                cleanup.callback(source.close)
            sink = None
            if job.out is not None:
                sink = open_sink(job.out, len(job.header) + job.nbytes, job.token)
            try:
                if sink is not None:
                    sink.write(memoryview(job.header))
                self._copy(sink)
                for source in self.sources.values():
                    source.finish()
                if sink is not None:
                    sink.commit()
            except BaseException:
                if sink is not None:
                    sink.abort()
                raise
        return self.result

    def _copy(self, sink: Sink | None) -> None:
        """Reads ahead, hashes and writes."""
        reader = ThreadPoolExecutor(_AHEAD - 1, thread_name_prefix="tierewrite-read")
        free: deque[Bytes] = deque()
        waiting: deque[tuple[list[_Part], Bytes, Future[None]]] = deque()
        loads = self._loads()
        with self.digester.stream(BUFFER_BYTES) as stream:
            try:
                while True:
                    while len(waiting) < _AHEAD and (load := next(loads, None)) is not None:
                        buffer = free.popleft() if free else self.digester.host_buffer(BUFFER_BYTES)
                        waiting.append((load, buffer, reader.submit(self._fill, load, buffer)))
                    if not waiting:
                        break
                    load, buffer, filled = waiting.popleft()
                    filled.result()
                    if self.stop.is_set():
                        raise Stopped
                    size = sum(part.length for part in load)
                    spans = self._spans(load)
                    ticket = stream.update(buffer, spans) if spans else None
                    if sink is not None:
                        self._write(load, buffer.data, sink, ticket.wait if ticket is not None else None)
                    if ticket is not None:
                        ticket.wait()
                    self.advance(size)
                    free.append(buffer)
                found = stream.finish()
            finally:
                reader.shutdown(wait=True, cancel_futures=True)
        self.result.digests.update((self.job.pieces[number].key, digest) for number, digest in found.items())

    def _loads(self) -> Iterator[list[_Part]]:
        """What goes through one buffer: neighbouring pieces, or a part of a large one."""
        load: list[_Part] = []
        size = 0
        for number, piece in enumerate(self.job.pieces):
            total = piece.end - piece.start
            if load and (size + total > BUFFER_BYTES or len(load) >= _PIECES):
                yield load
                load, size = [], 0
            if total <= BUFFER_BYTES:
                load.append(_Part(number, 0, total))
                size += total
                continue
            for position in range(0, total, BUFFER_BYTES):
                yield [_Part(number, position, min(BUFFER_BYTES, total - position))]
        if load:
            yield load

    def _source_of(self, part: _Part) -> int:
        """The shard to read it from; -1 where the source's bytes matter neither for the output nor for a digest."""
        piece = self.job.pieces[part.number]
        return piece.shard if piece.hashed or piece.key not in self.anew else -1

    def _fill(self, load: Sequence[_Part], buffer: Bytes) -> None:
        place = 0
        for shard, group in itertools.groupby(load, key=self._source_of):
            parts = list(group)
            length = sum(part.length for part in parts)
            if shard >= 0:
                starts = [self.job.pieces[part.number].start + part.position for part in parts]
                ranges = [(start, start + part.length) for start, part in zip(starts, parts, strict=True)]
                self.sources[shard].read_runs(runs_of(ranges), buffer.data[place : place + length])
            place += length

    def _spans(self, load: Sequence[_Part]) -> list[DigestSpan]:
        spans: list[DigestSpan] = []
        place = 0
        for part in load:
            piece = self.job.pieces[part.number]
            if piece.hashed:
                total = piece.end - piece.start
                spans.append(DigestSpan(part.number, place, part.length, total, part.position))
            place += part.length
        return spans

    def _write(
        self, load: Sequence[_Part], data: memoryview, sink: Sink, hashed: Callable[[], None] | None
    ) -> None:
        place = begun = 0
        for part in load:
            piece = self.job.pieces[part.number]
            here = slice(place, place + part.length)
            place += part.length
            if piece.shard < 0:
                data[here] = self.job.added[piece.key]
            elif piece.key in self.anew:
                sink.write(data[begun : here.start])
                begun = here.stop
                if part.position == 0:
                    self._encode(piece, sink)
            elif (new := self.job.patches.get(piece.key)) is not None:
                if hashed is not None:
                    hashed()  # the buffer is about to be changed
                put_patch(piece.key, data[here], new, self.job.originals)
        sink.write(data[begun:place])

    def _encode(self, piece: Piece, sink: Sink) -> None:
        """Writes all of a tensor that is encoded anew."""
        job = self.anew[piece.key]
        codes = piece.key == job.blob.weight
        moved = Moved() if codes else None
        shards = tuple(self.job.shards.get(number, _NONE) for number in range(max(self.job.shards) + 1))
        source = Checkpoint.of(Path(), shards, dict(self.job.entries))
        hasher = blake3()
        for parts in encoded(source, job, moved):
            data = parts[0 if codes else 1]
            hasher.update(data)
            sink.write(memoryview(data))
        self.result.encoded[piece.key] = hasher.digest()
        if moved is not None:
            self.result.moved[job.module] = moved


_NONE = Shard("", Path(), 0, 0, 0, 0, {})
