"""System calls that fail, data that change underfoot, disks that fill up: a documented exit code, a message that names
the file, nothing left beside DST, and the source as it was.

By hand, for the figures in the README: `pytest tests/test_faults.py -m long -s`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import tierewrite
from tests.conftest import snapshot
from tests.faults import CHANGES, Fault, Machine, Outcome, contents, names_in, unavailable
from tests.faults.sources import LAST_YEAR, Source, real

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

NOBODY = 65534
is_root = hasattr(os, "geteuid") and os.geteuid() == 0


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return real(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def right(machine: Machine, source: Source, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What an undisturbed run writes."""
    folder = tmp_path_factory.mktemp("right")
    machine.warm("rewrite", source.path, folder / "out", *source.options)
    return contents(folder / "out") or {}


@pytest.fixture(autouse=True)
def _the_source_stays_as_it_is(source: Source) -> Iterator[None]:
    before = snapshot(source.path)
    yield
    assert snapshot(source.path) == before


@pytest.fixture
def rewrite(machine: Machine, source: Source, tmp_path: Path) -> Callable[..., Outcome]:
    """Runs a rewrite into a folder of its own; afterwards nothing but DST may be there."""

    def run(fault: Fault | None = None, *argv: str, **more: int) -> Outcome:
        work = tmp_path / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        options = (*source.options, *argv)
        done = machine.run("rewrite", source.path, work / "out", *options, fault=fault, **more)  # type: ignore[arg-type]
        assert names_in(work) == (["out"] if done.code == 0 else []), (fault, done)
        return done

    return run


def struck(done: Outcome) -> str:
    """The name of the file whose call failed, without the suffix of an unfinished shard."""
    (call,) = [call for call in done.calls if call.result < 0][-1:]
    return Path(call.other if call.name == "exchange" else call.path).name.removesuffix(".part")


def fails_well(done: Outcome, code: int = 5) -> None:
    """The exit code, and one message that names the file."""
    assert done.code == code, done
    assert "Traceback" not in done.stderr
    name = struck(done)
    # A folder that is being made into DST is named as either.
    assert name in done.stderr or (name in (".out.tierewrite", "work") and "out" in done.stderr), (name, done)
    assert done.stdout == ""


# ------------------------------------------------------------------------------------------------- calls that fail


READING = {
    "open": (errno.EACCES, errno.EMFILE, errno.ENFILE),
    "read": (errno.EIO,),
    "pread": (errno.EIO, errno.ESTALE),
}
WRITING = {
    "create": (errno.EACCES, errno.EMFILE, errno.ENOSPC, errno.EROFS),
    "pwrite": (errno.ENOSPC, errno.EIO, errno.EDQUOT),
    "fsync": (errno.EIO, errno.ENOSPC),
    "ftruncate": (errno.EFBIG, errno.ENOSPC),
    "rename": (errno.EIO, errno.EXDEV, errno.ENOSPC),
    "mkdir": (errno.EACCES, errno.ENOSPC, errno.EROFS),
    "flock": (errno.EIO,),
}


@pytest.mark.parametrize("name", READING)
def test_failing_read_names_the_file_and_leaves_nothing(
    rewrite: Callable[..., Outcome], source: Source, name: str
) -> None:
    chance = random.Random(name)
    calls = len(rewrite(Fault(source.path, calls=(name,))).calls)
    assert calls >= 10
    for number in sorted(chance.sample(range(1, calls + 1), 4)):
        code = chance.choice(READING[name])
        fails_well(rewrite(Fault(source.path, "fail", number, None, code, (name,))))


@pytest.mark.parametrize("name", WRITING)
def test_failing_change_names_the_file_and_leaves_nothing(
    rewrite: Callable[..., Outcome], tmp_path: Path, name: str
) -> None:
    chance = random.Random(name)
    work = tmp_path / "work"
    made = [call for call in rewrite(Fault(work, calls=(name,))).calls if call.result >= 0]
    numbers = [call.number for call in made]
    assert numbers
    if name == "fsync":
        numbers.pop()  # once DST is complete: a mark whose removal is not flushed is removed by the next run
    for number in sorted({*chance.sample(numbers, min(3, len(numbers))), numbers[-1]}):
        fails_well(rewrite(Fault(work, "fail", number, None, chance.choice(WRITING[name]), (name,))))


@pytest.mark.long
def test_every_call_of_a_run_fails_once(
    rewrite: Callable[..., Outcome], source: Source, right: dict[str, str], tmp_path: Path
) -> None:
    failed = unharmed = 0
    for root, names in ((source.path, READING), (tmp_path / "work", WRITING)):
        for name, codes in names.items():
            calls = rewrite(Fault(root, calls=(name,))).calls
            for number in [call.number for call in calls if call.result >= 0]:
                done = rewrite(Fault(root, "fail", number, None, codes[number % len(codes)], (name,)))
                if done.code == 0:  # fewer calls than in the dry run
                    assert contents(tmp_path / "work" / "out") == right
                    unharmed += 1
                    continue
                fails_well(done)
                failed += 1
    print(f"\n{failed} failing system calls: exit 5 with the file named, nothing left ({unharmed} never came)")
    assert failed > 200


def test_disk_that_stays_full_from_some_write_on(rewrite: Callable[..., Outcome], tmp_path: Path) -> None:
    full = Fault(tmp_path / "work", "fail", 7, 0, errno.ENOSPC, ("pwrite", "write", "create", "mkdir"))
    done = rewrite(full)
    assert done.code == 5
    assert "ENOSPC" in done.stderr
    assert "free some space" in done.stderr


@pytest.mark.parametrize("code", [errno.EIO, errno.EXDEV])
def test_failing_swap_leaves_the_old_one(machine: Machine, source: Source, tmp_path: Path, code: int) -> None:
    shutil.copytree(source.path, tmp_path / "out")
    before = contents(tmp_path / "out")
    for argv in ((source.path, tmp_path / "out", "--overwrite"), (tmp_path / "out", "--in-place")):
        fault = Fault(tmp_path, "fail", 1, None, code, ("exchange",))
        fails_well(machine.run("rewrite", *argv, *source.options, fault=fault))
        assert contents(tmp_path / "out") == before
        assert names_in(tmp_path) == ["out"]


@pytest.mark.parametrize("exchange_missing", [False, True], ids=["exchange", "two renames"])
@pytest.mark.parametrize("argv", [["--overwrite"], ["--in-place"], ["--in-place", "--no-backup"]], ids=" ".join)
def test_failing_flush_after_the_swap_takes_it_back(
    machine: Machine, source: Source, tmp_path: Path, argv: list[str], exchange_missing: bool
) -> None:
    work = tmp_path / "work"
    shutil.copytree(source.path, work / "out")
    before = contents(work / "out")
    where = (work / "out",) if "--in-place" in argv else (source.path, work / "out")
    calls = machine.run(
        "rewrite", source.path, tmp_path / "x" / "out", *source.options, fault=Fault(tmp_path / "x")
    ).calls
    last = len([call for call in calls if call.name == "fsync"]) - 1  # the very last one is of the mark's removal
    fault = Fault(work, "fail", last, None, errno.EIO, ("fsync",))
    done = machine.run("rewrite", *where, *argv, *source.options, fault=fault, exchange_missing=exchange_missing)
    assert done.code == 5, done
    assert done.calls[-1].path == str(work)
    assert contents(work / "out") == before
    assert names_in(work) == ["out"]


def test_file_system_without_locks_is_no_obstacle(
    rewrite: Callable[..., Outcome], right: dict[str, str], tmp_path: Path
) -> None:
    done = rewrite(Fault(tmp_path / "work", "fail", 1, None, errno.ENOLCK, ("flock",)))
    assert done.code == 0, done
    assert "no locks" in done.stderr
    assert contents(tmp_path / "work" / "out") == right


# ------------------------------------------------------------------------------------------ short reads and writes


@pytest.mark.parametrize(
    ("action", "name", "part"),
    [
        ("half", "pread", ""),
        ("half", "pwrite", ""),
        ("half", "read", ""),
        ("one_byte", "pread", "model-00003"),
        ("one_byte", "pwrite", "model-00008"),
        ("one_byte", "pwrite", "index.json"),
        ("one_byte", "read", "config.json"),
    ],
)
def test_short_reads_and_writes_everywhere_give_the_same_bytes(
    rewrite: Callable[..., Outcome],
    right: dict[str, str],
    tmp_path: Path,
    source: Source,
    action: str,
    name: str,
    part: str,
) -> None:
    root = tmp_path / "work" if name == "pwrite" else source.path
    plain = len(rewrite(Fault(root, calls=(name,), part=part)).calls)
    done = rewrite(Fault(root, action, 1, 0, 0, (name,), part))
    assert done.code == 0, done
    assert len(done.calls) > 2 * plain
    assert contents(tmp_path / "work" / "out") == right


def test_files_that_end_early_while_they_are_read(rewrite: Callable[..., Outcome], source: Source) -> None:
    chance = random.Random(1)
    for name, part, code in (
        ("pread", "", 5),
        ("read", "model.py", 5),
        ("read", "model-00002", 5),  # within its header, not within the 8 bytes before it
        ("read", "index.json", 4),
    ):
        calls = rewrite(Fault(source.path, calls=(name,), part=part)).calls
        # The last read of a small file finds its end anyway.
        calls = [call for call in calls if call.result > 0]
        call = calls[-1] if part == "model-00002" else chance.choice(calls)
        done = rewrite(Fault(source.path, "end", call.number, 0, 0, (name,), part))
        assert done.code == code, (name, part, done)
        assert any(Path(call.path).name in done.stderr for call in done.calls if call.result == 0)
        assert "Traceback" not in done.stderr


# -------------------------------------------------------------------------------------------------- what fills up


class Watch(tierewrite.Progress):
    """Does something when a phase begins, or when bytes have moved in it."""

    def __init__(self, phase: str, act: Callable[[], object], *, midway: bool = False) -> None:
        self.phase, self.act, self.midway = phase, act, midway
        self.acted = self.within = False

    def _once(self) -> None:
        if not self.acted:
            self.acted = True
            self.act()

    def start(self, phase: str, total: int) -> None:
        self.within = phase == self.phase
        if self.within and not self.midway:
            self._once()

    def advance(self, nbytes: int) -> None:
        if self.within and self.midway:
            self._once()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or not is_root:
        pytest.skip("mounting a file system of limited size needs root")
    done = subprocess.run([mount, "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def in_process(source: Source, dst: Path, progress: tierewrite.Progress | None = None, **options: bool) -> None:
    tierewrite.rewrite(
        source.path,
        dst,
        ties=source.ties,
        max_shard_size="50KB",
        threads=2,
        progress=progress,
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("phase", ["rewriting", "copying other files"])
def test_real_disk_that_fills_up_meanwhile(source: Source, small_disk: Path, phase: str) -> None:
    def fill() -> None:
        with (small_disk / "other").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    with pytest.raises(tierewrite.SystemFailure, match="ENOSPC") as raised:
        in_process(source, small_disk / "out", Watch(phase, fill))
    assert raised.value.exit_code == 5
    assert raised.value.file is not None
    assert names_in(small_disk) == ["other"]


def test_real_disk_that_is_too_small_is_refused_before_the_first_byte(
    machine: Machine, source: Source, small_disk: Path
) -> None:
    (small_disk / "other").write_bytes(bytes(1_800_000))
    done = machine.run("rewrite", source.path, small_disk / "out", *source.options, fault=Fault(small_disk))
    assert done.code == 5, done
    assert "free" in done.stderr
    assert done.calls == []


def test_real_disk_that_is_just_large_enough(
    machine: Machine, source: Source, small_disk: Path, right: dict[str, str]
) -> None:
    assert machine.run("rewrite", source.path, small_disk / "out", *source.options).code == 0
    assert contents(small_disk / "out") == right


def test_what_a_killed_run_left_counts_as_free(
    machine: Machine, source: Source, small_disk: Path, right: dict[str, str]
) -> None:
    options = (*source.options, "--no-manifest")
    fault = Fault(small_disk, "kill_before", 1, calls=("create",), part="index.json")
    assert machine.run("rewrite", source.path, small_disk / "out", *options, fault=fault).code == -9
    status = os.statvfs(small_disk)
    (small_disk / "other").write_bytes(bytes(status.f_bavail * status.f_frsize - 200_000))
    elsewhere = machine.run("rewrite", source.path, small_disk / "elsewhere", *options)
    assert elsewhere.code == 5
    assert "bytes and the disk has" in elsewhere.stderr
    done = machine.run("rewrite", source.path, small_disk / "out", *options, "--resume")
    assert done.code == 0, done
    assert contents(small_disk / "out") == {name: it for name, it in right.items() if name != "tierewrite.json"}


def test_limit_of_the_size_of_files(rewrite: Callable[..., Outcome]) -> None:
    done = rewrite(None, limits={"RLIMIT_FSIZE": 30_000})  # type: ignore[arg-type]
    assert done.code == 5, done
    assert "EFBIG" in done.stderr
    assert "--max-shard-size" in done.stderr


def test_limit_of_the_size_of_files_in_a_process_of_its_own(source: Source, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    argv = [sys.executable, "-m", "tierewrite", "rewrite", source.path, tmp_path / "out", *source.options]
    done = subprocess.run(argv, preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 5, done  # not -25, SIGXFSZ
    assert "EFBIG" in done.stderr
    assert names_in(tmp_path) == []


def test_limit_of_open_files(rewrite: Callable[..., Outcome]) -> None:
    done = rewrite(None, limits={"RLIMIT_NOFILE": 12})  # type: ignore[arg-type]
    assert done.code == 5, done
    assert "ulimit -n" in done.stderr


# ---------------------------------------------------------------------------------------------------- permissions


@pytest.fixture
def public(source: Source, right: dict[str, str]) -> Iterator[tuple[Source, Path, int]]:
    """The source where another user may read it, an empty folder of that user, and the user."""
    folder = Path(tempfile.mkdtemp(prefix="tierewrite-faults-"))
    uid = NOBODY if is_root else 0
    try:
        shutil.copytree(source.path, folder / "naive")
        shutil.copy(source.ties, folder / "ties.json")
        (folder / "work").mkdir()
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
        if uid:
            os.chown(folder / "work", uid, uid)
        options = tuple(str(folder / "ties.json") if o == str(source.ties) else o for o in source.options)
        yield Source(folder / "naive", folder / "ties.json", options), folder / "work", uid
    finally:
        (folder / "work").chmod(0o755)
        shutil.rmtree(folder)


def test_source_of_another_user_that_may_only_be_read(
    machine: Machine, public: tuple[Source, Path, int], right: dict[str, str]
) -> None:
    source, work, uid = public
    for path in [source.path, *source.path.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    done = machine.run("rewrite", source.path, work / "out", *source.options, uid=uid)
    assert done.code == 0, done
    assert contents(work / "out") == right
    for path in [source.path, *source.path.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)


def test_parent_of_dst_that_may_not_be_written(
    machine: Machine, public: tuple[Source, Path, int], right: dict[str, str]
) -> None:
    source, work, uid = public
    work.chmod(0o555)
    for dst in (work / "out", work / "new" / "out"):
        done = machine.run("rewrite", source.path, dst, *source.options, uid=uid)
        assert done.code == 5, done
        assert "EACCES" in done.stderr
        assert str(work) in done.stderr
        assert names_in(work) == []


def test_dst_that_may_not_be_swapped_out_stays(machine: Machine, public: tuple[Source, Path, int]) -> None:
    source, work, uid = public
    (work / "in" / "out").mkdir(parents=True)
    (work / "in" / "out" / "old").write_text("old")
    (work / "in").chmod(0o555)
    done = machine.run("rewrite", source.path, work / "in" / "out", "--overwrite", *source.options, uid=uid)
    (work / "in").chmod(0o755)
    assert done.code == 5, done
    assert names_in(work / "in") == ["out"]
    assert (work / "in" / "out" / "old").read_text() == "old"


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "config.json", "remote/code/model.py"])
def test_file_of_the_source_that_may_not_be_read_is_named(
    machine: Machine, public: tuple[Source, Path, int], name: str
) -> None:
    source, work, uid = public
    (source.path / name).chmod(0)
    done = machine.run("rewrite", source.path, work / "out", *source.options, uid=uid)
    assert done.code == 5, done
    assert name in done.stderr
    assert names_in(work) == []


# --------------------------------------------------------------------------------------- data that change underfoot


def replaced(path: Path) -> None:
    """Another file with the same bytes and times."""
    other = path.with_name("other")
    shutil.copy2(path, other)
    other.rename(path)


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def appended(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def modified(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))


def removed(path: Path) -> None:
    path.unlink()


@pytest.fixture
def own(source: Source, tmp_path: Path) -> Source:
    """A copy of the source that a test may change."""
    folder = tmp_path / "own"
    shutil.copytree(source.path, folder / "naive")
    return replace(source, path=folder / "naive")


SHARD = "model-00002-of-00003.safetensors"


@pytest.mark.parametrize("change", [replaced, truncated, appended, modified, removed], ids=lambda f: f.__name__)
def test_shard_that_changes_between_plan_and_write_is_refused(
    own: Source, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    watch = Watch("rewriting", lambda: change(own.path / SHARD))
    with pytest.raises(tierewrite.SystemFailure) as raised:
        in_process(own, tmp_path / "work" / "out", watch)
    assert watch.acted
    assert SHARD in str(raised.value)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("change", [truncated, appended, modified], ids=lambda f: f.__name__)
def test_shard_that_changes_while_it_is_read_is_refused(
    own: Source, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    watch = Watch("rewriting", lambda: change(own.path / SHARD), midway=True)
    with pytest.raises(tierewrite.SourceChanged, match=r"chang|cut") as raised:
        in_process(own, tmp_path / "work" / "out", watch)
    assert watch.acted
    assert SHARD in str(raised.value)
    assert not (tmp_path / "work").exists()


def test_shard_whose_time_was_set_back_after_a_change_is_refused_and_found_by_verify(
    own: Source, tmp_path: Path
) -> None:
    def change() -> None:
        modified(own.path / SHARD)
        os.utime(own.path / SHARD, ns=(LAST_YEAR, LAST_YEAR))

    in_process(own, tmp_path / "work" / "out", Watch("copying other files", change), verify=False)  # it was done with
    with pytest.raises(tierewrite.SourceChanged, match="time set back") as raised:
        in_process(own, tmp_path / "work" / "late", Watch("rewriting", change))
    assert SHARD in str(raised.value)
    with pytest.raises(tierewrite.SourceChanged, match="changed while the checkpoint was rewritten"):
        in_process(own, tmp_path / "work" / "never", Watch("copying other files", change), verify=True)
    assert names_in(tmp_path / "work") == ["out"]


def exchanged(path: Path) -> None:
    """Another file takes the name, with the size and the time of the old one."""
    before, other = path.stat(), path.with_name("other")
    other.write_bytes(path.read_bytes()[::-1])
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize("name", ["config.json", "remote/code/model.py"])
@pytest.mark.parametrize("change", [truncated, appended, modified, exchanged, removed], ids=lambda f: f.__name__)
def test_side_file_that_changes_before_it_is_copied_is_refused(
    own: Source, tmp_path: Path, name: str, change: Callable[[Path], None]
) -> None:
    watch = Watch("copying other files", lambda: change(own.path / name))
    with pytest.raises(tierewrite.SystemFailure) as raised:
        in_process(own, tmp_path / "work" / "out", watch)
    assert watch.acted
    assert name in str(raised.value)
    assert not (tmp_path / "work").exists()


def added(path: Path) -> None:
    path.with_name("new-notes.md").write_text("written by somebody else meanwhile")


def set_back(path: Path) -> None:
    modified(path)
    os.utime(path, ns=(LAST_YEAR, LAST_YEAR))


@pytest.mark.parametrize("change", [added, replaced, truncated, modified, set_back, removed], ids=lambda f: f.__name__)
@pytest.mark.parametrize("backup", [True, False], ids=["backup", "no-backup"])
def test_source_that_changes_before_it_is_swapped_out_in_place_stays(
    own: Source, tmp_path: Path, change: Callable[[Path], None], backup: bool
) -> None:
    class Late(tierewrite.Progress):
        """Acts when the last side file has been copied: everything has been read by then."""

        def start(self, phase: str, total: int) -> None:
            self.left = total if phase == "copying other files" else 0

        def advance(self, nbytes: int) -> None:
            if self.left:
                self.left -= nbytes
                if self.left == 0:
                    change(own.path / SHARD)
                    self.state = snapshot(own.path)

    late = Late()
    options = {"ties": own.ties, "max_shard_size": "50KB", "in_place": True, "backup": backup}
    with pytest.raises(tierewrite.SourceChanged, match="nothing was made or swapped"):
        tierewrite.rewrite(own.path, progress=late, **options)  # type: ignore[arg-type]
    assert snapshot(own.path) == late.state
    assert names_in(own.path.parent) == ["naive"]


def test_source_that_changes_before_the_proof_reads_it_again_is_told_as_that(own: Source, tmp_path: Path) -> None:
    """It was called a bug of ours, or a failing disk."""
    watch = Watch("copying other files", lambda: added(own.path / SHARD))
    with pytest.raises(tierewrite.SourceChanged, match=r"new-notes.md: was added while the checkpoint was rewritten"):
        tierewrite.rewrite(own.path, tmp_path / "work" / "out", ties=own.ties, verify=True, progress=watch)
    assert watch.acted
    assert not (tmp_path / "work").exists()


# ------------------------------------------------------------------------------------------------------- resuming


def test_what_a_killed_run_left_and_cannot_be_read_or_removed_is_named(
    machine: Machine, source: Source, right: dict[str, str], tmp_path: Path
) -> None:
    left = tmp_path / "left"
    fault = Fault(left, "kill_before", 1, calls=("create",), part="index.json")
    assert machine.run("rewrite", source.path, left / "out", *source.options, fault=fault).code == -9
    work = tmp_path / "work"
    for name in ("open", "read", "pread"):
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(left, work)
        fault = Fault(work, "fail", 2, None, errno.EIO, (name,), ".safetensors")
        done = machine.run("rewrite", source.path, work / "out", *source.options, "--resume", fault=fault)
        if done.code == 0:  # a shard that cannot be opened is written again
            assert contents(work / "out") == right
        else:
            fails_well(done)
        assert names_in(work) == (["out"] if done.code == 0 else [])
    done = machine.run(
        "rewrite", source.path, left / "out", *source.options, "--resume", fault=Fault(left, calls=CHANGES)
    )
    assert done.code == 0
    assert contents(left / "out") == right
    assert not [call for call in done.calls if ".safetensors.part" in call.path]
