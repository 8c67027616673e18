"""The gate against anything: hostile headers, indexes and folders, and safetensors' own reader as the judge.

For every input the gate gives a verdict or a `SourceError`, quickly and in bounded memory, and the verdict is the one
of safetensors' Rust reader but for the deliberate differences, each distinguished here by a parser of its own:

- refused here, accepted there: a key twice in one JSON object, a tensor as an array, a dtype as an object;
- accepted here, refused there: a dtype that safetensors does not know, where the offsets tile the file.

Run by hand for the long figures: `pytest tests/test_fuzz.py -m long -s`; TIEREWRITE_FUZZ_INPUTS sets their number.
"""

from __future__ import annotations

import json
import os
import random
import resource
import struct
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpoints import FIXTURES
from tierewrite.errors import ShardIndexError, SourceError
from tierewrite.source.folder import open_folder
from tierewrite.source.header import _parse_any, header_length, parse_header, read_header
from tierewrite.source.index import read_index
from tierewrite.source.table import DTYPE_BITS

CPU_SECONDS_AN_INPUT = 5.0  # hundreds of times what the slowest takes; a hang or a blow-up is far beyond
KNOWN = set(DTYPE_BITS)


# ------------------------------------------------------------------------------------------------------------ judging


def ours(raw: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """The gate's verdict on a file's bytes: tensors with their bytes, or None where refused.

    What the fast parser accepts, the one for any header must read alike.
    """
    try:
        length = header_length(raw[:8], len(raw), Path("x"))
        metadata, tensors = parse_header(raw[8 : 8 + length], len(raw) - 8 - length)
    except SourceError:
        return None
    same, rows = _parse_any(raw[8 : 8 + length], len(raw) - 8 - length, None, 0, 0)
    assert (metadata, list(tensors.values())) == (same, list(rows.values()))
    data = memoryview(raw)[8 + length :]
    return {e.name: (e.dtype, e.shape, bytes(data[e.start : e.end])) for e in tensors.values()}


def theirs(raw: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """The Rust reader's verdict on the same bytes."""
    try:
        found = safetensors.deserialize(raw)
    except safetensors.SafetensorError:
        return None
    return {name: (info["dtype"], tuple(info["shape"]), bytes(info["data"])) for name, info in found}


class Pairs(list[tuple[str, Any]]):
    """A JSON object as its members in order, duplicates included."""


def header_of(raw: bytes) -> Any:
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length].decode("utf-8"), object_pairs_hook=Pairs)


def deliberately_refused(raw: bytes) -> bool:
    """Whether the header has one of the oddities that are refused here on purpose though Rust accepts them."""

    def duplicates(value: Any) -> bool:
        if isinstance(value, Pairs):
            keys = [key for key, _ in value]
            return len(set(keys)) != len(keys) or any(duplicates(child) for _, child in value)
        return isinstance(value, list) and any(duplicates(child) for child in value)

    header = header_of(raw)
    tensors = [value for key, value in header if key != "__metadata__"]
    arrays = any(isinstance(value, list) and not isinstance(value, Pairs) for value in tensors)
    objects = any(isinstance(value, Pairs) and isinstance(dict(value).get("dtype"), Pairs) for value in tensors)
    return duplicates(header) or arrays or objects


def deliberately_accepted(raw: bytes) -> bool:
    """Whether the header has a dtype that Rust does not know and is fine once each such tensor is plain bytes."""
    header = {key: dict(value) if value is not None else None for key, value in header_of(raw)}
    unknown = [name for name, info in header.items() if name != "__metadata__" and info and info["dtype"] not in KNOWN]
    for name in unknown:
        start, end = header[name]["data_offsets"]
        header[name] |= {"dtype": "U8", "shape": [end - start]}
    length = int.from_bytes(raw[:8], "little")
    return bool(unknown) and theirs(packed(header, raw[8 + length :])) is not None


def judge(raw: bytes) -> str:
    """Compare both verdicts; returns which case it was, fails on a difference that is not deliberate."""
    before = time.process_time()
    mine = ours(raw)
    took = time.process_time() - before
    assert took < CPU_SECONDS_AN_INPUT, f"{took:.1f} s for {raw[:200]!r}"
    reference = theirs(raw)
    if mine is None and reference is None:
        return "refused by both"
    if mine is None:
        assert deliberately_refused(raw), f"Rust accepts, the gate refuses: {raw[:2000]!r}"
        return "refused on purpose"
    if reference is None:
        assert deliberately_accepted(raw), f"the gate accepts, Rust refuses: {raw[:2000]!r}"
        return "unknown dtype kept"
    assert mine == reference, f"read differently: {raw[:2000]!r}"
    return "accepted by both"


def packed(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


# -------------------------------------------------------------------------------------------------- structured inputs

names = st.text(max_size=12) | st.sampled_from(["a", "b", "__metadata__", "dtype", "lm_head.weight", ""])
dtypes = st.sampled_from([*sorted(KNOWN), "I4", "F8_E4M3FN", "", "f32"])


@st.composite
def well_formed(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    """A header whose tensors tile the data, in any order of names and fields, and the data."""
    header: dict[str, Any] = {}
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3))
    offset = 0
    for name in draw(st.lists(names.filter(lambda n: n != "__metadata__"), unique=True, max_size=6)):
        dtype = draw(dtypes.filter(bool))  # an empty one is no dtype
        shape = draw(st.lists(st.integers(0, 5), max_size=4))
        count = 1
        for dim in shape:
            count *= dim
        bits = DTYPE_BITS.get(dtype, 3) * count
        if dtype in KNOWN and bits % 8:
            shape, bits = [*shape, 8], bits * 8
        size = (bits + 7) // 8
        fields = [("dtype", dtype), ("shape", shape), ("data_offsets", [offset, offset + size])]
        header[name] = dict(draw(st.permutations(fields)))
        offset += size
    order = draw(st.permutations(list(header)))
    return {name: header[name] for name in order}, draw(st.binary(min_size=offset, max_size=offset))


numbers = st.integers(-2, 40) | st.sampled_from([2**31, 2**32, 2**53 + 1, 2**61, 2**63, 2**64 - 1, 2**64, 10**400, -1])
scalars = numbers | st.floats() | st.booleans() | st.none() | st.text(max_size=4)
anything = st.recursive(
    scalars, lambda c: st.lists(c, max_size=3) | st.dictionaries(names, c, max_size=3), max_leaves=6
)


@settings(max_examples=400, deadline=None)
@given(well_formed())
def test_a_well_formed_file_is_accepted_and_read_as_safetensors_reads_it(made: tuple[dict[str, Any], bytes]) -> None:
    raw = packed(*made)
    assert ours(raw) is not None
    assert judge(raw) in ("accepted by both", "unknown dtype kept")


@settings(max_examples=600, deadline=None)
@given(well_formed(), st.data())
def test_one_field_replaced_by_anything_gets_the_verdict_of_safetensors(
    made: tuple[dict[str, Any], bytes], data: st.DataObject
) -> None:
    header, body = made
    tensors = [name for name in header if name != "__metadata__"]
    if tensors:
        name = data.draw(st.sampled_from(tensors))
        what = data.draw(
            st.sampled_from(["dtype", "shape", "data_offsets", "extra", "whole", "missing", "__metadata__"])
        )
        if what == "whole":
            header[name] = data.draw(anything)
        elif what == "__metadata__":
            header[what] = data.draw(anything)
        elif what == "missing":
            del header[name][data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))]
        elif what == "shape":
            header[name][what] = data.draw(st.lists(numbers, max_size=4) | anything)
        elif what == "data_offsets":
            header[name][what] = data.draw(st.lists(numbers, min_size=2, max_size=2) | anything)
        else:
            header[name][what] = data.draw(anything)
    judge(packed(header, body))


@settings(max_examples=300, deadline=None)
@given(well_formed(), st.integers(-3, 3), st.integers(0, 2**64 - 1) | st.integers(0, 400))
def test_cut_padded_and_mislengthed_files_get_the_verdict_of_safetensors(
    made: tuple[dict[str, Any], bytes], extra: int, length: int
) -> None:
    raw = packed(*made)
    judge(raw[:extra] if extra < 0 else raw + b"\0" * extra)
    judge(struct.pack("<Q", length) + raw[8:])


@settings(max_examples=300, deadline=None)
@given(st.recursive(scalars, lambda c: st.lists(c, max_size=4) | st.dictionaries(names, c, max_size=4), max_leaves=25))
def test_any_json_as_header_gets_the_verdict_of_safetensors(value: Any) -> None:
    judge(packed(value))


@pytest.mark.parametrize("depth", [120, 125, 126, 127, 128, 1000, 100_000])
@pytest.mark.parametrize("brackets", ["[]", "{}"])
def test_nesting_is_bounded_where_safetensors_bounds_it(depth: int, brackets: str) -> None:
    nested = "[" * depth + "]" * depth if brackets == "[]" else '{"a":' * depth + "1" + "}" * depth
    judge(packed(f'{{"t":{{"dtype":"U8","shape":[0],"data_offsets":[0,0],"z":{nested}}}}}'.encode()))
    judge(packed(f'{{"t":{nested}}}'.encode()))
    judge(packed(nested.encode()))


# ------------------------------------------------------------------------------------------------ mutated real headers


def real_headers() -> list[tuple[dict[str, Any], list[tuple[str, dict[str, Any], bytes]]]]:
    """(`__metadata__`, tensors with their bytes) of every fixture's first shard."""
    found = []
    for path in sorted(FIXTURES.glob("*/naive/*.safetensors")):
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        metadata = header.pop("__metadata__", None)
        data = raw[8 + length :]
        found.append((metadata, [(k, v, data[slice(*v["data_offsets"])]) for k, v in header.items()]))
    assert len(found) >= 10
    return found


TOKENS = [
    *(b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\u0000", b"\\ud800", b"\\ud83d\\ude00", b"\x00", b"\xff"),
    *(b"-", b"-0", b"0", b"-1", b"1e999", b"1E2", b"0.0", b"00", b"NaN", b"Infinity", b"null", b"true", b"false"),
    *(
        b"18446744073709551615",
        b"18446744073709551616",
        b"9223372036854775808",
        b"9" * 400,
        b" ",
        b"\n",
        b"\xef\xbb\xbf",
    ),
    *(b'"__metadata__":', b'"dtype":', b'"shape":', b'"data_offsets":', b'"F4"', b'"F6_E2M3"', b'"I4"', b'"U8"', b"[]"),
    *(b"{}", b'{"a":{}}', b'"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},', b'["U8",[0],[0,0]]', b'{"U8":null}'),
]


class Mutator:
    """Endless odd files: real tensors repacked a few at a time, then broken in one to five places."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.real = real_headers()

    def base(self) -> tuple[bytes, bytes]:
        rng = self.random
        metadata, tensors = rng.choice(self.real)
        small = [t for t in rng.sample(tensors, min(len(tensors), rng.randint(1, 12))) if len(t[2]) <= 4096]
        header: dict[str, Any] = {} if metadata is None or rng.random() < 0.5 else {"__metadata__": metadata}
        pieces, offset = [], 0
        for name, info, data in small[: rng.randint(0, 6)]:
            header[name] = {
                "dtype": info["dtype"],
                "shape": info["shape"],
                "data_offsets": [offset, offset + len(data)],
            }
            offset += len(data)
            pieces.append(data)
        separators = (",", ":") if rng.random() < 0.8 else None
        return json.dumps(header, separators=separators).encode(), b"".join(pieces)

    def broken(self, text: bytes) -> bytes:
        rng = self.random
        at = rng.randrange(len(text) + 1)
        to = min(len(text), at + rng.choice((1, 1, 2, 4, 16, 64)))
        kind = rng.randrange(8)
        if kind == 0 and at < len(text):  # one bit
            return text[:at] + bytes([text[at] ^ (1 << rng.randrange(8))]) + text[at + 1 :]
        if kind == 1:
            return text[:at] + text[to:]
        if kind == 2:
            return text[:at] + rng.choice(TOKENS) + text[at:]
        if kind == 3:
            return text[:at] + rng.choice(TOKENS) + text[to:]
        if kind == 4:  # a piece twice: duplicates of names, fields, elements
            return text[:to] + text[at:to] + text[to:]
        if kind == 5:  # a number changed
            digits = [i for i, c in enumerate(text) if 48 <= c <= 57]
            if digits:
                at = rng.choice(digits)
                return text[:at] + str(rng.choice((0, 1, 7, 9, 10, 255))).encode() + text[at + 1 :]
        if kind == 6:  # a member swapped with another place
            start = rng.randrange(len(text) + 1)
            return text[:start] + text[at:to] + text[start:]
        if kind == 7:  # a whole member twice or taken out
            members = text.split(b"},")
            if len(members) > 1:
                i = rng.randrange(len(members))
                members[i : i + 1] = [] if rng.random() < 0.5 else [members[i], members[i]]
                return b"},".join(members)
        return text[:at]

    def __call__(self) -> bytes:
        rng = self.random
        text, data = self.base()
        for _ in range(rng.choice((0, 1, 1, 1, 1, 2, 3, 5))):
            text = self.broken(text)
        length = len(text)
        if rng.random() < 0.06:
            length = rng.choice((0, 1, length - 1, length + 1, 100_000_000, 100_000_001, 2**63, 2**64 - 1)) % 2**64
        raw = struct.pack("<Q", length) + text + data
        if rng.random() < 0.08:
            raw = raw[: rng.randrange(len(raw) + 1)] if rng.random() < 0.5 else raw + rng.randbytes(rng.randint(1, 9))
        return raw


def fuzz_headers(seed: int, inputs: int) -> tuple[Counter[str], float]:
    """Judge `inputs` mutated files; returns the cases and the slowest, in seconds of CPU."""
    mutator, cases, slowest = Mutator(seed), Counter[str](), 0.0
    for _ in range(inputs):
        raw = mutator()
        before = time.process_time()
        cases[judge(raw)] += 1
        slowest = max(slowest, time.process_time() - before)
    return cases, slowest


def test_mutated_real_headers_get_the_verdict_of_safetensors() -> None:
    cases, _ = fuzz_headers(seed=int(os.environ.get("TIEREWRITE_FUZZ_SEED", "0")), inputs=20_000)
    assert all(cases[case] for case in ("accepted by both", "refused by both", "refused on purpose")), cases


# -------------------------------------------------------------------------------------------------------- the index


def index_and_tensors() -> tuple[bytes, dict[str, Any]]:
    path = FIXTURES / "dg_nvfp4_sharded" / "naive" / "model.safetensors.index.json"
    index = json.loads(path.read_bytes())
    few = dict(list(index["weight_map"].items())[:12])
    return json.dumps({"metadata": index["metadata"], "weight_map": few}).encode(), few


INDEX_TOKENS = [*TOKENS, b"../", b"/", b"..", b"model-00001-of-00003.safetensors", b'"weight_map":', b'"metadata":']


def fuzz_indexes(seed: int, inputs: int, folder: Path) -> Counter[str]:
    """Read `inputs` broken indexes; each is refused, or gives plain file names as JSON itself reads them."""
    mutator, cases = Mutator(seed), Counter[str]()
    text, _ = index_and_tensors()
    path = folder / "model.safetensors.index.json"
    for _ in range(inputs):
        raw = text
        for _ in range(mutator.random.choice((1, 1, 1, 2, 4))):
            raw = mutator.broken(raw)
            if mutator.random.random() < 0.2:
                at = mutator.random.randrange(len(raw) + 1)
                raw = raw[:at] + mutator.random.choice(INDEX_TOKENS) + raw[at:]
        path.write_bytes(raw)
        before = time.process_time()
        try:
            metadata, weight_map = read_index(path)
        except ShardIndexError:
            cases["refused"] += 1
        else:
            cases["accepted"] += 1
            plain = json.loads(raw)
            assert weight_map == plain["weight_map"]
            assert metadata == (plain.get("metadata") or {})
            for name in weight_map.values():
                assert name not in ("", ".", "..")
                assert os.path.basename(name) == name
                assert "\\" not in name
        assert time.process_time() - before < CPU_SECONDS_AN_INPUT
    return cases


def test_a_broken_index_is_refused_or_read_as_json_reads_it(tmp_path: Path) -> None:
    cases = fuzz_indexes(seed=0, inputs=4_000, folder=tmp_path)
    assert cases["accepted"] > 50
    assert cases["refused"] > 50


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        names,
        st.sampled_from(["a.safetensors", "b.safetensors", "c.safetensors", "../a.safetensors", "", "a\0"]) | anything,
        max_size=5,
    ),
    st.sampled_from([None, {}, {"total_size": 7}, [], "x"]),
)
def test_a_folder_with_any_index_opens_exactly_when_index_and_shards_agree(
    tmp_path: Path, weight_map: dict[str, Any], metadata: Any
) -> None:
    held = {"a.safetensors": ["a", "b"], "b.safetensors": ["lm_head.weight"]}
    for file, keys in held.items():
        header = {k: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i, k in enumerate(keys)}
        (tmp_path / file).write_bytes(packed(header, b"x" * len(keys)))
    try:
        text = json.dumps({"metadata": metadata, "weight_map": weight_map})
    except ValueError:
        return
    (tmp_path / "model.safetensors.index.json").write_text(text)
    listed = {str(name) for name in weight_map.values()}
    right = {key: file for file, keys in held.items() if file in listed for key in keys}
    agrees = bool(weight_map) and weight_map == right and (metadata is None or isinstance(metadata, dict))
    try:
        opened = open_folder(tmp_path)
    except SourceError:
        assert not agrees
    else:
        assert agrees
        assert {e.name: opened.shards[e.shard].name for e in opened.tensors.values()} == weight_map


# --------------------------------------------------------------------------------------------------------- long runs


def test_files_on_disk_get_the_same_verdict_as_their_bytes(tmp_path: Path) -> None:
    mutator, path, accepted = Mutator(5), tmp_path / "x.safetensors", 0
    for _ in range(500):
        raw = mutator()
        path.write_bytes(raw)
        expected = ours(raw)
        try:
            _, tensors = read_header(path)
        except SourceError:
            assert expected is None
        else:
            accepted += 1
            assert expected == {e.name: (e.dtype, e.shape, raw[e.start : e.end]) for e in tensors.values()}
    assert accepted > 30


@pytest.mark.long
def test_a_million_inputs_neither_crash_nor_hang_nor_grow(tmp_path: Path) -> None:
    inputs = int(os.environ.get("TIEREWRITE_FUZZ_INPUTS", "1000000"))
    fuzz_headers(seed=1, inputs=2_000)  # allocators warm
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cases, slowest = fuzz_headers(seed=20_26, inputs=inputs)
    indexes = fuzz_indexes(seed=20_26, inputs=inputs // 10, folder=tmp_path)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(
        f"\n{sum(cases.values()):,} headers {dict(cases)}, {sum(indexes.values()):,} indexes {dict(indexes)}, "
        f"{time.monotonic() - started:.0f} s, slowest {slowest * 1000:.1f} ms, memory grew {grown:.1f} MiB"
    )
    assert sum(cases.values()) == inputs
    assert grown < 64
