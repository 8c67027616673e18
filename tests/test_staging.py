"""Staging, resuming, and swapping in place."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tierewrite
from tests.checkpoints import digests, right_answer
from tests.conftest import snapshot
from tierewrite.output import staging, work
from tierewrite.output.target import Target
from tierewrite.output.work import Task, Work, work_of
from tierewrite.planning.plan import OutShard, OutTensor
from tierewrite.source.folder import open_folder
from tierewrite.source.table import Checkpoint, Shard, TensorEntry

Naive = Callable[[str], Path]


def staging_of(dst: Path) -> Path:
    return dst.parent / f".{dst.name}.tierewrite"


def killed_run(naive: Path, dst: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Leaves what a run leaves that is killed just before the rename; returns the staging folder."""
    with monkeypatch.context() as patch:
        patch.setattr(staging.Staging, "commit", lambda *_: os._exit(9))
        if (child := os.fork()) == 0:
            try:
                tierewrite.rewrite(naive, dst, max_shard_size="20KB")
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 9
    assert not dst.exists()
    return staging_of(dst)


def test_killed_run_leaves_no_dst_and_the_next_run_starts_anew(
    naive: Naive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = killed_run(naive("dg_nvfp4"), tmp_path / "out", monkeypatch)
    assert staging.is_dir()
    tierewrite.rewrite(naive("dg_nvfp4"), tmp_path / "out")
    assert digests(tmp_path / "out") == right_answer("dg_nvfp4")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_resume_writes_only_what_is_missing_and_gives_identical_bytes(
    naive: Naive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tierewrite.rewrite(naive("dg_nvfp4"), tmp_path / "whole", max_shard_size="20KB")
    staging = killed_run(naive("dg_nvfp4"), tmp_path / "out", monkeypatch)
    shards = sorted(staging.glob("*.safetensors"))
    shards[0].unlink()
    flipped = bytearray(shards[1].read_bytes())
    flipped[-1] ^= 1
    shards[1].write_bytes(flipped)
    (staging / "model-00077-of-00099.safetensors").write_bytes(b"stale")
    inodes = {path.name: path.stat().st_ino for path in shards[2:]}
    tierewrite.rewrite(naive("dg_nvfp4"), tmp_path / "out", max_shard_size="20KB", resume=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in inodes} == inodes
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["out", "whole"]


def test_resume_with_other_options_takes_nothing_over_that_is_wrong(
    naive: Naive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_run(naive("dg_nvfp4"), tmp_path / "out", monkeypatch)
    tierewrite.rewrite(naive("dg_nvfp4_kvfp8"), tmp_path / "out", max_shard_size="20KB", resume=True)
    assert digests(tmp_path / "out") == right_answer("dg_nvfp4_kvfp8")


def test_resume_without_anything_to_resume_is_a_plain_run(naive: Naive, tmp_path: Path) -> None:
    tierewrite.rewrite(naive("dg_nvfp4"), tmp_path / "out", resume=True)
    assert digests(tmp_path / "out") == right_answer("dg_nvfp4")


def test_resume_after_a_refusal_under_keep(naive: Naive, tmp_path: Path) -> None:
    case = "qwen3_tied_but_diverged_bf16"
    tierewrite.rewrite(naive(case), tmp_path / "out", on_mismatch="keep", resume=True)
    assert digests(tmp_path / "out") == digests(naive(case))


def test_second_run_into_the_same_dst_is_refused_and_disturbs_nothing(naive: Naive, tmp_path: Path) -> None:
    staging = staging_of(tmp_path / "out")
    staging.mkdir()
    (staging / "model.safetensors.part").write_bytes(b"the other run's")
    lock = os.open(staging, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        with pytest.raises(tierewrite.UsageError, match="another run"):
            tierewrite.rewrite(naive("dg_nvfp4"), tmp_path / "out")
        assert (staging / "model.safetensors.part").read_bytes() == b"the other run's"
    finally:
        os.close(lock)


def staged(dst: Path) -> staging.Staging:
    return staging.Staging(Target(dst, overwrite=True))


def test_a_run_that_begins_when_dst_has_appeared_loses_nothing_to_the_one_that_ends(tmp_path: Path) -> None:
    second = staged(tmp_path / "out")
    with staged(tmp_path / "out") as first:
        first.put("first", b"1")
        first.commit(lambda: second.__enter__().put("second", b"2"))
    assert (tmp_path / "out" / "first").read_bytes() == b"1"
    second.commit()
    second.__exit__(None, None, None)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["second"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_what_is_swapped_out_is_not_taken_over_by_a_second_run(
    exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchanges:
        monkeypatch.setattr(staging, "_exchange", lambda *_: False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_bytes(b"0")
    flush = staging.sync_folder

    def second_run_begins(folder: Path) -> None:
        if (tmp_path / "out" / "new").exists():
            with pytest.raises(tierewrite.UsageError, match="another run"):
                staged(tmp_path / "out").__enter__()
            raise OSError(errno.EIO, "the disk fails")
        flush(folder)

    monkeypatch.setattr(staging, "sync_folder", second_run_begins)
    with staged(tmp_path / "out") as first:
        first.put("new", b"1")
        with pytest.raises(tierewrite.SystemFailure):
            first.commit()
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "out").iterdir()] == [("old", b"0")]


def test_in_place_swaps_and_keeps_the_original(copied: Naive, tmp_path: Path) -> None:
    src = copied("dg_nvfp4")
    before = snapshot(src)
    tierewrite.rewrite(src, in_place=True)
    assert digests(src) == right_answer("dg_nvfp4")
    assert snapshot(src.with_name(src.name + ".bak")) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [src.name, src.name + ".bak"]


def test_in_place_without_backup_leaves_only_the_new_one(copied: Naive, tmp_path: Path) -> None:
    src = copied("dg_nvfp4")
    tierewrite.rewrite(src, in_place=True, backup=False)
    assert digests(src) == right_answer("dg_nvfp4")
    assert [p.name for p in tmp_path.iterdir()] == [src.name]


def test_in_place_works_where_the_kernel_cannot_exchange(
    copied: Naive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = copied("dg_nvfp4")
    before = snapshot(src)
    monkeypatch.setattr(staging.ctypes, "CDLL", lambda *a, **k: object())
    tierewrite.rewrite(src, in_place=True)
    assert digests(src) == right_answer("dg_nvfp4")
    assert snapshot(src.with_name(src.name + ".bak")) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [src.name, src.name + ".bak"]


def test_in_place_refuses_when_a_backup_exists(copied: Naive) -> None:
    src = copied("dg_nvfp4")
    before = digests(src)
    shutil.copytree(src, src.with_name(src.name + ".bak"))
    with pytest.raises(tierewrite.UsageError, match=r"\.bak"):
        tierewrite.rewrite(src, in_place=True)
    assert digests(src) == before


def test_in_place_refused_tie_leaves_src_alone(copied: Naive, tmp_path: Path) -> None:
    src = copied("qwen3_tied_but_diverged_bf16")
    before = snapshot(src)
    with pytest.raises(tierewrite.Refused):
        tierewrite.rewrite(src, in_place=True)
    assert snapshot(src) == before
    assert [p.name for p in tmp_path.iterdir()] == [src.name]


def test_in_place_says_beforehand_what_it_needs(copied: Naive) -> None:
    notes: list[str] = []

    class Watch(tierewrite.Progress):
        def note(self, text: str) -> None:
            notes.append(text)
            assert not src.with_name(src.name + ".bak").exists()

    src = copied("dg_nvfp4")
    tierewrite.rewrite(src, in_place=True, progress=Watch())
    assert len(notes) == 1
    assert "bytes" in notes[0]
    assert ".bak" in notes[0]


def test_dst_beside_in_place_is_wrong_usage(copied: Naive, tmp_path: Path) -> None:
    with pytest.raises(tierewrite.UsageError):
        tierewrite.rewrite(copied("dg_nvfp4"), tmp_path / "out", in_place=True)
    with pytest.raises(tierewrite.UsageError):
        tierewrite.rewrite(copied("bart_bf16"))


def test_too_little_space_is_refused_before_the_first_byte(
    naive: Naive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(tierewrite.SystemFailure, match=r"1,000 free"):
        tierewrite.rewrite(naive("dg_nvfp4"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_stray_file_with_the_name_of_an_output_shard_is_refused(copied: Naive, tmp_path: Path) -> None:
    from tests.checkpoints import write_shard

    src = copied("dg_nvfp4_sharded")
    write_shard(src / "model-00001-of-00002.safetensors", {"unrelated": ("U8", [1], b"x")})
    with pytest.raises(tierewrite.SourceError, match="name of a shard of the output"):
        tierewrite.rewrite(src, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("hashed", [["nobody"], []])
def test_work_on_a_tensor_that_the_source_does_not_have_is_an_error(naive: Naive, hashed: list[str]) -> None:
    checkpoint = open_folder(naive("dg_bf16"))
    written = [] if hashed else [OutTensor("a", "nobody", 0, 1)]
    with pytest.raises(KeyError, match="nobody"):
        work_of(checkpoint, hashed, (OutShard.of("model.safetensors", checkpoint.tensors, written),), (8,))


_FULL, _MOST = 100, 4
_SOME = st.tuples(st.sampled_from([0, 0, 1, 30, 50, 99, 100, 101, 250]), st.booleans(), st.sampled_from([-1, 0, 1]))


def check_steps(whole: Work, task: Task, rows: list[tuple[str, int, int, bool, int, int]]) -> None:
    """Every byte of a task is read into the buffer in order, and hashed and written from where it then is."""
    steps = whole.steps(task)
    read = [at for start, end in steps.reads for at in range(start, end)]
    assert read == [at for _, start, end, *_ in rows for at in range(start, end)]
    hashed = [read[start : start + length] for _, start, length, *_ in steps.hashed.tolist()]
    assert hashed == [list(range(start, end)) for _, start, end, is_hashed, *_ in rows if is_hashed]
    written = {
        (out, position + at - start): read[at] for out, start, end, position in steps.writes for at in range(start, end)
    }
    assert written == {
        (out, position + at - start): at
        for _, start, end, _, out, position in rows
        for at in range(start, end)
        if out >= 0
    }


@given(st.lists(st.lists(_SOME, max_size=20), min_size=1, max_size=3))
def test_tasks_hold_every_span_once_in_order_and_are_as_full_as_they_may(
    shards: list[list[tuple[int, bool, int]]],
) -> None:
    # Lengths from nothing to more than a buffer; each tensor is hashed or not, and goes to the output 0, 1 or to none.
    entries: dict[str, TensorEntry] = {}
    wanted: dict[int, list[tuple[str, int, int, bool, int, int]]] = {}
    hashed: list[str] = []
    outs: tuple[list[OutTensor], ...] = ([], [])
    ends = [0, 0]
    for number, tensors in enumerate(shards):
        at = 8
        for index, (length, is_hashed, out) in enumerate(tensors):
            key = f"{number}.{index}"
            entries[key] = TensorEntry(key, "U8", (length,), number, at, at + length)
            if is_hashed:
                hashed.append(key)
            if is_hashed or out >= 0:
                position = 1000 * (out + 1) + ends[out] if out >= 0 else 0
                wanted.setdefault(number, []).append((key, at, at + length, is_hashed, out, position))
            if out >= 0:
                outs[out].append(OutTensor(key, key, ends[out], ends[out] + length))
                ends[out] += length
            at += length
    files = tuple(Shard(str(n), Path(str(n)), 0, 0, 0, 8, {}) for n in range(len(shards)))
    checkpoint = Checkpoint.of(Path(), files, entries)
    shards_out = [OutShard.of(str(n), checkpoint.tensors, tensors) for n, tensors in enumerate(outs)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "BUFFER_BYTES", _FULL)
        patch.setattr(work, "_TENSORS_PER_TASK", _MOST)
        whole = work_of(checkpoint, hashed, shards_out, [1000, 2000])
    found = [task for task in whole.tasks if isinstance(task, Task)]
    names = checkpoint.tensors.names
    rows = [(names[row], *others) for row, *others in zip(*(c.tolist() for c in whole.columns), strict=True)]
    held = {task: rows[task.first : task.stop] for task in found}
    sizes = [task.nbytes for task in found]
    large = [size for size in sizes if size > _FULL]
    assert sizes[: len(large)] == sorted(large, reverse=True), "the large ones come first"
    for task in found:
        assert task.nbytes == sum(end - start for _, start, end, *_ in held[task])
        assert task.outs == {out for *_, out, _ in held[task] if out >= 0}
        assert len(held[task]) == 1 or (task.nbytes <= _FULL and len(held[task]) <= _MOST)
        if task.nbytes <= _FULL:
            check_steps(whole, task, held[task])
    for number in range(len(shards)):
        mine = [task for task in found if task.shard == number]
        mine.sort(key=lambda task: task.first)
        assert [row for task in mine for row in held[task]] == wanted.get(number, [])
        for one, following in itertools.pairwise(mine):
            _, start, end, *_ = held[following][0]
            assert one.nbytes + end - start > _FULL or len(held[one]) == _MOST, "the next one had no room"
