"""A crash at any instant: the target is whole or absent, the source is intact, and the next run finishes the work.

The instant is the number of a system call below the run's folders, drawn from as many as a dry run makes; the process
is killed before that call, after it, or after half of its bytes. (Threads make the order of calls vary from run to
run; every order is one that can happen.) A crash of the machine loses what was not flushed: for that the order of
writes, flushes and renames is checked.

By hand, for the figures in the README: `pytest tests/test_crashes.py -m long -s`.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.checkpoints import digests, right_answer
from tests.conftest import snapshot
from tests.faults import CHANGES, Call, Fault, Machine, calls_in, contents, names_in, unavailable
from tests.faults.sources import Source, real, synthetic

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

KILLS = ("kill_before", "kill_after", "kill_torn")
WAYS_ON: tuple[tuple[str, ...], ...] = ((), ("--resume",))
OLD = {"model.safetensors": b"the old checkpoint", "notes/readme.md": b"old"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return real(tmp_path_factory.mktemp("source"))


class Case:
    """One source, its right output, and the checks after a crash."""

    def __init__(self, machine: Machine, source: Source, folder: Path) -> None:
        self.machine, self.source, self.folder = machine, source, folder
        self.before = snapshot(source.path)
        reference = folder / "reference"
        machine.warm("rewrite", source.path, reference, *source.options)
        self.right = contents(reference)
        self.tensors = digests(reference)
        self.original = contents(source.path)
        self.finished_early = 0

    def run(self, *argv: str | Path, fault: Fault | None = None, **more: bool):  # type: ignore[no-untyped-def]
        return self.machine.run(
            "rewrite",
            self.source.path,
            *argv,
            *self.source.options,
            fault=fault,
            **more,  # type: ignore[arg-type]
        )

    def in_place(self, src: Path, *argv: str, fault: Fault | None = None, **more: bool):  # type: ignore[no-untyped-def]
        options = (*self.source.options, "--in-place", *argv)
        return self.machine.run("rewrite", src, *options, fault=fault, **more)  # type: ignore[arg-type]

    def source_intact(self) -> None:
        assert snapshot(self.source.path) == self.before

    def work(self, name: str) -> Path:
        """An empty folder."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def killed(self, fault: Fault, *argv: str | Path, in_place: Path | None = None, **more: bool) -> None:
        done = self.in_place(in_place, *argv, fault=fault, **more) if in_place else self.run(*argv, fault=fault, **more)
        assert done.code in (-signal.SIGKILL, 0), done
        self.finished_early += done.code == 0  # fewer calls than in the dry run


@pytest.fixture(scope="module")
def case(machine: Machine, source: Source, tmp_path_factory: pytest.TempPathFactory) -> Case:
    made = Case(machine, source, tmp_path_factory.mktemp("case"))
    assert made.tensors == right_answer("dg_nvfp4_sharded")
    assert len([name for name in made.right or {} if name.endswith(".safetensors")]) == 8
    return made


MARK = ".out.tierewrite-mark"
"""What a run killed within its swap may leave beside DST."""


def instants(calls: list[Call], seed: int, count: int) -> list[tuple[int, str]]:
    """Numbers of calls, each with a way to die at it."""
    chance = random.Random(seed)
    return [(chance.randint(1, len(calls)), chance.choice(KILLS)) for _ in range(count)]


# ------------------------------------------------------------------------------------------------- a new folder


def crash_into_a_new_folder(case: Case, seed: int, count: int) -> None:
    work = case.work("new")
    counted = case.run(work / "out", fault=Fault(case.folder.parent)).calls
    counted = [call for call in counted if case.machine.folder not in Path(call.path).parents]
    assert {call.name for call in counted} >= {"pwrite", "fsync", "rename", "mkdir", "create", "ftruncate", "flock"}
    absent = whole = 0
    for number, action in instants(counted, seed, count):
        work = case.work("new")
        case.killed(Fault(case.folder.parent, action, number), work / "out")
        case.source_intact()
        where = f"{action} at call {number}"
        if (work / "out").exists():
            whole += 1
            assert contents(work / "out") == case.right, where
            assert set(names_in(work)) <= {"out", MARK}, where
            again = case.run(work / "out")
            assert again.code == 2, (where, again)
            continue
        absent += 1
        assert set(names_in(work)) <= {".out.tierewrite", MARK}, where
        for option in WAYS_ON:
            copy = case.work("again")
            copy.rmdir()
            shutil.copytree(work, copy)
            done = case.run(copy / "out", *option)
            assert done.code == 0, (where, option, done)
            assert contents(copy / "out") == case.right, (where, option)
            assert names_in(copy) == ["out"], (where, option)
        case.source_intact()
    print(f"\n{count} kills among {len(counted)} calls: DST absent {absent} times, whole {whole} times")
    assert absent > count // 2


def test_killed_at_20_random_instants_dst_is_absent_or_whole_and_both_ways_on_give_the_same_bytes(case: Case) -> None:
    crash_into_a_new_folder(case, seed=20, count=20)


@pytest.mark.long
def test_killed_at_200_random_instants_dst_is_absent_or_whole_and_both_ways_on_give_the_same_bytes(case: Case) -> None:
    crash_into_a_new_folder(case, seed=200, count=200)


@pytest.mark.long
def test_killed_at_20_random_instants_of_a_rewrite_of_60_megabytes(
    machine: Machine, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = synthetic(tmp_path_factory.mktemp("large"), 60)
    case = Case(machine, source, tmp_path_factory.mktemp("large-case"))
    crash_into_a_new_folder(case, seed=60, count=20)


def killed_again_and_again(case: Case, seed: int, count: int) -> None:
    chance = random.Random(seed)
    work = case.work("chain")
    calls = len(case.run(work / "out", fault=Fault(work, calls=CHANGES)).calls)
    for _ in range(count):
        work = case.work("chain")
        for _ in range(5):
            if (work / "out").exists():
                break
            case.killed(
                Fault(work, chance.choice(KILLS), chance.randint(1, calls), calls=CHANGES), work / "out", "--resume"
            )
            assert contents(work / "out") in (None, case.right)
        if not (work / "out").exists():
            assert case.run(work / "out", "--resume").code == 0
        assert contents(work / "out") == case.right
        assert names_in(work) == ["out"]
    case.source_intact()


def test_killed_again_and_again_while_resuming(case: Case) -> None:
    killed_again_and_again(case, seed=3, count=3)


@pytest.mark.long
def test_killed_again_and_again_while_resuming_40_times(case: Case) -> None:
    killed_again_and_again(case, seed=40, count=40)


# ---------------------------------------------------------------------------------------------------- --overwrite


def old_checkpoint(folder: Path) -> Path:
    for name, data in OLD.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def crash_while_overwriting(case: Case, faults: list[Fault], exchange_missing: bool = False) -> None:
    ways = itertools.cycle(WAYS_ON)
    for fault in faults:
        work = case.work("over")
        old = contents(old_checkpoint(work / "out"))
        case.killed(replace(fault, root=work), work / "out", "--overwrite", exchange_missing=exchange_missing)
        if not exchange_missing:
            assert contents(work / "out") in (old, case.right), fault
        done = case.run(work / "out", "--overwrite", *next(ways))
        assert done.code == 0, (fault, done)
        assert contents(work / "out") == case.right, fault
        assert names_in(work) == ["out"], fault
    case.source_intact()


def calls_of(case: Case, name: str, *argv: str, in_place: bool = False, exchange_missing: bool = False) -> int:
    """How many changes a whole run makes."""
    work = case.work(name)
    fault = Fault(work, calls=CHANGES)
    if in_place:
        shutil.copytree(case.source.path, work / "out")
        done = case.in_place(work / "out", *argv, fault=fault, exchange_missing=exchange_missing)
    else:
        old_checkpoint(work / "out")
        done = case.run(work / "out", *argv, fault=fault, exchange_missing=exchange_missing)
    assert done.code == 0, done
    return len(done.calls)


def around_the_swap() -> list[Fault]:
    """Just before and just after each step that swaps, and while the old one is being removed."""
    steps = [Fault(Path(), kill, 1, calls=("exchange",)) for kill in ("kill_before", "kill_after")]
    steps += [Fault(Path(), "kill_after", n, calls=("unlink",)) for n in (1, 2, 3)]
    steps.append(Fault(Path(), "kill_before", 1, calls=("rmdir",)))
    return steps


def anywhere(calls: int, seed: int, count: int) -> list[Fault]:
    chance = random.Random(seed)
    return [Fault(Path(), chance.choice(KILLS), chance.randint(1, calls), calls=CHANGES) for _ in range(count)]


def test_killed_while_overwriting_dst_is_the_whole_old_one_or_the_whole_new_one(case: Case) -> None:
    calls = calls_of(case, "over", "--overwrite")
    crash_while_overwriting(case, around_the_swap() + anywhere(calls, 4, 4))


@pytest.mark.long
def test_killed_while_overwriting_at_every_instant(case: Case) -> None:
    calls = calls_of(case, "over", "--overwrite")
    faults = [
        Fault(Path(), kill, n, calls=CHANGES) for n in range(1, calls + 1) for kill in ("kill_after", "kill_torn")
    ]
    crash_while_overwriting(case, faults)
    print(f"\n{len(faults)} kills at {calls} instants of --overwrite")


def test_killed_while_overwriting_where_the_kernel_cannot_exchange_the_old_one_is_never_lost(case: Case) -> None:
    renames = [Fault(Path(), "kill_after", n, calls=("rename",), part="out.tierewrite") for n in (10, 11, 12, 13)]
    for fault in renames:
        work = case.work("over")
        old = contents(old_checkpoint(work / "out"))
        case.killed(replace(fault, root=work), work / "out", "--overwrite", exchange_missing=True)
        kept = [contents(work / name) for name in names_in(work)]
        assert old in kept, (fault, names_in(work))
    crash_while_overwriting(case, renames, exchange_missing=True)


# ------------------------------------------------------------------------------------------------------ --in-place


def crash_in_place(case: Case, faults: list[Fault], *argv: str, exchange_missing: bool = False) -> None:
    backup = "--no-backup" not in argv
    ways = itertools.cycle(WAYS_ON)
    for fault in faults:
        work = case.work("place")
        src = work / "out"
        shutil.copytree(case.source.path, src)
        case.killed(replace(fault, root=work), *argv, in_place=src, exchange_missing=exchange_missing)
        here, kept = contents(src), contents(work / "out.bak")
        if not exchange_missing:
            assert here in (case.original, case.right), fault
        if here != case.right:  # the original is whole, and where a next run touches nothing
            assert case.original in (here, kept), (fault, names_in(work))
        if backup and here == case.right:
            assert kept == case.original, fault
        state = {name: contents(work / name) for name in names_in(work) if not name.startswith(".")}
        if kept is not None or here is None:
            # What was killed within the swap: the next run touches nothing until a person has looked.
            done = case.in_place(src, *argv)
            assert done.code in (2, 4), (fault, done)
            assert {n: contents(work / n) for n in names_in(work) if not n.startswith(".")} == state, fault
            if here != case.original:
                continue
            assert kept == case.right, fault
            shutil.rmtree(work / "out.bak")
        if here == case.right:  # and only the removal of the old one was cut short; the next run sees to that
            assert set(names_in(work)) <= {"out", ".out.tierewrite", MARK}, fault
            shutil.rmtree(src)
            shutil.copytree(case.source.path, src)
        done = case.in_place(src, *argv, *next(ways))
        assert done.code == 0, (fault, done)
        assert contents(src) == case.right, fault
        assert contents(work / "out.bak") == (case.original if backup else None), fault
        assert names_in(work) == (["out", "out.bak"] if backup else ["out"]), fault


def test_killed_in_place_the_original_is_in_place_or_the_backup(case: Case) -> None:
    calls = calls_of(case, "place", in_place=True)
    around = around_the_swap()[:2] + [Fault(Path(), kill, 1, calls=("rename",), part="out.bak") for kill in KILLS[:2]]
    crash_in_place(case, around + anywhere(calls, 5, 3))


def test_killed_in_place_without_backup_src_is_the_whole_old_one_or_the_whole_new_one(case: Case) -> None:
    calls = calls_of(case, "place", "--no-backup", in_place=True)
    crash_in_place(case, around_the_swap() + anywhere(calls, 6, 3), "--no-backup")


def test_killed_in_place_where_the_kernel_cannot_exchange_the_original_is_in_place_or_the_backup(case: Case) -> None:
    around = [Fault(Path(), kill, n, calls=("rename",), part="out.bak") for n in (1, 2, 3) for kill in KILLS[:2]]
    crash_in_place(case, around, exchange_missing=True)


@pytest.mark.long
@pytest.mark.parametrize("argv", [(), ("--no-backup",)], ids=["backup", "no-backup"])
def test_killed_in_place_at_every_instant(case: Case, argv: tuple[str, ...]) -> None:
    calls = calls_of(case, "place", *argv, in_place=True)
    faults = [
        Fault(Path(), kill, n, calls=CHANGES) for n in range(1, calls + 1) for kill in ("kill_after", "kill_torn")
    ]
    crash_in_place(case, faults, *argv)
    print(f"\n{len(faults)} kills at {calls} instants of --in-place {' '.join(argv)}")


# --------------------------------------------------------------------------------------------------- loss of power


def not_on_disk(calls: list[Call], until: Call | None = None) -> set[str]:
    """Files with bytes and folders with entries that no flush has followed, when `until` begins."""
    dirty: set[str] = set()
    for call in calls:
        if call is until:
            break
        if call.result < 0:
            continue
        folder = str(Path(call.path).parent)
        if call.name == "fsync":
            dirty.discard(call.path)
        elif call.name in ("write", "pwrite", "ftruncate"):
            dirty.add(call.path)
        elif call.name in ("create", "mkdir"):
            dirty |= {call.path, folder}
        elif call.name in ("unlink", "rmdir"):
            dirty.discard(call.path)
            dirty.add(folder)
        elif call.name in ("rename", "exchange"):
            moved = {path for path in dirty if path == call.path or path.startswith(call.path + "/")}
            dirty = dirty - moved | {call.other + path[len(call.path) :] for path in moved}
            dirty |= {folder, str(Path(call.other).parent)}
    return dirty


def test_everything_is_flushed_before_the_rename_and_the_rename_before_the_end(case: Case) -> None:
    work = case.work("power")
    calls = case.run(work / "new" / "folder" / "out", fault=Fault(work, calls=CHANGES)).calls
    (last,) = [call for call in calls if call.name == "rename" and call.other.endswith("/out")]
    staging = last.path
    assert [path for path in not_on_disk(calls, last) if path.startswith(staging)] == []
    assert not_on_disk(calls) == set()
    files = {call.path for call in calls if call.name == "create" and "tierewrite-staging" not in call.path}
    assert len(files) == 8 + 2 + 4  # shards, index and manifest, side files


def test_a_shard_is_flushed_before_it_gets_the_name_that_resume_trusts(case: Case) -> None:
    work = case.work("power")
    calls = case.run(work / "out", fault=Fault(work, calls=CHANGES)).calls
    renames = [call for call in calls if call.name == "rename" and call.path.endswith(".part")]
    renames = [call for call in renames if "tierewrite-staging" not in call.path]
    assert len(renames) == 8
    for call in renames:
        assert call.path not in not_on_disk(calls, call)


@pytest.mark.parametrize("argv", [("--overwrite",), ("--in-place", "--no-backup")])
def test_the_swap_is_flushed_before_the_old_one_is_removed(case: Case, argv: tuple[str, ...]) -> None:
    work = case.work("power")
    fault = Fault(work, calls=CHANGES)
    if "--in-place" in argv:
        shutil.copytree(case.source.path, work / "out")
        calls = case.in_place(work / "out", "--no-backup", fault=fault).calls
    else:
        old_checkpoint(work / "out")
        calls = case.run(work / "out", *argv, fault=fault).calls
    (swap,) = [call for call in calls if call.name == "exchange"]
    assert [path for path in not_on_disk(calls, swap) if path.startswith(swap.path)] == []
    after = calls[calls.index(swap) :]
    flushed = after.index(next(call for call in after if call.name == "fsync" and call.path == str(work)))
    assert flushed < after.index(next(call for call in after if call.name in ("unlink", "rmdir")))


# --------------------------------------------------------------------------------------------------------- signals


def signalled(case: Case, fault: Fault, *argv: str, resume_from: Path | None = None, early: bool = False) -> None:
    """Interrupts a run into a new folder; `early`: the signal may come before there is anything to clean up."""
    work = case.work("signal")
    if resume_from is not None:
        work.rmdir()
        shutil.copytree(resume_from, work)
    done = case.run(work / "out", *argv, fault=fault)
    assert done.code == 128 + fault.argument, (fault, done)
    assert "Traceback" not in done.stderr, (fault, done)
    assert contents(work / "out") in (None, case.right), fault
    assert set(names_in(work)) <= {"out"}, (fault, names_in(work), done)


def signals(case: Case, seed: int, count: int) -> None:
    chance = random.Random(seed)
    work = case.work("signal")
    calls = len(case.run(work / "out", fault=Fault(work, calls=CHANGES)).calls)
    for n in [*(chance.randint(1, calls) for _ in range(count)), calls - 2, calls - 1, calls]:
        signum = chance.choice([signal.SIGINT, signal.SIGTERM])
        action = chance.choice(["signal_before", "signal_after"])
        last = chance.choice([None, 0])  # once, or at every call that follows, those of the clean-up included
        signalled(case, Fault(work, action, n, last, signum, CHANGES))
    case.source_intact()


def test_signals_at_random_instants_leave_nothing_and_a_second_one_does_no_harm(case: Case) -> None:
    signals(case, seed=8, count=12)


@pytest.mark.long
def test_signals_at_200_random_instants_leave_nothing_and_a_second_one_does_no_harm(case: Case) -> None:
    signals(case, seed=9, count=200)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_while_headers_are_read_or_side_files_copied(case: Case, signum: int) -> None:
    for calls, part in ((("pread",), ""), (("read",), "00002"), (("read",), "remote/code"), (("open",), "config.json")):
        signalled(case, Fault(case.source.path, "signal_after", 1, None, signum, calls, part))


def test_signal_while_what_a_killed_run_left_is_cleared_or_taken_over(case: Case) -> None:
    work = case.work("left")
    case.killed(Fault(work, "kill_before", 1, calls=("create",), part="index.json"), work / "out")
    assert len(names_in(work / ".out.tierewrite")) >= 8
    left = work.parent / "left-copy"
    shutil.rmtree(left, ignore_errors=True)
    shutil.copytree(work, left)
    target = case.folder / "signal"
    for n in (1, 4):
        signalled(case, Fault(target, "signal_after", n, None, signal.SIGTERM, ("unlink",)), resume_from=left)
    for calls in (("pread",), ("flock",)):
        fault = Fault(target, "signal_after", 1, 0, signal.SIGINT, calls)
        signalled(case, fault, "--resume", resume_from=left)


def test_signal_while_a_refused_output_is_removed(machine: Machine, case: Case, tmp_path: Path) -> None:
    src = tmp_path / "src"
    shutil.copytree(case.source.path, src)
    path = src / "model-00002-of-00003.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    work = tmp_path / "work"
    refused = machine.run("rewrite", src, work / "out", *case.source.options, fault=Fault(work, calls=("unlink",)))
    assert refused.code == 3, refused
    assert len(refused.calls) >= 8
    for n in (1, 5, len(refused.calls)):
        fault = Fault(work, "signal_after", n, 0, signal.SIGINT, ("unlink", "rmdir"))
        done = machine.run("rewrite", src, work / "out", *case.source.options, fault=fault)
        assert done.code == 130, done
        assert "Traceback" not in done.stderr
        assert not work.exists()


@pytest.mark.parametrize("output", [".out", ".err"])
def test_signal_while_the_result_is_printed(machine: Machine, case: Case, output: str) -> None:
    work = case.work("signal")
    fault = Fault(machine.folder, "signal_before", 1, None, signal.SIGINT, ("write",), output)
    # With an old DST in the way there is an error to print; without, the report.
    options = case.source.options[:-1]
    if output == ".err":
        old_checkpoint(work / "out")
    else:
        options = (*options, "--json")
    before = contents(work / "out")
    done = machine.run("rewrite", case.source.path, work / "out", *options, fault=fault)
    assert done.code == 130, done
    assert "Traceback" not in done.stderr
    assert contents(work / "out") == (before or case.right)
    assert names_in(work) == ["out"]


@pytest.mark.parametrize("argv", [(), ("--no-backup",)], ids=["backup", "no-backup"])
def test_signal_during_the_swap_comes_after_it(case: Case, argv: tuple[str, ...]) -> None:
    for calls in (("exchange",), ("unlink",)) if argv else (("exchange",), ("rename",)):
        work = case.work("signal")
        src = work / "out"
        shutil.copytree(case.source.path, src)
        part = "out.bak" if calls == ("rename",) else ""
        fault = Fault(work, "signal_after", 1, 0, signal.SIGTERM, calls, part)
        done = case.in_place(src, *argv, fault=fault)
        assert done.code == 143, done
        assert done.stderr == "tierewrite: stopped by signal 15; the rewrite is complete\n", done
        assert contents(src) == case.right
        assert contents(work / "out.bak") == (None if argv else case.original)
        assert names_in(work) == (["out"] if argv else ["out", "out.bak"])


# -------------------------------------------------------------------------------------------------- two runs at once


class Stopped:
    """A run of its own process that has stopped itself at a chosen call."""

    def __init__(self, case: Case, dst: Path, fault: Fault, *argv: str) -> None:
        self.case = case
        log = case.folder / "stopped.log"
        log.unlink(missing_ok=True)
        arguments = ["rewrite", case.source.path, dst, *case.source.options, *argv]
        environment = case.machine.environment(fault, log)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tierewrite", *arguments], env=environment, stderr=subprocess.PIPE, text=True
        )
        _, status = os.waitpid(self.process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), (status, self.process.stderr and self.process.stderr.read())
        assert calls_in(log) is not None

    def go_on(self) -> tuple[int, str]:
        """Lets it run to its end."""
        self.process.send_signal(signal.SIGCONT)
        _, err = self.process.communicate(timeout=120)
        return self.process.returncode, err


def test_second_run_into_a_dst_is_refused_and_disturbs_nothing(case: Case) -> None:
    work = case.work("two")
    first = Stopped(case, work / "out", Fault(work, "stop", 5, None, 0, ("pwrite",)))
    staged = contents(work / ".out.tierewrite")
    assert staged
    for option in ((), ("--resume",), ("--overwrite",)):
        second = case.run(work / "out", *option)
        assert second.code == 2, second
        assert "another run" in second.stderr
        assert contents(work / ".out.tierewrite") == staged
        assert names_in(work) == [".out.tierewrite"]
    assert first.go_on() == (0, "")
    assert contents(work / "out") == case.right
    assert names_in(work) == ["out"]
    case.source_intact()


def test_run_that_loses_the_race_for_the_lock_gives_way(case: Case) -> None:
    work = case.work("two")
    slow = Stopped(case, work / "out", Fault(work, "stop", 1, None, 0, ("flock",)))
    assert names_in(work) == [".out.tierewrite"]
    assert case.run(work / "out").code == 0  # takes the folder that the slow one has made
    code, err = slow.go_on()  # and now the slow one locks what has become DST
    assert code == 2, err
    assert contents(work / "out") == case.right
    assert names_in(work) == ["out"]


def test_dst_that_appears_while_a_run_works_is_left_alone(case: Case) -> None:
    work = case.work("two")
    first = Stopped(case, work / "out", Fault(work, "stop", 1, None, 0, ("create",), "tierewrite.json"))
    old = contents(old_checkpoint(work / "out"))
    code, err = first.go_on()
    assert code == 2, err
    assert contents(work / "out") == old
    assert names_in(work) == ["out"]


def test_backup_that_appears_while_a_run_works_is_left_alone(case: Case) -> None:
    work = case.work("two")
    src = work / "out"
    shutil.copytree(case.source.path, src)
    before = snapshot(src)
    fault = Fault(work, "stop", 1, None, 0, ("create",), "tierewrite.json")
    with_src = replace(case.source, path=src)
    held = case.source
    case.source = with_src
    try:
        process = Stopped.__new__(Stopped)
        process.case = case
        process.process = subprocess.Popen(
            [sys.executable, "-m", "tierewrite", "rewrite", str(src), *held.options, "--in-place"],
            env=case.machine.environment(fault),
            stderr=subprocess.PIPE,
            text=True,
        )
        _, status = os.waitpid(process.process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        old = contents(old_checkpoint(work / "out.bak"))
        code, err = process.go_on()
    finally:
        case.source = held
    assert code == 2, err
    assert contents(work / "out.bak") == old
    assert snapshot(src) == before
    assert names_in(work) == ["out", "out.bak"]
