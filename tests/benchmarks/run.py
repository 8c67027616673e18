"""The timed comparisons: this tool against a durable copy and against the script that a user would write.

Every run is a process of its own (measure.py: wall, user and system time, peak memory from wait4); the cases of a
comparison alternate, round after round, in one session; the figures are medians, the ratios are ratios of medians.
Before each run the input is read once (a warm page cache) and everything written before is flushed; outputs are
deleted before the next run. Copies and the user's script are followed by `sync -f`, because a rewrite flushes too.

    bin/bench                     the main comparison, on the 2-layer 26B-A4B shape
    bin/bench --preset full       the whole 26B-A4B checkpoint (28.4 GiB in; 62 GiB of disk)
    bin/bench --image xfs         the same on an XFS (or btrfs) in a file, as root: what sharing blocks saves
    bin/bench --other CHECKOUT    with another checkout of tierewrite beside this one
    bin/bench --growth            the same bytes in 10 times the tensors; 0.5, 1, 2 and 4 GB
    bin/bench --plan              planning a checkpoint of 500,000 tensors from its headers
    bin/bench --quick             all of these in a small way: does it work?

Nothing is asserted about times. Exit 1 if one of our own runs failed, and only then.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.benchmarks import generate as generator
from tests.benchmarks.generate import Generated, generate
from tests.images import MKFS, Unavailable, mounted

HERE = Path(__file__).resolve().parent
SCHEMA = "tierewrite/bench/1"
MiB, GiB = 1 << 20, 1 << 30

GOAL_BEYOND_IMPORTS = 1.3
"""Rewriting beyond the imports, at most this many durable copies of the input."""
GOAL_PEAK = 192
"""MiB of memory above the imports, at most."""
GOAL_GROWTH = 1.5
"""10 times the tensors at the same bytes, at most this many times the cost."""
GOAL_PLAN_SECONDS, GOAL_PLAN_GB = 10.0, 1.5

BUSY = 0.15
"""Share of the CPUs in use by others above which times mean little."""


def tierewrite(*arguments: str, checkout: Path | None = None) -> list[str]:
    """A command line of this checkout's, or of another one."""
    first = f"import sys; sys.path.insert(0, {str(checkout)!r}); " if checkout is not None else ""
    return [sys.executable, "-c", f"{first}from tierewrite.cli import main; main()", *arguments]


@dataclass(frozen=True)
class Case:
    """One thing to time. `steps` gives its commands for a checkpoint and a place for the output."""

    name: str
    steps: Callable[[Generated, Path], list[list[str]]]
    ours: bool = False
    of_output: bool = False
    """Its input is the output of our rewrite."""
    remembered: bool = False
    """What the model class answered is remembered, by a command that is not timed; otherwise nothing is."""


@dataclass(frozen=True)
class Sample:
    case: str
    subject: str
    exit: int
    wall: float
    user: float
    system: float
    peak: int
    flush: float
    """Seconds of `wall` in the `sync -f` that followed, where one did."""
    written: int
    """Bytes of the output's files."""
    busy: float = 0.0
    """Share of the machine's CPUs that others used just before."""
    error: str = ""


@dataclass
class Figures:
    """All samples of one case on one checkpoint."""

    samples: list[Sample] = field(default_factory=list)

    @property
    def failed(self) -> Sample | None:
        return next((sample for sample in self.samples if sample.exit != 0), None)

    def median(self, what: str) -> float:
        return float(statistics.median(getattr(sample, what) for sample in self.samples))


Results = dict[str, Figures]
"""By the case's name."""


def flushed(command: list[str], target: Path) -> list[list[str]]:
    return [command, ["sync", "-f", str(target)]]


def cases(
    devices: Sequence[str],
    writers: Sequence[str] = ("save_torch_state_dict", "save_file"),
    other: Path | None = None,
) -> list[Case]:
    """The main comparison. The first case makes the output that `cp -r output` copies."""
    made: list[Case] = []
    for device in devices:
        options = ["--device", device] if device != "auto" else []
        label = f" ({device})" if len(devices) > 1 or options else ""
        made.append(
            Case(
                f"tierewrite --ties{label}",
                lambda s, out, options=options: [  # type: ignore[misc]
                    tierewrite("rewrite", str(s.path), str(out), "--ties", str(s.ties_file), *options)
                ],
                ours=True,
            )
        )
        made.append(
            Case(
                f"tierewrite{label}",
                lambda s, out, options=options: [tierewrite("rewrite", str(s.path), str(out), *options)],  # type: ignore[misc]
                ours=True,
            )
        )
        made.append(
            Case(
                f"tierewrite, class remembered{label}",
                lambda s, out, options=options: [tierewrite("rewrite", str(s.path), str(out), *options)],  # type: ignore[misc]
                ours=True,
                remembered=True,
            )
        )
    made.append(Case("imports", lambda s, out: [[sys.executable, str(HERE / "build_model.py"), str(s.path)]]))
    # a durable copy moves the bytes: cp shares them by itself where the file system can
    made.append(
        Case("cp -r input", lambda s, out: flushed(["cp", "-r", "--reflink=never", str(s.path), str(out)], out)),
    )
    made.append(
        Case(
            "cp -r output",
            lambda s, out: flushed(["cp", "-r", "--reflink=never", str(s.path), str(out)], out),
            of_output=True,
        )
    )
    made.append(
        Case(
            "cp --reflink=always output",
            lambda s, out: flushed(["cp", "-r", "--reflink=always", str(s.path), str(out)], out),
            of_output=True,
        )
    )
    ways: list[tuple[str, list[str], Path | None]] = [("--copy never", ["--copy", "never"], None)]
    if other is not None:
        ways.append((f"of {other.name}", [], other.resolve()))
    for label, extra, checkout in ways:
        made.append(
            Case(
                f"tierewrite --ties {label}",
                lambda s, out, extra=extra, checkout=checkout: [  # type: ignore[misc]
                    tierewrite("rewrite", str(s.path), str(out), "--ties", str(s.ties_file), *extra, checkout=checkout)
                ],
                ours=True,
            )
        )
    for writer in writers:
        made.append(
            Case(
                f"user's script, {writer}",
                lambda s, out, writer=writer: flushed(  # type: ignore[misc]
                    [sys.executable, str(HERE / "user_script.py"), str(s.path), str(out), writer], out
                ),
            )
        )
    return made


class Bench:
    """Runs cases in a working folder and keeps every sample."""

    def __init__(self, work: Path, console: Console, patience: float = 0.0) -> None:
        self.work = work
        self.console = console
        self.patience = patience
        self.samples: list[Sample] = []

    def run(
        self, case: Case, subject: Generated, *, name: str, source: Path | None = None, keep: Path | None = None
    ) -> Sample:
        """One timed run; its output is deleted, or moved to `keep`."""
        out = self.work / "output"
        warm(source or subject.path)
        subprocess.run(["sync", "-f", str(self.work)], check=True)
        given = subject if source is None else _moved(subject, source)
        log = self.work / "stderr.txt"
        environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "HF_HUB_OFFLINE": "1", "TIEREWRITE_CACHE": ""}
        if case.remembered:
            environment["TIEREWRITE_CACHE"] = str(self.work / "cache")
            look = tierewrite("inspect", str(given.path))
            subprocess.run(look, stdout=subprocess.DEVNULL, check=True, env=environment)
        busy = quiet(self.patience)
        answer = subprocess.run(
            [sys.executable, "-I", "-S", str(HERE / "measure.py"), json.dumps(case.steps(given, out)), str(log)],
            stdout=subprocess.PIPE,
            check=True,
            env=environment,
        )
        report = json.loads(answer.stdout)
        steps = report["steps"]
        failed = steps[-1]["exit"] != 0
        sample = Sample(
            case=case.name,
            subject=name,
            exit=steps[-1]["exit"],
            wall=sum(step["wall"] for step in steps),
            user=sum(step["user"] for step in steps),
            system=sum(step["system"] for step in steps),
            peak=max(step["peak"] for step in steps),
            flush=sum(step["wall"] for step in steps if step["argv"][0] == "sync"),
            written=size_of(out),
            busy=busy,
            error=report["stderr"] if failed else "",
        )
        self.samples.append(sample)
        log.unlink(missing_ok=True)
        if keep is not None and not failed and out.exists():
            out.rename(keep)
        elif out.exists():
            shutil.rmtree(out)
        if failed:
            style = "red" if case.ours else "yellow"  # not every file system clones
            said = sample.error.strip() if case.ours else "".join(sample.error.strip().splitlines()[-1:])
            self.console.print(f"{case.name} on {name}: exit {sample.exit}\n{said}", style=style, markup=False)
        else:
            self.console.print(f"  {name}: {case.name}: {sample.wall:.2f} s", highlight=False)
        return sample

    def rounds(self, subjects: dict[str, Generated], chosen: Sequence[Case], repeats: int) -> dict[str, Results]:
        """Every case on every checkpoint, `repeats` times, alternating; by the checkpoint's name."""
        results: dict[str, Results] = {name: {case.name: Figures() for case in chosen} for name in subjects}
        wants_output = [case for case in chosen if case.of_output]
        for turn in range(repeats):
            for name, subject in subjects.items():
                waiting = list(chosen)
                kept = self.work / "kept"
                if wants_output:  # first, so that two outputs and one input are the most there is on the disk
                    maker = next(case for case in chosen if case.ours)
                    waiting = [case for case in waiting if case is not maker and not case.of_output]
                    results[name][maker.name].samples.append(self.run(maker, subject, name=name, keep=kept))
                    for case in wants_output:
                        if kept.exists():
                            sample = self.run(case, subject, name=name, source=kept)
                            results[name][case.name].samples.append(sample)
                    shutil.rmtree(kept, ignore_errors=True)
                if waiting:  # no case always follows the same one
                    turned = turn % len(waiting)
                    waiting = waiting[turned:] + waiting[:turned]
                for case in waiting:
                    results[name][case.name].samples.append(self.run(case, subject, name=name))
        return results


@dataclass(frozen=True)
class _Moved:
    path: Path
    ties_file: Path


def _moved(subject: Generated, source: Path) -> Any:
    return _Moved(source, subject.ties_file)


def warm(folder: Path) -> None:
    """Read every file of the folder once; a file that is a hole is left alone."""
    buffer = bytearray(4 * MiB)
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.stat().st_blocks * 512 * 2 >= path.stat().st_size:
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def busy_share(seconds: float = 0.25) -> float:
    """Share of all CPU time that was not idle over the next `seconds`; 0 where /proc/stat is not there."""

    def ticks() -> tuple[int, int]:
        with open("/proc/stat") as file:
            fields = [int(field) for field in file.readline().split()[1:9]]
        return sum(fields), fields[3] + fields[4]  # everything; idle and waiting for the disk

    try:
        total, idle = ticks()
        time.sleep(seconds)
        later, idle_later = ticks()
    except OSError:
        return 0.0
    return 1 - (idle_later - idle) / max(1, later - total)


def quiet(patience: float) -> float:
    """Wait at most `patience` seconds until others leave the machine alone; returns how busy it is then."""
    deadline = time.monotonic() + patience
    busy = busy_share()
    while busy > BUSY and time.monotonic() < deadline:
        time.sleep(0.5)
        busy = busy_share()
    return busy


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0


def input_bytes(subject: Generated) -> int:
    return size_of(subject.path)


# what the figures say


def table(title: str, results: Results) -> Table:
    view = Table(title=title, title_justify="left")
    for column in ("", "wall s", "min-max", "user s", "system s", "flush s", "peak MiB", "x cp input", "x cp output"):
        view.add_column(column, justify="left" if not column else "right")
    references = [results.get("cp -r input"), results.get("cp -r output")]
    for name, figures in results.items():
        if not figures.samples:
            continue
        if figures.failed:
            view.add_row(name, f"exit {figures.failed.exit}")
            continue
        walls = [sample.wall for sample in figures.samples]
        ratios = [
            f"{figures.median('wall') / reference.median('wall'):.2f}" if reference and reference.samples else ""
            for reference in references
        ]
        flush = figures.median("flush")
        view.add_row(
            name,
            f"{figures.median('wall'):.2f}",
            f"{min(walls):.2f}-{max(walls):.2f}",
            f"{figures.median('user'):.2f}",
            f"{figures.median('system'):.2f}",
            f"{flush:.2f}" if flush else "",
            f"{figures.median('peak') / MiB:.0f}",
            *ratios,
        )
    return view


@dataclass(frozen=True)
class Finding:
    what: str
    value: float
    unit: str
    goal: float | None = None
    at_least: bool = False


def findings(subject: Generated, results: Results) -> list[Finding]:
    """What the comparison is made for, from the medians; what lacks a sample or failed is left out."""
    fine = {name: f for name, f in results.items() if f.samples and not f.failed}
    copy, imports = fine.get("cp -r input"), fine.get("imports")
    found: list[Finding] = []
    rate = input_bytes(subject) / copy.median("wall") if copy else None
    if rate:
        found.append(Finding("durable copy of the input: rate", rate / 1e9, "GB/s"))
    for name, figures in fine.items():
        if not name.startswith("tierewrite"):
            continue
        seconds = figures.median("wall")
        label = name
        asks = "--ties" not in name and "remembered" not in name
        if asks and imports:
            # peak memory: of the whole process, against a process that does nothing but the imports
            found.append(
                Finding(
                    f"{name}: memory above the imports",
                    (figures.median("peak") - imports.median("peak")) / MiB,
                    "MiB",
                    GOAL_PEAK,
                )
            )
            seconds -= imports.median("wall")
            label = f"{name} beyond importing and building the model"
            found.append(Finding(label, seconds, "s"))
        if copy and rate and seconds > 0:
            goal = GOAL_BEYOND_IMPORTS if asks else None
            found.append(Finding(f"{label}: times cp -r input", seconds / copy.median("wall"), "x", goal))
            floor = figures.median("written") / rate
            found.append(Finding(f"{label}: floor (bytes written at the copy's rate)", floor, "s"))
            found.append(Finding(f"{label}: share of the floor reached", 100 * floor / seconds, "%"))
        for user, script in fine.items():
            if user.startswith("user's script"):
                times = script.median("wall") / figures.median("wall")
                found.append(Finding(f"{user}: times {name}", times, "x"))
    return found


def growth(results: dict[str, Results], subjects: dict[str, Generated]) -> Table:
    view = Table(title="Growth", title_justify="left")
    columns = ("checkpoint", "tensors", "GB", "case", "wall s", "beyond imports s", "CPU s", "peak MiB", "x the first")
    for column in columns:
        view.add_column(column, justify="left" if column in ("checkpoint", "case") else "right")
    first: dict[str, float] = {}
    for name, by_case in results.items():
        imports = by_case.get("imports")
        for case, figures in by_case.items():
            if not figures.samples or figures.failed:
                continue
            wall = figures.median("wall")
            own = wall - imports.median("wall") if imports and imports.samples and case == "tierewrite" else wall
            view.add_row(
                name,
                f"{subjects[name].tensors:,}",
                f"{subjects[name].data_bytes / 1e9:.2f}",
                case,
                f"{wall:.2f}",
                f"{own:.2f}" if own != wall else "",
                f"{figures.median('user') + figures.median('system'):.2f}",
                f"{figures.median('peak') / MiB:.0f}",
                f"{own / first.setdefault(case, own):.2f}",
            )
    return view


def show_findings(console: Console, found: Iterable[Finding]) -> None:
    view = Table(title="Figures", title_justify="left")
    for column in ("", "figure", "goal"):
        view.add_column(column, justify="right" if column else "left")
    for finding in found:
        sign = ">=" if finding.at_least else "<="
        goal = f"{sign} {finding.goal:g} {finding.unit}" if finding.goal is not None else ""
        view.add_row(finding.what, f"{finding.value:.2f} {finding.unit}", goal)
    console.print(view)


def environment(work: Path) -> dict[str, Any]:
    """Where the figures come from: they mean nothing without it."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    names = ("tierewrite", "torch", "transformers", "safetensors", "huggingface_hub", "blake3", "numpy")
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": os.getloadavg(),
        "filesystem": subprocess.run(
            ["df", "-PT", str(work)], capture_output=True, text=True, check=False
        ).stdout.splitlines()[-1:],
        "packages": {name: installed(name) for name in names},
    }


# the comparisons


def make(work: Path, preset: str, console: Console) -> Generated:
    made = generate(work / "inputs" / preset, preset)
    console.print(
        f"{preset}: {made.tensors:,} tensors, {made.data_bytes / GiB:.2f} GiB in {made.shards} shard(s), "
        f"made in {made.seconds:.1f} s",
        highlight=False,
    )
    return made


def compare(bench: Bench, preset: str, options: argparse.Namespace) -> dict[str, Any]:
    subject = make(bench.work, preset, bench.console)
    chosen = cases(options.devices.split(","), other=options.other)
    if options.cases:
        chosen = [case for case in chosen if any(part in case.name for part in options.cases.split(","))]
    results = bench.rounds({preset: subject}, chosen, options.repeats)[preset]
    title = (
        f"{preset}: {subject.tensors:,} tensors, {input_bytes(subject) / 1e9:.2f} GB in, "
        f"{subject.canonical_bytes / 1e9:.2f} GB canonical; medians of {options.repeats}"
    )
    bench.console.print(table(title, results))
    found = findings(subject, results)
    show_findings(bench.console, found)
    shutil.rmtree(subject.path)
    return {"preset": preset, "tensors": subject.tensors, "findings": [asdict(f) for f in found]}


def grow(bench: Bench, presets: Sequence[str], options: argparse.Namespace, what: str) -> dict[str, Any]:
    subjects = {preset: make(bench.work, preset, bench.console) for preset in presets}
    wanted = ["tierewrite --ties", "cp -r input"]
    if not options.quick:
        wanted += ["tierewrite", "imports"]
    chosen = [case for case in cases(["auto"]) if case.name in wanted]
    results = bench.rounds(subjects, chosen, options.repeats)
    bench.console.print(growth(results, subjects))
    found: list[Finding] = []
    if what == "tensors":
        few, many = (results[preset] for preset in presets)
        for case, beyond in (("tierewrite --ties", ""), ("tierewrite", ""), ("tierewrite", "imports")):
            costs = []
            for by_case in (few, many):
                if any(name not in by_case or by_case[name].failed for name in (case, beyond or case)):
                    break
                without = by_case[beyond].median("wall") if beyond else 0.0
                costs.append(by_case[case].median("wall") - without)
            if len(costs) == 2 and costs[0] > 0:
                label = f"{case}{beyond and ' beyond the '}{beyond}: 10 times the tensors at the same bytes"
                found.append(Finding(label, costs[1] / costs[0], "x", GOAL_GROWTH))
        show_findings(bench.console, found)
    for subject in subjects.values():
        shutil.rmtree(subject.path)
    return {"growth": what, "findings": [asdict(f) for f in found]}


def plan(bench: Bench, preset: str, options: argparse.Namespace) -> dict[str, Any]:
    subject = make(bench.work, preset, bench.console)
    name = "tierewrite plan --ties --json"
    case = Case(
        name,
        lambda s, out: [tierewrite("plan", str(s.path), "--ties", str(s.ties_file), "--json")],
        ours=True,
    )
    results = bench.rounds({preset: subject}, [case], options.repeats)[preset]
    title = f"{preset}: {subject.tensors:,} tensors, headers of {subject.header_bytes / 1e6:.1f} MB"
    bench.console.print(table(title, results))
    found: list[Finding] = []
    if not results[name].failed:
        found = [
            Finding("plan: time", results[name].median("wall"), "s", GOAL_PLAN_SECONDS),
            Finding("plan: peak memory", results[name].median("peak") / 1e9, "GB", GOAL_PLAN_GB),
        ]
        show_findings(bench.console, found)
    shutil.rmtree(subject.path)
    return {"plan": preset, "tensors": subject.tensors, "findings": [asdict(f) for f in found]}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bin/bench", description="Time tierewrite against copies and a plain script.")
    parser.add_argument("--preset", default="1.8gb", choices=sorted(generator.PRESETS), help="default: 1.8gb")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; figures are medians over them (default: 5)")
    parser.add_argument("--growth", action="store_true", help="how cost grows with tensors and with size")
    parser.add_argument("--plan", action="store_true", help="plan a checkpoint of 500,000 tensors")
    parser.add_argument("--quick", action="store_true", help="everything, on checkpoints of a few MB, once")
    parser.add_argument("--cases", help="only cases whose name contains one of these, comma-separated")
    parser.add_argument("--devices", default="auto", help="our --device values, comma-separated (default: auto)")
    parser.add_argument("--work", type=Path, help="folder on the disk to measure (default: a temporary folder)")
    parser.add_argument(
        "--image", choices=sorted(MKFS), help="measure on a file system of this kind in a file in --work"
    )
    parser.add_argument("--image-gb", type=int, default=16, help="size of that file system (default: 16)")
    parser.add_argument("--other", type=Path, help="another checkout of tierewrite, to compare with")
    parser.add_argument(
        "--patience", type=float, default=0, help="before each run, wait at most this long for an idle machine (s)"
    )
    parser.add_argument("--json", type=Path, help="write every sample and figure here")
    options = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 140)
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as kept:
        if options.image is not None:
            try:
                options.work = kept.enter_context(mounted(options.image, options.image_gb << 10, options.work))
            except Unavailable as why:
                parser.error(f"--image {options.image}: {why}")
        return _run(options, console)


def _run(options: argparse.Namespace, console: Console) -> int:
    """What the options ask for; returns the exit status."""
    done: list[dict[str, Any]] = []
    # gigabytes are not left behind when somebody loses patience
    previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="tierewrite-bench-", dir=options.work) as folder:
        bench = Bench(Path(folder), console, options.patience)
        where = environment(bench.work)
        console.print(
            f"{where['cpus']} CPUs, load {where['load'][0]:.1f}, {where['system']}, Python {where['python']}",
            highlight=False,
        )
        if options.quick:
            options.repeats = 1
            done.append(compare(bench, "tiny", options))
            done.append(grow(bench, ["tiny", "tiny-10x"], options, "tensors"))
            done.append(plan(bench, "tiny-plan", options))
        elif options.growth or options.plan:
            if options.growth:
                done.append(grow(bench, ["many-1x", "many-10x"], options, "tensors"))
                done.append(grow(bench, ["0.5gb", "1gb", "2gb", "4gb"], options, "size"))
            if options.plan:
                done.append(plan(bench, "plan-500k", options))
        else:
            done.append(compare(bench, options.preset, options))
    signal.signal(signal.SIGTERM, previous)
    disturbed = sum(sample.busy > BUSY for sample in bench.samples)
    if disturbed:
        console.print(
            f"[yellow]{disturbed} of {len(bench.samples)} runs began while others used more than {100 * BUSY:.0f}% of "
            "the CPUs: their times mean little[/yellow]"
        )
    if options.json is not None:
        answer = {
            "schema": SCHEMA,
            "environment": where,
            "comparisons": done,
            "samples": [asdict(sample) for sample in bench.samples],
        }
        options.json.write_text(json.dumps(answer, indent=2) + "\n")
    return int(any(sample.exit != 0 and sample.case.startswith("tierewrite") for sample in bench.samples))


if __name__ == "__main__":
    sys.exit(main())
