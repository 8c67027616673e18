"""Bytes of small tensors: neighbours are one read, and each gets its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import write_shard
from tierewrite.source.bytes import read_tensors
from tierewrite.source.folder import open_folder
from tierewrite.source.table import Checkpoint
from tierewrite.stores.local import LocalFile

TENSORS = {"a": b"123", "empty": b"", "b": b"45", "large": bytes(5000), "c": b"6", "none": b""}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    write_shard(tmp_path / "model.safetensors", {name: ("U8", [len(data)], data) for name, data in TENSORS.items()})
    return open_folder(tmp_path)


@pytest.mark.parametrize("keys", ["a empty b large c none", "none c large b empty a", "b empty", "empty", "c a", ""])
def test_each_tensor_gets_its_own_bytes_in_whatever_order_they_are_asked_for(keys: str, checkpoint: Checkpoint) -> None:
    assert read_tensors(checkpoint, keys.split()) == {key: TENSORS[key] for key in keys.split()}


def test_neighbours_are_one_read_and_a_gap_of_a_page_is_not_read(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[tuple[int, int]] = []
    read = LocalFile.read_runs
    monkeypatch.setattr(
        LocalFile, "read_runs", lambda self, asked, into: (runs.extend(asked), read(self, asked, into))[1]
    )
    read_tensors(checkpoint, ["c", "b", "a"])
    base = checkpoint.shards[0].data_start
    assert [(start - base, end - base) for start, end in runs] == [(0, 5), (5005, 5006)]
