"""Digests: the same 32 bytes as the blake3 package, whatever the length, the alignment, the cuts and the device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from tierewrite import digest as digest_room
from tierewrite.digest import DeviceFailed, Digester, Span, cuda_device, cuda_stream, cut, layout, select
from tierewrite.digest import cuda as cuda_room
from tierewrite.digest import schedule as schedule_room
from tierewrite.digest.cpu import CpuDigester
from tierewrite.digest.spans import Ledger, checked, host_bytes
from tierewrite.errors import UsageError

MIB = 1 << 20

# BLAKE3 (the specification, sections 2.2 and 2.3)
IV = (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19)
PERMUTATION = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
PARENT = 4
ROOT = 8


def why_no_gpu() -> str | None:
    try:
        cuda_room.CudaDigester()
    except DeviceFailed as error:
        return str(error)
    return None


NO_GPU = why_no_gpu()
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(NO_GPU is not None, reason=f"no CUDA GPU works here: {NO_GPU}")]


@pytest.fixture(scope="module", params=["cpu, 1 thread", "cpu, 8 threads", pytest.param("cuda", marks=needs_gpu)])
def digester(request: pytest.FixtureRequest) -> Digester:
    if request.param == "cuda":
        return select("cuda")
    return CpuDigester(int(request.param.split()[1]))


@pytest.fixture(scope="module")
def gpu() -> cuda_room.CudaDigester:
    return cuda_room.CudaDigester()


@pytest.fixture(scope="module")
def noise() -> bytes:
    return np.random.default_rng(3).bytes(9 * MIB)


# ---------------------------------------------------------------- a reference BLAKE3, readable and slow


def compress(h: Sequence[int], block: bytes, counter: int, length: int, flags: int) -> list[int]:
    """The compression function, from the BLAKE3 specification, section 2.2; the first 8 words of its output."""
    mask = 0xFFFFFFFF
    m = [int.from_bytes(block[i : i + 4], "little") for i in range(0, 64, 4)]
    v = [*h, *IV[:4], counter & mask, counter >> 32, length, flags]

    def g(a: int, b: int, c: int, d: int, x: int, y: int) -> None:
        for word, left, right in ((x, 16, 12), (y, 8, 7)):
            v[a] = (v[a] + v[b] + word) & mask
            v[d] ^= v[a]
            v[d] = (v[d] >> left | v[d] << 32 - left) & mask
            v[c] = (v[c] + v[d]) & mask
            v[b] ^= v[c]
            v[b] = (v[b] >> right | v[b] << 32 - right) & mask

    for _ in range(7):
        for i in range(4):
            g(i, 4 + i, 8 + i, 12 + i, m[2 * i], m[2 * i + 1])
        for i in range(4):
            g(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4, m[8 + 2 * i], m[9 + 2 * i])
        m = [m[i] for i in PERMUTATION]
    return [v[i] ^ v[i + 8] for i in range(8)]


def chunk_value(data: bytes, counter: int, root: bool = False) -> bytes:
    """Chaining value of at most 1,024 bytes."""
    blocks = [data[i : i + 64] for i in range(0, len(data), 64)] or [b""]
    h = list(IV)
    for i, block in enumerate(blocks):
        last = i == len(blocks) - 1
        flags = (1 if i == 0 else 0) | (2 if last else 0) | (8 if last and root else 0)
        h = compress(h, block.ljust(64, b"\0"), counter, len(block), flags)
    return np.array(h, "<u4").tobytes()


def parent_value(left: bytes, right: bytes, root: bool = False) -> bytes:
    return np.array(compress(IV, left + right, 0, 64, PARENT | (ROOT if root else 0)), "<u4").tobytes()


def subtree(data: bytes, counter: int = 0, root: bool = False) -> bytes:
    """Chaining value (the digest, for a root) of the chunks in data, by the specification's rule for left subtrees."""
    chunks = max(1, -(-len(data) // 1024))
    if chunks == 1:
        return chunk_value(data, counter, root)
    left = 1 << (chunks - 1).bit_length() - 1
    at = left * 1024
    return parent_value(subtree(data[:at], counter), subtree(data[at:], counter + left), root)


def joined(values: list[bytes]) -> bytes:
    """The digest of a tensor whose pieces have these chaining values: neighbours are paired, an odd last one waits."""
    while len(values) > 1:
        root = len(values) == 2
        odd = values[-1:] if len(values) % 2 else []
        values = [parent_value(a, b, root) for a, b in zip(values[::2], values[1::2])] + odd  # noqa: B905
    return values[0]


@pytest.mark.parametrize("length", [0, 1, 64, 65, 1024, 1025, 2048, 3073, 7 * 1024 + 5])
def test_the_reference_of_these_tests_is_blake3(noise: bytes, length: int) -> None:
    assert subtree(noise[:length], root=True) == blake3(noise[:length]).digest()


# ---------------------------------------------------------------- digests


def test_every_length_from_0_to_5000_at_any_start(digester: Digester, noise: bytes) -> None:
    spans = [(n * 37 % 101, n) for n in range(5001)]
    found = digester.digest_many(noise, spans)
    assert found == [blake3(noise[start : start + n]).digest() for start, n in spans]


def test_long_ranges_at_random_starts(digester: Digester, noise: bytes) -> None:
    rng = np.random.default_rng(17)
    lengths = np.exp(rng.uniform(np.log(5000), np.log(8 * MIB), 60)).astype(int)
    spans = [(int(rng.integers(len(noise) - n + 1)), int(n)) for n in lengths]
    spans += [(start, n) for n in (MIB - 1, MIB, MIB + 1, 2 * MIB, 3 * MIB + 1, 5 * MIB + 77) for start in (0, 13)]
    found = digester.digest_many(noise, spans)
    assert found == [blake3(noise[start : start + n]).digest() for start, n in spans]


def test_the_official_vectors(digester: Digester) -> None:
    path = os.environ.get("TIEREWRITE_BLAKE3_VECTORS")
    if not path:
        pytest.skip("TIEREWRITE_BLAKE3_VECTORS does not name BLAKE3's test_vectors.json")
    cases = json.loads(Path(path).read_text())["cases"]
    inputs = [bytes(i % 251 for i in range(case["input_len"])) for case in cases]
    assert [d.hex() for d in digester.digest_arrays(inputs)] == [case["hash"][:64] for case in cases]
    assert len(cases) > 30


def test_one_buffer_is_its_own_digest(digester: Digester, noise: bytes) -> None:
    assert digester.digest(noise) == blake3(noise).digest()
    assert digester.digest(b"") == blake3(b"").digest()
    assert digester.digest_many(b"", []) == digester.digest_arrays([]) == []


def test_host_arrays_of_any_kind_are_their_bytes_in_row_major_order(digester: Digester) -> None:
    torch = pytest.importorskip("torch")
    grid = np.arange(4000, dtype=np.float32).reshape(40, 100)
    brain = torch.arange(1000, dtype=torch.float32).to(torch.bfloat16)
    eight = brain.to(torch.float8_e4m3fn)
    words = brain.view(torch.int16).numpy()
    cases: list[tuple[object, bytes]] = [
        (grid, grid.tobytes()),
        (grid.T, grid.T.tobytes()),
        (np.float32(3.5), np.float32(3.5).tobytes()),
        (np.array(3.5), np.float64(3.5).tobytes()),
        (np.empty((0, 7)), b""),
        (bytearray(b"xyz"), b"xyz"),
        (memoryview(grid), grid.tobytes()),
        (brain, words.tobytes()),
        (brain.reshape(10, 100).T, words.reshape(10, 100).T.tobytes()),
        (eight, eight.view(torch.uint8).numpy().tobytes()),
        (torch.tensor(2.5), np.float32(2.5).tobytes()),
        (torch.empty(0, 3), b""),
    ]
    found = digester.digest_arrays([array for array, _ in cases])
    assert found == [blake3(data).digest() for _, data in cases]


@pytest.mark.parametrize("span", [(0, 11), (10, 1), (-1, 2), (3, -1)])
def test_a_range_that_leaves_its_buffer_is_refused(digester: Digester, span: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="leave a buffer of 10 bytes"):
        digester.digest_many(b"0123456789", [(0, 4), span])


# ---------------------------------------------------------------- streams


def streamed(digester: Digester, tensors: Sequence[bytes], size: int) -> dict[int, bytes]:
    """Digests by way of two buffers of `size` bytes, each overwritten as soon as its ticket allows."""
    buffers = [digester.host_buffer(size) for _ in range(2)]
    with digester.stream(size) as stream:
        tickets: list[Any] = [None, None]
        for turn, spans in enumerate(layout(map(len, tensors), size)):
            if tickets[turn % 2] is not None:
                tickets[turn % 2].wait()
                buffers[turn % 2][:] = 0xA5
            for span in spans:
                part = tensors[span.tensor][span.position : span.position + span.length]
                buffers[turn % 2][span.start : span.start + span.length] = np.frombuffer(part, np.uint8)
            tickets[turn % 2] = stream.update(buffers[turn % 2], spans)
        return dict(stream.finish())


@pytest.mark.parametrize("size", [MIB, 2 * MIB + 12345, 16 * MIB])
def test_tensors_many_to_a_buffer_and_tensors_over_many_buffers(digester: Digester, noise: bytes, size: int) -> None:
    rng = np.random.default_rng(size)
    lengths = [0, 4, 4, 2, 1, 0, 1023, 8 * MIB, 5, MIB, MIB + 1, 3 * MIB - 1, 4 * MIB + 1024, 9 * MIB, 77]
    lengths += [int(n) for n in np.exp(rng.uniform(0, np.log(3 * MIB), 40))]
    tensors = [noise[at : at + n] for n, at in ((n, int(rng.integers(len(noise) - n + 1))) for n in lengths)]
    found = streamed(digester, tensors, size)
    assert found == {i: blake3(data).digest() for i, data in enumerate(tensors)}


def test_more_tensors_in_a_buffer_than_one_submission_takes(digester: Digester, noise: bytes) -> None:
    tensors = [noise[4 * i : 4 * i + i % 6] for i in range(20_000)]
    found = streamed(digester, tensors, MIB)
    assert found == {i: blake3(data).digest() for i, data in enumerate(tensors)}


def test_spans_may_be_an_array_and_in_any_order_within_a_buffer(digester: Digester, noise: bytes) -> None:
    buffer = digester.host_buffer(MIB)
    buffer[:] = np.frombuffer(noise[:MIB], np.uint8)
    spans = np.array([[i, (9_999 - i) * 100 + 3, 90, 90, 0] for i in range(10_000)])
    with digester.stream(MIB) as stream:
        stream.update(buffer, spans).wait()
        found = stream.finish()
    assert found == {i: blake3(noise[start : start + 90]).digest() for i, start, *_ in spans.tolist()}


def test_what_came_through_before_a_failure_can_be_salvaged(
    digester: Digester, noise: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_stream, "_BATCH", 4)
    monkeypatch.setattr(cuda_stream, "_GROUPS", 2)
    buffer = digester.host_buffer(2 * MIB)
    buffer[:] = np.frombuffer(noise[: 2 * MIB], np.uint8)
    with digester.stream(2 * MIB) as stream:
        for turn in range(200):  # more than eight GPUs have room for
            stream.update(buffer, [Span(turn, turn % 90, MIB, MIB, 0), Span(1000 + turn, MIB + turn, 3, 3, 0)]).wait()
        stream.update(buffer, [Span(999, 0, 2 * MIB, 4 * MIB, 0)]).wait()
        known = stream.salvage()
    assert known
    assert 999 not in known
    for i, digest in known.items():
        start, length = (i % 90, MIB) if i < 999 else (MIB + i - 1000, 3)
        assert digest == blake3(noise[start : start + length]).digest()


def test_updates_from_several_threads_give_the_same_digests(digester: Digester, noise: bytes) -> None:
    def work(number: int) -> None:
        buffer = digester.host_buffer(MIB)
        for turn in range(8):
            tensor = number * 8 + turn
            buffer[:] = np.frombuffer(noise[tensor : tensor + MIB], np.uint8)
            stream.update(buffer, [Span(tensor, 0, MIB, MIB, 0)]).wait()

    with digester.stream(MIB) as stream:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = stream.finish()
    assert found == {i: blake3(noise[i : i + MIB]).digest() for i in range(32)}


@pytest.mark.parametrize(
    ("spans", "complaint"),
    [
        ([Span(1, MIB - 3, 4, 4, 0)], "does not lie in its buffer"),
        ([Span(1, 0, 4, 3, 0)], "does not lie in its buffer"),
        ([Span(1, 0, 4, 4, 0), Span(1, 4, 4, 4, 0)], "tensor 1 was handed over twice"),
        ([Span(1, 0, 4, 8, 0), Span(1, 4, 4, 8, 4)], "cut at multiples of 1048576 bytes only"),
        ([Span(1, 0, MIB, 3 * MIB, MIB)], "out of order: byte 0"),
        ([Span(1, 0, MIB, 2 * MIB, 0)], "tensor 1 ended at byte 1048576 of 2097152"),
    ],
)
def test_a_stream_refuses_spans_that_break_the_rules(digester: Digester, spans: list[Span], complaint: str) -> None:
    buffer = digester.host_buffer(MIB)
    with digester.stream(MIB) as stream, pytest.raises(ValueError, match=complaint):  # noqa: PT012
        stream.update(buffer, spans)
        stream.finish()


def test_a_stream_refuses_buffers_of_the_wrong_size(digester: Digester) -> None:
    with pytest.raises(ValueError, match="too small"):
        digester.stream(MIB - 1)
    with digester.stream(MIB) as stream, pytest.raises(ValueError, match="takes up to 1048576"):
        stream.update(digester.host_buffer(MIB + 1), [])


@pytest.mark.parametrize(
    ("spans", "complaint"),
    [
        ([(1, MIB, 0), (1, MIB, MIB)], None),
        ([(1, MIB, 0), (2, MIB, 0), (2, MIB, MIB), (1, MIB, MIB)], None),
        ([(1, MIB, 0), (1, MIB, MIB), (1, MIB, 0)], "tensor 1 was handed over twice"),
        ([(1, 2 * MIB, 0), (2, MIB, 0), (2, MIB, MIB), (1, 2 * MIB, 0)], "tensor 1 was handed over twice"),
        ([(1, MIB, MIB), (1, MIB, 0)], "out of order: byte 0 of 2097152 is the next of tensor 1"),
        ([(2, MIB, 0), (1, 2 * MIB, 0), (2, MIB, 0)], "out of order: byte 1048576 of 2097152 is the next of tensor 2"),
        ([(1, 2 * MIB, 0), (3, MIB, 0)], "tensor 3 ended at byte 1048576 of 2097152"),
    ],
)
def test_a_tensor_has_to_come_whole_once_and_in_its_order(
    spans: list[tuple[int, int, int]], complaint: str | None
) -> None:
    ledger = Ledger()
    for tensor, length, position in spans:
        ledger.enter(checked([Span(tensor, 0, length, 2 * MIB, position)], 2 * MIB))
    if complaint is None:
        ledger.close()
        return
    with pytest.raises(ValueError, match=complaint):
        ledger.close()


def test_an_empty_tensor_comes_once_too() -> None:
    ledger = Ledger()
    ledger.enter(checked([Span(1, 0, 0, 0, 0), Span(2, 5, 0, 0, 0)], 5))
    ledger.close()
    ledger.enter(checked([Span(2, 5, 0, 0, 0)], 5))
    with pytest.raises(ValueError, match="tensor 2 was handed over twice"):
        ledger.close()


def test_pieces_of_one_tensor_cannot_be_of_two_sizes() -> None:
    ledger = Ledger()
    ledger.enter(checked([Span(1, 0, MIB, 2 * MIB, 0), Span(1, MIB, MIB, 3 * MIB, MIB)], 2 * MIB))
    with pytest.raises(ValueError, match="out of order"):
        ledger.close()


@given(st.lists(st.integers(0, 5 * MIB), max_size=30), st.integers(MIB, 4 * MIB))
@settings(max_examples=60, deadline=None)
def test_a_layout_puts_every_byte_into_a_buffer_once_and_keeps_the_rules(lengths: list[int], size: int) -> None:
    ledger = Ledger()
    taken = [0] * len(lengths)
    for spans in layout(lengths, size):
        ends = [span.start + span.length for span in spans]
        assert [span.start for span in spans] == [0, *ends][:-1]  # no holes: a file's bytes may lie as they are
        ledger.enter(checked(spans, size))
        for span in spans:
            taken[span.tensor] += span.length
    ledger.close()
    assert taken == lengths


def test_cut_takes_all_that_fits_and_else_whole_pieces() -> None:
    assert cut(10, 10) == 10
    assert cut(5 * MIB, 3 * MIB + 5) == 3 * MIB
    assert cut(MIB, MIB - 1) == 0


# ---------------------------------------------------------------- what the GPU is told to do


def execute(plan: schedule_room.Schedule, data: bytes, fan: int) -> list[bytes]:
    """A schedule carried out as the kernels' comments say, slowly."""
    table = plan.table.tolist()
    n = plan.jobs
    start, length, first, tag = (table[i * n : i * n + n] for i in range(4))
    out: list[bytes] = [b""] * n
    values: list[bytes] = [b""] * plan.chunks
    root_bit = 1 << 63
    for me in range(plan.chunks):
        job = max(i for i in range(n) if first[i] <= me)
        at = (me - first[job]) * 1024
        part = data[start[job] + at : start[job] + min(at + 1024, length[job])]
        single = length[job] <= 1024
        value = chunk_value(part, (tag[job] & ~root_bit) + me - first[job], single and bool(tag[job] & root_bit))
        if single:
            out[job] = value
        else:
            values[me] = value
    join(plan, values, out, fan)
    return out


def join(plan: schedule_room.Schedule, values: list[bytes], out: list[bytes], fan: int) -> None:
    """Its levels."""
    table, root_bit = plan.table.tolist(), 1 << 63
    for level in plan.levels:
        rows = table[level.row : level.row + 4 * level.jobs]
        source, count, place, target = (rows[i * level.jobs : (i + 1) * level.jobs] for i in range(4))
        above: list[bytes] = [b""] * level.groups
        for group in range(level.groups):
            row = max(i for i in range(level.jobs) if place[i] <= group)
            skipped = (group - place[row]) * fan
            ready = count[row] <= fan
            nodes = values[source[row] + skipped : source[row] + min(count[row], skipped + fan)]
            while len(nodes) > 1:
                root = ready and len(nodes) == 2 and bool(target[row] & root_bit)
                odd = nodes[-1:] if len(nodes) % 2 else []
                nodes = [parent_value(a, b, root) for a, b in zip(nodes[::2], nodes[1::2])] + odd  # noqa: B905
            if ready:
                out[target[row] & ~root_bit] = nodes[0]
            else:
                above[group] = nodes[0]
        values = above


def test_a_schedule_carried_out_gives_the_digests(monkeypatch: pytest.MonkeyPatch, noise: bytes) -> None:
    monkeypatch.setattr(schedule_room, "FAN", 4)
    lengths = [0, 5, 1024, 1025, 4096, 4097, 5 * 1024, 17 * 1024 + 1, 3, 70 * 1024, 64 * 1024, 16 * 1024, 16 * 1024 + 9]
    start = np.arange(len(lengths), dtype=np.uint64) * np.uint64(333)
    u64 = np.array(lengths, np.uint64)
    plan = schedule_room.schedule(start, u64, np.zeros_like(u64), np.ones(len(lengths), bool))
    assert len(plan.levels) == 4
    found = execute(plan, noise, 4)
    assert found == [blake3(noise[int(s) : int(s) + n]).digest() for s, n in zip(start, lengths, strict=True)]


def test_a_schedule_of_pieces_gives_their_subtrees(noise: bytes) -> None:
    lengths, counters = [4096, 8192, 1024, 700], [8, 16, 1 << 32, 3]
    start = np.array([10, 5000, 20000, 30000], np.uint64)
    plan = schedule_room.schedule(start, np.array(lengths, np.uint64), np.array(counters, np.uint64), np.zeros(4, bool))
    found = execute(plan, noise, 1024)
    expected = [subtree(noise[int(s) : int(s) + n], c) for s, n, c in zip(start, lengths, counters, strict=True)]
    assert found == expected


@pytest.mark.parametrize("leaf", [1, 2, 4])
def test_pieces_of_one_size_are_joined_to_digests(noise: bytes, leaf: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule_room, "FAN", 4)
    width = leaf * 1024
    lengths = [n * width + extra for n in range(2, 20) for extra in (0, 1 - width, -1)]
    leaves = [[subtree(noise[i : min(i + width, n)], i // 1024) for i in range(0, n, width)] for n in lengths]
    plan = schedule_room.joining(np.array([len(values) for values in leaves], np.uint64))
    assert len(plan.levels) == 3
    out = [b""] * len(lengths)
    join(plan, [value for values in leaves for value in values], out, 4)
    assert out == [blake3(noise[:n]).digest() for n in lengths]
    assert [joined(values) for values in leaves] == out  # the reference of the stream's tests


@given(st.lists(st.integers(0, 40 * MIB), min_size=1, max_size=40))
@settings(max_examples=200, deadline=None)
def test_the_memory_set_aside_holds_any_schedule(lengths: list[int]) -> None:
    length = np.array(lengths, np.uint64)
    plan = schedule_room.schedule(length, length, np.zeros_like(length), np.ones(len(lengths), bool))
    words, values = schedule_room.bounds(len(lengths), sum(lengths))
    assert len(plan.table) <= words
    assert plan.chunks + plan.groups <= values


def test_launches_are_counted_per_batch_and_not_per_tensor() -> None:
    length = np.full(46_000, 700_000, np.uint64)
    plan = schedule_room.schedule(length, length, np.zeros_like(length), np.ones(len(length), bool))
    assert len(plan.levels) == 1
    assert (
        len(schedule_room.schedule(*(np.array([n], np.uint64) for n in (0, 1 << 32, 0)), np.ones(1, bool)).levels) == 3
    )


# ---------------------------------------------------------------- which device


def fake_cupy(**runtime: Any) -> types.ModuleType:
    module = types.ModuleType("cupy")
    module.cuda = types.SimpleNamespace(runtime=types.SimpleNamespace(**runtime))  # type: ignore[attr-defined]
    return module


def broken_driver() -> int:
    raise RuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient")


@pytest.fixture(params=["not installed", "broken", "driver too old", "no device"])
def useless_cupy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """CuPy in a state that serves no one, and what must be said of it."""
    if request.param == "not installed":
        monkeypatch.setitem(sys.modules, "cupy", None)
        yield "no cupy is installed"
    elif request.param == "broken":
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "cupy", raising=False)
        (tmp_path / "cupy.py").write_text("raise ImportError('libnvrtc.so.13: cannot open shared object file')")
        yield "CuPy does not import: libnvrtc"
    elif request.param == "driver too old":
        monkeypatch.setitem(sys.modules, "cupy", fake_cupy(getDeviceCount=broken_driver))
        yield "cudaErrorInsufficientDriver"
    else:
        monkeypatch.setitem(sys.modules, "cupy", fake_cupy(getDeviceCount=lambda: 0))
        yield "there is no CUDA device"


def test_auto_takes_the_cpu_where_no_gpu_works_and_says_why_where_one_is_there(
    useless_cupy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest_room, "_nvidia_gpu_is_here", lambda: True)
    chosen = select("auto", threads=3)
    assert chosen.device == "cpu"
    assert chosen.description.startswith("CPU, 3 threads (")
    assert useless_cupy in chosen.description


def test_who_has_no_gpu_is_not_told_about_cupy(useless_cupy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest_room, "_nvidia_gpu_is_here", lambda: False)
    assert select("auto", threads=3).description == "CPU, 3 threads"


def test_cuda_is_refused_where_no_gpu_works_with_what_cupy_said(useless_cupy: str) -> None:
    with pytest.raises(UsageError, match=useless_cupy):
        select("cuda")


def test_another_device_is_refused() -> None:
    with pytest.raises(UsageError, match="no device 'tpu': expected auto, cpu or cuda"):
        select("tpu")


def test_the_cpu_names_its_threads() -> None:
    assert select("cpu", threads=1).description == "CPU"


def test_importing_the_room_imports_neither_cupy_nor_torch() -> None:
    code = "import sys, tierewrite.digest, tierewrite.digest.cuda; print({'cupy', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_host_bytes_are_a_view() -> None:
    data = np.arange(10, dtype=np.float64)
    host_bytes(data)[0] = 7
    assert data.view(np.uint8)[0] == 7


def test_a_host_buffer_is_writable_and_starts_on_a_page(digester: Digester) -> None:
    buffer = digester.host_buffer(MIB + 1)
    buffer[-1] = 1
    assert buffer.nbytes == MIB + 1
    assert buffer.ctypes.data % 4096 == 0


# ---------------------------------------------------------------- on the GPU only


class TestOnTheGpu:
    pytestmark = needs_gpu

    def test_auto_takes_it_and_names_it(self, gpu: cuda_room.CudaDigester) -> None:
        chosen = select("auto")
        assert chosen.device == "cuda"
        assert "CuPy" in chosen.description

    def test_cupy_arrays_are_hashed_where_they_are(self, gpu: cuda_room.CudaDigester, noise: bytes) -> None:
        cupy = pytest.importorskip("cupy")
        there = cupy.asarray(np.frombuffer(noise, np.uint8))
        spans = [(n * 37 % 101, n) for n in range(5001)] + [(i, len(noise) - 40 + i) for i in range(20)]
        found = gpu.digest_many(there, spans)
        assert found == [blake3(noise[start : start + n]).digest() for start, n in spans]
        arrays = [there[1:1000], cupy.float32(2.5).reshape(()), cupy.empty((0, 3)), there[: 8 * MIB].view(np.float16)]
        assert gpu.digest_arrays(arrays) == [blake3(array.tobytes()).digest() for array in arrays]

    def test_every_gpu_hashes_its_own_arrays_and_its_share_of_a_stream(
        self, gpu: cuda_room.CudaDigester, noise: bytes
    ) -> None:
        cupy = pytest.importorskip("cupy")
        arrays = []
        for i, one in enumerate(gpu.gpus * 2):
            with cupy.cuda.Device(one.number):
                arrays.append(cupy.asarray(np.frombuffer(noise[i : i + 3 * MIB], np.uint8)))
        expected = [blake3(noise[i : i + 3 * MIB]).digest() for i in range(len(arrays))]
        assert gpu.digest_arrays(arrays) == expected
        with gpu.stream(4 * MIB) as stream:
            cells = [stream._cells.take() for _ in range(cuda_stream._GROUP * len(gpu.gpus))]
            assert {cell.share.gpu.number for cell in cells} == {one.number for one in gpu.gpus}
        tensors = [noise[i : i + 3 * MIB + 7 * i] for i in range(24 * len(gpu.gpus))]
        found = streamed(gpu, tensors, 4 * MIB)
        assert found == {i: blake3(data).digest() for i, data in enumerate(tensors)}

    def test_a_stream_gives_its_memory_back_to_the_device(self, gpu: cuda_room.CudaDigester, noise: bytes) -> None:
        cupy = pytest.importorskip("cupy")
        cupy.get_default_memory_pool().free_all_blocks()
        free, _ = cupy.cuda.runtime.memGetInfo()
        with gpu.stream(8 * MIB) as stream:
            for turn in range(20):
                stream.update(np.frombuffer(noise, np.uint8)[: 8 * MIB], [(turn, 0, 8 * MIB, 8 * MIB, 0)]).wait()
            assert cupy.cuda.runtime.memGetInfo()[0] < free - 128 * MIB
        assert cupy.cuda.runtime.memGetInfo()[0] >= free - 32 * MIB

    def test_torch_tensors_of_any_dtype_are_hashed_where_they_are(self, gpu: cuda_room.CudaDigester) -> None:
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("this torch has no CUDA")
        base = torch.randn(3000, 77, device="cuda", requires_grad=True)
        tensors = [base, base.to(torch.bfloat16), base.to(torch.float8_e4m3fn), base > 0, base.sum(), base[1:5, :],
                   torch.empty(0, 4, device="cuda"), base.to(torch.bfloat16).cpu(), base.reshape(-1)[3:]]  # fmt: skip
        expected = [blake3(t.detach().reshape(-1).view(torch.uint8).cpu().numpy().tobytes()).digest() for t in tensors]
        assert gpu.digest_arrays(tensors) == expected
        assert [gpu.digest(tensor) for tensor in tensors] == expected

    def test_work_queued_on_torchs_own_stream_is_waited_for(self, gpu: cuda_room.CudaDigester) -> None:
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("this torch has no CUDA")
        with torch.cuda.stream(torch.cuda.Stream()):
            tensor = torch.zeros(1 << 24, device="cuda")
            for _ in range(300):
                tensor += 1
            found = gpu.digest(tensor)
        assert found == blake3(np.full(1 << 24, 300, np.float32).tobytes()).digest()

    def test_arrays_that_are_not_contiguous_are_refused(self, gpu: cuda_room.CudaDigester) -> None:
        cupy = pytest.importorskip("cupy")
        with pytest.raises(ValueError, match="not contiguous"):
            gpu.digest(cupy.zeros((30, 40)).T)

    def test_tensors_larger_than_a_batch(
        self, gpu: cuda_room.CudaDigester, noise: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cupy = pytest.importorskip("cupy")
        monkeypatch.setattr(cuda_device, "_RESIDENT_CHUNKS", 2048)
        there = cupy.asarray(np.frombuffer(noise, np.uint8))
        lengths = [5, MIB, 2 * MIB, 2 * MIB + 1, 9 * MIB - 8, 0, 4 * MIB, 700_000, 1_500_000, 7 * MIB + 1, 3]
        spans = [(i % 8, n) for i, n in enumerate(lengths)]
        found = gpu.digest_many(there, spans)
        assert found == [blake3(noise[start : start + n]).digest() for start, n in spans]

    def test_a_tensor_over_a_gibibyte_needs_three_levels(self, gpu: cuda_room.CudaDigester, noise: bytes) -> None:
        cupy = pytest.importorskip("cupy")
        there = cupy.resize(cupy.asarray(np.frombuffer(noise, np.uint8)), (1 << 30) + (5 << 20) + 321)
        assert gpu.digest(there) == blake3(there.get(), max_threads=blake3.AUTO).digest()

    def test_too_little_memory_is_a_device_failure(self, gpu: cuda_room.CudaDigester) -> None:
        with gpu.stream(1 << 42) as stream, pytest.raises(DeviceFailed, match="allocating buffers failed on the GPU"):
            stream.update(np.zeros(8, np.uint8), [Span(0, 0, 8, 8, 0)])
        assert gpu.digest(b"still there") == blake3(b"still there").digest()
