"""The whole path on a GPU: the same bytes as on the CPU, and the CPU in its place when it fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tierewrite
from tests.checkpoints import FIXTURES, digests, read_tensors, right_answer
from tierewrite import digest
from tierewrite.consumers.folder import Folder
from tierewrite.consumers.values import kind_of, read_values
from tierewrite.digest.cpu import CpuDigester, CpuStream
from tierewrite.engines import trial
from tierewrite.engines.local import LocalEngine
from tierewrite.errors import UsageError
from tierewrite.numbers.arithmetic import device_arrays
from tierewrite.numbers.extremes import LAYOUTS, extremes
from tierewrite.source.folder import open_folder

Naive = Callable[[str], Path]
CASES = sorted(path.parent.name for path in FIXTURES.glob("*/right_answer.json"))


@pytest.fixture
def _cuda() -> None:
    try:
        digest.select("cuda")
    except UsageError as error:
        pytest.skip(f"no GPU: {error}")


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the CPU's first task a GPU is asked for, and stays."""
    for name, value in {"SETTLES": 0.0, "LASTS": 1e-9, "PAYS": 0.0, "_WORTH": 0.0}.items():
        monkeypatch.setattr(trial, name, value)


@pytest.mark.gpu
@pytest.mark.usefixtures("_cuda")
@pytest.mark.parametrize("case", CASES)
def test_output_is_byte_identical_on_a_gpu(case: str, naive: Naive, tmp_path: Path) -> None:
    report = tierewrite.rewrite(naive(case), tmp_path / "cuda", device="cuda", threads=8)
    assert "CPU" not in report.device
    tierewrite.rewrite(naive(case), tmp_path / "cpu", device="cpu")
    assert digests(tmp_path / "cuda") == right_answer(case)
    for path in (tmp_path / "cpu").iterdir():
        assert (tmp_path / "cuda" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.gpu
@pytest.mark.usefixtures("_cuda")
def test_auto_takes_the_gpu_and_says_so(naive: Naive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    impatient(monkeypatch)
    monkeypatch.setattr("tierewrite.output.work._TENSORS_PER_TASK", 16)
    with LocalEngine(threads=1) as engine:
        engine._prepared().result()  # so small a checkpoint would else be hashed before the GPU is ready
        checkpoint = open_folder(naive("dg_nvfp4_sharded"))
        found = engine.hash(checkpoint, list(checkpoint.tensors), "hashing")
        assert engine.device.startswith("CPU, then ")
        assert "CuPy" in engine.device
    with LocalEngine("cpu") as engine:
        assert engine.hash(checkpoint, list(checkpoint.tensors), "hashing") == found


class Late:
    """A GPU that gets ready once the CPU has hashed `buffers` buffers."""

    device = "cuda"
    description = "a GPU that is late"

    def __init__(self, monkeypatch: pytest.MonkeyPatch, buffers: int) -> None:
        self.inner = CpuDigester(threads=1)
        self.used = 0
        ready = threading.Event()
        update, lock, left = CpuStream.update, threading.Lock(), [buffers]

        def counted(stream: CpuStream, *arguments: Any) -> Any:
            with lock:
                left[0] -= 1
                if left[0] == 0:
                    ready.set()
            time.sleep(0.01)  # tasks are left when it is
            return update(stream, *arguments)

        monkeypatch.setattr(CpuStream, "update", counted)
        select = digest.select

        def choose(device: str, **more: Any) -> Any:
            if device == "cpu":
                return select(device, **more)
            ready.wait(60)
            return self

        monkeypatch.setattr(digest, "select", choose)

    def host_buffer(self, nbytes: int) -> Any:
        return self.inner.host_buffer(nbytes)

    def stream(self, size: int) -> digest.Stream:
        self.used += 1
        return self.inner.stream(size)


@pytest.mark.parametrize("buffers", [1, 2, 5])
def test_the_cpu_hashes_until_the_gpu_is_ready(
    buffers: int, naive: Naive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = Late(monkeypatch, buffers)
    impatient(monkeypatch)
    monkeypatch.setattr("tierewrite.output.one_pass.BUFFER_BYTES", 1 << 20)
    monkeypatch.setattr("tierewrite.output.work.BUFFER_BYTES", 1 << 20)
    monkeypatch.setattr("tierewrite.output.work._TENSORS_PER_TASK", 16)
    report = tierewrite.rewrite(naive("dg_nvfp4_sharded"), tmp_path / "out", threads=1)
    assert digests(tmp_path / "out") == right_answer("dg_nvfp4_sharded")
    assert late.used >= 1
    assert report.device == "CPU, then a GPU that is late"


def test_for_little_work_no_gpu_is_looked_for(naive: Naive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    select = digest.select
    choose = lambda device, **more: asked.append(device) or select(device, **more)  # type: ignore[func-returns-value]  # noqa: E731
    monkeypatch.setattr(digest, "select", choose)
    report = tierewrite.rewrite(naive("dg_nvfp4_sharded"), tmp_path / "out", verify=True)
    assert digests(tmp_path / "out") == right_answer("dg_nvfp4_sharded")
    assert set(asked) == {"cpu"}
    assert report.device == "CPU"


@pytest.mark.parametrize(
    ("faster", "device"),
    [("gpu", "CPU, then a GPU that fails"), ("cpu", "CPU (faster here than a GPU that fails)")],
)
def test_the_faster_one_is_named(faster: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, select = Failing(0), digest.select
    choose = lambda device, **more: gpu if device == "auto" else select(device, **more)  # noqa: E731
    monkeypatch.setattr(digest, "select", choose)
    with LocalEngine() as engine:
        engine._trial.chosen = engine._cpu
        assert engine.digester() is engine._cpu
        engine._trial.chosen = engine._prepared().result()
        assert engine.digester() is engine._prepared().result()
        engine._trial.chosen = engine._cpu if faster == "cpu" else engine._prepared().result()
        assert engine.device == device


def test_a_gpu_that_is_asked_for_is_waited_for(naive: Naive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    late = Late(monkeypatch, 0)
    select = digest.select

    def choose(device: str, **more: Any) -> Any:
        if device == "cuda":
            time.sleep(0.3)
            return late
        return select(device, **more)

    monkeypatch.setattr(digest, "select", choose)
    report = tierewrite.rewrite(naive("dg_nvfp4_sharded"), tmp_path / "out", device="cuda")
    assert report.device == "a GPU that is late"
    assert digests(tmp_path / "out") == right_answer("dg_nvfp4_sharded")


class Failing:
    """A digester whose stream fails after `good` buffers, as a GPU that runs out of memory does."""

    device = "cuda"
    description = "a GPU that fails"

    def __init__(self, good: int) -> None:
        self.good = good
        self.inner = digest.select("cpu", threads=1)

    def host_buffer(self, nbytes: int) -> object:
        return self.inner.host_buffer(nbytes)

    def stream(self, size: int) -> FailingStream:
        return FailingStream(self.inner.stream(size), self.good)


class FailingStream:
    def __init__(self, inner: digest.Stream, good: int) -> None:
        self.inner = inner
        self.good = good
        self.calls = 0

    def update(self, buffer: object, spans: object) -> digest.Ticket:
        self.calls += 1
        if self.calls > self.good:
            raise digest.DeviceFailed("out of memory")
        return self.inner.update(buffer, spans)  # type: ignore[arg-type]

    def finish(self) -> dict[int, bytes]:
        raise digest.DeviceFailed("driver error")

    def salvage(self) -> dict[int, bytes]:
        return self.inner.salvage()

    def close(self) -> None:
        self.inner.close()

    def __enter__(self) -> FailingStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@pytest.mark.parametrize("good", [0, 1, 3, 1000])
def test_gpu_that_fails_midway_is_replaced_by_the_cpu(
    good: int, naive: Naive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    select = digest.select
    failing = Failing(good)
    choose = lambda device, **more: failing if device == "cuda" else select(device, **more)  # noqa: E731
    monkeypatch.setattr(digest, "select", choose)
    monkeypatch.setattr("tierewrite.output.one_pass.BUFFER_BYTES", 1 << 20)
    monkeypatch.setattr("tierewrite.output.work.BUFFER_BYTES", 1 << 20)
    report = tierewrite.rewrite(naive("dg_nvfp4_sharded"), tmp_path / "out", max_shard_size="50KB", device="cuda")
    assert digests(tmp_path / "out") == right_answer("dg_nvfp4_sharded")
    assert any("the CPU goes on" in record.message for record in caplog.records)
    assert report.device.startswith("CPU")
    tierewrite.rewrite(naive("dg_nvfp4_sharded"), tmp_path / "cpu", max_shard_size="50KB", device="cpu")
    assert read_tensors(tmp_path / "cpu") == read_tensors(tmp_path / "out")


@pytest.mark.gpu
@pytest.mark.usefixtures("_cuda")
@pytest.mark.parametrize("dtype", LAYOUTS)
def test_the_largest_of_each_row_is_the_same_on_both_devices(dtype: str) -> None:
    data = np.random.default_rng(1).integers(0, 256, 8 * 96 * 1000, np.uint8)
    on_cpu = extremes(data, dtype, 96, count=True)
    on_gpu = extremes(device_arrays("cuda").asarray(data), dtype, 96, count=True)
    assert on_gpu.largest.tobytes() == on_cpu.largest.tobytes()
    assert np.array_equal(on_gpu.at_limit, on_cpu.at_limit)
    assert np.array_equal(on_gpu.at_bottom, on_cpu.at_bottom)


@pytest.mark.gpu
@pytest.mark.usefixtures("_cuda")
@pytest.mark.parametrize("case", ["dg_nvfp4", "dg_fp8", "llmc_int8", "dg_bf16"])
def test_values_are_the_same_on_both_devices(naive: Naive, case: str) -> None:
    folder = Folder.open(naive(case), "")
    kinds = {name: kind for name, entry in folder.entries.items() if (kind := kind_of(entry, folder.entries))}
    on_cpu, on_gpu = (read_values(folder, kinds, kinds, device=device) for device in ("cpu", "cuda"))
    assert list(on_gpu) == list(on_cpu)
    assert all(one.largest.tobytes() == on_cpu[name].largest.tobytes() for name, one in on_gpu.items())
