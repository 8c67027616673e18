"""How fast digests are on a CUDA GPU, beside what the hardware takes to move the same bytes, in one run.

    python tests/benchmarks/digest_gpu.py [--gib 8] [--file-gib 24] [--folder DIR] [--json FILE]

Data on the GPU: CUDA events around the kernels, and the wall clock around the whole call. From a file in the page
cache: reader threads, pinned buffers, copies to the GPU and hashing overlap; beside it, in the same run, reading alone
and copying alone. Medians; random data; a digest of each kind is checked against the blake3 package. In a small file
(8 GiB) the largest tensor, whose pieces one thread reads in their order, would be all that counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from tierewrite.digest import Span
from tierewrite.digest.cuda import CudaDigester
from tierewrite.digest.schedule import schedule
from tierewrite.output.buffers import Buffers
from tierewrite.output.result import BUFFER_BYTES
from tierewrite.source.threads import io_threads

GB = 1e9
GIB = 1 << 30

Step = tuple[int, int, Any]
"""File offset, bytes, and what is there: tuples like `Span`, or int64 (n, 5)."""


def mixed_lengths() -> list[int]:
    """Byte lengths like those of the experts of a 26B-A4B NVFP4 export: 46,080 tensors, half of them scalars.

    In the order of a safetensors file, by dtype: of 30 layers x 128 experts x 3 projections of 704 x 2816 the
    weight_scale_2 and input_scale (4 bytes each), then the embedding (262,144 x 2816, BF16) and four matrices of
    32 MiB, then the experts' scales (1/16 byte a weight) and packed weights (1/2).
    """
    modules = 30 * 128 * 3
    size = 704 * 2816
    big = [262_144 * 2816 * 2] + [32 << 20] * 4
    return [4] * (2 * modules) + big + [size // 16, size // 2] * modules


def events(cupy: Any, work: Callable[[], object], runs: int = 15) -> float:
    """Median seconds of GPU time of `work`, which enqueues on the current stream."""
    for _ in range(2):
        work()
    times = []
    for _ in range(runs):
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(begin, end) / 1e3)
    return statistics.median(times)


def wall(work: Callable[[], object], runs: int = 5) -> float:
    """Median seconds on the wall clock."""
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def resident(digester: CudaDigester, gib: float) -> list[dict[str, Any]]:
    """Data on the GPU: a copy, large tensors, the mixed batch, and both at awkward addresses."""
    cupy = digester._cupy
    gpu = digester.gpus[0]
    lengths = mixed_lengths()
    size = max(int(gib * GIB), sum(lengths)) + 64
    words = cupy.arange(size // 8 + 1, dtype=np.uint64)  # mixed well enough that no two chunks are alike
    words *= np.uint64(0x9E3779B97F4A7C15)
    words ^= words >> np.uint64(29)
    data = words.view(np.uint8)
    other = cupy.empty_like(words)
    seconds = events(cupy, lambda other=other: cupy.copyto(other, words))  # type: ignore[misc]
    copied = 2 * words.nbytes / seconds / GB
    rows = [{"what": "copy on the device, read + written", "bytes": 2 * words.nbytes, "GB/s": copied}]
    del other
    starts = np.cumsum([0, *lengths[:-1]]).astype(np.uint64)
    large = int(gib * GIB)
    plain = -(-large // (256 << 20))
    cases: list[tuple[str, Any, Any]] = [
        ("one tensor", np.array([0], np.uint64), np.array([min(large, 4 * GIB - 1024)], np.uint64)),
        (
            f"{plain} tensors of 256 MiB",
            np.arange(plain, dtype=np.uint64) << np.uint64(28),
            np.full(plain, 256 << 20, np.uint64),
        ),
        (f"{len(lengths):,} mixed tensors", starts, np.array(lengths, np.uint64)),
    ]
    for name, start, length in cases:
        for shift in (0, 4, 3):
            address = start + np.uint64(data.data.ptr + shift)
            plan = schedule(address, length, np.zeros_like(length), np.ones(len(length), bool))
            table = cupy.asarray(plan.table)
            scratch = cupy.empty(32 * (plan.chunks + plan.groups), np.uint8)
            out = cupy.empty((plan.jobs, 32), np.uint8)

            def launch(plan: Any = plan, table: Any = table, scratch: Any = scratch, out: Any = out) -> None:
                gpu.launch(plan, table.data.ptr, scratch.data.ptr, out.data.ptr)

            seconds = events(cupy, launch)
            total = int(length.sum())
            for i in {0, len(length) // 2, len(length) - 1}:
                begin = int(start[i]) + shift
                expected = blake3(data[begin : begin + int(length[i])].get().data, max_threads=blake3.AUTO).digest()
                assert out[i].get().tobytes() == expected, (name, shift, i)
            row = {"what": f"{name}, {shift} past alignment", "bytes": total, "GB/s": total / seconds / GB}
            rows.append({**row, "of the copy": total / seconds / GB / copied})
        spans = np.stack([start, length], axis=1).astype(np.int64)
        seconds = wall(lambda spans=spans: digester.digest_many(data, spans))  # type: ignore[misc]
        rows.append({"what": f"{name}, digest_many, wall", "bytes": total, "GB/s": total / seconds / GB})
    return rows


def sequences(lengths: list[int], buffer_size: int) -> list[list[Step]]:
    """Work for threads: steps (file offset, bytes, spans), of which each fills a buffer at most.

    A sequence is one step with many tensors, or the steps of one tensor larger than a buffer; these come first.
    """
    large: list[list[Step]] = []
    small: list[list[Step]] = []
    spans: list[Span] = []
    at = begin = 0
    for tensor, length in enumerate([*lengths, buffer_size + 1]):  # the last one stands for the end
        if spans and at - begin + length > buffer_size:
            small.append([(begin, at - begin, np.array(spans, np.int64))])  # as the pass hands them over
            spans = []
        if not spans:
            begin = at
        if length <= buffer_size:
            spans.append(Span(tensor, at - begin, length, length, 0))
        elif tensor < len(lengths):
            steps = range(0, length, buffer_size)
            sizes = [min(buffer_size, length - step) for step in steps]
            large.append([(at + s, n, [Span(tensor, 0, n, length, s)]) for s, n in zip(steps, sizes, strict=True)])
        at += length
    return large + small


def from_file(digester: CudaDigester, path: Path, threads: int) -> list[dict[str, Any]]:
    """A file in the page cache through pinned buffers, as in a pass: reading, copying and all together."""
    cupy = digester._cupy
    size = path.stat().st_size
    lengths = mixed_lengths()
    lengths *= size // sum(lengths) + 1
    ends = np.cumsum(lengths)
    keep = int(np.searchsorted(ends, size, side="right"))
    lengths = [*lengths[:keep], size - int(ends[keep - 1])]  # the last one takes what is left of the file
    work = sequences(lengths, BUFFER_BYTES)
    assert sum(nbytes for steps in work for _, nbytes, _ in steps) == size
    buffers = Buffers(digester, threads)
    file = os.open(path, os.O_RDONLY)

    def passes(hand_over: Callable[[Any, Any], Any]) -> None:
        """Threads take sequences, and read the steps of each into buffers."""
        lock = threading.Lock()
        upcoming = iter(work)
        failures: list[BaseException] = []

        def reader() -> None:
            try:
                while not failures:
                    with lock:
                        steps = next(upcoming, None)
                    if steps is None:
                        break
                    for offset, nbytes, spans in steps:
                        with buffers.one() as buffer:
                            done = 0
                            while done < nbytes:
                                done += os.preadv(file, [buffer.array.data[done:nbytes]], offset + done)
                            buffer.ticket = hand_over(buffer.array[:nbytes], spans)
            except BaseException as error:
                failures.append(error)

        crew = [threading.Thread(target=reader) for _ in range(threads)]
        for thread in crew:
            thread.start()
        for thread in crew:
            thread.join()
        if failures:
            raise failures[0]

    found: dict[int, bytes] = {}

    def everything() -> None:
        with digester.stream(BUFFER_BYTES) as stream:
            passes(stream.update)
            found.update(stream.finish())

    reading = wall(lambda: passes(lambda *_: None))
    there = cupy.empty(BUFFER_BYTES, np.uint8)
    pinned = [digester.host_buffer(BUFFER_BYTES) for _ in range(threads)]
    queue = cupy.cuda.Stream(non_blocking=True)
    runtime = cupy.cuda.runtime

    def copies() -> None:
        for i in range(256):
            here = pinned[i % threads].ctypes.data
            runtime.memcpyAsync(there.data.ptr, here, BUFFER_BYTES, runtime.memcpyHostToDevice, queue.ptr)
        queue.synchronize()

    copying = wall(copies)
    hashing = wall(everything)
    os.close(file)
    with path.open("rb") as source:  # the first large tensor and the last one
        for i in {len(lengths) - 1, next(i for i, n in enumerate(lengths) if n > 1000)}:
            source.seek(sum(lengths[:i]))
            hasher = blake3(max_threads=blake3.AUTO)
            for begin in range(0, lengths[i], 64 << 20):
                hasher.update(source.read(min(64 << 20, lengths[i] - begin)))
            assert found[i] == hasher.digest(), f"tensor {i}"
    assert len(found) == len(lengths)
    floor = min(size / reading, 256 * BUFFER_BYTES / copying) / GB
    return [
        {"what": f"reading alone, {threads} threads", "bytes": size, "GB/s": size / reading / GB},
        {"what": "copying to the GPU alone", "bytes": 256 * BUFFER_BYTES, "GB/s": 256 * BUFFER_BYTES / copying / GB},
        {
            "what": f"file -> pinned -> GPU -> {len(lengths):,} digests",
            "bytes": size,
            "GB/s": size / hashing / GB,
            "of the slower": size / hashing / GB / floor,
        },
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=8, help="GiB of large tensors on the GPU")
    parser.add_argument("--file-gib", type=float, default=24, help="GiB of the file; 0 leaves that part out")
    parser.add_argument("--folder", help="where to make the file (default: the system's temporary folder)")
    parser.add_argument("--threads", type=int, default=io_threads(), help="reader threads (default: as in a pass)")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    begin = time.perf_counter()
    digester = CudaDigester()
    print(f"{digester.description}; ready after {time.perf_counter() - begin:.2f} s")
    rows = resident(digester, args.gib) if args.gib else []
    digester._cupy.get_default_memory_pool().free_all_blocks()
    if args.file_gib:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            path = Path(folder) / "data"
            block = np.random.default_rng(5).integers(0, 1 << 62, (256 << 20) // 8 + 1, dtype=np.int64).view(np.uint8)
            with path.open("wb") as file:  # blocks of an odd length, so that no two chunks are alike by position
                left = int(args.file_gib * GIB)
                while left:
                    left -= file.write(block[: min(left, len(block) - 5)])
            rows += from_file(digester, path, args.threads)
    for row in rows:
        ratios = "".join(f"  {value:5.1%} {key}" for key, value in row.items() if key.startswith("of "))
        print(f"{row['what']:<48} {row['bytes'] / GB:8.2f} GB {row['GB/s']:9.1f} GB/s{ratios}")
    if args.json:
        Path(args.json).write_text(json.dumps({"device": digester.description, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
