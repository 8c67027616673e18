"""Reading while the model class is asked: it changes when bytes are read, and nothing else."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoints import digests, right_answer
from tierewrite import rewrite
from tierewrite.source import read_ahead
from tierewrite.source.folder import open_folder

Naive = Callable[[str], Path]

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice on reading")


def _finished() -> None:
    for thread in threading.enumerate():
        if thread.name == "tierewrite-ahead":
            thread.join()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """What the kernel is asked to read: file name, start and end."""
    calls: list[tuple[str, int, int]] = []
    advise = os.posix_fadvise

    def noted(fd: int, start: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        calls.append((os.path.basename(os.readlink(f"/proc/self/fd/{fd}")), start, start + length))
        advise(fd, start, length, advice)

    monkeypatch.setattr(os, "posix_fadvise", noted)
    return calls


def test_every_byte_of_every_shard_is_asked_for_once(
    naive: Naive, asked: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "_STEP", 4096)
    checkpoint = open_folder(naive("dg_nvfp4_sharded"))
    assert len(checkpoint.shards) > 1
    with read_ahead.reading(checkpoint):
        _finished()
    for shard in checkpoint.shards:
        ranges = [(start, end) for name, start, end in asked if name == shard.name]
        assert [start for start, _ in ranges] == list(range(0, shard.size, 4096))
        assert ranges[-1][1] >= shard.size
    assert {name for name, _, _ in asked} == {shard.name for shard in checkpoint.shards}


def test_no_more_is_asked_for_than_a_share_of_the_memory(
    naive: Naive, asked: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "_STEP", 4096)
    monkeypatch.setattr(read_ahead, "_memory", lambda: read_ahead._SHARE * 10_000)
    with read_ahead.reading(open_folder(naive("dg_nvfp4_sharded"))):
        _finished()
    assert [end - start for _, start, end in asked] == [4096, 4096]


def test_it_ends_with_the_body_that_answers_or_fails(
    naive: Naive, asked: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "_STEP", 512)
    checkpoint = open_folder(naive("dg_nvfp4_sharded"))
    first, go_on = threading.Event(), threading.Event()
    noted = os.posix_fadvise

    def held(fd: int, start: int, length: int, advice: int) -> None:
        noted(fd, start, length, advice)
        first.set()
        go_on.wait(60)

    monkeypatch.setattr(os, "posix_fadvise", held)

    def fail_once_it_reads() -> None:
        assert first.wait(60)
        threading.Timer(0.2, go_on.set).start()
        raise KeyError

    with pytest.raises(KeyError), read_ahead.reading(checkpoint):
        fail_once_it_reads()
    assert len(asked) == 1
    assert not [thread for thread in threading.enumerate() if thread.name == "tierewrite-ahead"]


def test_a_file_that_went_away_is_left_to_the_pass_that_needs_it(
    naive: Naive, tmp_path: Path, asked: list[tuple[str, int, int]]
) -> None:
    checkpoint = open_folder(Path(shutil.copytree(naive("dg_nvfp4_sharded"), tmp_path / "source")))
    for shard in checkpoint.shards:
        assert isinstance(shard.path, Path)
        shard.path.unlink()
    with read_ahead.reading(checkpoint):
        _finished()
    assert asked == []


def test_a_rewrite_that_asks_the_class_reads_ahead(
    naive: Naive, tmp_path: Path, asked: list[tuple[str, int, int]]
) -> None:
    rewrite(naive("dg_nvfp4_experts_only"), tmp_path / "out", device="cpu")
    assert {name for name, _, _ in asked} == {"model.safetensors"}
    assert digests(tmp_path / "out") == right_answer("dg_nvfp4_experts_only")
