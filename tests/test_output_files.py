"""New files that threads write in any order while the disk already takes what is there."""

from __future__ import annotations

import errno
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import tierewrite
from tests.checkpoints import FIXTURES
from tierewrite.errors import SystemFailure
from tierewrite.output import files
from tierewrite.output.files import PartFiles
from tierewrite.stores import local
from tierewrite.stores.local import part_path


def _made(folder: Path, count: int = 2) -> dict[int, Path]:
    paths = {number: folder / f"{number}.safetensors" for number in range(count)}
    for path in paths.values():
        part_path(path).touch()
    return paths


def test_pieces_by_many_threads_are_all_in_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "WRITEBACK_BYTES", 4096)
    monkeypatch.setattr(local, "_WRITE_BYTES", 100)
    data = {number: random.Random(number).randbytes(100_000) for number in range(3)}
    pieces = [(number, at) for number in data for at in range(0, 100_000, 700)]
    random.Random(1).shuffle(pieces)
    paths = _made(tmp_path, 3)
    seen: list[int] = []
    with PartFiles(paths) as shards, ThreadPoolExecutor(8) as pool:
        written = [pool.submit(shards.write, n, memoryview(data[n][at : at + 700]), at) for n, at in pieces]
        for future in written:
            future.result()
        assert shards.incomplete() == [0, 1, 2]
        for number in data:
            shards.complete(number)
        assert shards.incomplete() == []
        shards.durable(seen.append)
        assert {number: path.read_bytes() for number, path in paths.items()} == data
    assert seen == [100_000] * 3
    assert sorted(os.listdir(tmp_path)) == [f"{number}.safetensors" for number in data]


def test_the_disk_is_told_to_begin_before_the_end_and_not_for_every_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    monkeypatch.setattr(local, "WRITEBACK_BYTES", 1000)
    monkeypatch.setattr(local, "start_writeback", begun.append)
    with PartFiles(_made(tmp_path, 1)) as shards:
        for at in range(0, 10_000, 100):
            shards.write(0, memoryview(bytes(100)), at)
        shards._pool.submit(int).result()
        assert 1 <= len(begun) <= 10


def test_what_is_not_complete_keeps_the_name_of_a_part(tmp_path: Path) -> None:
    paths = _made(tmp_path)
    with PartFiles(paths) as shards:
        for number in paths:
            shards.write(number, memoryview(b"bytes"), 0)
        shards.complete(1)
        shards.durable()
    assert sorted(os.listdir(tmp_path)) == ["0.safetensors.part", "1.safetensors"]


def test_a_flush_that_fails_is_met_by_who_waits_and_the_file_gets_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files, "flush", broken)
    paths = _made(tmp_path, 1)
    with PartFiles(paths) as shards:
        shards.complete(0)
        with pytest.raises(SystemFailure, match=r"0\.safetensors"):
            shards.durable()
    assert os.listdir(tmp_path) == ["0.safetensors.part"]


def test_files_that_cannot_be_opened_are_named(tmp_path: Path) -> None:
    with pytest.raises(SystemFailure, match="absent"):
        PartFiles({0: tmp_path / "absent.safetensors"})


def test_flushing_is_a_phase_that_moves_every_byte(tmp_path: Path) -> None:
    class Seen(tierewrite.Progress):
        def __init__(self) -> None:
            self.phases: dict[str, list[int]] = {}

        def start(self, phase: str, total: int) -> None:
            self.phases[phase] = [total, 0]
            self.phase = phase

        def advance(self, nbytes: int) -> None:
            self.phases[self.phase][1] += nbytes

    seen = Seen()
    source = FIXTURES / "dg_nvfp4_sharded" / "naive"
    tierewrite.rewrite(source, tmp_path / "out", device="cpu", max_shard_size="50KB", progress=seen)
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert seen.phases["flushing to the disk"] == [size, size]
    assert list(seen.phases)[-2:] == ["flushing to the disk", "copying other files"]
