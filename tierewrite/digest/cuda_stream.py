"""Digests of tensors that arrive buffer by buffer, on CUDA GPUs: copied at once, hashed many buffers at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from tierewrite.digest.cuda_device import DIGEST, Gpu, device_work, pinned, split
from tierewrite.digest.schedule import Schedule, Table, bounds, schedule
from tierewrite.digest.spans import CHUNK, PIECE, Bytes, Columns, Ledger, Row, checked, host_bytes
from tierewrite.digest.tree import combine

_JOBS = 32768
"""Spans of a batch at most."""
_BATCH = 16
"""Buffers that are hashed together: launching costs the same for many as for few."""
_CELLS = 3 * _BATCH
"""Buffers that each GPU has room for: while a batch is hashed, others are gathered and on their way."""
_DESKS = 3
"""Batches that each GPU hashes at once."""

T = TypeVar("T")


@dataclass(frozen=True)
class _Jobs:
    """What the spans of a batch come to: a job for each whole tensor, and one for each PIECE of the others.

    Attributes:
        spans: int64 (n, 5), as `Span`; they start at device addresses.
        first: int64 (n,), the first job of each span.
        count: int64 (n,), its jobs.
    """

    spans: Columns
    first: Columns
    count: Columns

    @classmethod
    def of(cls, spans: Columns) -> _Jobs:
        length, total = spans[:, 2], spans[:, 3]
        count = np.where(length == total, 1, -(-length // PIECE))
        return cls(spans, np.cumsum(count) - count, count)

    def schedule(self) -> Schedule:
        """The launches that do them."""
        _, start, length, total, position = self.spans.T
        span = np.repeat(np.arange(len(self.spans)), self.count)
        past = (np.arange(len(span)) - self.first[span]) * PIECE
        whole = (length == total)[span]
        lengths = np.where(whole, length[span], np.minimum(PIECE, length[span] - past))
        address, counter = start[span] + past, (position[span] + past) // CHUNK
        return schedule(address.astype(np.uint64), lengths.astype(np.uint64), counter.astype(np.uint64), whole)


class _Pool(Generic[T]):
    """Things that are lent out, made when they are first needed, and up to a number."""

    def __init__(self, make: Callable[[int], T], most: int) -> None:
        self._make = make
        self._most = most
        self._made = 0
        self._making = threading.Lock()
        self._free: SimpleQueue[T] = SimpleQueue()

    def take(self) -> T:
        """One that nobody has; waits until there is one."""
        with suppress(Empty):
            return self._free.get_nowait()
        with self._making:
            if self._made < self._most:
                made = self._make(self._made)
                self._made += 1
                return made
        return self._free.get()

    def give(self, thing: T) -> None:
        """Takes it back."""
        self._free.put(thing)

    def clear(self) -> None:
        """Lets go of all that are here, and makes no more."""
        self._most = 0
        with suppress(Empty):
            while True:
                self._free.get_nowait()


@dataclass(eq=False)
class _Cell:
    """Room for one buffer on a GPU."""

    owner: _Share
    memory: Any  # owns the device memory
    address: int
    stream: Any  # of its copies
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
    memory: Any  # owns the device memory; the next three are addresses in it
    table: int
    scratch: int
    out: int
    table_here: Table  # pinned
    out_here: Bytes  # pinned

    def run(self, plan: Schedule, cells: Sequence[_Cell]) -> None:
        """Carries out a plan once what the cells hold has arrived; then its results are in `out_here`."""
        self.table_here[: len(plan.table)] = plan.table
        runtime, queue = self.gpu.cupy.cuda.runtime, self.stream.ptr
        with self.gpu.cupy.cuda.Device(self.gpu.number), self.stream:
            try:
                for cell in cells:
                    self.stream.wait_event(cell.copied)
                here = self.table_here.ctypes.data
                runtime.memcpyAsync(self.table, here, plan.table.nbytes, runtime.memcpyHostToDevice, queue)
                self.gpu.launch(plan, self.table, self.scratch, self.out)
                here = self.out_here.ctypes.data
                runtime.memcpyAsync(here, self.out, DIGEST * plan.jobs, runtime.memcpyDeviceToHost, queue)
            finally:
                self.stream.synchronize()  # also after a failure: the memory must outlive the work on it


@dataclass(eq=False)
class _Share:
    """What one GPU does of a stream: the parts that it was given and that are not hashed yet."""

    gpu: Gpu
    desks: _Pool[_Desk]
    parts: list[_Part] = field(default_factory=list)
    spans: int = 0

    def add(self, part: _Part) -> list[_Part]:
        """One more; the parts that came before it, if they are a batch."""
        full: list[_Part] = []
        if len(self.parts) == _BATCH or self.spans + len(part.spans) > _JOBS:
            full = self.rest()
        self.parts.append(part)
        self.spans += len(part.spans)
        return full

    def rest(self) -> list[_Part]:
        """All parts; then there are none."""
        parts, self.parts, self.spans = self.parts, [], 0
        return parts


class Copied:
    """The ticket of a buffer on its way to the GPU."""

    def __init__(self, events: list[Any]) -> None:
        self._events = events

    def wait(self) -> None:
        """See `Ticket`."""
        with device_work("copying"):
            for event in self._events:
                event.synchronize()


class CudaStream:
    """Digests of tensors that arrive buffer by buffer; see `tierewrite.digest.Stream`.

    Each buffer is copied at once, to a cell of its own. Whoever finds that a batch is full hashes it, while the others
    go on. Of a buffer only what must be is done when it arrives: with eight threads the interpreter's lock takes longer
    to get back than most calls take.
    """

    def __init__(self, gpus: Sequence[Gpu], buffer_size: int) -> None:
        if buffer_size < PIECE:
            raise ValueError(f"a buffer of {buffer_size} bytes is too small: at least {PIECE} are needed")
        self.buffer_size = buffer_size
        self._runtime = gpus[0].cupy.cuda.runtime
        self._ledger = Ledger()
        self._digests: dict[int, bytes] = {}
        self._leaves: dict[int, npt.NDArray[np.uint32]] = {}  # tensor -> chaining values of its pieces
        self._gathering = threading.Lock()  # held by who adds to a batch
        self._filing = threading.Lock()  # held by who enters results
        self._shares = [_Share(gpu, _Pool(partial(self._desk, gpu), _DESKS)) for gpu in gpus]
        self._cells = _Pool(self._cell, _CELLS * len(gpus))
        self._copying: list[Any] = []  # streams

    def _cell(self, number: int) -> _Cell:
        """One on each GPU in turn."""
        share = self._shares[number % len(self._shares)]
        cuda = share.gpu.cupy.cuda
        with device_work("allocating buffers"), cuda.Device(share.gpu.number):
            memory = cuda.alloc(self.buffer_size)
            stream = cuda.Stream(non_blocking=True)
            self._copying.append(stream)
            return _Cell(share, memory, memory.ptr, stream, cuda.Event(disable_timing=True))

    def _desk(self, gpu: Gpu, number: int) -> _Desk:
        cupy, room = gpu.cupy, _BATCH * self.buffer_size
        most = _JOBS + room // PIECE  # the pieces of large tensors come on top of one job for each span
        words, values = bounds(most, room)
        sizes = [-(-n // 256) * 256 for n in (8 * words, DIGEST * values, DIGEST * most)]
        with device_work("allocating buffers"), cupy.cuda.Device(gpu.number):
            memory = cupy.cuda.alloc(sum(sizes))
            table, scratch, out = (memory.ptr + sum(sizes[:i]) for i in range(3))
            return _Desk(
                gpu=gpu,
                stream=cupy.cuda.Stream(non_blocking=True),
                memory=memory,
                table=table,
                scratch=scratch,
                out=out,
                table_here=pinned(cupy, 8 * words).view(np.uint64),
                out_here=pinned(cupy, DIGEST * most),
            )

    def update(self, buffer: Bytes, spans: Sequence[Row] | Columns) -> Copied:
        """See `Stream`. A broken rule may be found later only, when the batch is hashed or at the end."""
        view = host_bytes(buffer)
        if len(view) > self.buffer_size:
            raise ValueError(f"a buffer of {len(view)} bytes: this stream takes up to {self.buffer_size}")
        columns = np.asarray(spans, np.int64).reshape(-1, 5)
        return Copied([self._copy(view, columns[at : at + _JOBS]) for at in range(0, len(columns), _JOBS)])

    def _copy(self, view: Bytes, spans: Columns) -> Any:
        """Puts a copy in line, and hashes a batch if one is full; the event returned marks the copy's end."""
        cell = self._cells.take()
        # a copy may be put into the stream of another device than the current one, an event may not (CUDA programming
        # guide, "Stream and event behavior"): it is made with its device current, and recorded wherever
        with device_work("copying"):
            if len(view):
                to_device = self._runtime.memcpyHostToDevice
                self._runtime.memcpyAsync(cell.address, view.ctypes.data, len(view), to_device, cell.stream.ptr)
            cell.copied.record(cell.stream)
        with self._gathering:
            self._ledger.enter(spans)
            full = cell.owner.add(_Part(cell, len(view), spans))
        if full:
            self._hash(cell.owner, full)
        return cell.copied

    def _hash(self, share: _Share, batch: Sequence[_Part]) -> None:
        """Hashes a batch, files the results, and sets what it used free whatever happens."""
        desk = share.desks.take()
        try:
            counts = [len(part.spans) for part in batch]
            spans = np.concatenate([part.spans for part in batch])
            checked(spans, np.repeat([part.size for part in batch], counts))
            spans[:, 1] += np.repeat([part.cell.address for part in batch], counts)
            jobs = _Jobs.of(spans)
            with device_work("hashing"):
                desk.run(jobs.schedule(), [part.cell for part in batch])
            with self._filing:
                self._file(jobs, desk.out_here)
        finally:
            share.desks.give(desk)
            for part in batch:
                self._cells.give(part.cell)

    def _file(self, jobs: _Jobs, out: Bytes) -> None:
        """Enters the results of jobs: digests of whole tensors, chaining values of pieces."""
        tensor, _, length, total, position = jobs.spans.T
        found = out[: DIGEST * int(jobs.count.sum())].reshape(-1, DIGEST)
        whole = length == total
        self._digests.update(zip(tensor[whole].tolist(), split(found[jobs.first[whole]]), strict=True))
        words = found.view("<u4")
        for i in np.flatnonzero(~whole).tolist():
            leaf, job, count = int(position[i]) // PIECE, int(jobs.first[i]), int(jobs.count[i])
            if int(tensor[i]) not in self._leaves:
                self._leaves[int(tensor[i])] = np.zeros((-(-int(total[i]) // PIECE), 8), np.uint32)
            self._leaves[int(tensor[i])][leaf : leaf + count] = words[job : job + count]

    def finish(self) -> dict[int, bytes]:
        """See `Stream`."""
        for share in self._shares:
            if share.parts:
                self._hash(share, share.rest())
        self._ledger.close()
        with self._filing:
            self._digests.update(zip(self._leaves, combine(list(self._leaves.values())), strict=True))
            self._leaves.clear()
            return self._digests

    def salvage(self) -> dict[int, bytes]:
        """See `Stream`."""
        return dict(self._digests)

    def close(self) -> None:
        """See `Stream`."""
        for stream in self._copying:
            with suppress(Exception):  # a dead device's memory is gone either way
                stream.synchronize()  # the memory must outlive the work on it
        self._copying.clear()
        self._cells.clear()
        self._shares.clear()
        self._leaves.clear()

    def __enter__(self) -> CudaStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
