"""The stream of CUDA GPUs on a device made of NumPy: who copies, who hashes and who waits, without a GPU.

Its memory is the host's, a copy is done when it is asked for (or late), and a launch carries out the schedule.
Whether the kernels are right is tested on a GPU (test_digest.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
import time
import types
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3

import tierewrite
from tests.checkpoints import digests, right_answer
from tests.test_digest import joined, subtree
from tierewrite import digest
from tierewrite.digest import DeviceFailed, Span, cuda_stream
from tierewrite.digest.cuda_driver import Copies
from tierewrite.digest.cuda_stream import CudaStream
from tierewrite.digest.schedule import Schedule
from tierewrite.output.buffers import Buffers
from tierewrite.output.one_pass import Transfer
from tierewrite.output.work import work_of
from tierewrite.planning.plan import OutShard, OutTensor
from tierewrite.source.folder import open_folder
from tierewrite.values.content import Patch

MIB = 1 << 20


class NumpyGpu:
    """What `CudaStream` asks of a `Gpu`, with arrays in place of the device's memory."""

    number = 0

    def __init__(self, before_copy: Callable[[], object], before_launch: Callable[[], object]) -> None:
        def copy(target: int, source: int, nbytes: int, stream: int) -> None:
            before_copy()
            ctypes.memmove(target, source, nbytes)

        def copy_of_tables(target: int, source: int, nbytes: int, kind: int, stream: int) -> None:
            ctypes.memmove(target, source, nbytes)

        event = types.SimpleNamespace(record=lambda stream: None, synchronize=lambda: None, done=True)
        self._before_launch = before_launch
        cuda: dict[str, Any] = {
            "runtime": types.SimpleNamespace(
                memcpyAsync=copy_of_tables, memcpyHostToDevice=1, memcpyDeviceToHost=2, hostAllocPortable=1
            ),
            "Device": lambda number: contextlib.nullcontext(),
            "Stream": lambda **options: _Queue(),
            "Event": lambda **options: event,
            "PinnedMemory": lambda nbytes, flags: np.zeros(nbytes, np.uint8),
            "PinnedMemoryPointer": lambda memory, start: memory,
        }
        self.cupy = types.SimpleNamespace(cuda=types.SimpleNamespace(**cuda))
        self.copies = types.SimpleNamespace(put=copy)
        self.lent: weakref.WeakSet[Any] = weakref.WeakSet()
        self.left: list[int] = []  # at each giving back, how many still had an owner

    def room(self, nbytes: int) -> Any:
        owner = _Memory(nbytes)
        self.lent.add(owner)
        return owner

    def give_back(self) -> None:
        self.left.append(len(self.lent))

    def launch(self, plan: Schedule, table: int, scratch: int, out: int) -> None:
        self._before_launch()
        n = plan.jobs
        jobs = np.frombuffer((ctypes.c_uint64 * (4 * n)).from_address(table), np.uint64).reshape(4, n)
        results = (ctypes.c_char * (32 * n)).from_address(out)
        for i, (start, length, _, tag) in enumerate(jobs.T.tolist()):
            data = ctypes.string_at(start, length)
            counter, root = tag & ~(1 << 63), bool(tag >> 63)
            results[32 * i : 32 * i + 32] = blake3(data).digest() if root else subtree(data, counter)

    def joined(self, leaves: list[Any]) -> list[bytes]:
        return [joined([value.tobytes() for value in values]) for values in leaves]


class _Memory:
    def __init__(self, nbytes: int) -> None:
        self.array = np.zeros(nbytes, np.uint8)
        self.ptr = self.array.ctypes.data


class _Queue:
    ptr = 0

    def __enter__(self) -> _Queue:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def synchronize(self) -> None:
        pass


class LateGpu(NumpyGpu):
    """One that does everything late: when somebody waits for it, and a part before, as chance has it.

    What changes bytes before their copy, or takes results before they are there, gets wrong digests.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(lambda: None, lambda: None)
        self.lock = threading.RLock()
        self.queues: list[_LateQueue] = []
        self.current = threading.local()
        self._random = np.random.default_rng(seed)
        cuda = self.cupy.cuda
        cuda.Stream = lambda **options: _LateQueue(self)
        cuda.Event = lambda **options: _LateEvent(self)
        cuda.runtime.memcpyAsync = lambda target, source, nbytes, kind, stream: self._copy(
            target, source, nbytes, stream
        )
        self.copies.put = self._copy

    def _copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self.queues[stream].put(functools.partial(ctypes.memmove, target, source, nbytes))

    def launch(self, plan: Schedule, table: int, scratch: int, out: int) -> None:
        self.current.queue.put(functools.partial(super().launch, plan, table, scratch, out))

    def some(self) -> None:
        """Does some of what waits, in any of the queues."""
        while self._random.random() < 0.4:
            if (queue := self.queues[int(self._random.integers(len(self.queues)))]).works:
                queue.works.popleft()()


class _LateQueue:
    """Work in its order."""

    def __init__(self, gpu: LateGpu) -> None:
        self.gpu, self.ptr = gpu, len(gpu.queues)
        self.works: deque[Callable[[], object]] = deque()
        gpu.queues.append(self)

    def __enter__(self) -> _LateQueue:
        self.gpu.current.queue = self
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def put(self, work: Callable[[], object]) -> None:
        with self.gpu.lock:
            self.works.append(work)
            self.gpu.some()

    def wait_event(self, event: _LateEvent) -> None:
        self.put(event.end())

    def synchronize(self) -> None:
        with self.gpu.lock:
            while self.works:
                self.works.popleft()()


class _LateEvent:
    """A place in a queue: that of the last `record`."""

    def __init__(self, gpu: LateGpu) -> None:
        self.gpu = gpu
        self._reached = threading.Event()
        self._reached.set()
        self._queue: _LateQueue | None = None

    def record(self, queue: _LateQueue) -> None:
        with self.gpu.lock:
            self._queue, self._reached = queue, threading.Event()
            queue.put(self._reached.set)

    @property
    def done(self) -> bool:
        with self.gpu.lock:
            self.gpu.some()
            return self._reached.is_set()

    def end(self) -> Callable[[], None]:
        """Gets to that place, also if the event is recorded again meanwhile."""
        with self.gpu.lock:
            queue, reached = self._queue, self._reached

        def run() -> None:
            with self.gpu.lock:
                while queue is not None and not reached.is_set():
                    queue.works.popleft()()

        return run

    def synchronize(self) -> None:
        self.end()()


def stream_on(*gpus: NumpyGpu, buffer_size: int = MIB, batch: int = 4, monkeypatch: pytest.MonkeyPatch) -> CudaStream:
    monkeypatch.setattr(cuda_stream, "_BATCH", batch)
    monkeypatch.setattr(cuda_stream, "_GROUP", 4)
    monkeypatch.setattr(cuda_stream, "_GROUPS", batch // 2 + 2)
    return CudaStream(gpus, buffer_size)  # type: ignore[arg-type]


def a_moment(seed: int) -> Callable[[], None]:
    """Mostly nothing, now and then a while: other threads come in between."""
    random, lock = np.random.default_rng(seed), threading.Lock()

    def wait() -> None:
        with lock:
            seconds = float(random.choice([0, 0, 1e-5, 1e-4, 1e-3]))
        time.sleep(seconds)

    return wait


class Crew:
    """Threads of which each hands over buffers of its own, with tensors of many sizes, and waits for each ticket."""

    def __init__(self, stream: CudaStream, turns: int) -> None:
        self.stream, self.turns = stream, turns
        self.expected: dict[int, bytes] = {}
        self._lock = threading.Lock()

    def work(self, number: int) -> None:
        random = np.random.default_rng(number)
        buffer = np.empty(MIB, np.uint8)
        for turn in range(self.turns):
            buffer[:] = np.frombuffer(random.bytes(MIB), np.uint8)
            ends = np.sort(random.integers(0, MIB, int(random.integers(1, 60))))
            spans = []
            for i, (start, end) in enumerate(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)):
                tensor = (number * self.turns + turn) * 100 + i
                spans.append(Span(tensor, start, end - start, end - start, 0))
                with self._lock:
                    self.expected[tensor] = blake3(buffer[start:end].tobytes()).digest()
            ticket = self.stream.update(buffer, spans)
            ticket.wait()
            buffer[:] = 0  # its bytes are not needed any more

    def run(self, threads: int = 8) -> list[BaseException]:
        """What the threads raised. Fails if one of them hangs."""
        with ThreadPoolExecutor(threads) as pool:
            done = [pool.submit(self.work, i) for i in range(threads)]
            return [error for future in done if (error := future.exception(timeout=60)) is not None]


@pytest.mark.parametrize("gpus", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_many_threads_give_the_digests_of_every_tensor(seed: int, gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [NumpyGpu(a_moment(seed), a_moment(seed + 10)) for _ in range(gpus)]
    with stream_on(*devices, monkeypatch=monkeypatch) as stream:
        crew = Crew(stream, turns=20)
        assert crew.run() == []
        assert stream.finish() == crew.expected
    assert [device.left for device in devices] == [[0]] * gpus


@pytest.mark.parametrize("gpus", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_bytes_are_copied_late_and_results_come_late(seed: int, gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [LateGpu(seed + i) for i in range(gpus)]
    with stream_on(*devices, monkeypatch=monkeypatch) as stream:
        crew = Crew(stream, turns=10)
        assert crew.run() == []
        assert stream.finish() == crew.expected
    assert [device.left for device in devices] == [[0]] * gpus


def test_who_waits_for_a_cell_of_a_closed_stream_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a second Ctrl-C, while the workers of a pass end, leaves no thread for which the interpreter waits forever."""
    begun, go_on = threading.Event(), threading.Event()

    def launch() -> None:
        begun.set()
        go_on.wait(60)

    stream = stream_on(NumpyGpu(lambda: None, launch), batch=4, monkeypatch=monkeypatch)
    buffer = np.zeros(MIB, np.uint8)

    def work() -> None:
        with contextlib.suppress(ValueError, RuntimeError):  # what a thread pool says that takes no more
            for turn in range(60):  # more than there are cells
                stream.update(buffer, [(turn, 0, 8, 8, 0)])

    working = [threading.Thread(target=work, daemon=True) for _ in range(3)]
    for thread in working:
        thread.start()
    assert begun.wait(60)
    monkeypatch.setattr(stream, "_hash", lambda share, batch: None)  # no cell comes back any more
    threading.Timer(0.1, go_on.set).start()
    stream.close()
    for thread in working:
        thread.join(20)
        assert not thread.is_alive()
    with pytest.raises(ValueError, match="the stream is closed"):
        stream.update(buffer, [(1, 0, 8, 8, 0)])


def test_threads_that_begin_together_share_one_group_of_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = NumpyGpu(lambda: None, lambda: None)
    room, together = gpu.room, threading.Barrier(4)
    monkeypatch.setattr(gpu, "room", lambda nbytes: time.sleep(0.05) or room(nbytes))

    def work(number: int) -> None:
        together.wait(60)
        stream.update(np.zeros(MIB, np.uint8), [(number, 0, 8, 8, 0)]).wait()

    with stream_on(gpu, monkeypatch=monkeypatch) as stream, ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(work, number) for number in range(4)]:
            future.result(60)
        assert len(gpu.lent) == 1


def test_after_a_failure_the_memory_is_given_back_while_the_error_is_still_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails() -> None:
        raise RuntimeError("out of memory")

    gpu = NumpyGpu(lambda: None, fails)
    with stream_on(gpu, monkeypatch=monkeypatch) as stream:
        for turn in range(3):
            stream.update(np.zeros(MIB, np.uint8), [(turn, 0, MIB, MIB, 0)])
        with pytest.raises(DeviceFailed) as failure:
            stream.finish()
    assert gpu.left == [0]
    assert "out of memory" in str(failure.value)


def test_a_buffer_that_is_refused_may_be_changed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many spans take two cells, and the second cannot be had: of the first copy nobody gets a ticket."""
    gpu, buffer = LateGpu(0), np.full(MIB, 7, np.uint8)
    monkeypatch.setattr(gpu, "some", lambda: None)  # nothing before somebody waits
    monkeypatch.setattr(cuda_stream, "_JOBS", 1)
    with stream_on(gpu, monkeypatch=monkeypatch) as stream:
        monkeypatch.setattr(cuda_stream, "_GROUP", 2)
        monkeypatch.setattr(stream._cells, "give", lambda cell: None)  # what is hashed meanwhile frees none
        stream.update(buffer, [(0, 0, 8, 8, 0)]).wait()
        room = gpu.room
        monkeypatch.setattr(gpu, "room", lambda nbytes: room(nbytes) if nbytes != 2 * MIB else 1 / 0)
        with pytest.raises(DeviceFailed):
            stream.update(buffer, [(1, 0, 8, 8, 0), (2, 0, 8, 8, 0)])
        buffer[:] = 0
        assert stream.finish()[1] == blake3(b"\7" * 8).digest()


def test_a_stream_that_is_left_unfinished_gives_its_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = NumpyGpu(lambda: None, lambda: None)
    with stream_on(gpu, monkeypatch=monkeypatch) as stream:
        for turn in range(7):  # one batch is hashed, three buffers wait for the next
            stream.update(np.zeros(MIB, np.uint8), [(turn, 0, MIB, MIB, 0)])
        assert len(gpu.lent) >= 2
    assert gpu.left == [0]
    stream.close()
    assert gpu.left == [0]


@pytest.mark.parametrize("for_good", [False, True])
@pytest.mark.parametrize("what", ["copy", "launch"])
@pytest.mark.parametrize("at", [1, 2, 7, 30])
def test_after_a_failure_no_thread_hangs_and_no_digest_is_wrong(
    what: str, at: int, for_good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, lock, moment = [0], threading.Lock(), a_moment(at)

    def failing() -> None:
        moment()
        with lock:
            calls[0] += 1
            if calls[0] == at or (for_good and calls[0] > at):
                raise RuntimeError("cudaErrorIllegalAddress: an illegal memory access was encountered")

    gpu = NumpyGpu(failing, moment) if what == "copy" else NumpyGpu(moment, failing)
    with stream_on(gpu, monkeypatch=monkeypatch) as stream:
        crew = Crew(stream, turns=25)
        errors = crew.run()
        assert any("illegal memory access" in str(error) for error in errors)
        assert all(isinstance(error, DeviceFailed) for error in errors)
        known = stream.salvage()
        assert known.items() <= crew.expected.items()


@pytest.mark.parametrize("start", [0, 1])
def test_spans_that_break_a_rule_are_refused_and_no_thread_hangs(start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = NumpyGpu(a_moment(1), a_moment(2))
    refused: list[str] = []

    def work() -> None:
        buffer = np.zeros(MIB, np.uint8)
        for turn in range(20):  # of each tensor every thread hands over one
            try:
                stream.update(buffer, [(turn, start, MIB, MIB, 0)]).wait()
            except ValueError as error:
                refused.append(str(error))

    with stream_on(gpu, monkeypatch=monkeypatch) as stream:
        with ThreadPoolExecutor(8) as pool:
            for future in [pool.submit(work) for _ in range(8)]:
                assert future.exception(timeout=60) is None
        if start:  # they leave their buffer: found when the first batch is hashed, and told to all who come after
            assert len(refused) >= 8 * 20 - 16 - 8
            assert all("does not lie in its buffer of 1048576 bytes" in text for text in refused)
        else:
            assert refused == []
        with pytest.raises(
            ValueError, match="does not lie in its buffer" if start else "tensor 0 was handed over twice"
        ):
            stream.finish()


def test_pieces_and_whole_tensors_are_hashed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = NumpyGpu(lambda: None, lambda: None)
    data = np.random.default_rng(3).bytes(MIB + 5)
    with stream_on(gpu, batch=2, monkeypatch=monkeypatch) as stream:
        view = np.frombuffer(data, np.uint8)
        stream.update(view[:MIB], [(7, 0, MIB, len(data), 0)]).wait()
        rest = np.concatenate([view[MIB:], view[:100]])
        spans = [(7, 0, 5, len(data), MIB), (8, 5, 100, 100, 0)]
        stream.update(rest, spans).wait()
        found = stream.finish()
    assert found == {7: blake3(data).digest(), 8: blake3(data[:100]).digest()}


class NumpyDigester:
    """`CudaDigester` with such a device."""

    device = "cuda"
    description = "a GPU of NumPy"

    def __init__(self, gpu: NumpyGpu) -> None:
        self.gpu = gpu

    def host_buffer(self, nbytes: int) -> Any:
        return np.zeros(nbytes, np.uint8)

    def stream(self, buffer_size: int) -> CudaStream:
        return CudaStream([self.gpu], buffer_size)  # type: ignore[list-item]


def through(digester: NumpyDigester, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of "cuda" is that digester's from now on, with small buffers and tasks."""
    select = digest.select
    choose = lambda device, **more: digester if device == "cuda" else select(device, **more)  # noqa: E731
    monkeypatch.setattr(digest, "select", choose)
    monkeypatch.setattr(cuda_stream, "_BATCH", 2)
    for module in ("buffers", "one_pass", "work"):
        monkeypatch.setattr(f"tierewrite.output.{module}.BUFFER_BYTES", MIB)
    monkeypatch.setattr("tierewrite.output.work._TENSORS_PER_TASK", 8)


@pytest.mark.parametrize(
    ("what", "at"), [("nothing", 0), *((what, at) for what in ("copy", "launch") for at in (1, 2, 5))]
)
@pytest.mark.parametrize("case", ["dg_nvfp4_sharded", "dg_bf16", "qwen3_torchao_head"])
def test_a_rewrite_goes_through_the_stream_and_on_without_it(
    case: str, what: str, at: int, naive: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, lock = {"copy": 0, "launch": 0}, threading.Lock()

    def called(which: str) -> None:
        with lock:
            calls[which] += 1
            if what == which and calls[which] >= at:
                raise RuntimeError("cudaErrorLaunchFailure")

    gpu = NumpyGpu(functools.partial(called, "copy"), functools.partial(called, "launch"))
    through(NumpyDigester(gpu), monkeypatch)
    report = tierewrite.rewrite(naive(case), tmp_path / "out", device="cuda", threads=4)
    assert digests(tmp_path / "out") == right_answer(case)
    failed = what != "nothing" and calls[what] >= at
    assert report.device == ("CPU" if failed else "a GPU of NumPy")
    assert calls["launch"] > 0 or failed


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("case", ["dg_nvfp4_sharded", "dg_nvfp4_decoder_uncalibrated"])
def test_a_rewrite_changes_no_buffer_before_its_bytes_are_copied(
    case: str, threads: int, naive: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    through(NumpyDigester(LateGpu(threads)), monkeypatch)
    report = tierewrite.rewrite(
        naive(case), tmp_path / "out", device="cuda", threads=threads, digests=True, verify=True, copy="never"
    )
    assert digests(tmp_path / "out") == right_answer(case)
    assert report.device == "a GPU of NumPy"


class Written:
    """What `Transfer` writes."""

    def __init__(self, nbytes: int) -> None:
        self.data = bytearray(nbytes)

    def incomplete(self) -> list[int]:
        return [0]

    def write(self, index: int, data: memoryview, position: int) -> None:
        self.data[position : position + len(data)] = data

    def complete(self, index: int) -> None:
        pass


def test_what_is_hashed_and_replaced_is_replaced_once_it_is_copied(
    naive: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    digester = NumpyDigester(LateGpu(1))
    through(digester, monkeypatch)
    checkpoint = open_folder(naive("dg_bf16"))
    (file,) = naive("dg_bf16").glob("*.safetensors")
    raw, names, tensors = file.read_bytes(), list(checkpoint.tensors.names), []
    originals = {name: raw[checkpoint.tensors[name].start : checkpoint.tensors[name].end] for name in names}
    for name in names:
        at = tensors[-1].end if tensors else 0
        tensors.append(OutTensor(name, name, at, at + len(originals[name])))
    shards = (OutShard.of("model.safetensors", checkpoint.tensors, tensors),)
    contents = {name: Patch(b"\xee" * len(data), data, name) for name, data in originals.items()}
    out = Written(tensors[-1].end)
    work = work_of(checkpoint, names, shards, (0,), contents=contents)
    result = Transfer(work, lambda: digester, out, threads=4).run()  # type: ignore[arg-type, return-value]
    assert set(out.data) == {0xEE}
    assert result.digests == {name: blake3(data).digest() for name, data in originals.items()}


def test_a_rewrite_goes_on_where_no_pinned_memory_is_left(
    naive: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers go on until they are told to stop: each asks again, and fails of the same."""
    digester = NumpyDigester(NumpyGpu(lambda: None, lambda: None))

    def host_buffer(nbytes: int) -> Any:
        raise DeviceFailed("pinning host memory failed on the GPU: cudaErrorMemoryAllocation")

    monkeypatch.setattr(digester, "host_buffer", host_buffer)
    through(digester, monkeypatch)
    monkeypatch.setattr("tierewrite.output.work._TENSORS_PER_TASK", 1)
    tierewrite.rewrite(naive("dg_nvfp4"), tmp_path / "out", device="cuda", threads=8)
    assert digests(tmp_path / "out") == right_answer("dg_nvfp4")


def test_buffers_that_could_not_be_made_are_not_counted() -> None:
    class Failing:
        def host_buffer(self, nbytes: int) -> Any:
            raise DeviceFailed("pinning host memory failed on the GPU: cudaErrorMemoryAllocation")

    buffers = Buffers(Failing(), 1)  # type: ignore[arg-type]
    for _ in range(9):
        with pytest.raises(DeviceFailed), buffers.one():
            pass


class Driver:
    """The CUDA driver's functions that `Copies` calls: a thread has a stack of contexts, a copy needs the device's."""

    def __init__(self, name: str) -> None:
        assert name == "libcuda.so.1"
        self.local = threading.local()
        self.fails: list[int] = []
        self.copied: list[tuple[int, int, int, int]] = []
        for function in (self.device_get, self.retain, self.push, self.pop, self.copy, self.text):
            setattr(
                self, DRIVER_NAMES[function.__name__], functools.partial(function)
            )  # takes attributes, as ctypes' do

    def stack(self) -> list[int]:
        self.local.stack = getattr(self.local, "stack", [])
        return self.local.stack  # type: ignore[no-any-return]

    def device_get(self, handle: Any, number: int) -> int:
        handle.value = 70 + number
        return 0

    def retain(self, context: Any, handle: Any) -> int:
        context.value = 1000 + handle.value
        return 0

    def push(self, context: Any) -> int:
        self.stack().append(context.value)
        return 0

    def pop(self, context: Any) -> int:
        context.value = self.stack().pop()
        return 0

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> int:
        if self.fails:
            return self.fails.pop()
        if not self.stack() or self.stack()[-1] != 1071:
            return 201
        self.copied.append((target, source, nbytes, stream))
        return 0

    def text(self, result: int, text: Any) -> int:
        text.value = {700: b"an illegal memory access was encountered", 201: b"invalid device context"}.get(result)
        return 0


DRIVER_NAMES = {
    "device_get": "cuDeviceGet",
    "retain": "cuDevicePrimaryCtxRetain",
    "push": "cuCtxPushCurrent_v2",
    "pop": "cuCtxPopCurrent_v2",
    "copy": "cuMemcpyHtoDAsync_v2",
    "text": "cuGetErrorString",
}


def test_a_copy_is_put_in_the_devices_context_and_the_threads_own_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    drivers: list[Driver] = []
    monkeypatch.setattr(ctypes, "PyDLL", lambda name: drivers.append(Driver(name)) or drivers[-1])  # type: ignore[func-returns-value]
    copies = Copies(1)
    (driver,) = drivers
    with ThreadPoolExecutor(1) as pool:  # a thread without a context
        pool.submit(copies.put, 1, 2, 3, 4).result()
        assert pool.submit(driver.stack).result() == []
    driver.stack().append(5)  # a thread that works with another device
    copies.put(5, 6, 7, 8)
    assert driver.copied == [(1, 2, 3, 4), (5, 6, 7, 8)]
    driver.fails = [12, 700]
    with pytest.raises(RuntimeError, match=r"^CUDA error 700: an illegal memory access was encountered$"):
        copies.put(1, 2, 3, 4)
    with pytest.raises(RuntimeError, match=r"^CUDA error 12: it has no text$"):
        copies.put(1, 2, 3, 4)
    assert driver.stack() == [5]
