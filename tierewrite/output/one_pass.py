"""Moving bytes: each byte that matters is read once, hashed and written from the same buffer.

Any worker can carry out any task, in any order, with the same result: the work says where every byte goes. Memory is
bounded by the number of workers, each of which has one buffer at a time, whatever the size of the checkpoint.
"""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from tierewrite.digest import DeviceFailed, Digester, Stream, select
from tierewrite.output.buffers import Buffer, Buffers
from tierewrite.output.files import PartFiles
from tierewrite.output.result import BUFFER_BYTES, Result
from tierewrite.output.work import AnyTask, CopyTask, MadeTask, Task, Work
from tierewrite.source.bytes import open_source
from tierewrite.source.threads import io_threads
from tierewrite.stores.base import SourceFile
from tierewrite.values.content import COPY, Maker

log = logging.getLogger(__name__)


class Transfer:
    """Carries out a pass with a fixed number of workers and buffers.

    Args:
        work: what to do; the source's shards are opened read-only.
        digester: gives where hashing happens, for the next task: it may change while tasks are carried out.
        outputs: the output shards to write, by number, headers included. Each is flushed once it is complete; whoever
            made them waits for that.
        threads: number of workers.
        advance: called with a number of bytes after each piece, from any thread.

    Attributes:
        failed: whether a GPU failed.
    """

    def __init__(
        self,
        work: Work,
        digester: Callable[[], Digester],
        outputs: PartFiles | None = None,
        threads: int | None = None,
        advance: Callable[[int], None] = lambda n: None,
    ) -> None:
        self.work = work
        self.digester = digester
        self.outputs = outputs
        self.threads = threads or io_threads()
        self.advance = advance
        self.failed = False
        self._sources: list[SourceFile] = []
        self._missing: dict[int, int] = {}
        self._done: set[AnyTask] = set()
        self._lock = threading.Lock()
        self._digests: dict[int, bytes] = {}  # by row
        self._result = Result()

    def run(self) -> Result:
        """Carries out all of the work; then the outputs are complete, and being flushed.

        A GPU that fails midway is replaced by the CPU, with a warning; the output is the same.

        Raises:
            SourceChanged: a source file became shorter, or a scale changed since it was merged.
            SystemFailure: reading or writing failed.
        """
        try:
            for shard in self.work.checkpoint.shards:
                self._sources.append(open_source(shard))
            if self.outputs is not None:
                self._missing = dict.fromkeys(self.outputs.incomplete(), 0)
                for task in self.work.tasks:
                    for index in task.outs:
                        self._missing[index] += 1
            try:
                self._pass(self.work.tasks)
            except DeviceFailed as error:
                log.warning("the GPU failed (%s); the CPU goes on", error)
                traceback.clear_frames(error.__traceback__)  # they hold buffers: pinned memory
                cpu = select("cpu", threads=1)
                self.digester, self.failed = lambda: cpu, True
                self._pass([task for task in self.work.tasks if self._is_left(task)])
            if self.outputs is not None:
                for index in self.outputs.incomplete():  # those without any tensor
                    self.outputs.complete(index)
            for source in self._sources:
                source.finish()
        finally:
            for source in self._sources:
                source.close()
            self._sources = []
        names = self.work.checkpoint.tensors.names
        self._result.digests = dict(zip(map(names.__getitem__, self._digests), self._digests.values(), strict=True))
        return self._result

    def _is_left(self, task: AnyTask) -> bool:
        """Whether a task has to be carried out again; if it is done it only lacks digests: its file may be complete."""
        if task not in self._done or not isinstance(task, Task):
            return task not in self._done
        columns = self.work.columns
        rows = columns.row[task.first : task.stop][columns.hashed[task.first : task.stop]]
        return any(row not in self._digests for row in rows.tolist())

    def _completed(self, task: AnyTask) -> None:
        """Enters a task as done; a shard that lacks nothing any more is complete."""
        with self._lock:
            if task in self._done:
                return
            self._done.add(task)
            for index in task.outs:
                self._missing[index] -= 1
                if self._missing[index] == 0 and self.outputs is not None:
                    self.outputs.complete(index)

    def _pass(self, work: Sequence[AnyTask]) -> None:
        """One go at `work` on the present digester; the digests that are known are kept, also when it fails."""
        stop = threading.Event()
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="tierewrite")
        with _Lanes(self.digester, self.threads) as lanes:

            def one(task: AnyTask) -> None:
                if stop.is_set():
                    return
                stream, buffers = lanes.now()
                if not isinstance(task, (MadeTask, CopyTask)) and task.nbytes > BUFFER_BYTES:
                    self._large(task, buffers, stream, stop)
                else:
                    with buffers.one() as buffer:
                        if isinstance(task, MadeTask):
                            self._make(task, buffer.array.data, stop)
                        elif isinstance(task, CopyTask):
                            self._copy(task, buffer.array.data, stop)
                        else:
                            self._batch(task, buffer, stream)
                if not stop.is_set():
                    self._completed(task)

            try:
                done, _ = wait([pool.submit(one, task) for task in work], return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                for stream in lanes.streams():
                    self._digests.update(stream.finish())
            except DeviceFailed:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                for stream in lanes.streams():
                    self._digests.update(stream.salvage())
                raise
            finally:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)

    def _batch(self, task: Task, buffer: Buffer, stream: Stream) -> None:
        """Tensors that fit into a buffer together: read, hand over for hashing, write meanwhile."""
        data = buffer.array.data
        steps = self.work.steps(task)
        self._sources[task.shard].read_runs(steps.reads, data)
        if len(steps.hashed):
            buffer.ticket = stream.update(buffer.array[: task.nbytes], steps.hashed)
        if self.outputs is not None and task not in self._done:
            if steps.patched:
                buffer.wait()
            for name, content, start, end in steps.patched:
                maker = Maker(content)
                maker.fill(data[start:end])
                self._result.made[name] = maker.made()
            for out, start, end, position in steps.writes:
                self.outputs.write(out, data[start:end], position)
        self.advance(task.nbytes)

    def _large(self, task: Task, buffers: Buffers, stream: Stream, stop: threading.Event) -> None:
        """One tensor larger than a buffer, piece by piece."""
        row, start, end, hashed, out, place = (column[task.first].item() for column in self.work.columns)
        writes = self.outputs is not None and out >= 0 and task not in self._done
        name, content = self.work.patch(row) or ("", COPY)
        maker = Maker(content) if content is not COPY and writes else None
        total = end - start
        for position in range(0, total, BUFFER_BYTES):
            if stop.is_set():
                return
            length = min(BUFFER_BYTES, total - position)
            with buffers.one() as buffer:
                piece = buffer.array.data[:length]
                self._sources[task.shard].read_runs([(start + position, start + position + length)], piece)
                if hashed:
                    buffer.ticket = stream.update(buffer.array[:length], [(row, 0, length, total, position)])
                if maker is not None:
                    buffer.wait()
                    maker.fill(piece)
                if writes and self.outputs is not None:
                    self.outputs.write(out, piece, place + position)
            self.advance(length)
        if maker is not None:
            self._result.made[name] = maker.made()

    def _copy(self, task: CopyTask, buffer: memoryview, stop: threading.Event) -> None:
        """A range that is not hashed, piece by piece: copied by the kernel, or read and written where it does not.

        On one local disk that takes half to two thirds of the time: each byte moves once and not twice (ext4, Linux
        6.18). What is hashed lies in a buffer already, and is written from there.
        """
        assert self.outputs is not None
        source = self._sources[task.shard]
        for start in range(task.start, task.end, BUFFER_BYTES):
            if stop.is_set():
                return
            end = min(task.end, start + BUFFER_BYTES)
            position = start - task.start + task.position
            copied = self.outputs.take(task.out, source, start, end, position)
            if not copied:
                piece = buffer[: end - start]
                source.read_runs([(start, end)], piece)
                self.outputs.write(task.out, piece, position)
            with self._lock:
                self._result.copied += copied
            self.advance(end - start)

    def _make(self, task: MadeTask, buffer: memoryview, stop: threading.Event) -> None:
        """One tensor that is made without the source's bytes of that range, piece by piece."""
        maker = Maker(task.content)
        for position in range(0, task.nbytes, BUFFER_BYTES):
            if stop.is_set():
                return
            piece = buffer[: min(BUFFER_BYTES, task.nbytes - position)]
            maker.fill(piece)
            if self.outputs is not None:
                self.outputs.write(task.out, piece, task.position + position)
            self.advance(len(piece))
        self._result.made[task.name] = maker.made()


class _Lanes:
    """The streams of one pass, one for each digester that came to work, and the buffers that go through each."""

    def __init__(self, digester: Callable[[], Digester], workers: int) -> None:
        self._digester = digester
        self._workers = workers
        self._lanes: dict[Digester, tuple[Stream, Buffers]] = {}
        self._lock = threading.Lock()

    def now(self) -> tuple[Stream, Buffers]:
        """The stream that takes the next task, and the buffers for it. Raises DeviceFailed."""
        digester = self._digester()
        with self._lock:
            if digester not in self._lanes:
                self._lanes[digester] = digester.stream(BUFFER_BYTES), Buffers(digester, self._workers)
            return self._lanes[digester]

    def streams(self) -> list[Stream]:
        return [stream for stream, _ in self._lanes.values()]

    def __enter__(self) -> _Lanes:
        return self

    def __exit__(self, *exc: object) -> None:
        for stream in self.streams():
            stream.close()
        self._lanes.clear()
