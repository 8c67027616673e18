"""Work that any process can carry out: an output shard from its first byte to its last, or ranges to hash.

A `Job` is data, cut from the plan, and holds all that is needed: byte ranges of the source, the contents that stand in
their place, and where the shard is to be. `run_job` is a function of it: done twice, or begun and killed, it has the
same result, since a shard appears whole or not at all. So jobs may go to threads, or to other machines; and they write
to what takes no byte out of order, such as an upload.

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
from typing import NamedTuple

from tierewrite.digest import DeviceFailed, Digester, Stream, select
from tierewrite.digest import Span as DigestSpan
from tierewrite.digest.spans import Bytes
from tierewrite.output.copied import CopiedRun
from tierewrite.output.files import open_sink
from tierewrite.output.result import BUFFER_BYTES, Result
from tierewrite.source.bytes import open_source, runs_of
from tierewrite.source.table import Checkpoint, Shard
from tierewrite.stores.base import CopyingSink, Sink, SourceFile
from tierewrite.stores.places import FilePath, store_of
from tierewrite.values.content import COPY, Content, Maker, needs_source

_AHEAD = 3  # buffers: one being written, the others being read
_TENSORS = 4096  # in a buffer, at most


class Stopped(Exception):
    """The job ended because it was told to; nothing of it stays."""


class JobTensor(NamedTuple):
    """One tensor of a job.

    Attributes:
        name: its key in the output; in the source where nothing is written.
        key: its key in the source; "" where the source has no such tensor.
        shard: number of its source shard; -1: the source has no such tensor.
        start, end: absolute byte range there.
        hashed: whether the digest of the source's bytes is wanted.
    """

    name: str
    key: str
    shard: int
    start: int
    end: int
    hashed: bool

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.end - self.start


@dataclass(frozen=True)
class Job:
    """An output shard, or (without `out`) ranges to hash.

    Attributes:
        shards: the source's that are read, by number.
        tensors: in the order of the output.
        out: the shard; None: nothing is written.
        header: what stands before the tensors.
        contents: output key -> what is written, where that is no copy.
        token: of the run; see `open_sink`.
        copied: the neighbours that are copied without being read; they are not hashed.
    """

    shards: Mapping[int, Shard]
    tensors: tuple[JobTensor, ...]
    out: FilePath | None = None
    header: bytes = b""
    contents: Mapping[str, Content] = field(default_factory=dict)
    token: str = ""
    copied: tuple[CopiedRun, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def name(self) -> str:
        """For messages."""
        return self.out.name if self.out is not None else f"{len(self.tensors):,} tensors to hash"


def hash_jobs(checkpoint: Checkpoint, keys: Iterable[str], nbytes: int) -> list[Job]:
    """Jobs of about `nbytes` that hash `keys`, in file order."""
    entries = sorted((checkpoint.tensors[key] for key in keys), key=lambda entry: (entry.shard, entry.start))
    jobs: list[Job] = []
    batch: list[JobTensor] = []
    size = 0
    for entry in entries:
        if batch and (size + entry.nbytes > nbytes or batch[-1].shard != entry.shard):
            jobs.append(Job(_shards_of(checkpoint, batch), tuple(batch)))
            batch, size = [], 0
        batch.append(JobTensor(entry.name, entry.name, entry.shard, entry.start, entry.end, True))
        size += entry.nbytes
    if batch:
        jobs.append(Job(_shards_of(checkpoint, batch), tuple(batch)))
    return jobs


def _shards_of(checkpoint: Checkpoint, tensors: Iterable[JobTensor]) -> dict[int, Shard]:
    return {number: checkpoint.shards[number] for number in sorted({tensor.shard for tensor in tensors})}


def run_job(
    job: Job,
    digester: Digester,
    advance: Callable[[int], None] = lambda n: None,
    stop: threading.Event | None = None,
) -> Result:
    """Carries out a job. A GPU that fails is replaced by the CPU.

    Args:
        digester: where hashing happens.
        advance: called with a number of bytes after each buffer.
        stop: once set, the job ends early, and nothing of it stays.

    Raises:
        SourceChanged: a source file is not what it was when its header was read, or a scale changed.
        SystemFailure: reading or writing failed.
        Stopped: `stop` was set.
    """
    try:
        return _Attempt(job, digester, advance, stop or threading.Event()).run()
    except DeviceFailed:
        return _Attempt(job, select("cpu", threads=1), advance, stop or threading.Event()).run()


class _Segment(NamedTuple):
    """Bytes of one tensor within a load."""

    number: int
    position: int
    length: int


class _Attempt:
    """One go at a job."""

    def __init__(self, job: Job, digester: Digester, advance: Callable[[int], None], stop: threading.Event) -> None:
        self.job = job
        self.digester = digester
        self.advance = advance
        self.stop = stop
        self.result = Result()
        self.sources: dict[int, SourceFile] = {}
        self.makers: dict[int, Maker] = {}
        self.free: deque[Bytes] = deque()  # buffers
        self.copying: CopyingSink | None = None

    def run(self) -> Result:
        job = self.job
        with ExitStack() as cleanup:
            for number, shard in job.shards.items():
                self.sources[number] = source = open_source(shard)
                cleanup.callback(source.close)
            sink = None
            if job.out is not None:
                sink = self._sink(job.out, len(job.header) + job.nbytes)
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

    def _sink(self, out: FilePath, size: int) -> Sink:
        if self.job.copied:
            sources = [self.job.shards[run.shard] for run in self.job.copied]
            # None: the settings differ on this machine.
            self.copying = store_of(out).copying(sources, out, size, self.job.token)
        return self.copying or open_sink(out, size, self.job.token)

    def _copy(self, sink: Sink | None) -> None:
        """Everything after the header, in the order of the output."""
        at = 0
        with self.digester.stream(BUFFER_BYTES) as stream:
            if self.copying is not None:
                for run in self.job.copied:
                    self._pass_on(range(at, run.first), stream, sink)
                    self._let_copy(self.copying, run)
                    at = run.stop
            self._pass_on(range(at, len(self.job.tensors)), stream, sink)
            found = stream.finish()
        self.result.digests.update((self.job.tensors[number].key, digest) for number, digest in found.items())

    def _let_copy(self, sink: CopyingSink, run: CopiedRun) -> None:
        """The store copies a run by itself."""
        for start, end in run.pieces():
            if self.stop.is_set():
                raise Stopped
            self.result.copied += sink.copy(self.sources[run.shard], start, end)
            self.advance(end - start)

    def _pass_on(self, numbers: range, stream: Stream, sink: Sink | None) -> None:
        """Tensors by number: reads ahead, hashes and writes."""
        reader = ThreadPoolExecutor(_AHEAD - 1, thread_name_prefix="tierewrite-read")
        waiting: deque[tuple[list[_Segment], Bytes, Future[None]]] = deque()
        loads = self._loads(numbers)
        try:
            while True:
                while len(waiting) < _AHEAD and (load := next(loads, None)) is not None:
                    buffer = self.free.popleft() if self.free else self.digester.host_buffer(BUFFER_BYTES)
                    waiting.append((load, buffer, reader.submit(self._read, load, buffer)))
                if not waiting:
                    break
                load, buffer, read = waiting.popleft()
                read.result()
                if self.stop.is_set():
                    raise Stopped
                size = sum(segment.length for segment in load)
                spans = self._spans(load)
                ticket = stream.update(buffer[:size], spans) if spans else None
                if sink is not None:
                    self._make(load, buffer.data, ticket.wait if ticket is not None else lambda: None)
                    sink.write(buffer.data[:size])
                if ticket is not None:
                    ticket.wait()
                self.advance(size)
                self.free.append(buffer)
        finally:
            reader.shutdown(wait=True, cancel_futures=True)

    def _loads(self, numbers: range) -> Iterator[list[_Segment]]:
        """What goes through one buffer: neighbouring tensors, or a part of a large one."""
        load: list[_Segment] = []
        size = 0
        for number in numbers:
            total = self.job.tensors[number].nbytes
            if load and (size + total > BUFFER_BYTES or len(load) >= _TENSORS):
                yield load
                load, size = [], 0
            if total <= BUFFER_BYTES:
                load.append(_Segment(number, 0, total))
                size += total
                continue
            for position in range(0, total, BUFFER_BYTES):
                yield [_Segment(number, position, min(BUFFER_BYTES, total - position))]
        if load:
            yield load

    def _content(self, segment: _Segment) -> Content:
        return self.job.contents.get(self.job.tensors[segment.number].name, COPY)

    def _source_of(self, segment: _Segment) -> int:
        """The shard to read it from; -1 where the source's bytes matter neither for the output nor for a digest."""
        tensor = self.job.tensors[segment.number]
        return tensor.shard if tensor.hashed or needs_source(self._content(segment)) else -1

    def _read(self, load: Sequence[_Segment], buffer: Bytes) -> None:
        place = 0
        for shard, group in itertools.groupby(load, key=self._source_of):
            segments = list(group)
            length = sum(segment.length for segment in segments)
            if shard >= 0:
                starts = [self.job.tensors[segment.number].start + segment.position for segment in segments]
                ranges = [(start, start + segment.length) for start, segment in zip(starts, segments, strict=True)]
                self.sources[shard].read_runs(runs_of(ranges), buffer.data[place : place + length])
            place += length

    def _spans(self, load: Sequence[_Segment]) -> list[DigestSpan]:
        spans: list[DigestSpan] = []
        place = 0
        for segment in load:
            tensor = self.job.tensors[segment.number]
            if tensor.hashed:
                spans.append(DigestSpan(segment.number, place, segment.length, tensor.nbytes, segment.position))
            place += segment.length
        return spans

    def _make(self, load: Sequence[_Segment], data: memoryview, hashed: Callable[[], None]) -> None:
        """Puts what is no copy into its place in a buffer.

        Args:
            hashed: waits until the source's bytes in the buffer are hashed.
        """
        place = 0
        for segment in load:
            here = slice(place, place + segment.length)
            place += segment.length
            content = self._content(segment)
            if content is COPY:
                continue
            hashed()
            maker = self.makers.setdefault(segment.number, Maker(content))
            maker.fill(data[here])
            tensor = self.job.tensors[segment.number]
            if segment.position + segment.length == tensor.nbytes:
                self.result.made[tensor.name] = maker.made()
