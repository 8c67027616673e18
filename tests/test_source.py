"""The gate: what a checkpoint folder is, and everything about one that is refused."""

from __future__ import annotations

import errno
import gc
import json
import os
import resource
import shutil
import socket
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from tests.checkpoints import FIXTURES, read_tensors, write_checkpoint, write_shard, write_sparse_shard
from tierewrite.errors import (
    EXIT_SOURCE,
    ConfigError,
    HeaderError,
    ShardIndexError,
    SourceChanged,
    SourceError,
    SystemFailure,
    shown,
)
from tierewrite.source import header as header_room
from tierewrite.source.folder import natural_key, open_folder
from tierewrite.source.header import read_header
from tierewrite.source.index import read_index
from tierewrite.source.table import TensorEntry, Tensors

INDEX = "model.safetensors.index.json"
SHARD = "model.safetensors"
ONE = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
EMPTY = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def put(folder: Path, name: str, header: Any, data: bytes = b"") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(raw(header, data))
    return folder / name


def index(folder: Path, weight_map: Any, **more: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map, **more}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of one shard with one tensor `a`, one byte."""
    put(tmp_path / "src", SHARD, {"a": ONE}, b"x")
    return tmp_path / "src"


# ------------------------------------------------------------------------------------------------- what is accepted


@pytest.mark.parametrize("case", [p.parent.name for p in sorted(FIXTURES.glob("*/naive"))])
def test_a_real_checkpoint_opens_with_the_bytes_that_are_there(case: str) -> None:
    root = FIXTURES / case / "naive"
    opened = open_folder(root)
    tensors = read_tensors(root)
    found = {
        e.name: (e.dtype, list(e.shape), opened.shards[e.shard].path.read_bytes()[e.start : e.end])
        for e in opened.tensors.values()
    }
    assert found == tensors
    assert opened.total_bytes == sum(len(data) for _, _, data in tensors.values())
    assert opened.config == json.loads((root / "config.json").read_text())
    here = {p.name for p in root.iterdir()}
    assert {s.name for s in opened.side_files} == here - {s.name for s in opened.shards} - {INDEX}
    order = [(e.shard, e.start, e.end) for e in opened.tensors.values()]
    assert order == sorted(order)


def test_several_files_without_an_index_are_all_read(tmp_path: Path) -> None:
    for i in (10, 9, 1):
        put(tmp_path, f"part-{i}.safetensors", {f"t{i}": ONE}, b"x")
    opened = open_folder(tmp_path)
    assert [s.name for s in opened.shards] == ["part-1.safetensors", "part-9.safetensors", "part-10.safetensors"]
    assert list(opened.tensors) == ["t1", "t9", "t10"]
    assert opened.index_metadata is None


def test_dotfiles_are_no_shards_but_side_files(folder: Path) -> None:
    (folder / "._model.safetensors").write_bytes(b"AppleDouble")
    opened = open_folder(folder)
    assert [s.name for s in opened.shards] == [SHARD]
    assert [s.name for s in opened.side_files] == ["._model.safetensors"]


def test_an_unknown_dtype_is_accepted_where_the_offsets_tile_the_file(tmp_path: Path) -> None:
    header = {"b": ONE | {"data_offsets": [3, 4]}, "a": {"dtype": "I4", "shape": [5], "data_offsets": [0, 3]}}
    put(tmp_path, SHARD, header, b"abcd")
    a = open_folder(tmp_path).tensors["a"]
    assert (a.dtype, a.shape, a.nbytes) == ("I4", (5,), 3)


@pytest.mark.parametrize(("dtype", "shape", "size"), [("F4", [3, 2], 3), ("F6_E2M3", [4], 3), ("F6_E3M2", [8], 6)])
def test_a_dtype_of_less_than_a_byte_is_counted_in_bits(
    dtype: str, shape: list[int], size: int, tmp_path: Path
) -> None:
    put(tmp_path, SHARD, {"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}, b"x" * size)
    assert open_folder(tmp_path).tensors["a"].nbytes == size
    put(tmp_path, SHARD, {"a": {"dtype": dtype, "shape": [*shape, 8], "data_offsets": [0, size]}}, b"x" * size)
    with pytest.raises(HeaderError):
        open_folder(tmp_path)


def test_zero_dimensions_empty_tensors_and_odd_names_are_tensors(tmp_path: Path) -> None:
    header = {
        "": EMPTY,
        "s": ONE | {"shape": []},
        "\0": EMPTY,
        "é\u202e": EMPTY | {"shape": [3, 0]},
        "__metadata__": None,
    }
    put(tmp_path, SHARD, header, b"x")
    assert open_folder(tmp_path).tensors.keys() == {"", "s", "\0", "é\u202e"}


def test_metadata_of_shard_and_index_are_kept(tmp_path: Path) -> None:
    put(tmp_path, "a.safetensors", {"a": ONE, "__metadata__": {"format": "pt", "x": ""}}, b"x")
    index(tmp_path, {"a": "a.safetensors"}, metadata={"total_size": 1, "dtype": 1, "shape": 2, "data_offsets": 3})
    opened = open_folder(tmp_path)
    assert opened.shards[0].metadata == {"format": "pt", "x": ""}
    assert opened.index_metadata == {"total_size": 1, "dtype": 1, "shape": 2, "data_offsets": 3}
    assert opened.warnings == ()


# --------------------------------------------------------------------------------------------------------- headers

T = '"data_offsets":[0,1]'
HEADERS: dict[str, tuple[bytes, str]] = {
    # what: (the file, a word of the message)
    "an empty file": (b"", "0 bytes"),
    "seven bytes": (b"1234567", "7 bytes"),
    "a length field beyond the file": (raw({"a": ONE}, b"x", 100), "truncated"),
    "a header over 100 MB": (raw({}, b"", 100_000_001), "100000000"),
    "the largest length": (raw({}, b"", 2**64 - 1), "allows"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    "no JSON": (raw(b"{"), "JSON"),
    "nothing": (raw(b""), "JSON"),
    "two values": (raw(b"{}{}"), "JSON"),
    "not UTF-8": (raw(b'{"\xff":1}'), "UTF-8"),
    "an encoded surrogate": (raw(b'{"\xed\xa0\x80":1}'), "UTF-8"),
    "half a surrogate pair": (raw(b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "surrogate"),
    "a byte order mark": (raw(b"\xef\xbb\xbf{}"), "begins with a byte order mark"),
    "an array": (raw([]), "an array"),
    "a number": (raw(3), "a number"),
    "NaN": (raw(b'{"a":NaN}'), "NaN"),
    "a name twice": (raw(b'{"a":{"dtype":"U8","shape":[1],%b},"a":{}}' % T.encode(), b"x"), "'a' comes twice"),
    "a field twice": (
        raw(b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],%b}}' % T.encode(), b"x"),
        "'dtype' comes twice",
    ),
    "a metadata key twice": (raw(b'{"__metadata__":{"k":"","k":""}}'), "'k' comes twice"),
    "an ignored key twice": (raw(b'{"a":{"z":{"y":1,"y":1},"dtype":"U8","shape":[1],%b}}' % T.encode(), b"x"), "'y'"),
    "a tensor as an array": (raw({"a": ["U8", [1], [0, 1]]}, b"x"), "an array"),
    "a tensor as null": (raw({"a": None}), "null"),
    "a dtype as an object": (raw({"a": ONE | {"dtype": {"U8": None}}}, b"x"), "dtype is an object"),
    "a dtype as null": (raw({"a": ONE | {"dtype": None}}, b"x"), "dtype is null"),
    "no dtype": (raw({"a": {"shape": [1], "data_offsets": [0, 1]}}, b"x"), "lacks dtype"),
    "no shape": (raw({"a": {"dtype": "U8", "data_offsets": [0, 1]}}, b"x"), "lacks shape"),
    "no offsets": (raw({"a": {"dtype": "U8", "shape": [1]}}, b"x"), "lacks data_offsets"),
    "a shape as a number": (raw({"a": ONE | {"shape": 1}}, b"x"), "shape is a number"),
    "a dimension as a fraction": (raw({"a": ONE | {"shape": [1.0]}}, b"x"), "a fraction"),
    "a dimension as true": (raw({"a": ONE | {"shape": [True]}}, b"x"), "a boolean"),
    "a negative dimension": (raw({"a": ONE | {"shape": [-1, -1]}}, b"x"), "-1"),
    "a minus zero": (raw(b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'), "a fraction"),
    "a dimension of 2^64": (raw({"a": EMPTY | {"shape": [0, 2**64]}}), "18446744073709551616"),
    "a dimension of 5,000 digits": (raw(b'{"a":{"shape":[%b]}}' % (b"9" * 5000)), "digits"),
    "a product over 2^64": (raw({"a": EMPTY | {"shape": [2**32, 2**32]}}), "overflows"),
    "an overflow before a zero": (raw({"a": EMPTY | {"shape": [2**63, 4, 0]}}), "overflows"),
    "bits over 2^64": (raw({"a": EMPTY | {"shape": [2**62]}}), "overflows"),
    "bits that fill no byte": (raw({"a": ONE | {"dtype": "F4"}}, b"x"), "whole number of bytes"),
    "one offset": (raw({"a": ONE | {"data_offsets": [0]}}, b"x"), "two numbers"),
    "three offsets": (raw({"a": ONE | {"data_offsets": [0, 1, 1]}}, b"x"), "two numbers"),
    "a negative offset": (raw({"a": ONE | {"data_offsets": [-1, 0]}}, b"x"), "-1"),
    "offsets backwards": (raw({"a": EMPTY | {"data_offsets": [1, 0]}}, b"x"), "backwards"),
    "a size that disagrees": (raw({"a": ONE | {"shape": [2]}}, b"x"), "takes 2"),
    "an overlap": (raw({"a": ONE, "b": ONE}, b"x"), "overlaps"),
    "a hole": (raw({"a": ONE, "b": ONE | {"data_offsets": [2, 3]}}, b"xyz"), "hole"),
    "a hole at the start": (raw({"a": ONE | {"data_offsets": [1, 2]}}, b"xy"), "hole"),
    "trailing bytes": (raw({"a": ONE}, b"xy"), "1 trailing"),
    "a cut file": (raw({"a": ONE}, b""), "truncated"),
    "metadata that is no object": (raw({"__metadata__": "x"}), "__metadata__ is a string"),
    "metadata of no strings": (raw({"__metadata__": {"k": 1}}), "'k' is a number"),
    "a number out of range": (raw(b'{"a":{"dtype":"U8","shape":[1],%b,"z":1e999}}' % T.encode(), b"x"), "range"),
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_header_is_refused_for(what: str, folder: Path) -> None:
    content, word = HEADERS[what]
    (folder / SHARD).write_bytes(content)
    with pytest.raises(HeaderError, match=None) as caught:
        open_folder(folder)
    assert word in str(caught.value)
    assert caught.value.file == str(folder / SHARD)
    assert caught.value.exit_code == 4


# ---------------------------------------------------------------------------------- headers as serializers write them


def tensor(name: str = "a", dtype: str = "U8", shape: str = "1", offsets: str = "0,1") -> str:
    """One member of a header, with `shape` and `offsets` as JSON has them between the brackets."""
    return f'"{name}":{{"dtype":"{dtype}","shape":[{shape}],"data_offsets":[{offsets}]}}'


Found = tuple[dict[str, str], list[TensorEntry]]


def fast(text: str, data_bytes: int = 1) -> Found | None:
    found = header_room._parse_canonical(text.encode(), data_bytes, 3, 100)
    return None if found is None else (found[0], list(found[1].values()))


def any_form(text: str, data_bytes: int = 1) -> Found:
    metadata, tensors = header_room._parse_any(text.encode(), data_bytes, None, 3, 100)
    return metadata, list(tensors.values())


# MLX orders the members of an entry in another way than safetensors does: its headers take the long way.
REAL_HEADERS = [path for path in sorted(FIXTURES.glob("*/*/*.safetensors")) if "mlx" not in path.parts[-3]]


@pytest.mark.parametrize("path", REAL_HEADERS, ids=lambda p: f"{p.parent.parent.name}")
def test_real_headers_take_the_fast_way_and_read_alike(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data_bytes = content[8 : 8 + length], len(content) - 8 - length
    expected, rows = header_room._parse_any(header, data_bytes, path, 3, 8 + length)
    monkeypatch.delattr(header_room, "_parse_any")
    metadata, tensors = header_room.parse_header(header, data_bytes, shard=3, base=8 + length)
    assert (metadata, list(tensors.values())) == (expected, list(rows.values()))


FAST = {
    "one tensor": "{" + tensor() + "}",
    "padding": "{" + tensor() + "}" + " " * 7,
    "metadata": '{"__metadata__":{"format":"pt"},' + tensor() + "}",
    "no metadata in it": '{"__metadata__":{},' + tensor() + "}",
    "metadata that holds JSON": '{"__metadata__":{"a":"{\\"b\\":{\\"dtype\\":1}},"},' + tensor() + "}",
    "metadata with escapes": '{"__metadata__":{"\u00e9\\n":"\\\\"},' + tensor() + "}",
    "metadata like a tensor's fields": '{"__metadata__":{"shape":"x","dtype":"y"},' + tensor() + "}",
    "a scalar": "{" + tensor(shape="") + "}",
    "an empty name": "{" + tensor("") + "}",
    "a name that looks like JSON": "{" + tensor("}],[{:,") + "," + tensor("'a':{", shape="0", offsets="1,1") + "}",
    "names that are fields": "{" + ",".join(tensor(n, shape="0", offsets="0,0") for n in ("dtype", "shape")) + "}",
    "names of any letters": "{" + tensor("\u00e9\u202e\U0001f600\x7f") + "}",
    "an unknown dtype": "{" + tensor(dtype="I3", shape="5") + "}",
    "empty tensors": "{" + ",".join(tensor(n, shape="3,0", offsets="0,0") for n in "abc") + "}",
    "less than a byte": "{" + tensor(dtype="F4", shape="2") + "}",
    "an escape that has to be": "{" + tensor('\\"\\\\\\n\\u0000', dtype="I\\n", shape="1") + "}",
    "another order than the offsets'": "{" + tensor("b", "U8", "0", "1,1") + "," + tensor() + "}",
    "another order of empty ones": "{" + ",".join(tensor(n, "U8", "0", "1,1") for n in "zb") + "," + tensor() + "}",
}


@pytest.mark.parametrize("what", FAST)
def test_the_fast_way_is_taken_for(what: str) -> None:
    size = 0 if what in ("names that are fields", "empty tensors") else 1
    assert fast(FAST[what], size) is not None
    assert fast(FAST[what], size) == any_form(FAST[what], size)


LEFT = {
    "a name twice": "{" + tensor() + "," + tensor(offsets="1,1", shape="0") + "}",
    "a field twice": "{" + tensor().replace('"shape"', '"dtype":"U8","shape"') + "}",
    "fields in another order": '{"a":{"shape":[1],"dtype":"U8","data_offsets":[0,1]}}',
    "another field": "{" + tensor().replace('"shape"', '"z":1,"shape"') + "}",
    "an escape in a name": "{" + tensor("\\u0061") + "," + tensor("a", "U8", "0", "1,1") + "}",
    "an escape in a dtype": "{" + tensor(dtype="\\u0055\\u0038") + "}",
    "metadata with an escape that need not be": '{"__metadata__":{"\\u00e9":""},' + tensor() + "}",
    "metadata with spaces": '{"__metadata__":{ "a" : "b" },' + tensor() + "}",
    "half a surrogate pair in a name": "{" + tensor("\\ud800") + "}",
    "half a surrogate pair in metadata": '{"__metadata__":{"a":"\\ud800"},' + tensor() + "}",
    **{f"{char!r} in a name": "{" + tensor(f"a{char}") + "}" for char in map(chr, range(0x20))},
    "a control character in a dtype": "{" + tensor(dtype="I\t3") + "}",
    "a backslash before a name's end": "{" + tensor("a\\") + "}",
    "spaces": json.dumps({"a": ONE}),
    "a space before": " {" + tensor() + "}",
    "a line break behind": "{" + tensor() + "}\n",
    "something behind": "{" + tensor() + "}x",
    "another object behind": "{" + tensor() + "}{}",
    "a brace behind": "{" + tensor() + "}}",
    "no end": "{" + tensor(),
    "a comma at the end": "{" + tensor() + ",}",
    "a comma too many": "{" + tensor() + ",," + tensor("b", "U8", "0", "1,1") + "}",
    "no comma": "{" + tensor() + tensor("b", "U8", "0", "1,1") + "}",
    "text between": "{" + tensor() + ",1," + tensor("b", "U8", "0", "1,1") + "}",
    "another value between": "{" + tensor() + ',"c":1,' + tensor("b", "U8", "0", "1,1") + "}",
    "something before": "{1," + tensor() + "}",
    "an array": "[" + tensor() + "]",
    "a start that is no number": "{" + tensor(offsets="x,1") + "}",
    "a start that is another number": "{" + tensor() + "," + tensor("b", "U8", "0", "01,1") + "}",
    "three offsets": "{" + tensor(offsets="0,0,1") + "}",
    "minus zero": "{" + tensor(offsets="-0,1") + "}",
    "minus zero as a dimension": "{" + tensor(shape="-0", offsets="0,0") + "}",
    "a leading zero": "{" + tensor(offsets="0,01") + "}",
    "a leading zero in a dimension": "{" + tensor(shape="01") + "}",
    "a fraction": "{" + tensor(offsets="0,1.0") + "}",
    "other digits": "{" + tensor(offsets="0,\u0661") + "}",
    "an empty dimension": "{" + tensor(shape="1,,1") + "}",
    "a comma behind a dimension": "{" + tensor(shape="1,") + "}",
    "20 digits": "{" + tensor(shape="10000000000000000000,0", offsets="0,1") + "}",
    "5,000 digits": "{" + tensor(shape="9" * 5000) + "}",
    "an overflow before a zero": "{" + tensor(shape="9000000000000000000,4,0", offsets="0,0") + "}",
    "an overflow of an unknown dtype": "{" + tensor(dtype="I3", shape="9000000000000000000,4") + "}",
    "bits that fill no byte": "{" + tensor(dtype="F4") + "}",
    "a size that disagrees": "{" + tensor(shape="2") + "}",
    "a dimension beyond 64 bits": "{" + tensor(shape="0,18446744073709551616", offsets="0,0") + "}",
    "a negative dimension": "{" + tensor(shape="-1,-1") + "}",
    "a negative offset": "{" + tensor(offsets="-1,0") + "}",
    "an offset beyond 63 bits": "{" + tensor(offsets="0,9223372036854775808") + "}",
    "an offset beyond 64 bits": "{" + tensor(offsets="0,18446744073709551617") + "}",
    "sizes that wrap to what is there": "{"
    + tensor(dtype="I3", offsets="0,9223372036854775807")
    + ","
    + tensor("b", "I3", offsets="9223372036854775807,-9223372036854775808")
    + "}",
    "offsets backwards": "{" + tensor(shape="0", offsets="1,0") + "}",
    "a hole": "{" + tensor(shape="0", offsets="0,0") + "," + tensor("b", offsets="1,2") + "}",
    "an overlap": "{" + tensor() + "," + tensor("b") + "}",
    "trailing bytes": "{" + tensor(shape="0", offsets="0,0") + "}",
    "no tensor": "{}",
    "metadata alone": '{"__metadata__":{}}',
    "metadata last": "{" + tensor() + ',"__metadata__":{}}',
    "metadata twice": '{"__metadata__":{},"__metadata__":{},' + tensor() + "}",
    "metadata of null": '{"__metadata__":null,' + tensor() + "}",
    "metadata of a number": '{"__metadata__":{"a":1},' + tensor() + "}",
    "metadata with a key twice": '{"__metadata__":{"a":"","a":""},' + tensor() + "}",
    "metadata that is a tensor": "{" + tensor("__metadata__") + "}",
    "a tensor called __metadata__ behind": "{" + tensor() + "," + tensor("__metadata__", "U8", "0", "1,1") + "}",
    "metadata without an end": '{"__metadata__":{"a":"' + tensor() + "}",
    "deep metadata": '{"__metadata__":' + "[" * 100_000 + "," + tensor() + "}",
    "nothing": "",
}


@pytest.mark.parametrize("what", LEFT)
def test_the_fast_way_is_not_taken_for(what: str) -> None:
    assert fast(LEFT[what]) is None


@pytest.mark.parametrize("what", HEADERS)
def test_what_is_refused_is_never_read_the_fast_way(what: str) -> None:
    content, _ = HEADERS[what]
    length = min(int.from_bytes(content[:8], "little"), len(content) - 8)
    header = content[8 : 8 + max(0, length)].decode(errors="replace").replace(": ", ":").replace(", ", ",")
    assert fast(header, len(content) - 8 - length) is None


@pytest.mark.parametrize("nest", ["[" * 100_000, '{"a":' * 100_000, '{"a":{"z":' + "[" * 200 + "]" * 200 + "}}"])
def test_a_nesting_bomb_is_refused(nest: str, folder: Path) -> None:
    (folder / SHARD).write_bytes(raw(nest.encode()))
    with pytest.raises(HeaderError):
        open_folder(folder)


def test_the_error_names_the_tensor_and_escapes_what_a_terminal_would_obey(folder: Path) -> None:
    (folder / SHARD).write_bytes(raw({"\x1b[2J\u202e": ONE | {"shape": [2]}}, b"x"))
    with pytest.raises(HeaderError) as caught:
        open_folder(folder)
    assert caught.value.tensor == "\x1b[2J\u202e"
    assert "\x1b" not in str(caught.value)
    assert "\u202e" not in str(caught.value)
    assert "\\x1b[2J" in str(caught.value)


def test_memory_is_bounded_by_the_header_whatever_it_says(folder: Path) -> None:
    dims = b",".join([b"1"] * 100) + b",18446744073709551615"
    (folder / SHARD).write_bytes(
        raw(b'{"a":{"dtype":"U8","shape":[%b],"data_offsets":[0,18446744073709551615]}}' % dims)
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(HeaderError):
        open_folder(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024 * (
        1 if sys.platform == "linux" else 1024
    )


# ----------------------------------------------------------------------------------------------------------- index

INDEXES: dict[str, Any] = {
    "no JSON": "{",
    "an array": [],
    "no weight_map": {"metadata": {}},
    "a weight_map that is none": {"weight_map": ["a"]},
    "an empty weight_map": {"weight_map": {}},
    "a file that is no name": {"weight_map": {"a": 3}},
    "metadata that is none": {"metadata": 3, "weight_map": {"a": SHARD}},
    "a key twice": '{"weight_map": {"a": "model.safetensors", "a": "model.safetensors"}}',
    "an absolute name": {"weight_map": {"a": "/model.safetensors"}},
    "the folder above": {"weight_map": {"a": ".."}},
    "a way up": {"weight_map": {"a": "../src/model.safetensors"}},
    "a separator": {"weight_map": {"a": "sub/model.safetensors"}},
    "another separator": {"weight_map": {"a": "sub\\model.safetensors"}},
    "a drive": {"weight_map": {"a": "C:model.safetensors"}},
    "an empty name": {"weight_map": {"a": ""}},
    "a NUL": {"weight_map": {"a": "model\0.safetensors"}},
    "a file that is not there": {"weight_map": {"a": SHARD, "b": "other.safetensors"}},
    "a key that is not there": {"weight_map": {"a": SHARD, "b": SHARD}},
    "nested too deep": '{"metadata":' + '{"a":' * 5000 + "1" + "}" * 5000 + "}",
    "NaN": '{"metadata":{"total_size":NaN},"weight_map":{"a":"model.safetensors"}}',
}


@pytest.mark.parametrize("what", INDEXES)
def test_an_index_is_refused_for(what: str, folder: Path) -> None:
    value = INDEXES[what]
    (folder / INDEX).write_text(value if isinstance(value, str) else json.dumps(value))
    (folder / "sub").mkdir()
    shutil.copy(folder / SHARD, folder / "sub")
    with pytest.raises(ShardIndexError) as caught:
        open_folder(folder)
    assert caught.value.exit_code == 4
    assert caught.value.file == str(folder / INDEX)


def test_an_index_that_is_not_utf8_or_huge_is_refused(folder: Path) -> None:
    (folder / INDEX).write_bytes(b'{"\xff": 1}')
    with pytest.raises(ShardIndexError, match="UTF-8"):
        read_index(folder / INDEX)
    os.truncate(folder / INDEX, 1 << 40)
    with pytest.raises(ShardIndexError, match="at most"):
        read_index(folder / INDEX)


def test_a_key_in_another_shard_than_the_index_says_is_refused(folder: Path) -> None:
    put(folder, "b.safetensors", {"b": ONE}, b"x")
    index(folder, {"a": "b.safetensors", "b": SHARD})
    with pytest.raises(ShardIndexError, match=r"it is in model\.safetensors"):
        open_folder(folder)


def test_tensors_that_the_index_lacks_are_refused_or_left_out_on_request(tmp_path: Path) -> None:
    put(tmp_path, SHARD, {"a": ONE, "b": ONE | {"data_offsets": [1, 2]}}, b"xy")
    index(tmp_path, {"b": SHARD})
    with pytest.raises(ShardIndexError, match=r"holds 1 tensor .* ignore_unindexed=True") as caught:
        open_folder(tmp_path)
    assert caught.value.details == {"unindexed": ["a"]}
    opened = open_folder(tmp_path, ignore_unindexed=True)
    assert list(opened.tensors) == ["b"]
    assert any("'a'" in warning for warning in opened.warnings)


@pytest.mark.parametrize("indexed", [False, True])
def test_one_key_in_two_shards_is_refused(indexed: bool, folder: Path) -> None:
    put(folder, "second.safetensors", {"a": ONE, "b": EMPTY}, b"x")
    if indexed:
        index(folder, {"a": SHARD, "b": "second.safetensors"})
    with pytest.raises(ShardIndexError, match=r"also stored in model\.safetensors") as caught:
        open_folder(folder, ignore_unindexed=True)
    assert caught.value.tensor == "a"


def test_a_stray_file_beside_an_index_is_a_side_file_with_a_warning(folder: Path) -> None:
    put(folder, "stray.safetensors", {"z": ONE}, b"x")
    index(folder, {"a": SHARD})
    opened = open_folder(folder)
    assert list(opened.tensors) == ["a"]
    assert [s.name for s in opened.side_files] == ["stray.safetensors"]
    assert any("stray.safetensors" in warning for warning in opened.warnings)


def test_a_stray_file_with_keys_of_the_index_is_refused_and_so_is_a_broken_one(folder: Path) -> None:
    put(folder, "stray.safetensors", {"z": ONE, "a": ONE | {"data_offsets": [1, 2]}}, b"xy")
    index(folder, {"a": SHARD})
    with pytest.raises(ShardIndexError) as caught:
        open_folder(folder)
    assert caught.value.details == {"overlap": ["a"]}
    (folder / "stray.safetensors").write_bytes(b"nonsense")
    with pytest.raises(HeaderError):
        open_folder(folder)


def test_a_wrong_total_size_is_only_a_warning(folder: Path) -> None:
    index(folder, {"a": SHARD}, metadata={"total_size": 10**400})
    assert any("total_size" in warning for warning in open_folder(folder).warnings)


# ----------------------------------------------------------------------------------------------------------- links


def test_a_hub_cache_snapshot_is_followed_to_its_blobs(tmp_path: Path) -> None:
    cache = tmp_path / "models--x--y"
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for name, content in ((SHARD, raw({"a": ONE}, b"x")), (INDEX, b""), ("config.json", b"{}"), ("card.md", b"hi")):
        if name == INDEX:
            content = json.dumps({"weight_map": {"a": SHARD}}).encode()
        blob = cache / "blobs" / blake3(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / name).symlink_to(Path("../..") / "blobs" / blob.name)
    opened = open_folder(snapshot)
    assert opened.shards[0].name == SHARD
    assert opened.shards[0].path.parent == cache / "blobs"
    assert [s.name for s in opened.side_files] == ["card.md", "config.json"]
    assert opened.warnings == ()


def test_without_an_index_a_link_is_followed_to_a_file_anywhere(folder: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / SHARD).symlink_to(folder / SHARD)
    assert open_folder(linked).shards[0].path == folder / SHARD


def test_an_indexed_name_that_leaves_the_folder_through_a_link_is_refused(folder: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / SHARD).symlink_to(folder / SHARD)
    index(linked, {"a": SHARD})
    with pytest.raises(ShardIndexError, match="leaves the folder"):
        open_folder(linked)


def test_an_indexed_name_may_be_a_link_within_the_folder(folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / SHARD).rename(folder / "data" / "blob")
    (folder / SHARD).symlink_to("data/blob")
    index(folder, {"a": SHARD})
    assert open_folder(folder).shards[0].path == folder / "data" / "blob"


def test_the_folder_itself_may_be_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert open_folder(tmp_path / "link").root == folder


def test_links_that_lead_nowhere_or_to_themselves_are_refused(folder: Path) -> None:
    for target in ("nowhere", "x"):
        for name in ("x", "x.safetensors", "config.json"):
            (folder / name).symlink_to(target if target == "nowhere" else name)
            with pytest.raises(SourceError):
                open_folder(folder)
            (folder / name).unlink()


def test_folder_links_stay_inside_and_make_no_loops(folder: Path, tmp_path: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "f").write_text("f")
    (folder / "again").symlink_to("sub")
    assert [s.name for s in open_folder(folder).side_files] == ["again/f", "sub/f"]
    (folder / "sub" / "up").symlink_to("..")
    with pytest.raises(SourceError, match="loop"):
        open_folder(folder)
    (folder / "sub" / "up").unlink()
    (folder / "out").symlink_to(tmp_path)
    with pytest.raises(SourceError, match="outside"):
        open_folder(folder)


def test_folders_that_multiply_through_links_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tierewrite.source.folder.MAX_SIDE_ENTRIES", 2_000)
    for depth in range(20):  # 2^20 paths in 20 folders
        (folder / f"d{depth}").mkdir()
        for name in ("l", "r"):
            (folder / f"d{depth}" / name).symlink_to(f"../d{depth + 1}")
    (folder / "d20").mkdir()
    with pytest.raises(SourceError, match="more than 2000"):
        open_folder(folder)


# ------------------------------------------------------------------------------------------------------ side files


def test_everything_else_is_a_side_file_folders_and_dotfiles_included(folder: Path) -> None:
    expected = [
        ".cache/huggingface/download/config.json.metadata",
        ".git/objects/ab/cdef",
        ".gitattributes",
        "README.md",
        "deep/er/model.safetensors",
        "tierewrite.json.old",
        "tokenizer.json",
    ]
    for name in expected:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "empty" / "inside").mkdir(parents=True)
    (folder / "tierewrite.json").write_text("{}")
    opened = open_folder(folder)
    assert [s.name for s in opened.side_files] == expected
    assert [s.size for s in opened.side_files] == [len(name) for name in expected]
    assert opened.directories == (
        *(".cache", ".cache/huggingface", ".cache/huggingface/download", ".git", ".git/objects", ".git/objects/ab"),
        *("deep", "deep/er", "empty", "empty/inside"),
    )


def test_a_name_that_is_not_utf8_is_a_name(folder: Path) -> None:
    path = os.fsencode(folder) + b"/caf\xe9 \x1b[2J"
    try:
        with open(path, "wb"):
            pass
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    (side,) = open_folder(folder).side_files
    assert os.fsencode(side.name) == b"caf\xe9 \x1b[2J"
    assert "\x1b" not in shown(side.name)


def test_a_link_to_a_file_outside_is_copied_with_a_warning(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    (folder / "link").symlink_to(tmp_path / "secret")
    opened = open_folder(folder)
    assert [(s.name, s.path) for s in opened.side_files] == [("link", tmp_path / "secret")]
    assert any("secret" in warning for warning in opened.warnings)


# ---------------------------------------------------------------------------------------- what is no regular file


@pytest.mark.parametrize("name", [SHARD, INDEX, "config.json", "side"])
@pytest.mark.parametrize("kind", ["FIFO", "socket", "folder", "device"])
def test_what_is_no_regular_file_is_refused_at_once(name: str, kind: str, folder: Path) -> None:
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        here = os.getcwd()
        os.chdir(folder)  # a socket's path has 107 bytes at most
        try:
            socket.socket(socket.AF_UNIX).bind(name)
        finally:
            os.chdir(here)
    outcome: list[BaseException | None] = []

    def attempt() -> None:
        try:
            open_folder(folder)
            outcome.append(None)
        except SourceError as e:
            outcome.append(e)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(20)
    assert outcome, "hangs"
    if (name, kind) == ("side", "folder"):
        assert outcome == [None]
    else:
        assert isinstance(outcome[0], SourceError)


@pytest.mark.parametrize("what", ["missing", "file", "empty", "bin"])
def test_a_folder_without_safetensors_says_what_is_there_instead(what: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if what == "file":
        path.write_text("")
    elif what != "missing":
        path.mkdir()
    if what == "bin":
        (path / "pytorch_model.bin").write_text("")
    with pytest.raises(SourceError) as caught:
        open_folder(path)
    word = {"missing": "does not exist", "file": "not a folder", "empty": "empty", "bin": "pytorch_model.bin"}[what]
    assert word in str(caught.value)


def test_files_without_a_tensor_are_refused(tmp_path: Path) -> None:
    put(tmp_path, SHARD, {"__metadata__": {"format": "pt"}})
    with pytest.raises(SourceError, match="no tensors"):
        open_folder(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_a_failure_of_the_system(folder: Path) -> None:
    (folder / SHARD).chmod(0)
    with pytest.raises(SystemFailure):
        open_folder(folder)


@pytest.mark.parametrize("name", [SHARD, INDEX, "config.json"])
def test_an_io_error_is_a_failure_of_the_system_that_names_the_file(
    name: str, copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = copied("qwen3_tied_bf16")
    index(root, dict.fromkeys(read_tensors(root), SHARD))
    broken = (root / name).stat().st_ino
    real = os.read

    def read(fd: int, count: int) -> bytes:
        if os.fstat(fd).st_ino == broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, count)

    monkeypatch.setattr(os, "read", read)
    with pytest.raises(SystemFailure) as caught:
        open_folder(root)
    assert caught.value.file == str(root / name)
    assert caught.value.exit_code == 5


def test_short_reads_are_continued(copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    root = copied("dg_nvfp4_sharded")
    whole = open_folder(root)
    real = os.read
    monkeypatch.setattr(os, "read", lambda fd, count: real(fd, min(count, 1013)))
    assert open_folder(root) == whole


def test_a_file_that_shrinks_while_it_is_read_has_changed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.read

    def read(fd: int, count: int) -> bytes:
        if count > 8:
            os.truncate(folder / SHARD, 9)
        return real(fd, count)

    monkeypatch.setattr(os, "read", read)
    with pytest.raises(SourceChanged):
        open_folder(folder)


# ------------------------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize("name", ["config.json", "hf_quant_config.json"])
@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"3", b"null", b"\xff", b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"a":' * 100_000]
)
def test_a_broken_configuration_is_refused(name: str, text: bytes, folder: Path) -> None:
    (folder / name).write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        open_folder(folder)
    assert caught.value.file == str(folder / name)


def test_a_huge_configuration_is_refused_without_reading_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(folder / "config.json", "wb") as file:
        file.truncate(1 << 40)
    asked: list[int] = []
    real = os.read

    def read(fd: int, count: int) -> bytes:
        asked.append(count)
        return real(fd, count)

    monkeypatch.setattr(os, "read", read)
    with pytest.raises(ConfigError, match="at most"):
        open_folder(folder)
    header = (folder / SHARD).stat().st_size
    assert sum(asked) <= header
    (folder / "config.json").write_text("{}")
    open_folder(folder)
    assert sum(asked) > header, "what reads a configuration is what is counted"


def test_a_configuration_is_read_as_python_reads_it(folder: Path) -> None:
    (folder / "config.json").write_text('{"a": Infinity, "b": {"c": 1, "c": 2}}')
    opened = open_folder(folder)
    assert opened.config == {"a": float("inf"), "b": {"c": 2}}
    assert opened.quant_config == {}
    assert any("'c'" in warning for warning in opened.warnings)


# ------------------------------------------------------------------------------------------------------------- rest


def test_nothing_is_ever_opened_for_writing(monkeypatch: pytest.MonkeyPatch, copied: Callable[[str], Path]) -> None:
    root = copied("dg_nvfp4_sharded")
    flags: list[int] = []
    real = os.open

    def recorded(path: Any, flag: int, *rest: Any, **more: Any) -> int:
        flags.append(flag)
        return real(path, flag, *rest, **more)

    monkeypatch.setattr(os, "open", recorded)
    open_folder(root)
    assert len(flags) >= 5
    assert all(flag & os.O_ACCMODE == os.O_RDONLY and not flag & (os.O_CREAT | os.O_TRUNC) for flag in flags)


def test_a_pause_of_the_collector_ends_with_nothing_frozen_or_thawed() -> None:
    class Seen:
        itself: Any = None

    with header_room.gc_paused():
        assert not gc.isenabled()
        with header_room.gc_paused():
            pass
        assert not gc.isenabled()
        seen = Seen()
        seen.itself = seen
        ended = weakref.ref(seen)
        del seen
    assert gc.isenabled()
    gc.collect()
    assert ended() is None  # garbage of the pause is collected afterwards
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        with header_room.gc_paused():
            pass
        assert gc.get_freeze_count() > frozen // 2  # other threads may end a few; thawed, there would be none
    finally:
        gc.unfreeze()


def test_names_sort_as_people_count() -> None:
    names = ["model-10", "model-9", "model-09", "model-1000000000000000000000000000", "model-2b", "model-2a", "model"]
    assert sorted(names, key=natural_key)[:4] == ["model", "model-2a", "model-2b", "model-09"]
    assert natural_key("²") != natural_key("2")


def test_a_header_has_its_own_name_and_number(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.safetensors", {"a": ("U8", [1], b"x")})
    shard, tensors = read_header(tmp_path / "x.safetensors", shard=3, name="y")
    (entry,) = tensors.values()
    assert (shard.name, entry.shard, entry.nbytes) == ("y", 3, 1)
    assert entry.start == shard.data_start == shard.size - 1


def test_more_data_than_a_file_can_have_is_refused() -> None:
    """A remote header is read before anybody knows the file's size, and the columns of offsets have 63 bits."""
    most = 2**63 - 1
    for data_bytes, base in ((most - 8, 8), (most, 0)):
        header = ("{" + tensor(dtype="I3", offsets=f"0,{data_bytes}") + "}").encode()
        _, tensors = header_room.parse_header(header, data_bytes, base=base)
        assert tensors["a"].end == most
        with pytest.raises(HeaderError, match="more than a file can have"):
            header_room.parse_header(header, data_bytes, base=base + 1)
    assert Tensors.concatenated([tensors, tensors]).total_bytes == 2 * most


def test_half_a_million_tensors_open_in_less_than_a_gigabyte(tmp_path: Path) -> None:
    sizes = {}
    for i in range(500_000):
        size = 32 * (1 + i % 7)
        name = f"model.encoder.language_model.layers.{i // 16_000}.experts.{i // 125}.gate_proj.weight_scale.{i}"
        sizes[name] = ("U8", [size // 16, 16], size)
    assert write_sparse_shard(tmp_path / SHARD, sizes) > 70_000_000
    code = (
        "from tests.checkpoints import peak_bytes\n"
        "from tierewrite.source.folder import open_folder\n"
        f"n = len(open_folder({str(tmp_path)!r}).tensors)\n"
        "print(n, peak_bytes())\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=300, cwd=root
    )
    count, peak = done.stdout.split()
    assert int(count) == 500_000
    assert int(peak) < 1_000_000_000


def test_a_checkpoint_of_several_shards_is_ordered_by_shard_then_offset(tmp_path: Path) -> None:
    tensors = {f"t{i}": ("U8", [1], bytes([i])) for i in range(7)}
    root = write_checkpoint(tmp_path / "c", tensors, shards=3)  # type: ignore[arg-type]
    opened = open_folder(root)
    assert list(opened.tensors) == ["t0", "t3", "t6", "t1", "t4", "t2", "t5"]
    assert opened.index_metadata == {"total_size": 7, "note": "kept"}


# --- files named for another loader

ALONE = {"a.weight": ("F32", [1], b"1234")}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adapter_model.safetensors", "PEFT adapter"),
        ("consolidated.safetensors", "layout"),
        ("consolidated.00.safetensors", "layout"),
        ("diffusion_pytorch_model.safetensors", "diffusers"),
        ("diffusion_pytorch_model-00001-of-00002.safetensors", "diffusers"),
        ("diffusion_pytorch_model.fp16.safetensors", "diffusers"),
        ("model.fp16.safetensors", "variant"),
        ("model.fp16-00001-of-00002.safetensors", "variant"),
        ("model-00001-of-00002.fp16.safetensors", "variant"),
        ("pytorch_lora_weights.safetensors", "LoRA"),
        ("optimizer.safetensors", "training"),
    ],
)
def test_a_file_of_another_loader_is_no_model(name: str, kind: str, tmp_path: Path) -> None:
    """Renamed to model.safetensors, it would be found by nobody."""
    write_checkpoint(tmp_path, ALONE, config={})
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    with pytest.raises(SourceError, match=kind) as error:
        open_folder(tmp_path)
    assert name in str(error.value)
    assert error.value.exit_code == EXIT_SOURCE


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "consolidated.safetensors", "model.fp16.safetensors"])
def test_a_file_of_another_loader_beside_a_model_is_copied_under_its_name(name: str, tmp_path: Path) -> None:
    src = write_checkpoint(tmp_path / "src", ALONE, config={})
    other = write_checkpoint(tmp_path / "other", {"b.weight": ("F32", [1], b"5678")}) / "model.safetensors"
    (src / name).write_bytes(other.read_bytes())
    checkpoint = open_folder(src)
    assert [shard.name for shard in checkpoint.shards] == ["model.safetensors"]
    assert list(checkpoint.tensors) == ["a.weight"]
    assert name in [side.name for side in checkpoint.side_files]
    assert any(name in warning and "copied" in warning for warning in checkpoint.warnings)


def test_a_variant_with_the_names_of_the_model_is_refused(tmp_path: Path) -> None:
    src = write_checkpoint(tmp_path, ALONE, config={})
    (src / "model.fp16.safetensors").write_bytes((src / "model.safetensors").read_bytes())
    with pytest.raises(ShardIndexError, match="named as a variant"):
        open_folder(src)


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00001.safetensors", "part.1.safetensors"])
def test_other_names_are_those_of_a_model(name: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, ALONE, config={})
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    assert [shard.name for shard in open_folder(tmp_path).shards] == [name]


@pytest.mark.parametrize("padding", ["", " "])
@pytest.mark.parametrize("dtype", ["", " ", "\n"])
def test_an_empty_dtype_is_none(dtype: str, padding: str, tmp_path: Path) -> None:
    header = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    header["lm_head.weight"] = {"dtype": dtype, "shape": [], "data_offsets": [4, 4]}
    text = (padding + json.dumps(header, separators=(",", ":"))).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"1234")
    with pytest.raises(HeaderError, match="dtype is empty") as error:
        open_folder(tmp_path)
    assert error.value.tensor == "lm_head.weight"


def test_an_adapter_that_repeats_the_models_names_is_refused_without_a_word_of_an_index(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, ALONE, config={})
    write_shard(tmp_path / "adapter_model.safetensors", ALONE)
    with pytest.raises(ShardIndexError, match="named as a PEFT adapter") as error:
        open_folder(tmp_path)
    assert "index" not in str(error.value)


def test_an_indexed_file_that_is_not_there_is_named_once(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, config={})
    (tmp_path / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {"a": "lost.safetensors"}}')
    with pytest.raises(ShardIndexError) as caught:
        open_folder(tmp_path)
    assert "names 'lost.safetensors', which does not exist; " in str(caught.value)
    assert str(caught.value).count(str(tmp_path)) == 1
