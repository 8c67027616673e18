"""What limits a rewrite on many nodes: measured on one machine with 1 and 2 Ray workers, simulated for a terabyte.

Measures a rewrite of a synthetic checkpoint by the local engine and by Ray clusters of one and of two nodes of one CPU
(real Ray nodes, on this machine), each in a process of its own, alternating. A first run on one worker, which is not
counted, gives the rates: bytes read and hashed a second by one CPU, bytes read, hashed and written a second by one
CPU, seconds a task besides, seconds a tensor of planning, seconds of everything else. From these rates the model says
how long the counted runs should have taken (printed beside what they took), and how long a larger checkpoint takes.
With --work on a file system in memory the rates are those of the CPU, as the model wants them; on a disk that one CPU
can fill, two workers share the disk.

The model (`simulate`), all there is to it:
- The driver plans alone; its time grows with the number of tensors. The workers start; then tasks to hash run, then
  those that write, then the driver commits; each waits for all of the one before.
- A task is taken by the CPU that is free first, the largest tasks first (list scheduling, as Ray does it). It takes
  the overhead, then moves its bytes at its CPU's rate; written bytes go over the network twice (in and out).
- The tasks of a node share its network, all tasks share the storage's aggregate bandwidth, evenly, both ways together.
- Nothing else is modelled: no cold caches, no metadata servers, no stragglers, no failures, no verification.

    python -m tests.benchmarks.scale                              measure, check the model, simulate
    python -m tests.benchmarks.scale --bandwidth 5 20 100 --network 12.5 --cpus 16 --json scale.json
    python -m tests.benchmarks.scale --from scale.json --size 4e12   simulate again from these rates
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import heapq
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tierewrite
from tests.benchmarks.generate import PRESETS, Generated, generate
from tierewrite.engines import open_engine
from tierewrite.engines.on_ray import hash_batch
from tierewrite.engines.progress import Progress
from tierewrite.output.jobs import hash_jobs
from tierewrite.source.folder import open_folder

SCHEMA = "tierewrite/scale/1"
GB = 1e9
NODES = (1, 4, 16, 64)
ROOT = Path(__file__).resolve().parents[2]
SMALL_TASKS = 64


@dataclass(frozen=True)
class Rates:
    """What one CPU and the driver do, as measured.

    Attributes:
        hash_rate: bytes read and hashed, a second and CPU.
        write_rate: bytes read, hashed where wanted, written and flushed, a second and CPU.
        task_seconds: what a task costs besides.
        start_seconds: until the workers' processes are there, all at a time.
        tensor_seconds: planning, a tensor of the source.
        other_seconds: starting, connecting, side files, index, manifest, commit, shutting down.
        hashed, written: bytes that are only hashed and bytes that are written, each by bytes of the source.
    """

    hash_rate: float
    write_rate: float
    task_seconds: float
    start_seconds: float
    tensor_seconds: float
    other_seconds: float
    hashed: float
    written: float


@dataclass(frozen=True)
class Place:
    """Where the work is done.

    Attributes:
        nodes: how many.
        cpus: tasks at a time, each.
        network: bytes a second, each, in and out together.
        bandwidth: bytes a second of the storage, in and out together, of all nodes.
    """

    nodes: int
    cpus: int
    network: float = float("inf")
    bandwidth: float = float("inf")


@dataclass(frozen=True)
class Forecast:
    """Seconds, and what they are bound by."""

    seconds: float
    planning: float
    hashing: float
    writing: float
    bound: str


@dataclass(frozen=True)
class Work:
    """One phase: bytes of its tasks, each CPU's rate, and how often a byte goes over the network."""

    tasks: Sequence[float]
    rate: float
    crossings: int


def makespan(work: Work, place: Place, overhead: float) -> float:
    """Seconds until the last of the tasks ends."""
    waiting = sorted(work.tasks)
    free = [(slot, node) for slot in range(place.cpus) for node in range(place.nodes)]  # spread over the nodes
    heapq.heapify(free)
    left: dict[tuple[int, int], float] = {}  # slot -> bytes
    starting: dict[tuple[int, int], float] = {}  # slot -> seconds of overhead left
    now = 0.0
    while waiting or left or starting:
        while waiting and free:
            slot = heapq.heappop(free)
            left[slot], starting[slot] = waiting.pop(), overhead
        moving = [slot for slot in left if slot not in starting]
        speed = _speeds(Counter(node for _, node in moving), work, place)
        ends = [left[slot] / speed[slot[1]] for slot in moving]
        step = min([*ends, *starting.values()])
        now += step
        for slot in moving:
            left[slot] -= step * speed[slot[1]]
            if left[slot] <= 1e-6 * work.rate:
                del left[slot]
                heapq.heappush(free, slot)
        for slot in list(starting):
            starting[slot] -= step
            if starting[slot] <= 1e-9:
                del starting[slot]
    return now


def _speeds(moving: Counter[int], work: Work, place: Place) -> dict[int, float]:
    """Bytes a second of each task, by node: what CPU, network and storage all allow."""
    fits = {node: min(work.rate, place.network / (tasks * work.crossings)) for node, tasks in moving.items()}
    traffic = sum(fits[node] * tasks * work.crossings for node, tasks in moving.items())
    share = min(1.0, place.bandwidth / traffic) if traffic else 1.0
    return {node: speed * share for node, speed in fits.items()}


def simulate(rates: Rates, place: Place, size: float, shard: float, tensors: int) -> Forecast:
    """How long a rewrite of `size` bytes takes, into shards of `shard` bytes."""
    hashed, written = size * rates.hashed, size * rates.written
    hashing = Work(_split(hashed, hash_batch(int(hashed), place.nodes * place.cpus)), rates.hash_rate, 1)
    writing = Work(_split(written, shard), rates.write_rate, 2)
    return forecast(rates, place, hashing, writing, tensors)


def forecast(rates: Rates, place: Place, hashing: Work, writing: Work, tensors: int) -> Forecast:
    planning = tensors * rates.tensor_seconds
    times = [makespan(work, place, rates.task_seconds) for work in (hashing, writing)]
    alone = planning + rates.start_seconds + rates.other_seconds
    least: dict[str, float] = {"planning, starting, committing": alone}
    for work in (hashing, writing):
        crossing = sum(work.tasks) * work.crossings
        for name, seconds in (
            ("storage", crossing / place.bandwidth),
            ("network", crossing / (place.network * place.nodes)),
            ("CPUs", sum(work.tasks) / work.rate / (place.nodes * place.cpus)),
            ("shards too large", max(work.tasks, default=0.0) / work.rate),
        ):
            least[name] = least.get(name, 0.0) + seconds
    bound = max(least, key=lambda name: least[name])
    return Forecast(alone + sum(times), planning, times[0], times[1], bound)


def _split(total: float, part: float) -> list[float]:
    whole, rest = divmod(total, part)
    return [part] * int(whole) + ([rest] if rest > 0 else [])


# ------------------------------------------------------------------------------------------------- measuring


class Phases(Progress):
    """Notes when each phase begins and its last byte has moved."""

    def __init__(self) -> None:
        self.seen: dict[str, dict[str, Any]] = {}

    def start(self, phase: str, total: int) -> None:
        now = time.perf_counter()
        self.now = self.seen[phase] = {"begun": now, "ended": now, "total": total, "tasks": []}

    def advance(self, nbytes: int) -> None:
        if nbytes:
            self.now["ended"] = time.perf_counter()
            self.now["tasks"].append(nbytes)


def one_run(arguments: dict[str, Any]) -> dict[str, Any]:
    """A rewrite by Ray, in this process; with `calibrate` also many small tasks."""
    phases = Phases()
    small = {}
    with contextlib.ExitStack() as stack:
        if arguments["calibrate"]:
            # What `rewrite` then uses too, so that its own tasks find their workers started.
            import ray

            ray.init(address=arguments["address"], log_to_driver=False, logging_level="ERROR")
            stack.callback(ray.shutdown)
            small = small_tasks(Path(arguments["src"]))
        started = time.perf_counter()
        tierewrite.rewrite(
            arguments["src"],
            arguments["dst"],
            ties=arguments["ties"],
            max_shard_size=arguments["shard"],
            engine="ray",
            ray_address=None if arguments["calibrate"] else arguments["address"],
            progress=phases,
        )
    hashing, writing = phases.seen["hashing"], phases.seen["rewriting"]
    return {
        **small,
        "before": hashing["begun"] - started,
        "hashing": hashing["ended"] - hashing["begun"],
        "writing": writing["ended"] - writing["begun"],
        "hashed": hashing["tasks"],
        "written": writing["tasks"],
    }


def small_tasks(src: Path) -> dict[str, float]:
    """Seconds a task that does next to nothing, until the workers are there, and of finding this out."""
    begun = time.perf_counter()
    checkpoint = open_folder(src)
    smallest = sorted(checkpoint.tensors.values(), key=lambda entry: entry.nbytes)[:SMALL_TASKS]
    jobs = [job for entry in smallest for job in hash_jobs(checkpoint, [entry.name], 1)]
    with open_engine("ray") as engine:
        rounds = [time.perf_counter()]
        for _ in range(2):
            engine.run_jobs(jobs, "small tasks")
            rounds.append(time.perf_counter())
    first, second = rounds[1] - rounds[0], rounds[2] - rounds[1]
    seconds = time.perf_counter() - begun
    return {"task_seconds": second / len(jobs), "start_seconds": first - second, "small_seconds": seconds}


@contextlib.contextmanager
def cluster(workers: int) -> Iterator[str]:
    """A Ray cluster of so many nodes of one CPU, and a head that does no work; its address."""
    from ray.cluster_utils import Cluster

    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([before] if before else [])])
    try:
        made = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 100 << 20},
        )
        for _ in range(workers):
            made.add_node(num_cpus=1, object_store_memory=100 << 20)
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before
    try:
        yield made.address
    finally:
        made.shutdown()


def ray_run(made: Generated, dst: Path, address: str, shard: int, calibrate: bool = False) -> dict[str, Any]:
    arguments = {
        "src": str(made.path), "dst": str(dst), "ties": str(made.ties_file), "shard": shard, "address": address,
        "calibrate": calibrate,
    }  # fmt: skip
    wall, out = timed([sys.executable, "-m", "tests.benchmarks.scale", "--one", json.dumps(arguments)], dst)
    return {"wall": wall, **json.loads(out)}


def local_run(made: Generated, dst: Path, shard: int) -> dict[str, Any]:
    argv = [sys.executable, "-m", "tierewrite", "rewrite", str(made.path), str(dst), "--quiet"]
    wall, _ = timed([*argv, "--ties", str(made.ties_file), "--max-shard-size", str(shard)], dst)
    return {"wall": wall}


def timed(argv: list[str], dst: Path) -> tuple[float, str]:
    """Wall seconds of a command that makes `dst`, and what it printed; `dst` is removed."""
    os.sync()
    begun = time.perf_counter()
    done = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    wall = time.perf_counter() - begun
    shutil.rmtree(dst)
    return wall, done.stdout


def measure(made: Generated, work: Path, shard: int, repeats: int) -> tuple[Rates, dict[str, list[dict[str, Any]]]]:
    """The rates, and every counted run by its name."""
    runs: dict[str, list[dict[str, Any]]] = {"local": [], "ray, 1 worker": [], "ray, 2 workers": []}
    for path in made.path.iterdir():
        path.read_bytes()  # into the page cache
    dst = work / "out"
    rates = None
    for _ in range(repeats):
        runs["local"].append(local_run(made, dst, shard))
        for workers, name in ((1, "ray, 1 worker"), (2, "ray, 2 workers")):
            with cluster(workers) as address:
                rates = rates or rates_of(ray_run(made, dst, address, shard, calibrate=True), made)
                runs[name].append(ray_run(made, dst, address, shard))
    assert rates is not None
    return rates, runs


def rates_of(run: dict[str, Any], made: Generated) -> Rates:
    overhead: float = run["task_seconds"]

    def rate(phase: str, tasks: list[int]) -> float:
        return sum(tasks) / max(1e-9, run[phase] - overhead * len(tasks))

    return Rates(
        hash_rate=rate("hashing", run["hashed"]),
        write_rate=rate("writing", run["written"]),
        task_seconds=overhead,
        start_seconds=run["start_seconds"],
        tensor_seconds=run["before"] / made.tensors,
        other_seconds=run["wall"] - sum(run[part] for part in ("small_seconds", "before", "hashing", "writing")),
        hashed=sum(run["hashed"]) / made.data_bytes,
        written=sum(run["written"]) / made.data_bytes,
    )


def checked(rates: Rates, runs: dict[str, list[dict[str, Any]]], made: Generated) -> list[dict[str, Any]]:
    """Each counted kind of run: median, range, and what the model says."""
    rows = []
    for name, found in runs.items():
        walls = [run["wall"] for run in found]
        row: dict[str, Any] = {"run": name, "wall": statistics.median(walls), "range": [min(walls), max(walls)]}
        if name != "local":
            workers = int(name.split()[1])
            said = forecast(
                rates,
                Place(workers, 1),
                Work(found[0]["hashed"], rates.hash_rate, 1),
                Work(found[0]["written"], rates.write_rate, 2),
                made.tensors,
            )
            for phase in ("hashing", "writing"):
                # A run's first tasks wait for their workers, which the model counts by itself.
                row[phase] = statistics.median(run[phase] for run in found)
                row[f"{phase} predicted"] = getattr(said, phase) + (rates.start_seconds if phase == "hashing" else 0)
            row["predicted"] = said.seconds
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------------- telling


def tell_measured(rows: list[dict[str, Any]], rates: Rates) -> None:
    print(
        f"one CPU: {rates.hash_rate / GB:.2f} GB/s read and hashed, {rates.write_rate / GB:.2f} GB/s read, hashed and "
        f"written; {rates.task_seconds * 1e3:.0f} ms a task; planning {rates.tensor_seconds * 1e6:.0f} us a tensor; "
        f"{rates.start_seconds:.1f} s until the workers have started; {rates.other_seconds:.1f} s else"
    )
    print(f"of a source's bytes {rates.hashed:.0%} are hashed only and {rates.written:.0%} written\n")
    print("| | wall, median (range) | predicted | hashing | predicted | writing | predicted |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        low, high = row["range"]
        cells = [row["run"], f"{row['wall']:.1f} s ({low:.1f} to {high:.1f})"]
        for key in ("predicted", "hashing", "hashing predicted", "writing", "writing predicted"):
            cells.append(f"{row[key]:.1f} s" if key in row else "")
        print(f"| {' | '.join(cells)} |")


def simulated(rates: Rates, options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for nodes in NODES:
        for bandwidth in options.bandwidth:
            place = Place(nodes, options.cpus, options.network * GB, bandwidth * GB)
            said = simulate(rates, place, options.size, options.shard_size, options.tensors)
            rows.append({"nodes": nodes, "bandwidth": bandwidth, **dataclasses.asdict(said)})
    return rows


def tell_simulated(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    print(
        f"\nsimulated: {options.size / 1e12:g} TB in {options.tensors:,} tensors, shards of "
        f"{options.shard_size / GB:g} GB; nodes of {options.cpus} CPUs as fast as the one measured, each with "
        f"{options.network:g} GB/s of network; the storage's bandwidth is in and out together; minutes, and what binds "
        "most\n"
    )
    print(f"| nodes | {' | '.join(f'{b:g} GB/s storage' for b in options.bandwidth)} |")
    print(f"|---|{'---|' * len(options.bandwidth)}")
    for nodes in NODES:
        cells = [f"{row['seconds'] / 60:.1f} ({row['bound']})" for row in rows if row["nodes"] == nodes]
        print(f"| {nodes} | {' | '.join(cells)} |")


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), default="1.8gb", help="what is measured")
    parser.add_argument("--measured-shard", type=float, default=100e6, help="its output's shards, bytes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder for checkpoints (default: a temporary one)")
    parser.add_argument("--from", dest="given", type=Path, metavar="FILE", help="take the rates of an earlier --json")
    parser.add_argument("--bandwidth", type=float, nargs="+", default=[5, 20, 100], help="of the storage, GB/s")
    parser.add_argument("--network", type=float, default=12.5, help="of each node, GB/s (12.5: 100 Gb/s)")
    parser.add_argument("--cpus", type=int, default=16, help="tasks at a time on each node")
    parser.add_argument("--hash-rate", type=float, help="GB/s and CPU, instead of what was measured")
    parser.add_argument("--write-rate", type=float, help="GB/s and CPU, instead of what was measured")
    parser.add_argument("--size", type=float, default=1e12, help="bytes of the checkpoint")
    parser.add_argument("--shard-size", type=float, default=5e9, help="bytes of its output's shards")
    parser.add_argument("--tensors", type=int, default=500_000, help="in the checkpoint")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parsed(argv)
    if options.one:
        print(json.dumps(one_run(json.loads(options.one))))
        return 0
    rows: list[dict[str, Any]] = []
    runs: dict[str, list[dict[str, Any]]] = {}
    if options.given is not None:
        rates = Rates(**json.loads(options.given.read_text())["rates"])
    else:
        with tempfile.TemporaryDirectory(dir=options.work, prefix="tierewrite-scale-") as folder:
            made = generate(Path(folder) / "naive", options.preset)
            print(f"{options.preset}: {made.data_bytes / GB:.2f} GB in {made.tensors:,} tensors, {os.cpu_count()} CPUs")
            rates, runs = measure(made, Path(folder), int(options.measured_shard), options.repeats)
        rows = checked(rates, runs, made)
        tell_measured(rows, rates)
    for name in ("hash_rate", "write_rate"):
        if (given := getattr(options, name)) is not None:
            rates = dataclasses.replace(rates, **{name: given * GB})
    forecasts = simulated(rates, options)
    tell_simulated(forecasts, options)
    if options.json is not None:
        answer = {
            "schema": SCHEMA, "rates": dataclasses.asdict(rates), "measured": rows, "runs": runs,
            "simulated": forecasts, "options": {k: v for k, v in vars(options).items() if not isinstance(v, Path)},
        }  # fmt: skip
        options.json.write_text(json.dumps(answer, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
