"""BLAKE3 on CUDA GPUs, by CuPy: the same digests as `cpu`, for any length and any alignment.

How it is laid out: a job is a byte range with a digest of its own. Two kernels do all jobs of a batch at once:
`chunks` makes one chaining value for each chunk of 1,024 bytes, one thread a chunk; `parents` joins up to 1,024
chaining values of a job in one thread block. Three launches so serve jobs of up to 1 GiB, however many there are.
A tensor cut over buffers is a row of jobs of PIECE bytes whose values `tree.combine` joins on the host.

How fast it can be: a block of 64 bytes takes 448 XORs and rotations on the ALU pipe, 64 lanes a clock and
multiprocessor, which bounds an H100 (132 of them at 1.98 GHz) at 2.4 TB/s; its memory reads 3 TB/s.

Refuses: devices that fail a self-test, and non-contiguous device arrays (ValueError; a copy would not be ours to
make). Every failure of CuPy, driver or device becomes DeviceFailed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from tierewrite.digest import DeviceFailed
from tierewrite.digest.kernels import SOURCE
from tierewrite.digest.schedule import FAN, Schedule, Table, bounds, schedule
from tierewrite.digest.spans import CHUNK, PIECE, Bytes, Columns, Ledger, Row, host_bytes, layout
from tierewrite.digest.tree import combine

_THREADS = 128  # a block of either kernel
_DIGEST = 32
_PAGE = 4096
_JOBS = 32768
"""Jobs that a stream's slot takes at most before it is hashed."""
_SLOT = 32 << 20
"""Bytes that a stream gathers on the GPU before it hashes them: launching costs the same for many as for few."""
_RESIDENT_CHUNKS = 4 << 20
"""Chunks (4 GiB) of one batch of data on the GPU: bounds its scratch memory at 128 MiB."""
_STAGE = 16 << 20
"""Bytes of each buffer through which host data go that were not handed over in a stream."""


@contextmanager
def _device_work(what: str) -> Iterator[None]:
    """Turns whatever CuPy raises into DeviceFailed; our own complaints about arguments pass."""
    try:
        yield
    except (DeviceFailed, ValueError, TypeError):
        raise
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        raise DeviceFailed(f"{what} failed on the GPU: {text}") from error


def _leaf_jobs(start: int, length: int, position: int) -> tuple[list[int], list[int], list[int]]:
    """Starts, lengths and chunk counters of the PIECE-sized jobs of a piece that begins at byte `position`."""
    offsets = range(0, length, PIECE)
    return (
        [start + at for at in offsets],
        [min(PIECE, length - at) for at in offsets],
        [(position + at) // CHUNK for at in offsets],
    )


def _split(digests: npt.NDArray[np.uint8]) -> list[bytes]:
    raw = digests.tobytes()
    return [raw[at : at + _DIGEST] for at in range(0, len(raw), _DIGEST)]


class _Gpu:
    """One device with the kernels loaded, checked against known digests."""

    def __init__(self, cupy: Any, number: int) -> None:
        self.cupy = cupy
        self.number = number
        with cupy.cuda.Device(number):
            module = cupy.RawModule(code=SOURCE)
            self._chunks = module.get_function("chunks")
            self._parents = module.get_function("parents")
            properties = cupy.cuda.runtime.getDeviceProperties(number)
            self.name = properties["name"].decode()
            self._self_test()

    def launch(self, plan: Schedule, table: int, scratch: int, out: int) -> None:
        """Enqueues a batch on CuPy's current stream. The arguments after the plan are device addresses."""
        u32, u64 = np.uint32, np.uint64
        one = u32(1)  # a multiplier that the compiler must not know, see the kernels
        values = scratch
        self._chunks(
            (-(-plan.chunks // _THREADS),),
            (_THREADS,),
            (u64(table), u32(plan.jobs), u64(plan.chunks), u64(values), u64(out), one),
        )
        above = scratch + _DIGEST * plan.chunks
        for level in plan.levels:
            rows = table + 8 * level.row
            self._parents(
                (level.groups,),
                (_THREADS,),
                (u64(rows), u32(level.jobs), u64(values), u64(above), u64(out), one),
            )
            values, above = above, above + _DIGEST * level.groups

    def digests(self, address: Table, length: Table) -> npt.NDArray[np.uint8]:
        """uint8 (n, 32): digests of n byte ranges at absolute device addresses, a batch of at most 4 GiB at a time.

        Runs on CuPy's current stream of this device, and waits for it.
        """
        cupy = self.cupy
        n = len(address)
        result = np.empty((n, _DIGEST), np.uint8)
        batches: list[tuple[slice, Any]] = []
        giant = length > np.uint64(_RESIDENT_CHUNKS * CHUNK)
        chunks = np.cumsum(length // np.uint64(CHUNK) + np.uint64(1))
        at = 0
        while at < n:
            if giant[at]:
                result[at] = np.frombuffer(self._giant(int(address[at]), int(length[at])), np.uint8)
                at += 1
                continue
            before = int(chunks[at - 1]) if at else 0
            end = max(at + 1, int(np.searchsorted(chunks, before + _RESIDENT_CHUNKS, side="right")))
            if giant[at:end].any():
                end = at + int(giant[at:end].argmax())
            some = slice(at, end)
            zeros = np.zeros(end - at, np.uint64)
            plan = schedule(address[some], length[some], zeros, np.ones(end - at, bool))
            batches.append((some, self.resident(plan)))
            at = end
        for some, out in batches:
            result[some] = cupy.asnumpy(out)
        return result

    def resident(self, plan: Schedule) -> Any:
        """CuPy uint8 (jobs, 32): runs a plan of absolute addresses on the current stream, without waiting."""
        cupy = self.cupy
        table = cupy.asarray(plan.table)
        scratch = cupy.empty(_DIGEST * (plan.chunks + plan.groups), np.uint8)
        out = cupy.empty((plan.jobs, _DIGEST), np.uint8)
        self.launch(plan, table.data.ptr, scratch.data.ptr, out.data.ptr)
        return out

    def _giant(self, address: int, length: int) -> bytes:
        """One tensor too large for a batch: subtrees of PIECE bytes, joined on the host."""
        leaves = []
        batch = _RESIDENT_CHUNKS * CHUNK
        for position in range(0, length, batch):
            columns = _leaf_jobs(address + position, min(batch, length - position), position)
            starts, lengths, counters = (np.array(column, np.uint64) for column in columns)
            plan = schedule(starts, lengths, counters, np.zeros(len(starts), bool))
            leaves.append(self.cupy.asnumpy(self.resident(plan)).view("<u4"))
        return combine([np.concatenate(leaves)])[0]

    def _self_test(self) -> None:
        lengths = np.array([0, 1, 64, 1025, 5000, CHUNK * FAN + 1], np.uint64)
        data = (np.arange(int(lengths.max()) + 3, dtype=np.uint32) * 2654435761 >> 13).astype(np.uint8)
        there = self.cupy.asarray(data)
        starts = np.arange(len(lengths), dtype=np.uint64) % np.uint64(4)
        found = self.digests(starts + np.uint64(there.data.ptr), lengths)
        for start, length, digest in zip(starts.tolist(), lengths.tolist(), found, strict=True):
            if digest.tobytes() != blake3(data[start : start + length].data).digest():
                raise DeviceFailed(f"{self.name} computes a wrong digest of {length} known bytes")


class CudaDigester:
    """BLAKE3 on all CUDA GPUs that work; see `tierewrite.digest.Digester`.

    Args:
        devices: CUDA device numbers to use; None takes all that pass a self-test.

    Raises:
        DeviceFailed: CuPy is missing, there is no device, or none passes.
    """

    device = "cuda"

    def __init__(self, devices: Sequence[int] | None = None) -> None:
        try:
            import cupy
        except ModuleNotFoundError as error:
            raise DeviceFailed(f"no {error.name} is installed; pip install 'tierewrite[cuda13]' brings CuPy") from error
        except Exception as error:  # a CuPy without its CUDA libraries raises much else than ImportError
            raise DeviceFailed(f"CuPy does not import: {error}") from error
        self._cupy = cupy
        with _device_work("counting devices"):
            numbers = range(cupy.cuda.runtime.getDeviceCount()) if devices is None else devices
        if not numbers:
            raise DeviceFailed("there is no CUDA device")
        self.gpus: list[_Gpu] = []
        failed: DeviceFailed | None = None
        for number in numbers:
            try:
                with _device_work(f"preparing device {number}"):
                    self.gpus.append(_Gpu(cupy, number))
            except DeviceFailed as error:
                failed = error
        if not self.gpus:
            assert failed is not None
            raise failed
        names = [gpu.name for gpu in self.gpus]
        counted = [f"{names.count(name)} x {name}" if names.count(name) > 1 else name for name in dict.fromkeys(names)]
        self.description = f"{', '.join(counted)} (CuPy {cupy.__version__})"

    def digest(self, data: object) -> bytes:
        """See `Digester`."""
        return self.digest_arrays([data])[0]

    def digest_many(self, data: object, spans: Iterable[tuple[int, int]]) -> list[bytes]:
        """See `Digester`."""
        ranges = np.array(spans if isinstance(spans, np.ndarray) else list(spans), dtype=np.int64).reshape(-1, 2)
        there = self._on_device(data)
        flat = host_bytes(data) if there is None else there
        size = flat.nbytes
        wrong = (ranges < 0).any(axis=1) | (ranges.sum(axis=1) > size)
        if wrong.any():
            start, length = ranges[wrong.argmax()].tolist()
            raise ValueError(f"bytes {start} to {start + length} leave a buffer of {size} bytes")
        if there is None:
            return self._through_host([flat[start : start + length] for start, length in ranges.tolist()])
        with _device_work("hashing"), self._cupy.cuda.Device(there.device.id):
            unsigned = ranges.astype(np.uint64)
            address = unsigned[:, 0] + np.uint64(there.data.ptr)
            return _split(self._gpu(there.device.id).digests(address, np.ascontiguousarray(unsigned[:, 1])))

    def digest_arrays(self, arrays: Iterable[object]) -> list[bytes]:
        """See `Digester`."""
        items = list(arrays)
        digests: list[bytes] = [b""] * len(items)
        arrays_there = [self._on_device(item) for item in items]
        there = {i: array for i, array in enumerate(arrays_there) if array is not None}
        here = [i for i, array in enumerate(arrays_there) if array is None]
        for i, digest in zip(here, self._through_host([host_bytes(items[i]) for i in here]), strict=True):
            digests[i] = digest
        for number in {array.device.id for array in there.values()}:
            mine = [i for i, array in there.items() if array.device.id == number]
            with _device_work("hashing"), self._cupy.cuda.Device(number):
                address = np.array([there[i].data.ptr if there[i].nbytes else 0 for i in mine], np.uint64)
                length = np.array([there[i].nbytes for i in mine], np.uint64)
                for i, digest in zip(mine, _split(self._gpu(number).digests(address, length)), strict=True):
                    digests[i] = digest
        return digests

    def host_buffer(self, nbytes: int) -> Bytes:
        """See `Digester`."""
        with _device_work("pinning host memory"):
            runtime = self._cupy.cuda.runtime
            memory = self._cupy.cuda.PinnedMemory(nbytes + _PAGE, runtime.hostAllocPortable)
            whole = np.frombuffer(self._cupy.cuda.PinnedMemoryPointer(memory, 0), np.uint8, nbytes + _PAGE)
            start = -whole.ctypes.data % _PAGE  # the driver aligns to 512 bytes only
            return whole[start : start + nbytes]

    def stream(self, buffer_size: int) -> CudaStream:
        """See `Digester`."""
        return CudaStream(self, buffer_size)

    def _gpu(self, number: int) -> _Gpu:
        for gpu in self.gpus:
            if gpu.number == number:
                return gpu
        raise ValueError(f"the array lives on device {number}, which this digester does not use")

    def _on_device(self, data: object) -> Any | None:
        """A flat uint8 CuPy view of data on a GPU, ordered after the work that makes them; None for host data."""
        cupy = self._cupy
        if type(data).__module__.partition(".")[0] == "torch":
            import torch

            assert isinstance(data, torch.Tensor)
            if data.device.type != "cuda":
                return None
            if not data.is_contiguous():
                raise ValueError("the tensor on the GPU is not contiguous: call .contiguous() on it")
            # through uint8, for which every dtype has a view; DLPack makes our stream wait for torch's
            with cupy.cuda.Device(data.device.index):
                return cupy.from_dlpack(data.detach().reshape(-1).view(torch.uint8))
        if isinstance(data, cupy.ndarray) or hasattr(data, "__cuda_array_interface__"):
            array = cupy.asarray(data)
        elif not isinstance(data, np.ndarray) and hasattr(data, "__dlpack_device__"):
            if data.__dlpack_device__()[0] != 2:  # kDLCUDA of dlpack.h
                return None
            array = cupy.from_dlpack(data)
        else:
            return None
        if not array.flags.c_contiguous:
            raise ValueError("the array on the GPU is not contiguous in row-major order: copy it first")
        return array.reshape(-1).view(np.uint8)

    def _through_host(self, views: Sequence[Bytes]) -> list[bytes]:
        if not views:
            return []
        with self.stream(_STAGE) as stream:
            stages = [self.host_buffer(_STAGE) for _ in range(2)]
            tickets: list[_Copied | None] = [None, None]
            for turn, spans in enumerate(layout([len(view) for view in views], _STAGE)):
                stage, ticket = stages[turn % 2], tickets[turn % 2]
                if ticket is not None:
                    ticket.wait()
                for span in spans:
                    part = views[span.tensor][span.position : span.position + span.length]
                    stage[span.start : span.start + span.length] = part
                tickets[turn % 2] = stream.update(stage, spans)
            digests = stream.finish()
        return [digests[i] for i in range(len(views))]


@dataclass
class _Slot:
    """A device buffer with all that one submission needs, and the submission under way."""

    gpu: _Gpu
    stream: Any
    memory: Any  # owns the device memory; the next four are addresses in it
    data: int
    table: int
    scratch: int
    out: int
    table_here: Table  # pinned
    out_here: Bytes  # pinned
    done: Any
    filled: int = 0  # bytes
    # gathered, not yet hashed: (tensor, its leaf or -1, address, length, counter of the first chunk)
    jobs: list[Row] = field(default_factory=list)
    under_way: Columns | None = None  # the jobs being hashed


class _Copied:
    """The ticket of a buffer on its way to the GPU."""

    def __init__(self, events: list[Any]) -> None:
        self._events = events

    def wait(self) -> None:
        with _device_work("copying"):
            for event in self._events:
                event.synchronize()


class CudaStream:
    """Digests of tensors that arrive buffer by buffer; see `tierewrite.digest.Stream`.

    Buffers are copied at once and gathered in a slot on the GPU; a full slot is hashed in one go. Each GPU has two
    slots, so that one is filled while the other is hashed.
    """

    def __init__(self, digester: CudaDigester, buffer_size: int) -> None:
        if buffer_size < PIECE:
            raise ValueError(f"a buffer of {buffer_size} bytes is too small: at least {PIECE} are needed")
        self.buffer_size = buffer_size
        self._room = max(_SLOT, buffer_size + 256)
        self._digester = digester
        self._ledger = Ledger()
        self._digests: dict[int, bytes] = {}
        self._leaves: dict[int, npt.NDArray[np.uint32]] = {}  # tensor -> chaining values of its pieces
        self._lock = threading.Lock()
        self._turn = 0
        self._slots: list[_Slot] = []
        with _device_work("allocating buffers"):
            for _ in range(2):
                self._slots += [self._slot(gpu) for gpu in digester.gpus]

    def _slot(self, gpu: _Gpu) -> _Slot:
        cupy = gpu.cupy
        words, values = bounds(_JOBS, self._room)
        sizes = [-(-n // 256) * 256 for n in (self._room, 8 * words, _DIGEST * values, _DIGEST * _JOBS)]
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
                table_here=self._digester.host_buffer(8 * words).view(np.uint64),
                out_here=self._digester.host_buffer(_DIGEST * _JOBS),
                done=cupy.cuda.Event(disable_timing=True),
            )

    def update(self, buffer: Bytes, spans: Sequence[Row] | Columns) -> _Copied:
        """See `Stream`."""
        view = host_bytes(buffer)
        if len(view) > self.buffer_size:
            raise ValueError(f"a buffer of {len(view)} bytes: this stream takes up to {self.buffer_size}")
        with self._lock, _device_work("hashing"):
            whole, pieces = self._ledger.take(spans, len(view))
            jobs = [(tensor, -1, start, length, 0) for tensor, start, length, _, _ in whole]
            for tensor, start, length, total, position in pieces:
                if position == 0:
                    self._leaves[tensor] = np.zeros((-(-total // PIECE), 8), np.uint32)
                starts, lengths, counters = _leaf_jobs(start, length, position)
                first = position // PIECE
                jobs += zip([tensor] * len(starts), range(first, first + len(starts)), starts, lengths, counters)  # noqa: B905
            if len(jobs) > _JOBS:
                jobs.sort(key=itemgetter(2))  # so that each part copies its own bytes only
            return _Copied([self._gather(view, jobs[at : at + _JOBS]) for at in range(0, len(jobs), _JOBS)])

    def _gather(self, view: Bytes, jobs: list[Row]) -> Any:
        """Enqueues the copy of the jobs' bytes into a slot with room; the event returned marks its end."""
        low = min([job[2] for job in jobs]) // 256 * 256  # keeps every alignment as it was
        high = max([job[2] + job[3] for job in jobs])
        slot = self._slots[self._turn]
        if slot.filled + high - low > self._room or len(slot.jobs) + len(jobs) > _JOBS:
            self._hash(slot)
            self._turn = (self._turn + 1) % len(self._slots)
            slot = self._slots[self._turn]
            self._collect(slot)
        cupy = self._digester._cupy
        with cupy.cuda.Device(slot.gpu.number):
            copied = cupy.cuda.Event(disable_timing=True)
            if high > low:
                runtime = cupy.cuda.runtime
                target, source = slot.data + slot.filled, view.ctypes.data + low
                runtime.memcpyAsync(target, source, high - low, runtime.memcpyHostToDevice, slot.stream.ptr)
            copied.record(slot.stream)
        shift = slot.data + slot.filled - low
        slot.jobs += [(tensor, leaf, start + shift, length, counter) for tensor, leaf, start, length, counter in jobs]
        slot.filled += -(-(high - low) // 256) * 256
        return copied

    def _hash(self, slot: _Slot) -> None:
        """Enqueues the kernels for all that a slot has gathered, and the copy of the results back."""
        if not slot.jobs:
            return
        jobs = np.array(slot.jobs, np.int64)
        address, length, counter = (np.ascontiguousarray(jobs[:, i]).view(np.uint64) for i in (2, 3, 4))
        plan = schedule(address, length, counter, jobs[:, 1] < 0)
        slot.table_here[: len(plan.table)] = plan.table
        cupy = self._digester._cupy
        runtime, queue = cupy.cuda.runtime, slot.stream.ptr
        with cupy.cuda.Device(slot.gpu.number), slot.stream:
            here = slot.table_here.ctypes.data
            runtime.memcpyAsync(slot.table, here, plan.table.nbytes, runtime.memcpyHostToDevice, queue)
            slot.gpu.launch(plan, slot.table, slot.scratch, slot.out)
            here = slot.out_here.ctypes.data
            runtime.memcpyAsync(here, slot.out, _DIGEST * plan.jobs, runtime.memcpyDeviceToHost, queue)
            slot.done.record(slot.stream)
        slot.under_way, slot.jobs, slot.filled = jobs, [], 0

    def _collect(self, slot: _Slot) -> None:
        """Waits for what a slot is hashing, if anything, and files the results."""
        if slot.under_way is None:
            return
        slot.done.synchronize()
        raw = slot.out_here[: _DIGEST * len(slot.under_way)].tobytes()
        words = np.frombuffer(raw, "<u4").reshape(-1, 8)
        for i, (tensor, leaf) in enumerate(slot.under_way[:, :2].tolist()):
            if leaf < 0:
                self._digests[tensor] = raw[_DIGEST * i : _DIGEST * (i + 1)]
            else:
                self._leaves[tensor][leaf] = words[i]
        slot.under_way = None

    def finish(self) -> dict[int, bytes]:
        """See `Stream`."""
        with self._lock, _device_work("hashing"):
            self._ledger.close()
            self._hash(self._slots[self._turn])
            for slot in self._slots:
                self._collect(slot)
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
