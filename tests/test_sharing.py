"""Survivors are shared with the source where the file system can, on real XFS and Btrfs images; the output is the same.

By hand: `pytest -m long -s tests/test_sharing.py` (every fixture; SIGKILL at every call).
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tierewrite
from tests.checkpoints import FIXTURES, read_header
from tests.conftest import snapshot
from tests.faults import CHANGES, Fault, Machine, contents, names_in
from tests.faults.sources import Source, shareable
from tests.images import MKFS, Unavailable, mounted, shared_bytes
from tierewrite.engines.local import LocalEngine
from tierewrite.errors import SourceChanged, SystemFailure, UsageError
from tierewrite.output import files, shards
from tierewrite.output.work import work_of
from tierewrite.planning import alignment
from tierewrite.report import Means, Report
from tierewrite.stores import local, sharing

RUN = 3 << 19
MERGED = 4 * RUN
"""Bytes of the runs in the output of `shareable`: two tied weights, and two that have one name."""


@pytest.fixture(scope="module", params=sorted(MKFS))
def image(request: pytest.FixtureRequest) -> Iterator[Path]:
    try:
        with mounted(request.param, 400) as place:
            yield place
    except Unavailable as error:
        pytest.skip(f"no {request.param} image can be mounted: {error}")


@pytest.fixture
def work(image: Path) -> Iterator[Path]:
    folder = image / "work"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def source(work: Path) -> Source:
    return shareable(work)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The output as this program writes it by itself."""
    folder = tmp_path_factory.mktemp("plain")
    source = shareable(folder)
    report = tierewrite.rewrite(source.path, folder / "out", ties=source.ties, copy="never")
    assert report.means is not None
    assert report.means.written == sum(shard.nbytes for shard in report.after_shards)
    return contents(folder / "out") or {}


def rewritten(source: Source, out: Path, **options: Any) -> Report:
    return tierewrite.rewrite(source.path, out, ties=source.ties, **options)


def means_of(report: Report) -> Means:
    assert report.means is not None
    means = report.means
    written = sum(shard.nbytes for shard in report.after_shards)
    assert means.shared + means.copied_in_kernel + means.copied_by_store + means.written == written
    return means


def shared_in(folder: Path) -> int:
    return sum(shared_bytes(path) for path in folder.glob("*.safetensors"))


# ----------------------------------------------------------------------------------------------- what is shared


def test_large_runs_are_shared_and_the_output_is_the_same(source: Source, work: Path, plain: dict[str, str]) -> None:
    before = snapshot(source.path)
    report = rewritten(source, work / "out", verify=True)
    means = means_of(report)
    assert MERGED - 8 * 4096 <= means.shared <= MERGED
    assert means.copied_in_kernel == 0
    assert means.shared <= shared_in(work / "out") <= means.shared + 8 * 4096
    assert contents(work / "out") == plain
    assert snapshot(source.path) == before
    assert report.to_json()["means"]["shared"] == means.shared


def test_copy_never_writes_every_byte(source: Source, work: Path, plain: dict[str, str]) -> None:
    report = rewritten(source, work / "out", copy="never")
    means = means_of(report)
    assert means.shared == means.copied_in_kernel == shared_in(work / "out") == 0
    assert contents(work / "out") == plain


def test_digests_of_every_tensor_do_not_depend_on_what_is_shared(source: Source, work: Path, tmp_path: Path) -> None:
    means = means_of(rewritten(source, work / "out", digests=True))
    assert means.shared >= MERGED - 8 * 4096
    rewritten(source, tmp_path / "out", digests=True)
    assert contents(work / "out") == contents(tmp_path / "out")
    alone = tierewrite.verify_integrity(work / "out")
    assert alone.ok
    assert alone.digests == alone.tensors


def test_jobs_of_other_processes_share_too(
    source: Source, work: Path, plain: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_one_pass = LocalEngine.run_pass
    hashing = lambda self, checkpoint, keys, phase: in_one_pass(self, work_of(checkpoint, keys), phase).digests  # noqa: E731
    monkeypatch.setattr(LocalEngine, "hash", hashing)
    monkeypatch.setattr(LocalEngine, "run_pass", None)
    means = means_of(rewritten(source, work / "out"))
    assert MERGED - 8 * 4096 <= means.shared <= MERGED
    assert contents(work / "out") == plain


def test_source_and_output_live_without_each_other(source: Source, work: Path, plain: dict[str, str]) -> None:
    original = contents(source.path)
    for number, gone in enumerate(("source", "output")):
        src = shutil.copytree(source.path, work / f"src{number}")
        tierewrite.rewrite(src, work / f"out{number}", ties=source.ties)
        if gone == "source":
            shutil.rmtree(src)
            subprocess.run(["sync", "-f", work], check=True)
            assert contents(work / f"out{number}") == plain
        else:
            shutil.rmtree(work / f"out{number}")
            subprocess.run(["sync", "-f", work], check=True)
            assert contents(src) == original


def test_what_is_written_to_the_output_later_does_not_reach_the_source(source: Source, work: Path) -> None:
    original = contents(source.path)
    rewritten(source, work / "out")
    for path in (work / "out").glob("*.safetensors"):
        path.write_bytes(bytes(path.stat().st_size))
    assert contents(source.path) == original


# ------------------------------------------------------------------------------------------ what is not shared


def test_where_sharing_is_refused_after_all_the_kernel_copies_else_all_is_written(
    source: Source, work: Path, plain: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = local.can_share
    refuses = lambda *given: False  # noqa: E731

    def only_the_trial(*given: Any) -> Any:
        found = tried(*given)
        monkeypatch.setattr(local, "clone", refuses)
        return found

    monkeypatch.setattr(shards, "can_share", only_the_trial)
    assert means_of(rewritten(source, work / "copied")).copied_in_kernel >= MERGED
    assert contents(work / "copied") == plain
    monkeypatch.setattr(local, "copy_range", lambda *given: None)
    monkeypatch.setattr(local, "clone", sharing.clone)
    assert means_of(rewritten(source, work / "written")) == Means(written=means_of_written(plain, work / "written"))
    assert contents(work / "written") == plain


def test_where_the_kernel_says_that_nothing_is_left_to_copy_all_is_read(
    source: Source, work: Path, plain: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for files of some file systems: reading tells whether that is so."""
    monkeypatch.setattr(local, "clone", lambda *given: False)
    monkeypatch.setattr(os, "copy_file_range", lambda *given: 0)
    assert means_of(rewritten(source, work / "out")) == Means(written=means_of_written(plain, work / "out"))
    assert contents(work / "out") == plain


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux shares and copies in the kernel")
def test_a_signal_interrupts_neither_sharing_nor_copying(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[int | type[InterruptedError]] = []

    def call(*given: Any) -> int:
        now = said.pop(0)
        if now is InterruptedError:
            raise InterruptedError(errno.EINTR, "interrupted")
        assert isinstance(now, int)
        return now

    monkeypatch.setattr(sharing.fcntl, "ioctl", call)
    monkeypatch.setattr(os, "copy_file_range", call)
    said[:] = [InterruptedError, 0]
    assert sharing.clone(0, 1, 0, 4096, 0)
    said[:] = [5, InterruptedError, InterruptedError, 5]
    assert sharing.copy_range(0, 1, 0, 10, 0)
    assert said == []


def test_a_file_that_is_to_be_nameless_does_not_meet_one_that_a_killed_run_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the file system has no nameless files: processes in containers have the same few ids over and over."""
    opened = os.open

    def refused(path: Any, flags: int, *given: Any, **more: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        return opened(path, flags, *given, **more)

    monkeypatch.setattr(os, "open", refused)
    (tmp_path / f".tierewrite-{os.getpid()}").touch()
    found = [sharing.nameless(tmp_path) for _ in range(2)]
    for fd in found:
        assert os.write(fd, b"x") == 1
        os.close(fd)
    assert names_in(tmp_path) == [f".tierewrite-{os.getpid()}"]


def means_of_written(plain: dict[str, str], folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in plain if name.endswith(".safetensors"))


def test_an_output_on_another_file_system_is_not_shared(source: Source, tmp_path: Path, plain: dict[str, str]) -> None:
    assert means_of(rewritten(source, tmp_path / "out")).shared == 0
    assert contents(tmp_path / "out") == plain


def test_a_tie_that_the_bytes_refute_is_not_shared(source: Source, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in source.path.glob("*.safetensors"):
        header, start = read_header(path)
        if "encoder.0.weight" in header:
            with path.open("r+b") as file:
                file.seek(start + header["encoder.0.weight"]["data_offsets"][0] + RUN // 2)
                file.write(b"not what it was")
    puts: list[Any] = []
    monkeypatch.setattr(files.PartFiles, "put", lambda self, *given: puts.append(given))
    with pytest.raises(tierewrite.Refused):
        rewritten(source, work / "out")
    assert puts == []
    assert names_in(work) == ["shareable", "ties.json"]
    monkeypatch.undo()
    assert means_of(rewritten(source, work / "out", on_mismatch="keep", verify=True)).shared > MERGED


def test_there_are_two_ways_to_copy(source: Source, work: Path) -> None:
    with pytest.raises(UsageError, match="auto, never"):
        rewritten(source, work / "out", copy="always")


# -------------------------------------------------------------------------------------- a source that changes


def _write(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - RUN)


def _replace(path: Path) -> None:
    other = path.with_name("other")
    shutil.copy2(path, other)
    other.rename(path)


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("change", [_write, _truncate, _replace])
def test_a_source_that_changes_before_or_while_it_is_shared_is_refused(
    change: Callable[[Path], None], after: int, source: Source, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []
    put = files.PartFiles.put

    def changing(self: files.PartFiles, *given: Any) -> Any:
        if len(done) == after:
            for path in source.path.glob("*.safetensors"):
                change(path)
        done.append(1)
        return put(self, *given)

    monkeypatch.setattr(files.PartFiles, "put", changing)
    with pytest.raises(SourceChanged):
        rewritten(source, work / "out")
    assert len(done) > after
    assert [name for name in names_in(work) if "out" in name] == []


# ---------------------------------------------------------------------------------------------------- the disk


def fill(folder: Path, leave: int) -> None:
    """Takes the space but for about `leave` bytes."""
    with (folder / "filler").open("wb") as file:
        at = 0
        while (free := shutil.disk_usage(folder).free) > leave + (1 << 20):
            size = max(1 << 20, (free - leave) // 2)
            os.posix_fallocate(file.fileno(), at, size)
            subprocess.run(["sync", "-f", folder], check=True)
            at += size


def test_what_is_shared_needs_no_space_and_what_is_written_is_refused_before_the_first_byte(
    source: Source, work: Path, plain: dict[str, str]
) -> None:
    fill(work, 4 << 20)  # the output has 6 MB
    with pytest.raises(SystemFailure, match="make room"):
        rewritten(source, work / "out", copy="never")
    assert [name for name in names_in(work) if "out" in name] == []
    assert means_of(rewritten(source, work / "out")).shared
    assert contents(work / "out") == plain


def test_in_place_needs_no_space_for_what_stays(source: Source, work: Path, plain: dict[str, str]) -> None:
    fill(work, 4 << 20)
    assert means_of(tierewrite.rewrite(source.path, in_place=True, ties=source.ties)).shared
    assert contents(source.path) == plain
    shutil.rmtree(source.path.with_name("shareable.bak"))
    assert contents(source.path) == plain


def test_an_empty_subvolume_is_an_empty_folder(work: Path, source: Source, plain: dict[str, str]) -> None:
    made = subprocess.run(["btrfs", "subvolume", "create", work / "out"], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("only Btrfs has subvolumes")
    rewritten(source, work / "out")
    assert contents(work / "out") == plain
    assert names_in(work) == ["out", "shareable", "ties.json"]


# ----------------------------------------------------------------------------------------- crashes and failures


def instants(machine: Machine, source: Source, work: Path) -> int:
    """How many calls a rewrite makes that change something."""
    machine.warm("rewrite", source.path, work / "warm", *source.options)
    fault = Fault(work, calls=CHANGES)
    counted = machine.run("rewrite", source.path, work / "counted", *source.options, fault=fault).calls
    assert {call.name for call in counted} >= {"clone", "pwrite", "fsync", "rename"}
    return len(counted)


def killed_at(
    number: int, how: str, machine: Machine, source: Source, work: Path, plain: dict[str, str], *more: str
) -> None:
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    fault = Fault(work, how, number, None, 0, CHANGES)
    code = machine.run("rewrite", source.path, out, *source.options, fault=fault).code
    assert code == -signal.SIGKILL, number
    assert contents(out) in (None, plain), number
    if not out.exists():
        machine.run("rewrite", source.path, out, *source.options, *more)
        assert contents(out) == plain, number
        assert [name for name in names_in(work) if "out" in name] == ["out"], number


KILLS = ("kill_before", "kill_after", "kill_torn")


def test_killed_at_some_calls_there_is_the_whole_output_or_none(
    machine: Machine, source: Source, work: Path, plain: dict[str, str]
) -> None:
    count = instants(machine, source, work)
    chance = random.Random(5)
    for number in chance.sample(range(1, count + 1), 6):
        killed_at(number, chance.choice(KILLS), machine, source, work, plain, *chance.choice([(), ("--resume",)]))


@pytest.mark.long
def test_killed_at_every_call_there_is_the_whole_output_or_none(
    machine: Machine, source: Source, work: Path, plain: dict[str, str]
) -> None:
    count = instants(machine, source, work)
    for number in range(1, count + 1):
        for how in KILLS:
            killed_at(number, how, machine, source, work, plain, *(("--resume",) if number % 2 else ()))
    print(f"killed at {count} calls in {len(KILLS)} ways")


@pytest.mark.parametrize("code", ["EIO", "ENOSPC"])
def test_a_clone_that_fails_is_exit_5_and_leaves_nothing(
    code: str, machine: Machine, source: Source, work: Path
) -> None:
    run = ("rewrite", source.path, work / "out", *source.options)
    clones = machine.run(*run, fault=Fault(work, calls=("clone",))).calls
    assert len(clones) >= 4
    for number in (1, len(clones)):
        shutil.rmtree(work / "out", ignore_errors=True)
        done = machine.run(*run, fault=Fault(work, "fail", number, None, getattr(errno, code), ("clone",)))
        assert done.code == 5, done
        assert "Traceback" not in done.stderr
        assert [name for name in names_in(work) if "out" in name] == []


# --------------------------------------------------------------------------------------------- every fixture


@pytest.mark.long
@pytest.mark.parametrize("case", sorted(path.parent.name for path in FIXTURES.glob("*/naive")))
def test_every_fixture_gives_the_same_bytes(
    case: str, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With runs of 8 KiB: the fixtures have no large ones."""
    monkeypatch.setattr(alignment, "RUN_BYTES", 8192)
    src = shutil.copytree(FIXTURES / case / "naive", work / "naive")
    outcomes = []
    for out, copy in ((work / "shared", "auto"), (tmp_path / "plain", "never")):
        try:
            report = tierewrite.rewrite(src, out, on_mismatch="keep", copy=copy, verify=copy == "auto")  # type: ignore[arg-type]
        except tierewrite.TierewriteError as error:
            outcomes.append((type(error), None))
            continue
        assert copy == "auto" or means_of(report).shared == 0
        outcomes.append((Report, contents(out)))
    assert outcomes[0] == outcomes[1]
