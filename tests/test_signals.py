"""Signals at random instants: no run hangs, none prints a traceback, none leaves anything that is half done.

The instants of test_crashes.py are system calls; here they are any: the start of threads, locks, the end of the
interpreter. Each run is bounded in time, and what it prints names its seed.
"""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.faults import Machine, Outcome, contents, unavailable
from tests.faults.sources import Source, real
from tests.s3_server import Store

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

SECONDS = 30
"""After which a run counts as hung; the longest takes 2."""
SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGXCPU, signal.SIGALRM)


@dataclass
class Field:
    """Where the signals strike: commands on a source, and what may be there afterwards."""

    machine: Machine
    source: Source
    folder: Path
    right: Mapping[str, str] = field(default_factory=dict)
    original: Mapping[str, str] = field(default_factory=dict)
    lasted: dict[str, float] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    store: Store | None = None

    @property
    def work(self) -> Path:
        return self.folder / "work"

    def prepare(self, command: str) -> list[str | Path]:
        """An empty place for one run, and its command line."""
        shutil.rmtree(self.work, ignore_errors=True)
        (self.work / "tmp").mkdir(parents=True)
        source, out = self.source.path, self.work / "out"
        if command == "in place":
            shutil.copytree(source, out)
            return ["rewrite", out, "--in-place", *self.source.options]
        if command == "overwrite":
            out.mkdir()
            (out / "old").write_bytes(b"old")
            return ["rewrite", source, out, "--overwrite", *self.source.options]
        if command in ("batch", "batch of two at a time"):
            for name in "abc":
                shutil.copytree(source, self.work / "models" / name)
            jobs = ("--jobs", "2") if command != "batch" else ()
            return ["batch", self.work / "models", "--into", out, *jobs, *self.source.options]
        if command == "verify":
            return ["verify", source, self.folder / "right", *self.source.options[:4]]
        if command == "plan":
            return ["plan", source, "--json", *self.source.options[:4]]
        if command == "store in memory":
            return ["rewrite", source, "memory://out", *self.source.options]
        if command == "store":
            assert self.store is not None
            self.store.reset()
            return ["rewrite", source, self.store.url("out"), *self.source.options]
        return ["rewrite", source, out, *self.source.options, *(["--verify"] if command == "rewrite, proved" else [])]

    def run(self, command: str, *signals: tuple[float, int]) -> Outcome:
        argv = self.prepare(command)
        environment = {**self.environment, "TMPDIR": str(self.work / "tmp")}
        return self.machine.run(*argv, signals=signals, seconds=SECONDS, environment=environment)

    def strike(self, command: str, seed: str) -> int | None:
        """One run, with one signal or two at instants that `seed` decides; returns its exit code."""
        chance = random.Random(seed)
        if command not in self.lasted:
            self.run(command)  # the first one imports
            done = self.run(command)
            assert done.code == 0, done
            self.lasted[command] = done.seconds
        first, second = chance.choices(SIGNALS, k=2)
        signals = [(chance.uniform(0, 1.05 * self.lasted[command]), first)]
        if chance.random() < 0.3:
            signals.append((chance.choice([0.0, 0.001, 0.02]), second))
        done = self.run(command, *signals)
        codes = {0, *(128 + signum for _, signum in signals)}
        assert done.code in codes, (seed, signals, done)
        for word in ("Traceback", "Exception ignored", "internal error", "Error:"):
            assert word not in done.stderr, (seed, signals, done)
        self.nothing_is_half_done(command, done, (seed, signals, done))
        self.what_is_said_is_true(command, done, (seed, signals, done))
        return done.code

    def nothing_is_half_done(self, command: str, done: Outcome, what: object) -> None:
        assert contents(self.source.path) == self.original, what
        assert list((self.work / "tmp").iterdir()) == [], what
        names = {path.name for path in self.work.iterdir()} - {"tmp", "models"}
        out = contents(self.work / "out")
        if command in ("batch", "batch of two at a time"):
            assert names <= {"out"}, what
            if out is not None:
                made = sorted(path.name for path in (self.work / "out").iterdir())
                assert set(made) <= set("abc"), what
                assert all(contents(self.work / "out" / name) == self.right for name in made), what
                assert done.code != 0 or made == [*"abc"], what
        elif command == "in place":
            assert names <= {"out", "out.bak"}, what
            assert (out, contents(self.work / "out.bak")) in (
                (self.original, None),
                (self.right, self.original),
            ), what
        elif command == "overwrite":
            assert names == {"out"}, what
            assert out == self.right or sorted(out or ()) == ["old"], what
        elif command == "store":
            assert self.store is not None
            objects = self.store.objects("out")
            assert not objects or sorted(objects) == sorted(name for name, digest in self.right.items() if digest), what
            assert self.store.unfinished() == [], what
        else:
            assert names <= {"out"}, what
            assert out in (None, self.right), what
            assert done.code != 0 or out is not None or not command.startswith("rewrite"), what

    def what_is_said_is_true(self, command: str, done: Outcome, what: object) -> None:
        """A rewrite that was stopped says that it is complete where DST is there, and nowhere else."""
        if command in ("rewrite", "rewrite, proved", "overwrite", "in place", "store"):
            out = contents(self.work / "out")
            there = bool(self.store and self.store.objects("out")) if command == "store" else out == self.right
            assert there == (done.code == 0 or "the rewrite is complete" in done.stderr), what


COMMANDS = (
    "rewrite",
    "rewrite, proved",
    "overwrite",
    "in place",
    "batch",
    "batch of two at a time",
    "verify",
    "plan",
    "store in memory",
    "store",
)


@pytest.fixture(scope="module")
def struck(tmp_path_factory: pytest.TempPathFactory, s3_servers: Store) -> Iterator[Field]:
    folder = tmp_path_factory.mktemp("signals")
    machine = Machine(tmp_path_factory.mktemp("machine"))
    source = real(tmp_path_factory.mktemp("source"))
    machine.warm("rewrite", source.path, folder / "right", "--verify", *source.options)
    right, original = contents(folder / "right"), contents(source.path)
    assert right is not None
    assert original is not None
    made = Field(machine, source, folder, right, original, store=s3_servers, environment=s3_servers.settings)
    yield made
    machine.close()


@pytest.mark.parametrize("command", COMMANDS)
def test_signals_at_any_instant(command: str, struck: Field) -> None:
    codes: set[int | None] = set()
    for number in range(60):  # a machine that was busy when a run was timed lets the first ones come too late
        codes.add(struck.strike(command, f"{command} {number}"))
        if number >= 5 and codes - {0}:
            break
    assert codes - {0}


@pytest.mark.long
@pytest.mark.parametrize("part", range(20))
@pytest.mark.parametrize("command", COMMANDS)
def test_5000_signals_at_any_instant(command: str, part: int, struck: Field) -> None:
    runs = 5000 // len(COMMANDS) // 20 + 1
    ended = sum(struck.strike(command, f"long {command} {part} {number}") != 0 for number in range(runs))
    print(f"{command}: {ended} of {runs} runs ended by a signal")  # the others were done before it came
