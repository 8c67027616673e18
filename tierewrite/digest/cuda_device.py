"""A CUDA GPU that hashes: the two kernels loaded by CuPy, checked on known bytes, and its memory.

How it is laid out: a job is a byte range with a digest of its own. Two kernels do all jobs of a batch at once:
`chunks` makes one chaining value for each chunk of 1,024 bytes, one thread a chunk; `parents` joins up to 1,024
chaining values of a job in one thread block. Three launches so serve jobs of up to 1 GiB, however many there are.
A tensor cut over buffers is a row of jobs of PIECE bytes; once all are done, `parents` joins their values too.

How fast it can be: a block of 64 bytes takes 448 XORs and rotations on the ALU pipe, 64 lanes a clock and
multiprocessor, which bounds an H100 (132 of them at 1.98 GHz) at 2.4 TB/s; its memory reads 3 TB/s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from tierewrite.digest import DeviceFailed
from tierewrite.digest.cuda_driver import Copies
from tierewrite.digest.kernels import SOURCE
from tierewrite.digest.schedule import FAN, Schedule, Table, joining, schedule, schedule_of
from tierewrite.digest.spans import CHUNK, Bytes, Span, pieces

DIGEST = 32
"""Bytes of a digest, and of a chaining value."""
_THREADS = 128  # a block of either kernel
_PAGE = 4096
_ONE = np.uint32(1)  # a multiplier that the compiler must not know, see the kernels
_RESIDENT_CHUNKS = 4 << 20
"""Chunks (4 GiB) of one batch of data on the GPU: bounds its scratch memory at 128 MiB."""


@contextmanager
def device_work(what: str) -> Iterator[None]:
    """Turns whatever CuPy raises into DeviceFailed; our own complaints about arguments pass."""
    try:
        yield
    except (DeviceFailed, ValueError, TypeError):
        raise
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        raise DeviceFailed(f"{what} failed on the GPU: {text}") from error


def split(digests: npt.NDArray[np.uint8]) -> list[bytes]:
    """32 bytes for each row of uint8 (n, 32)."""
    rows: list[bytes] = np.ascontiguousarray(digests).view(f"V{DIGEST}").ravel().tolist()
    return rows


def pinned(cupy: Any, nbytes: int) -> Bytes:
    """uint8 (nbytes,), page-aligned host memory that GPUs read and write without the CPU. Raises DeviceFailed."""
    with device_work("pinning host memory"):
        memory = cupy.cuda.PinnedMemory(nbytes + _PAGE, cupy.cuda.runtime.hostAllocPortable)
        whole = np.frombuffer(cupy.cuda.PinnedMemoryPointer(memory, 0), np.uint8, nbytes + _PAGE)
        start = -whole.ctypes.data % _PAGE  # the driver aligns to 512 bytes only
        return whole[start : start + nbytes]


class Gpu:
    """One device with the kernels loaded, checked against known digests.

    Attributes:
        copies: to the device.
    """

    def __init__(self, cupy: Any, number: int) -> None:
        self.cupy = cupy
        self.number = number
        with cupy.cuda.Device(number):
            module = cupy.RawModule(code=SOURCE)
            self._chunks = module.get_function("chunks")
            self._parents = module.get_function("parents")
            properties = cupy.cuda.runtime.getDeviceProperties(number)
            self.name = properties["name"].decode()
            self.copies = Copies(number)
            self._pool = cupy.cuda.MemoryPool()  # CuPy's own would keep what we gave back
            self._self_test()

    def room(self, nbytes: int) -> Any:
        """Device memory: an owner with an address, `ptr`. For work on the device while it is current."""
        return self._pool.malloc(nbytes)

    def give_back(self) -> None:
        """Gives memory that nobody owns any more back to the device: others in this process may need it."""
        with suppress(Exception), self.cupy.cuda.Device(self.number):  # a dead device has none
            self._pool.free_all_blocks()

    def launch(self, plan: Schedule, table: int, scratch: int, out: int) -> None:
        """Enqueues a batch on CuPy's current stream. The arguments after the plan are device addresses."""
        u32, u64 = np.uint32, np.uint64
        self._chunks(
            (-(-plan.chunks // _THREADS),),
            (_THREADS,),
            (u64(table), u32(plan.jobs), u64(plan.chunks), u64(scratch), u64(out), _ONE),
        )
        self._join(plan, table, scratch, out)

    def _join(self, plan: Schedule, table: int, values: int, out: int) -> None:
        """Enqueues its levels: of the chaining values of all chunks, behind which there is room for more."""
        u32, u64 = np.uint32, np.uint64
        above = values + DIGEST * plan.chunks
        for level in plan.levels:
            rows = table + 8 * level.row
            self._parents(
                (level.groups,),
                (_THREADS,),
                (u64(rows), u32(level.jobs), u64(values), u64(above), u64(out), _ONE),
            )
            values, above = above, above + DIGEST * level.groups

    def digests(self, address: Table, length: Table) -> npt.NDArray[np.uint8]:
        """uint8 (n, 32): digests of n byte ranges at absolute device addresses, a batch of at most 4 GiB at a time.

        Runs on CuPy's current stream of this device, and waits for it.
        """
        cupy = self.cupy
        n = len(address)
        result = np.empty((n, DIGEST), np.uint8)
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
        scratch = cupy.empty(DIGEST * (plan.chunks + plan.groups), np.uint8)
        out = cupy.empty((plan.jobs, DIGEST), np.uint8)
        self.launch(plan, table.data.ptr, scratch.data.ptr, out.data.ptr)
        return out

    def _giant(self, address: int, length: int) -> bytes:
        """One tensor too large for a batch: subtrees of PIECE bytes, and then their tree."""
        leaves = []
        batch = _RESIDENT_CHUNKS * CHUNK
        for position in range(0, length, batch):
            part = Span(0, address + position, min(batch, length - position), length, position)
            jobs = pieces(np.array([part], np.int64))
            leaves.append(self.cupy.asnumpy(self.resident(schedule_of(jobs, np.zeros(len(jobs), bool)))))
        return self.joined([np.concatenate(leaves)])[0]

    def joined(self, leaves: Sequence[npt.NDArray[np.uint8]]) -> list[bytes]:
        """Digests of tensors that were cut, by the chaining values of their pieces.

        BLAKE3 gives a left child the largest power of two of chunks (specification, section 2.1), so pieces of one
        power of two of them, of which the last may be smaller, are joined as chunks are.

        Runs on CuPy's current stream of this device, and waits for it.

        Args:
            leaves: for each tensor uint8 (n, 32), n >= 2, in order.
        """
        cupy = self.cupy
        plan = joining(np.array([len(values) for values in leaves], np.uint64))
        with cupy.cuda.using_allocator(self._pool.malloc):
            table = cupy.asarray(plan.table)
            values = cupy.empty((plan.chunks + plan.groups, DIGEST), np.uint8)
            values[: plan.chunks] = cupy.asarray(np.concatenate(leaves))
            out = cupy.empty((plan.jobs, DIGEST), np.uint8)
            self._join(plan, table.data.ptr, values.data.ptr, out.data.ptr)
            return split(cupy.asnumpy(out))

    def _self_test(self) -> None:
        lengths = np.array([0, 1, 64, 1025, 5000, CHUNK * FAN + 1], np.uint64)
        data = (np.arange(int(lengths.max()) + 3, dtype=np.uint32) * 2654435761 >> 13).astype(np.uint8)
        here = pinned(self.cupy, len(data))  # copied as a stream's buffers are
        here[:] = data
        there = self.cupy.empty(len(data), np.uint8)
        self.copies.put(there.data.ptr, here.ctypes.data, len(data), self.cupy.cuda.get_current_stream().ptr)
        starts = np.arange(len(lengths), dtype=np.uint64) % np.uint64(4)
        found = self.digests(starts + np.uint64(there.data.ptr), lengths)
        for start, length, digest in zip(starts.tolist(), lengths.tolist(), found, strict=True):
            if digest.tobytes() != blake3(data[start : start + length].data).digest():
                raise DeviceFailed(f"{self.name} computes a wrong digest of {length} known bytes")
