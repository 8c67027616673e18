"""Moving bytes: each byte that matters is read once, hashed and written from the same buffer.

A `Task` is data: a batch of byte ranges of one source shard, small enough for one buffer, or one larger tensor that
streams through it. Any worker can carry out any task, in any order, with the same result: every span knows where its
bytes go. Memory is bounded by the number of workers times one buffer, whatever the size of the checkpoint. Bytes that
are neither hashed nor written are not read.
"""

from __future__ import annotations

import logging
import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import accumulate
from operator import itemgetter
from typing import NamedTuple

from tierewrite.digest import PIECE, DeviceFailed, Digester, Stream, select
from tierewrite.digest.spans import Bytes, Row
from tierewrite.errors import SourceChanged
from tierewrite.output.files import PartFiles
from tierewrite.planning.plan import OutShard
from tierewrite.source.bytes import SourceFile, open_source
from tierewrite.source.rows import rows_of
from tierewrite.source.table import Checkpoint, gc_paused

log = logging.getLogger(__name__)

BUFFER_BYTES = 8 << 20  # a multiple of digest.PIECE, so that a large tensor may be cut at every buffer's end
assert BUFFER_BYTES % PIECE == 0
_RUNS_PER_TASK = 4096


class Span(NamedTuple):
    """One source tensor within a task.

    Attributes:
        key: its name in the source.
        start, end: absolute byte range in the source shard.
        hashed: whether its digest is wanted.
        out: index of the output shard it is written to, or -1.
        position: absolute byte offset in that file.
    """

    key: str
    start: int
    end: int
    hashed: bool
    out: int = -1
    position: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """Spans of one source shard, ascending; together at most a buffer, unless there is only one.

    Equal and hashed by identity: a task is one piece of work.

    Attributes:
        shard: index of the source shard.
        spans: what to read of it.
        nbytes: of all spans.
        outs: the output shards that it writes to.
    """

    shard: int
    spans: tuple[Span, ...]
    nbytes: int
    outs: frozenset[int]


@gc_paused()
def tasks(
    checkpoint: Checkpoint,
    hashed: Iterable[str],
    shards: Sequence[OutShard] = (),
    data_starts: Sequence[int] = (),
    finished: Collection[int] = (),
    elsewhere: Collection[str] = (),
) -> list[Task]:
    """Batches of byte ranges that cover `hashed` and everything that `shards` hold.

    Args:
        checkpoint: the source.
        hashed: keys whose digests are wanted.
        shards: output shards to write; empty to hash only.
        data_starts: for each output shard, the absolute offset of its data section.
        finished: indices of output shards that need no writing.
        elsewhere: source keys whose place in the output is filled by somebody else.

    Returns:
        Large tensors first, since each is one worker's work, then the rest, `_mixed`.
    """
    nowhere = (-1, 0)
    places: dict[str, tuple[int, int]] = {}
    for index, shard in enumerate(shards):
        if index in finished:
            continue
        begin = data_starts[index]
        for _, source, start, _, added in shard.tensors:
            if not added and source not in elsewhere:
                places[source] = (index, begin + start)
    want_digest = set(hashed)
    by_shard: list[list[tuple[str, int, int, bool, int, int]]] = [[] for _ in checkpoint.shards]
    # All are walked, in their order: looking up those that are wanted, in a set's order, takes longer.
    for key, _, _, number, start, end in checkpoint.tensors.values():
        wanted = key in want_digest
        if wanted:
            want_digest.remove(key)
        out, position = places.pop(key, nowhere)
        if wanted or out >= 0:
            by_shard[number].append((key, start, end, wanted, out, position))
    if want_digest or places:
        raise KeyError(next(iter(want_digest or places)))
    large: list[Task] = []
    batches: list[Task] = []
    for number, rows in enumerate(by_shard):
        rows.sort(key=itemgetter(1))
        before = [0, *accumulate([end - start for _, start, end, _, _, _ in rows])]  # bytes, of each
        at = 0
        while at < len(rows):
            full = bisect_right(before, before[at] + BUFFER_BYTES, at) - 1
            stop = max(at + 1, min(full, at + _RUNS_PER_TASK))
            some = rows[at:stop]
            outs = frozenset([out for _, _, _, _, out, _ in some]) - {-1}
            task = Task(number, tuple(rows_of(Span, some)), before[stop] - before[at], outs)
            (large if task.nbytes > BUFFER_BYTES else batches).append(task)
            at = stop
    large.sort(key=lambda task: -task.nbytes)
    return large + _mixed(batches)


def _mixed(work: list[Task]) -> list[Task]:
    """`work` in such an order that neighbours write to different files, or one of them only hashes.

    A file system lets one writer at a time into a file. Of each file's tasks the same share is done at any moment, in
    the order of the source.
    """
    total: dict[int, int] = {}
    positions: list[tuple[int, int]] = []
    for task in work:
        out = max(task.outs, default=-1)
        positions.append((out, total.get(out, 0)))
        total[out] = total.get(out, 0) + task.nbytes
    share = [position / (total[out] or 1) for out, position in positions]
    return [work[i] for i in sorted(range(len(work)), key=share.__getitem__)]


class Transfer:
    """Carries out tasks with a fixed number of workers and buffers.

    Args:
        checkpoint: the source; its shards are opened read-only.
        digester: gives where hashing happens, for the next task: it may change while tasks are carried out.
        outputs: the output shards to write, by number, headers included. Each is flushed once it is complete; whoever
            made them waits for that.
        patches: source key -> bytes to write instead of the source's (merged scales); same length.
        originals: source key -> the bytes that the merge was computed from; a difference means SRC changed.
        threads: number of workers.
        advance: called with a number of bytes after each piece, from any thread.

    Attributes:
        failed: whether a GPU failed.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        digester: Callable[[], Digester],
        outputs: PartFiles | None = None,
        patches: Mapping[str, bytes] | None = None,
        originals: Mapping[str, bytes] | None = None,
        threads: int | None = None,
        advance: Callable[[int], None] = lambda n: None,
    ) -> None:
        self.checkpoint = checkpoint
        self.digester = digester
        self.outputs = outputs
        self.patches = patches or {}
        self.originals = originals or {}
        self.threads = threads or default_threads()
        self.advance = advance
        self.failed = False
        self._sources: list[SourceFile] = []
        self._missing: dict[int, int] = {}
        self._done: set[Task] = set()
        self._lock = threading.Lock()

    def run(self, work: Sequence[Task]) -> dict[str, bytes]:
        """Carries out all of `work`; then the outputs are complete, and being flushed.

        A GPU that fails midway is replaced by the CPU, with a warning; the output is the same.

        Returns:
            The 32-byte BLAKE3 digest of each tensor that was to be hashed.

        Raises:
            SourceChanged: a source file became shorter, or a scale changed since it was merged.
            SystemFailure: reading or writing failed.
        """
        digests: dict[str, bytes] = {}
        try:
            for shard in self.checkpoint.shards:
                self._sources.append(open_source(shard))
            if self.outputs is not None:
                self._missing = dict.fromkeys(self.outputs.incomplete(), 0)
                for task in work:
                    for index in task.outs:
                        self._missing[index] += 1
            try:
                self._pass(work, digests)
            except DeviceFailed as error:
                log.warning("the GPU failed (%s); the CPU goes on", error)
                cpu = select("cpu", threads=1)
                self.digester, self.failed = lambda: cpu, True
                # What is done already is only hashed: its file may be complete.
                left = [
                    task
                    for task in work
                    if task not in self._done or any(s.hashed and s.key not in digests for s in task.spans)
                ]
                self._pass(left, digests)
            if self.outputs is not None:
                for index in self.outputs.incomplete():  # those without any tensor
                    self.outputs.complete(index)
            for source in self._sources:
                source.finish()
        finally:
            for source in self._sources:
                source.close()
            self._sources = []
        return digests

    def _completed(self, task: Task) -> None:
        """Enters a task as done; a shard that lacks nothing any more is complete."""
        with self._lock:
            if task in self._done:
                return
            self._done.add(task)
            for index in task.outs:
                self._missing[index] -= 1
                if self._missing[index] == 0 and self.outputs is not None:
                    self.outputs.complete(index)

    def _pass(self, work: Sequence[Task], digests: dict[str, bytes]) -> None:
        """One go at `work` on the present digester; what is known goes into `digests`, also when it fails."""
        stop = threading.Event()
        keys: list[str] = []
        numbered: list[tuple[Task, int]] = []
        for task in work:
            numbered.append((task, len(keys)))
            keys.extend([span.key for span in task.spans])
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="tierewrite")
        with _Lanes(self.digester) as lanes:

            def carry_out(task: Task, number: int) -> None:
                if stop.is_set():
                    return
                stream, buffer = lanes.mine()
                if task.nbytes > BUFFER_BYTES:
                    self._large(task, number, buffer, stream, stop)
                else:
                    self._batch(task, number, buffer, stream)
                if not stop.is_set():
                    self._completed(task)

            found: dict[int, bytes] = {}
            try:
                futures = [pool.submit(carry_out, task, number) for task, number in numbered]
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                for stream in lanes.streams():
                    found.update(stream.finish())
            except DeviceFailed:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                for stream in lanes.streams():
                    found.update(stream.salvage())
                raise
            finally:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                digests.update(zip(map(keys.__getitem__, found), found.values(), strict=True))

    def _batch(self, task: Task, number: int, array: Bytes, stream: Stream) -> None:
        """Tensors that fit into a buffer together: read, hand over for hashing, write meanwhile."""
        buffer = array.data
        steps = _steps(task, number, self.patches if self.outputs is not None else {})
        self._sources[task.shard].read_runs(steps.reads, buffer)
        ticket = stream.update(array, steps.hashed) if steps.hashed else None
        if self.outputs is not None and task not in self._done:
            if ticket is not None and steps.patched:
                ticket.wait()  # the buffer is about to be changed
            self._patch(steps.patched, buffer)
            for out, start, end, position in steps.writes:
                self.outputs.write(out, buffer[start:end], position)
        if ticket is not None:
            ticket.wait()
        self.advance(task.nbytes)

    def _patch(self, patched: Sequence[tuple[str, int, int]], buffer: memoryview) -> None:
        """Puts the merged values in the place of what was read, which has to be what they were merged from."""
        for key, start, end in patched:
            put_patch(key, buffer[start:end], self.patches[key], self.originals)

    def _large(self, task: Task, number: int, array: Bytes, stream: Stream, stop: threading.Event) -> None:
        """One tensor larger than the buffer, piece by piece."""
        (span,) = task.spans
        source = self._sources[task.shard]
        buffer = array.data
        total = span.end - span.start
        for position in range(0, total, BUFFER_BYTES):
            if stop.is_set():
                return
            length = min(BUFFER_BYTES, total - position)
            piece = buffer[:length]
            source.read_runs([(span.start + position, span.start + position + length)], piece)
            ticket = stream.update(array, [(number, 0, length, total, position)]) if span.hashed else None
            if self.outputs is not None and span.out >= 0 and task not in self._done:
                self.outputs.write(span.out, piece, span.position + position)
            if ticket is not None:
                ticket.wait()
            self.advance(length)


class _Lanes:
    """The streams of one pass, one for each digester that came to work, and a buffer for each thread."""

    def __init__(self, digester: Callable[[], Digester]) -> None:
        self._digester = digester
        self._streams: dict[Digester, Stream] = {}
        self._local = threading.local()
        self._lock = threading.Lock()

    def mine(self) -> tuple[Stream, Bytes]:
        """The stream that takes the next task, and this thread's buffer for it. Raises DeviceFailed."""
        digester = self._digester()
        if getattr(self._local, "digester", None) is not digester:
            with self._lock:
                stream = self._streams.get(digester)
                if stream is None:
                    stream = self._streams[digester] = digester.stream(BUFFER_BYTES)
            self._local.buffer = digester.host_buffer(BUFFER_BYTES)
            self._local.stream, self._local.digester = stream, digester
        return self._local.stream, self._local.buffer

    def streams(self) -> list[Stream]:
        return list(self._streams.values())

    def __enter__(self) -> _Lanes:
        return self

    def __exit__(self, *exc: object) -> None:
        for stream in self._streams.values():
            stream.close()


class _Steps(NamedTuple):
    """What is to be done with a task that fits into a buffer.

    Attributes:
        reads: runs of the source (start, end); the buffer holds them one after the other.
        hashed: the tensors whose digests are wanted.
        patched: those whose bytes are replaced: key, start and end in the buffer.
        writes: runs of the buffer: index of the output shard, start, end, and position in that file.
    """

    reads: list[tuple[int, int]]
    hashed: list[Row]
    patched: list[tuple[str, int, int]]
    writes: list[tuple[int, int, int, int]]


def _steps(task: Task, number: int, patches: Collection[str]) -> _Steps:
    """All that the workers need to know of a task, in one loop: while it runs, none of the others gets on.

    Args:
        number: of the first span's tensor, for the digests.
        patches: keys whose bytes are replaced.
    """
    reads: list[tuple[int, int]] = []
    rows: list[Row] = []
    patched: list[tuple[str, int, int]] = []
    writes: list[tuple[int, int, int, int]] = []
    read_start = read_end = task.spans[0].start
    place = run_start = run_position = run_end = 0
    run_out = -1
    for tensor, (key, start, end, hashed, out, position) in enumerate(task.spans, number):
        length = end - start
        if start != read_end:
            reads.append((read_start, read_end))
            read_start = start
        read_end = end
        if hashed:
            rows.append((tensor, place, length, length, 0))
        if out != run_out or (position != run_end and out >= 0):
            if run_out >= 0:
                writes.append((run_out, run_start, place, run_position))
            run_start, run_out, run_position = place, out, position
        if out >= 0:
            run_end = position + length
            if key in patches:
                patched.append((key, place, place + length))
        place += length
    reads.append((read_start, read_end))
    if run_out >= 0:
        writes.append((run_out, run_start, place, run_position))
    return _Steps(reads, rows, patched, writes)


def put_patch(key: str, place: memoryview, patch: bytes, originals: Mapping[str, bytes]) -> None:
    """Puts `patch` in the place of what was read of the tensor `key`.

    Raises:
        SourceChanged: what was read is not what the patch was computed from (`originals`).
    """
    if place != originals.get(key, patch):
        raise SourceChanged(
            "a scale changed while the checkpoint was rewritten; run again when nothing writes to SRC", tensor=key
        )
    place[:] = patch


def default_threads() -> int:
    """Workers enough to overlap reading, hashing and writing on this machine."""
    return max(2, min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2))
