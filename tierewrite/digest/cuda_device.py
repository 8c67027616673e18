"""A CUDA GPU that hashes: the two kernels loaded by CuPy, checked on known bytes, and its memory.

How it is laid out: a job is a byte range with a digest of its own. Two kernels do all jobs of a batch at once:
`chunks` makes one chaining value for each chunk of 1,024 bytes, one thread a chunk; `parents` joins up to 1,024
chaining values of a job in one thread block. Three launches so serve jobs of up to 1 GiB, however many there are.
A tensor cut over buffers is a row of jobs of PIECE bytes whose values `tree.combine` joins on the host.

How fast it can be: a block of 64 bytes takes 448 XORs and rotations on the ALU pipe, 64 lanes a clock and
multiprocessor, which bounds an H100 (132 of them at 1.98 GHz) at 2.4 TB/s; its memory reads 3 TB/s.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from tierewrite.digest import DeviceFailed
from tierewrite.digest.cuda_driver import Copies
from tierewrite.digest.kernels import SOURCE
from tierewrite.digest.schedule import FAN, Schedule, Table, schedule
from tierewrite.digest.spans import CHUNK, PIECE, Bytes
from tierewrite.digest.tree import combine

DIGEST = 32
"""Bytes of a digest, and of a chaining value."""
_THREADS = 128  # a block of either kernel
_PAGE = 4096
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


def _leaf_jobs(start: int, length: int, position: int) -> tuple[list[int], list[int], list[int]]:
    """Starts, lengths and chunk counters of the PIECE-sized jobs of a piece that begins at byte `position`."""
    offsets = range(0, length, PIECE)
    return (
        [start + at for at in offsets],
        [min(PIECE, length - at) for at in offsets],
        [(position + at) // CHUNK for at in offsets],
    )


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
        one = u32(1)  # a multiplier that the compiler must not know, see the kernels
        values = scratch
        self._chunks(
            (-(-plan.chunks // _THREADS),),
            (_THREADS,),
            (u64(table), u32(plan.jobs), u64(plan.chunks), u64(values), u64(out), one),
        )
        above = scratch + DIGEST * plan.chunks
        for level in plan.levels:
            rows = table + 8 * level.row
            self._parents(
                (level.groups,),
                (_THREADS,),
                (u64(rows), u32(level.jobs), u64(values), u64(above), u64(out), one),
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
        here = pinned(self.cupy, len(data))  # copied as a stream's buffers are
        here[:] = data
        there = self.cupy.empty(len(data), np.uint8)
        self.copies.put(there.data.ptr, here.ctypes.data, len(data), self.cupy.cuda.get_current_stream().ptr)
        starts = np.arange(len(lengths), dtype=np.uint64) % np.uint64(4)
        found = self.digests(starts + np.uint64(there.data.ptr), lengths)
        for start, length, digest in zip(starts.tolist(), lengths.tolist(), found, strict=True):
            if digest.tobytes() != blake3(data[start : start + length].data).digest():
                raise DeviceFailed(f"{self.name} computes a wrong digest of {length} known bytes")
