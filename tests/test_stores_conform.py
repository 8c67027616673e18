"""What every store promises (stores/base.py), held by a folder, fsspec's memory:// and S3 alike."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tierewrite
from tests.checkpoints import FIXTURES
from tierewrite.errors import SourceChanged, SystemFailure, TierewriteError
from tierewrite.output.destination import destination
from tierewrite.stores.base import Store
from tierewrite.stores.places import FilePath, is_remote, located, store_of

DATA = bytes(range(256)) * 40
STORES: dict[str, Callable[[pytest.FixtureRequest], FilePath]] = {
    "folder": lambda request: request.getfixturevalue("tmp_path") / "in a folder",
    "memory": lambda request: located(f"memory://{uuid.uuid4().hex}/folder"),
    "s3": lambda request: located(request.getfixturevalue("store").url("folder")),
}
"""A folder of each store, empty and in an empty folder. A new store is a line here."""


@pytest.fixture(params=STORES)
def folder(request: pytest.FixtureRequest) -> FilePath:
    return STORES[request.param](request)


def filled(folder: FilePath, *names: str) -> Store[Any]:
    """The folder's store, with files of DATA in the folder."""
    store = store_of(folder)
    for name in names:
        store.make_folder((folder / name).parent)
        store.put(folder / name, DATA)
    return store


def test_names_are_all_files_below_sorted(folder: FilePath) -> None:
    store = filled(folder, "b.json", "a.safetensors", "tokenizer/more/merges ü.txt")
    filled(folder.parent / f"{folder.name}-2", "of another folder")
    assert store.names(folder) == ["a.safetensors", "b.json", "tokenizer/more/merges ü.txt"]


def test_a_folder_that_is_not_there_has_no_files(folder: FilePath) -> None:
    assert store_of(folder).names(folder / "absent") == []


def test_what_is_put_is_read_and_put_again_replaces_it(folder: FilePath) -> None:
    store = filled(folder, "a.json")
    assert store.read(folder / "a.json") == DATA
    store.put(folder / "a.json", b"other")
    assert store.read(folder / "a.json") == b"other"
    store.put(folder / "a.json", b"")
    assert store.read(folder / "a.json") == b""


def test_ranges_come_in_the_order_asked_for(folder: FilePath) -> None:
    store = filled(folder, "a")
    runs = [(0, 8), (300, 300), (100, 200), (5000, 5001), (len(DATA) - 3, len(DATA))]
    into = bytearray(sum(end - start for start, end in runs))
    with store.open(store.stamp(folder / "a")) as file:
        file.read_runs(runs, memoryview(into))
        file.finish()
    assert bytes(into) == b"".join(DATA[start:end] for start, end in runs)


def test_a_range_beyond_the_end_is_a_change_of_the_file(folder: FilePath) -> None:
    store = filled(folder, "a")
    with store.open(store.stamp(folder / "a")) as file, pytest.raises(SourceChanged):
        file.read_runs([(len(DATA) - 4, len(DATA) + 4)], memoryview(bytearray(8)))


@pytest.mark.parametrize("size", [0, 1, len(DATA)])
def test_chunks_are_the_whole_file(folder: FilePath, size: int) -> None:
    store = filled(folder, "a")
    store.put(folder / "a", DATA[:size])
    assert b"".join(store.chunks(store.stamp(folder / "a"))) == DATA[:size]


def test_a_file_that_changed_since_it_was_looked_at_is_noticed(folder: FilePath) -> None:
    store = filled(folder, "a")
    before = store.stamp(folder / "a")
    store.put(folder / "a", DATA + b"more")
    with pytest.raises(SourceChanged), store.open(before) as file:
        file.finish()
    with pytest.raises(SourceChanged):
        list(store.chunks(before))


def test_a_file_of_another_size_than_was_listed_is_noticed(folder: FilePath) -> None:
    store = filled(folder, "a")
    longer = replace(store.stamp(folder / "a"), size=len(DATA) + 1)
    with pytest.raises(SourceChanged):
        list(store.chunks(longer))


@pytest.mark.parametrize("folder", ["folder", "s3"], indirect=True)  # memory:// writes in place: see below
def test_a_new_file_is_under_its_name_only_once_it_is_committed(folder: FilePath) -> None:
    store = filled(folder, "other")
    sink = store.create(folder / "new", len(DATA), "token")
    sink.write(memoryview(DATA)[:1000])
    sink.write(memoryview(DATA)[1000:])
    assert "new" not in store.names(folder)
    sink.commit()
    assert store.names(folder) == ["new", "other"]
    assert store.read(folder / "new") == DATA


@pytest.mark.parametrize("folder", ["folder", "s3"], indirect=True)  # memory:// writes in place: see below
def test_a_new_file_that_is_aborted_leaves_nothing(folder: FilePath) -> None:
    store = filled(folder, "other")
    sink = store.create(folder / "new", len(DATA), "token")
    sink.write(memoryview(DATA))
    sink.abort()
    assert store.names(folder) == ["other"]


@pytest.mark.parametrize("folder", STORES, indirect=True)
def test_a_committed_file_is_whole(folder: FilePath) -> None:
    store = filled(folder, "other")
    sink = store.create(folder / "new", len(DATA), "token")
    for start in range(0, len(DATA), 1000):
        sink.write(memoryview(DATA)[start : start + 1000])
    sink.commit()
    assert store.read(folder / "new") == DATA


@pytest.mark.parametrize("folder", ["memory"], indirect=True)
def test_memory_writes_in_place_so_only_the_index_and_the_marker_tell_what_is_whole(folder: FilePath) -> None:
    """A limit of fsspec's memory://, held here so that its end is noticed."""
    store = filled(folder, "other")
    sink = store.create(folder / "new", len(DATA), "token")
    sink.write(memoryview(DATA)[:1000])
    assert store.names(folder) == ["new", "other"]
    sink.abort()


def test_a_store_copies_ranges_by_itself_or_says_that_it_cannot(
    folder: FilePath, request: pytest.FixtureRequest
) -> None:
    store = filled(folder, "other")
    large = DATA * 1200
    store.put(folder / "large", large)
    stamp = store.stamp(folder / "large")
    MiB = 1 << 20
    ranges = [(3, 3 + 6 * MiB), (0, 11 * MiB), (7, 8)]
    expected = b"header" + b"".join(large[start:end] for start, end in ranges) + b"end"
    sink = store.copying([stamp], folder / "new", len(expected), "token")
    where = request.node.callspec.id
    assert (sink is not None) == ("s3" in where or "folder" in where)
    if sink is None:
        return
    sink.write(memoryview(b"header"))
    with store.open(stamp) as source:
        # S3 takes no part below 5 MiB but the last: what is too short to be one passes through this machine.
        copied = [sink.copy(source, start, end) for start, end in ranges]
    assert [part.by_store for part in copied] == ([0, 11 * MiB, 0] if "s3" in where else [0, 0, 0])
    sink.write(memoryview(b"end"))
    assert "new" not in store.names(folder)
    sink.commit()
    assert store.read(folder / "new") == expected


def test_a_removed_file_is_gone_and_a_missing_one_is_an_error_unless_it_may_be(folder: FilePath) -> None:
    store = filled(folder, "a", "b")
    store.remove(folder / "a")
    assert store.names(folder) == ["b"]
    store.remove(folder / "a", missing_ok=True)


def test_what_is_absent_is_an_error_that_names_the_file(folder: FilePath) -> None:
    store = filled(folder, "other")
    for ask in (store.stamp, store.read):
        with pytest.raises(TierewriteError, match="absent"):
            ask(folder / "absent")


def test_an_output_appears_whole_or_not_at_all(folder: FilePath, tmp_path: Path) -> None:
    store = store_of(folder)
    for committed in (False, True):
        place = destination(tmp_path / "src", folder, overwrite=False, resume=False)
        with place.staging(False) as staging:
            sink = store.create(staging.folder / "model.safetensors", len(DATA), "token")
            sink.write(memoryview(DATA))
            sink.commit()
            staging.put("config.json", b"{}")
            staging.put("model.safetensors.index.json", b"1")
            assert "model.safetensors.index.json" not in store.names(folder)
            if committed:
                staging.commit()
        expected = ["config.json", "model.safetensors", "model.safetensors.index.json"] if committed else []
        assert store.names(folder) == expected


def test_what_is_there_is_not_overwritten_unasked(folder: FilePath, tmp_path: Path) -> None:
    filled(folder, "model.safetensors")
    with pytest.raises(TierewriteError) as raised:
        destination(tmp_path / "src", folder, overwrite=False, resume=False)
    assert not isinstance(raised.value, SystemFailure)
    assert store_of(folder).names(folder) == ["model.safetensors"]


def test_a_rewrite_within_it_gives_what_one_on_this_machine_gives(folder: FilePath, tmp_path: Path) -> None:
    naive = FIXTURES / "dg_nvfp4_sharded" / "naive"
    store = store_of(folder)
    store.make_folder(folder / "src")
    for file in naive.iterdir():
        store.put(folder / "src" / file.name, file.read_bytes())
    src, dst = (place.url if is_remote(place) else str(place) for place in (folder / "src", folder / "dst"))
    tierewrite.rewrite(src, dst, max_shard_size="100KB", verify=True)
    tierewrite.rewrite(naive, tmp_path / "dst", max_shard_size="100KB")
    expected = {file.name: file.read_bytes() for file in (tmp_path / "dst").iterdir()}
    assert {name: store.read(folder / "dst" / name) for name in store.names(folder / "dst")} == expected
