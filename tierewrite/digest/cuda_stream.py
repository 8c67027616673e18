"""Digests of tensors that arrive buffer by buffer, on CUDA GPUs: copied at once, hashed many buffers at a time."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tierewrite.digest import DeviceFailed
from tierewrite.digest.cuda_device import DIGEST, Gpu, device_work, pinned, split
from tierewrite.digest.schedule import Schedule, Table, bounds, schedule_of
from tierewrite.digest.spans import PIECE, Bytes, Columns, Ledger, Row, checked, host_bytes, pieces

_JOBS = 32768
"""Spans of a batch at most."""
_BATCH = 32
"""Buffers that are hashed together: planning and launching cost the same for many as for few."""
_GROUP = 8
"""Cells that are made at once: each allocation takes a while."""
_GROUPS = 2 * _BATCH // _GROUP + 2
"""Groups on each GPU: while a batch is hashed, the next is gathered, and some buffers are on their way."""


@dataclass(frozen=True)
class _Jobs:
    """What the spans of a batch come to: a job for each whole tensor, then one for each PIECE of the others.

    Attributes:
        whole: int64 (n, 5), as `Span`, at device addresses.
        pieces: int64 (m, 5), likewise; at most PIECE bytes each.
    """

    whole: Columns
    pieces: Columns

    @classmethod
    def of(cls, spans: Columns) -> _Jobs:
        cut = spans[:, 2] != spans[:, 3]
        return cls(spans[~cut], pieces(spans[cut])) if cut.any() else cls(spans, spans[:0])

    def schedule(self) -> Schedule:
        """The launches that do them."""
        jobs = np.concatenate([self.whole, self.pieces])
        return schedule_of(jobs, np.arange(len(jobs)) < len(self.whole))


class _Cells:
    """Room for buffers on the GPUs: lent out, made in groups when it is first needed, and up to a number of groups."""

    def __init__(self, make: Callable[[int], list[_Cell]], groups: int) -> None:
        self._make = make
        self._groups = groups
        self._made = 0
        self._making = threading.Lock()
        self._free: SimpleQueue[_Cell | None] = SimpleQueue()  # None: there will be no more

    def take(self) -> _Cell:
        """One that nobody has; waits until there is one. Raises ValueError once they are cleared."""
        with suppress(Empty):
            return self._or_closed(self._free.get_nowait())
        with self._making:
            with suppress(Empty):  # while this thread waited, another one made some
                return self._or_closed(self._free.get_nowait())
            if self._made < self._groups:
                group = self._make(self._made)
                self._made += 1
                for cell in group[1:]:
                    self._free.put(cell)
                return group[0]
        return self._or_closed(self._free.get())

    def _or_closed(self, cell: _Cell | None) -> _Cell:
        if cell is None:
            self._free.put(None)  # for the next one who waits
            raise ValueError("the stream is closed")
        return cell

    def give(self, cell: _Cell) -> None:
        """Takes it back."""
        self._free.put(cell)

    def clear(self) -> None:
        """Lets go of all that are here, and makes no more; whoever waits for one waits no longer."""
        self._groups = 0
        with suppress(Empty):
            while True:
                self._free.get_nowait()
        self._free.put(None)


@dataclass(eq=False)
class _Cell:
    """Room for one buffer on a GPU."""

    share: _Share
    memory: Any  # owns the device memory of its group
    address: int
    copied: Any  # an event


class _Part(NamedTuple):
    """A buffer of `size` bytes that is on its way to a cell, and its spans."""

    cell: _Cell
    size: int
    spans: Columns


@dataclass(eq=False)
class _Desk:
    """What hashing a batch takes beside its data."""

    gpu: Gpu
    stream: Any
    copied: Any  # an event
    memory: Any  # owns the device memory; the next three are addresses in it
    table: int
    scratch: int
    out: int
    table_here: Table  # pinned
    out_here: Bytes  # pinned

    @classmethod
    def on(cls, gpu: Gpu, buffer_size: int) -> _Desk:
        """One on a GPU. Raises DeviceFailed."""
        cupy, room = gpu.cupy, _BATCH * buffer_size
        most = _JOBS + room // PIECE  # the pieces of large tensors come on top of one job for each span
        words, values = bounds(most, room)
        sizes = [-(-n // 256) * 256 for n in (8 * words, DIGEST * values, DIGEST * most)]
        with device_work("allocating buffers"), cupy.cuda.Device(gpu.number):
            memory = gpu.room(sum(sizes))
            table, scratch, out = (memory.ptr + sum(sizes[:i]) for i in range(3))
            return cls(
                gpu=gpu,
                stream=cupy.cuda.Stream(non_blocking=True),
                copied=cupy.cuda.Event(disable_timing=True),
                memory=memory,
                table=table,
                scratch=scratch,
                out=out,
                table_here=pinned(cupy, 8 * words).view(np.uint64),
                out_here=pinned(cupy, DIGEST * most),
            )

    def run(self, plan: Schedule, copying: Any) -> None:
        """Carries out a plan once all that `copying` was given has arrived; then its results are in `out_here`."""
        self.table_here[: len(plan.table)] = plan.table
        runtime, queue = self.gpu.cupy.cuda.runtime, self.stream.ptr
        with device_work("hashing"), self.gpu.cupy.cuda.Device(self.gpu.number), self.stream:
            try:
                self.copied.record(copying)
                self.stream.wait_event(self.copied)
                here = self.table_here.ctypes.data
                runtime.memcpyAsync(self.table, here, plan.table.nbytes, runtime.memcpyHostToDevice, queue)
                self.gpu.launch(plan, self.table, self.scratch, self.out)
                here = self.out_here.ctypes.data
                runtime.memcpyAsync(here, self.out, DIGEST * plan.jobs, runtime.memcpyDeviceToHost, queue)
            finally:
                self.stream.synchronize()  # also after a failure: the memory must outlive the work on it


class _Share:
    """What one GPU does of a stream: a queue of copies, the parts that are not hashed yet, and a thread that hashes."""

    def __init__(self, gpu: Gpu, buffer_size: int) -> None:
        self.gpu = gpu
        with device_work("preparing a queue"), gpu.cupy.cuda.Device(gpu.number):
            self.copying = gpu.cupy.cuda.Stream(non_blocking=True)
        self.hashing = ThreadPoolExecutor(1, thread_name_prefix="tierewrite-hash")
        self._buffer_size = buffer_size
        self._parts: list[_Part] = []
        self._spans = 0

    @cached_property
    def desk(self) -> _Desk:
        """For the thread that hashes. Raises DeviceFailed."""
        return _Desk.on(self.gpu, self._buffer_size)

    def add(self, part: _Part) -> list[_Part]:
        """One more; the parts that came before it, if they are a batch."""
        full: list[_Part] = []
        if len(self._parts) == _BATCH or self._spans + len(part.spans) > _JOBS:
            full = self.rest()
        self._parts.append(part)
        self._spans += len(part.spans)
        return full

    def rest(self) -> list[_Part]:
        """All parts; then there are none."""
        parts, self._parts, self._spans = self._parts, [], 0
        return parts

    def close(self) -> None:
        """Waits for all that is under way, and lets go of what it has."""
        self.hashing.shutdown()
        with suppress(Exception):  # a dead device's memory is gone either way
            self.copying.synchronize()  # the memory must outlive the work on it
        self.rest()
        self.__dict__.pop("desk", None)


class Copied:
    """The ticket of a buffer on its way to the GPU."""

    def __init__(self, events: list[Any]) -> None:
        self.events = events

    def done(self) -> bool:
        """See `Ticket`."""
        return all(event.done for event in self.events)

    def wait(self) -> None:
        """See `Ticket`."""
        with device_work("copying"):
            for event in self.events:
                if not event.done:  # asking keeps the interpreter's lock, waiting does not
                    event.synchronize()


class CudaStream:
    """Digests of tensors that arrive buffer by buffer; see `tierewrite.digest.Stream`.

    Each buffer is copied at once, to a cell of its own; of each GPU a thread of the stream's hashes many together.
    Whoever hands over a buffer so does little: while many threads ask for the interpreter's lock, each call after
    which one has to get it back costs more than the call.
    """

    def __init__(self, gpus: Sequence[Gpu], buffer_size: int) -> None:
        if buffer_size < PIECE:
            raise ValueError(f"a buffer of {buffer_size} bytes is too small: at least {PIECE} are needed")
        self.buffer_size = buffer_size
        self._ledger = Ledger()
        self._digests: dict[int, bytes] = {}
        self._leaves: dict[int, npt.NDArray[np.uint8]] = {}  # tensor -> chaining values of its pieces, (n, 32)
        self._gathering = threading.Lock()  # held by who adds to a batch
        self._filing = threading.Lock()  # held by who enters results
        self._failure: Exception | None = None  # the first one of hashing
        self._shares = [_Share(gpu, buffer_size) for gpu in gpus]
        self._cells = _Cells(self._group, _GROUPS * len(gpus))

    def _group(self, number: int) -> list[_Cell]:
        """Cells, on each GPU in turn."""
        share = self._shares[number % len(self._shares)]
        gpu, size = share.gpu, self.buffer_size
        with device_work("allocating buffers"), gpu.cupy.cuda.Device(gpu.number):
            memory = gpu.room(_GROUP * size)
            events = [gpu.cupy.cuda.Event(disable_timing=True) for _ in range(_GROUP)]
            return [_Cell(share, memory, memory.ptr + i * size, event) for i, event in enumerate(events)]

    def update(self, buffer: Bytes, spans: Sequence[Row] | Columns) -> Copied:
        """See `Stream`. A rule that was broken may be told by a later call only, or at the end."""
        view = host_bytes(buffer)
        if len(view) > self.buffer_size:
            raise ValueError(f"a buffer of {len(view)} bytes: this stream takes up to {self.buffer_size}")
        columns = np.asarray(spans, np.int64).reshape(-1, 5)
        copied = Copied([])
        try:
            for at in range(0, len(columns), _JOBS):
                copied.events.append(self._copy(view, columns[at : at + _JOBS]))
        except BaseException:
            with suppress(DeviceFailed):  # whoever gets no ticket may change the buffer at once
                copied.wait()
            raise
        return copied

    def _copy(self, view: Bytes, spans: Columns) -> Any:
        """Puts a copy in line, and a batch that is full; the event returned marks the copy's end."""
        self._raise_failure()
        cell = self._cells.take()
        share = cell.share
        try:
            # an event is made with its device current, and recorded wherever (CUDA programming guide, "Stream and event
            # behavior")
            with device_work("copying"):
                if len(view):
                    share.gpu.copies.put(cell.address, view.ctypes.data, len(view), share.copying.ptr)
                cell.copied.record(share.copying)
        except BaseException:
            self._cells.give(cell)
            raise
        with self._gathering:
            self._ledger.enter(spans)
            full = share.add(_Part(cell, len(view), spans))
        if full:
            share.hashing.submit(self._hash, share, full)
        return cell.copied

    def _hash(self, share: _Share, batch: list[_Part]) -> None:
        """Hashes a batch and files the results; whatever happens, its cells are free again. Never raises."""
        try:
            if batch and self._failure is None:
                counts = [len(part.spans) for part in batch]
                spans = np.concatenate([part.spans for part in batch])
                checked(spans, np.repeat([part.size for part in batch], counts))
                spans[:, 1] += np.repeat([part.cell.address for part in batch], counts)
                jobs = _Jobs.of(spans)
                desk = share.desk
                desk.run(jobs.schedule(), share.copying)
                with self._filing:
                    self._file(jobs, desk.out_here)
        except Exception as error:
            self._failure = self._failure or error
        finally:
            for part in batch:
                self._cells.give(part.cell)
            batch.clear()  # a failure remembers who called, and with what

    def _raise_failure(self) -> None:
        """What hashing failed of, in whatever thread asks."""
        if self._failure is not None:
            raise self._failure

    def _file(self, jobs: _Jobs, out: Bytes) -> None:
        """Enters the results of jobs: digests of whole tensors, chaining values of pieces."""
        n, m = len(jobs.whole), len(jobs.pieces)
        found = out[: DIGEST * (n + m)].reshape(-1, DIGEST)
        self._digests.update(zip(jobs.whole[:, 0].tolist(), split(found[:n]), strict=True))
        if m:
            tensor, total, leaf = jobs.pieces[:, 0], jobs.pieces[:, 3], jobs.pieces[:, 4] // PIECE
            for one in np.unique(tensor).tolist():
                mine = tensor == one
                if one not in self._leaves:
                    self._leaves[one] = np.zeros((-(-int(total[mine.argmax()]) // PIECE), DIGEST), np.uint8)
                self._leaves[one][leaf[mine]] = found[n:][mine]

    def finish(self) -> dict[int, bytes]:
        """See `Stream`."""
        for last in [share.hashing.submit(self._hash, share, share.rest()) for share in self._shares]:
            last.result()
        self._raise_failure()
        self._ledger.close()
        with self._filing:
            if self._leaves:
                gpu = self._shares[0].gpu
                with device_work("hashing"), gpu.cupy.cuda.Device(gpu.number):
                    joined = gpu.joined(list(self._leaves.values()))
                self._digests.update(zip(self._leaves, joined, strict=True))
                self._leaves.clear()
            return self._digests

    def salvage(self) -> dict[int, bytes]:
        """See `Stream`."""
        with self._filing:
            return dict(self._digests)

    def close(self) -> None:
        """See `Stream`."""
        for share in self._shares:
            share.close()
        if self._failure is not None:  # what was at work when it failed holds the last batch's memory
            traceback.clear_frames(self._failure.__traceback__)
        self._cells.clear()
        for share in self._shares:
            share.gpu.give_back()
        self._shares.clear()
        self._leaves.clear()

    def __enter__(self) -> CudaStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
