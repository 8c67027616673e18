"""Digests of tensors that arrive buffer by buffer, on CUDA GPUs: copied at once, gathered, hashed many at a time."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tierewrite.digest.cuda_device import DIGEST, Gpu, device_work, pinned, split
from tierewrite.digest.schedule import Schedule, Table, bounds, schedule
from tierewrite.digest.spans import CHUNK, PIECE, Bytes, Columns, Ledger, Row, host_bytes
from tierewrite.digest.tree import combine

_JOBS = 32768
"""Spans that a slot takes at most before it is hashed."""
_SLOTS = 3
"""Slots of a stream on each GPU: one is filled while others are hashed."""
_SLOT = 64 << 20
"""Bytes that a slot gathers before it is hashed: launching costs the same for many as for few."""


@dataclass(frozen=True)
class _Jobs:
    """What the spans of a slot come to: a job for each whole tensor, and one for each PIECE of the others.

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


class _Part(NamedTuple):
    """Spans of a buffer of `size` bytes; with `shift` their starts become addresses on the GPU."""

    spans: Columns
    size: int
    shift: int


@dataclass
class _Slot:
    """A device buffer with all that one submission needs, and what it has gathered for it."""

    gpu: Gpu
    stream: Any
    memory: Any  # owns the device memory; the next four are addresses in it
    data: int
    table: int
    scratch: int
    out: int
    table_here: Table  # pinned
    out_here: Bytes  # pinned
    done: Any
    copied: list[Any] = field(default_factory=list)  # events, one for each part
    filled: int = 0  # bytes
    spans: int = 0
    parts: list[_Part] = field(default_factory=list)

    def event(self) -> Any:
        """One for the next part: made once, and recorded again each time the slot is filled."""
        if len(self.parts) == len(self.copied):
            with self.gpu.cupy.cuda.Device(self.gpu.number):
                self.copied.append(self.gpu.cupy.cuda.Event(disable_timing=True))
        return self.copied[len(self.parts)]


class _Full(NamedTuple):
    """A slot to be hashed, and the spans that it gathered, which start at addresses."""

    slot: _Slot
    spans: Columns


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

    Buffers are copied at once and gathered in a slot on the GPU. Whoever finds it full takes a free one for all, and
    hashes the full one while the others go on. Threads wait for each other only where a copy is put in line, so little
    is done there: the spans' extent is worked out before, and their rules are looked at once for a whole slot.
    """

    def __init__(self, gpus: Sequence[Gpu], buffer_size: int) -> None:
        if buffer_size < PIECE:
            raise ValueError(f"a buffer of {buffer_size} bytes is too small: at least {PIECE} are needed")
        self.buffer_size = buffer_size
        self._room = max(_SLOT, buffer_size + 256)
        self._runtime = gpus[0].cupy.cuda.runtime
        self._ledger = Ledger()
        self._digests: dict[int, bytes] = {}
        self._leaves: dict[int, npt.NDArray[np.uint32]] = {}  # tensor -> chaining values of its pieces
        self._copying = threading.Lock()  # held by who puts a copy in line
        self._filing = threading.Lock()  # held by who enters results
        with device_work("allocating buffers"):
            self._slots = [self._slot(gpu) for _ in range(_SLOTS) for gpu in gpus]
        self._free: SimpleQueue[_Slot] = SimpleQueue()
        for slot in self._slots[1:]:
            self._free.put(slot)
        self._filling = self._slots[0]

    def _slot(self, gpu: Gpu) -> _Slot:
        cupy = gpu.cupy
        most = _JOBS + self._room // PIECE  # the pieces of large tensors come on top of one job for each span
        words, values = bounds(most, self._room)
        sizes = [-(-n // 256) * 256 for n in (self._room, 8 * words, DIGEST * values, DIGEST * most)]
        with cupy.cuda.Device(gpu.number):
            memory = cupy.cuda.alloc(sum(sizes))
            data, table, scratch, out = (memory.ptr + sum(sizes[:i]) for i in range(4))
            return _Slot(
                gpu=gpu,
                stream=cupy.cuda.Stream(non_blocking=True),
                memory=memory,
                data=data,
                table=table,
                scratch=scratch,
                out=out,
                table_here=pinned(cupy, 8 * words).view(np.uint64),
                out_here=pinned(cupy, DIGEST * most),
                done=cupy.cuda.Event(disable_timing=True),
            )

    def update(self, buffer: Bytes, spans: Sequence[Row] | Columns) -> Copied:
        """See `Stream`. A broken rule may be found later only, when the slot is hashed."""
        view = host_bytes(buffer)
        if len(view) > self.buffer_size:
            raise ValueError(f"a buffer of {len(view)} bytes: this stream takes up to {self.buffer_size}")
        columns = np.asarray(spans, np.int64).reshape(-1, 5)
        if len(columns) > _JOBS:
            columns = columns[np.argsort(columns[:, 1], kind="stable")]  # so that each part copies its own bytes only
        return Copied([self._gather(view, columns[at : at + _JOBS]) for at in range(0, len(columns), _JOBS)])

    def _gather(self, view: Bytes, spans: Columns) -> Any:
        """Enqueues the copy of the spans' bytes into a slot with room; the event returned marks its end."""
        starts = spans[:, 1]
        low, high = int(starts.min()), int((starts + spans[:, 2]).max())
        if low < 0 or high > len(view):
            self._ledger.take(spans, len(view))  # says which
        low = low // 256 * 256  # keeps every alignment as it was
        source, full = view.ctypes.data + low, None
        # a copy may be put into the stream of another device than the current one, an event may not (CUDA programming
        # guide, "Stream and event behavior"): they are made with their slot's device current, and recorded wherever
        with self._copying, device_work("copying"):
            slot = self._filling
            if slot.filled + high - low > self._room or slot.spans + len(spans) > _JOBS:
                full, slot = self._next(), self._filling
            address = slot.data + slot.filled
            if high > low:
                to_device = self._runtime.memcpyHostToDevice
                self._runtime.memcpyAsync(address, source, high - low, to_device, slot.stream.ptr)
            copied = slot.event()
            copied.record(slot.stream)
            slot.parts.append(_Part(spans, len(view), address - low))
            slot.spans += len(spans)
            slot.filled += -(-(high - low) // 256) * 256
        if full is not None:
            self._hash(full)
        return copied

    def _next(self) -> _Full:
        """Lets go of the slot that was filled, in exchange for a free one; its spans are entered, in their order."""
        slot, self._filling = self._filling, self._free.get()
        parts, slot.parts, slot.spans, slot.filled = slot.parts, [], 0, 0
        spans = np.concatenate([part.spans for part in parts])
        counts = [len(part.spans) for part in parts]
        try:
            self._ledger.take(spans, np.repeat([part.size for part in parts], counts))
        except ValueError:
            self._free.put(slot)
            raise
        spans[:, 1] += np.repeat([part.shift for part in parts], counts)
        return _Full(slot, spans)

    def _hash(self, full: _Full) -> None:
        """Hashes what a slot has gathered, files the results, and sets it free whatever happens."""
        try:
            jobs = _Jobs.of(full.spans)
            with device_work("hashing"):
                self._run(full.slot, jobs.schedule())
            with self._filing:
                self._file(jobs, full.slot.out_here)
        finally:
            self._free.put(full.slot)

    def _run(self, slot: _Slot, plan: Schedule) -> None:
        """Carries out a plan on a slot; its results are in `out_here` afterwards."""
        slot.table_here[: len(plan.table)] = plan.table
        runtime, queue = self._runtime, slot.stream.ptr
        with slot.gpu.cupy.cuda.Device(slot.gpu.number), slot.stream:
            here = slot.table_here.ctypes.data
            runtime.memcpyAsync(slot.table, here, plan.table.nbytes, runtime.memcpyHostToDevice, queue)
            slot.gpu.launch(plan, slot.table, slot.scratch, slot.out)
            here = slot.out_here.ctypes.data
            runtime.memcpyAsync(here, slot.out, DIGEST * plan.jobs, runtime.memcpyDeviceToHost, queue)
            slot.done.record(slot.stream)
        slot.done.synchronize()

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
        if self._filling.parts:
            self._hash(self._next())
        with self._filing, device_work("hashing"):
            self._ledger.close()
            self._digests.update(zip(self._leaves, combine(list(self._leaves.values())), strict=True))
            self._leaves.clear()
            return self._digests

    def salvage(self) -> dict[int, bytes]:
        """See `Stream`."""
        return dict(self._digests)

    def close(self) -> None:
        """See `Stream`."""
        for slot in self._slots:
            with suppress(Exception):  # a dead device's memory is gone either way
                slot.stream.synchronize()  # the memory must outlive the work on it
        self._slots.clear()
        self._leaves.clear()

    def __enter__(self) -> CudaStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
