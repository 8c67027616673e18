"""`check --values` against reading the same files, as a ratio: `python -m tests.benchmarks.values DIR`.

Files that are in the page cache show the arithmetic, others the disk. Both read with the same threads and pieces.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from tierewrite.consumers.folder import Folder
from tierewrite.consumers.values import PIECE, kind_of, read_values
from tierewrite.source.bytes import open_source
from tierewrite.source.table import Shard
from tierewrite.source.threads import io_threads


def read_alone(folder: Folder) -> None:
    """Reads all shards in pieces, in threads, and does nothing with them."""

    def read(job: tuple[Shard, int]) -> None:
        shard, start = job
        buffer = np.empty(min(PIECE, shard.size - start), np.uint8)
        with open_source(shard) as file:
            file.read_runs([(start, start + len(buffer))], buffer.data)

    jobs = [(shard, start) for shard in folder.shards for start in range(0, shard.size, PIECE)]
    with ThreadPoolExecutor(io_threads()) as pool:
        list(pool.map(read, jobs))


def seconds(work: Callable[[], object], repeats: int) -> list[float]:
    """Wall times of `work`."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return found


def main() -> None:
    """Prints both, and their ratio."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("folder", type=Path)
    options.add_argument("--device", default="cpu", choices=["cpu", "cuda", "auto"])
    options.add_argument("--repeats", type=int, default=3)
    chosen = options.parse_args()
    folder = Folder.open(chosen.folder, "")
    kinds = {name: kind for name, entry in folder.entries.items() if (kind := kind_of(entry, folder.entries))}
    size = sum(shard.size for shard in folder.shards)
    read_alone(folder)  # into the page cache, as far as it fits
    pairs = [
        (seconds(lambda: read_alone(folder), 1)[0],
         seconds(lambda: read_values(folder, kinds, kinds, device=chosen.device), 1)[0])
        for _ in range(chosen.repeats)
    ]  # fmt: skip
    alone, looked = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"{size / 1e9:.2f} GB in {len(folder.entries):,} tensors, {io_threads()} threads, {chosen.device}")
    print(f"reading alone    {size / alone / 1e9:6.2f} GB/s")
    print(f"check --values   {size / looked / 1e9:6.2f} GB/s, {looked / alone:.2f} times the time")


if __name__ == "__main__":
    main()
