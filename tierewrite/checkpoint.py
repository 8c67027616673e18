"""What is on disk: a checkpoint's shards, tensors, index, configurations and side files. Headers only.

This is the one gate for input. A header or an index is validated in full here, before anything is planned, so
that no later room has to ask whether an offset lies inside its file. Nothing is opened for writing, no tensor
data is read, and time and memory are bounded by the size of the headers, whatever they say.

Refused: anything but regular files; headers that safetensors' own reader refuses (length field beyond the
file, over 100 MB, not UTF-8, not JSON, wrong types, negative or huge numbers, overflow, overlaps, holes,
trailing or missing bytes, sizes that disagree with dtype and shape); and, unlike there, duplicate names or
JSON keys anywhere, tensors given as arrays, dtypes given as objects. Accepted, unlike there: dtypes that
nobody here knows, as long as the offsets tile the file.

The format: https://github.com/huggingface/safetensors#format (8 bytes little-endian header length N, N bytes
of JSON, then the data). The rules were compared with `safetensors` 0.8.0 by running it; tests/test_fuzz.py
keeps them equal.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import math
import operator
import os
import re
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from tierewrite.errors import (
    ConfigError,
    HeaderError,
    ShardIndexError,
    SourceChanged,
    SourceError,
    SystemFailure,
    TierewriteError,
    shown,
)
from tierewrite.remote import FilePath, RemotePath
from tierewrite.rows import rows_of

INDEX_NAME = "model.safetensors.index.json"
WANTED = "expected a checkpoint folder holding *.safetensors files"
_MEND_JSON = "correct it, or copy it from the original model"
MANIFEST_NAME = "tierewrite.json"
INCOMPLETE_NAME = "tierewrite.incomplete.json"
"""Stands in a store that cannot rename for as long as a rewrite writes there; the index comes last."""

MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit (MAX_HEADER_SIZE)
MAX_INDEX_BYTES = 256 * 1024**2  # three times the index of 500,000 tensors
MAX_CONFIG_BYTES = 64 * 1024**2
MAX_SIDE_ENTRIES = 1_000_000  # files and folders; ends the walk through folders that link to each other
MAX_DEPTH = 127  # serde_json refuses the 128th nested container
_U64_MAX = 2**64 - 1

DTYPE_BITS: Mapping[str, int] = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits an element takes, for the dtypes that safetensors 0.8 knows. A dtype may be missing here: use `.get`.
"""


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """No cyclic garbage collection: it would scan a million young containers over and over, at twice the
    time.
    """
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            if not gc.get_freeze_count():
                # What was made meanwhile counts as old from here on: the next allocation would scan it all.
                gc.freeze()
                gc.unfreeze()
            gc.enable()


class TensorEntry(NamedTuple):
    """One tensor: its name and where its bytes are. A named tuple, because half a million dataclasses take
    seconds.

    Attributes:
        name: the key in the checkpoint.
        dtype: as the header spells it (`BF16`, `F8_E4M3`, ...); possibly one that is not in DTYPE_BITS.
        shape: () for a scalar.
        shard: position of its file in `Checkpoint.shards`.
        start, end: byte range in that file, absolute, end exclusive.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: int
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file.

    Attributes:
        name: file name in the checkpoint folder.
        path: the regular file it leads to, links resolved; or the remote file.
        size, mtime_ns, inode, ctime_ns: of that file when its header was read (bytes, ns); to notice a
            change underfoot. `version` is that of a remote file.
        data_start: offset of the first data byte.
        metadata: its `__metadata__`.
    """

    name: str
    path: FilePath
    size: int
    mtime_ns: int
    inode: int
    data_start: int
    metadata: Mapping[str, str]
    ctime_ns: int = 0
    version: str = ""


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file that is carried along unchanged. `name` is its POSIX path below the root, `path` the resolved
    file; a remote one has a `version`.
    """

    name: str
    path: FilePath
    size: int
    mtime_ns: int
    version: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, as far as headers, index and configurations tell.

    Attributes:
        root: the folder, resolved.
        shards: the files whose tensors count, in natural order of their names.
        tensors: by name, ordered by shard, then offset.
        index_metadata: the index's `metadata` ({} if it has none); None without an index.
        side_files: everything else but the index and an old manifest, sorted by name; links as the files they
            lead to.
        directories: the folders below the root, empty ones too, sorted.
        config, quant_config: config.json and hf_quant_config.json, {} where absent.
        warnings: sentences for the report.
        origin: the remote folder, if it is one; `root` then holds copies of its index and configurations alone.
        copies: who removes these once nobody needs them.
    """

    root: Path
    shards: tuple[Shard, ...]
    tensors: dict[str, TensorEntry]
    index_metadata: dict[str, Any] | None
    side_files: tuple[SideFile, ...]
    directories: tuple[str, ...]
    config: dict[str, Any]
    quant_config: dict[str, Any]
    warnings: tuple[str, ...]
    origin: RemotePath | None = None
    copies: object = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, root: Path, shards: tuple[Shard, ...], tensors: dict[str, TensorEntry]) -> Checkpoint:
        """Shards and tensors alone: enough to read from."""
        return cls(root, shards, tensors, None, (), (), {}, {}, ())

    @property
    def place(self) -> Path | RemotePath:
        """Where it is, for messages."""
        return self.origin or self.root

    @property
    def total_bytes(self) -> int:
        """Sum of all tensors' bytes."""
        return sum(entry.end - entry.start for entry in self.tensors.values())

    @classmethod
    @gc_paused()
    def open(cls, path: str | os.PathLike[str], *, ignore_unindexed: bool = False) -> Checkpoint:
        """Read the headers, index and configurations of the checkpoint folder `path`.

        With an index, the index decides which files are shards; without one, every `*.safetensors` of the
        folder is read, as vLLM does. Safetensors files beside an index are side files, unless their keys
        overlap.

        Args:
            path: the folder (a link to one is followed).
            ignore_unindexed: leave out, with a warning, tensors that a shard holds and the index lacks.

        Raises:
            HeaderError, ShardIndexError, ConfigError, SourceError: something is wrong in the folder.
            SystemFailure: the system does not let us read it.
        """
        try:
            root = _resolve(Path(path))
        except SourceError as e:
            raise SourceError(f"{e.args[0]}; {WANTED}", file=path) from None
        if not root.is_dir():
            raise SourceError(f"not a folder; {WANTED}", file=path)
        return cls.assembled(
            root,
            _list_dir(root),
            lambda name: _check_shard_link(root, name, root / INDEX_NAME),
            lambda name, number: read_header(root / name, shard=number, name=name),
            lambda listed, warnings: _walk(root, listed, warnings),
            ignore_unindexed=ignore_unindexed,
        )

    @classmethod
    def assembled(
        cls,
        root: Path,
        top: list[str],
        indexed: Callable[[str], None],
        header: Callable[[str, int], tuple[Shard, list[TensorEntry]]],
        others: Callable[[set[str], list[str]], tuple[tuple[SideFile, ...], tuple[str, ...]]],
        *,
        ignore_unindexed: bool = False,
        origin: RemotePath | None = None,
        copies: object = None,
    ) -> Checkpoint:
        """A checkpoint from its parts: the one place where index, headers and configurations are held together.

        Args:
            root: the folder that holds the index and the configurations, if there are any.
            top: sorted names of the files and folders at the checkpoint's top.
            indexed: told each file that the index names, before any header is asked for; raises if it is not there.
            header: gives the header of the file of that name and number, validated.
            others: gives side files and folders; told the names that are none of them, and where to put warnings.
            ignore_unindexed: as in `open`.
            origin, copies: as the attributes.

        Raises:
            As `open`.
        """
        refuse_half_written(top, origin or root)
        warnings: list[str] = []
        config = _read_config(root / "config.json", warnings)
        quant_config = _read_config(root / "hf_quant_config.json", warnings)

        index_path = root / INDEX_NAME
        metadata: dict[str, Any] | None = None
        weight_map: dict[str, str] | None = None
        local = [name for name in top if name.endswith(".safetensors") and not name.startswith(".")]
        if INDEX_NAME in top:
            metadata, weight_map = read_index(index_path)
            listed_files = set(weight_map.values())
            names = sorted(listed_files, key=natural_key)
            for name in names:
                indexed(name)
            strays = [name for name in local if name not in listed_files]
        else:
            names, strays = sorted(local, key=natural_key), []
            if not names:
                raise SourceError(f"no *.safetensors file here; {what_is_here(top)}", file=origin or root)

        shards: list[Shard] = []
        tensors: dict[str, TensorEntry] = {}
        unindexed: list[TensorEntry] = []
        for number, name in enumerate(names):
            shard, entries = header(name, number)
            shards.append(shard)
            held = {entry.name: entry for entry in entries}
            if not tensors.keys().isdisjoint(held):
                key = next(key for key in held if key in tensors)
                raise ShardIndexError(
                    f"also stored in {shown(shards[tensors[key].shard].name)}; expected each name in one shard only",
                    file=root / name,
                    tensor=key,
                    advice="remove the copy that is not meant",
                )
            tensors.update(held)
            if weight_map is not None and not held.keys() <= weight_map.keys():
                unindexed.extend(entry for entry in entries if entry.name not in weight_map)
        if weight_map is not None:
            _check_against_index(weight_map, tensors, shards, index_path)
            if unindexed:
                listed = ", ".join(f"'{shown(entry.name)}'" for entry in unindexed[:5])
                more = f" and {len(unindexed) - 5} more" if len(unindexed) > 5 else ""
                if not ignore_unindexed:
                    raise ShardIndexError(
                        f"holds {len(unindexed)} tensors that {INDEX_NAME} lacks: {listed}{more}. Loaders would not "
                        "read them",
                        file=root / shards[unindexed[0].shard].name,
                        tensor=unindexed[0].name,
                        details={"unindexed": [entry.name for entry in unindexed]},
                        advice="add them to the index, or pass --ignore-unindexed to leave them out",
                    )
                for entry in unindexed:
                    del tensors[entry.name]
                warnings.append(f"left out {len(unindexed)} tensors that the index lacks: {listed}{more}")
            _check_total(metadata or {}, tensors, warnings)
        for name in strays:
            _, entries = header(name, 0)
            twice = [entry.name for entry in entries if entry.name in tensors]
            if twice:
                raise ShardIndexError(
                    f"is not in {INDEX_NAME}, yet holds {len(twice)} of its tensors",
                    file=root / name,
                    tensor=twice[0],
                    details={"overlap": twice},
                    advice="remove the file, or the index if the file is what counts",
                )
            warnings.append(f"{shown(name)} is not in {INDEX_NAME}: copied as it is, its tensors are not looked at")
        if not tensors:
            raise SourceError("the safetensors files hold no tensors; nothing to rewrite", file=root)
        side_files, directories = others({*names, INDEX_NAME, MANIFEST_NAME, INCOMPLETE_NAME}, warnings)
        return cls(
            root=root,
            shards=tuple(shards),
            tensors=tensors,
            index_metadata=metadata,
            side_files=side_files,
            directories=directories,
            config=config,
            quant_config=quant_config,
            warnings=tuple(warnings),
            origin=origin,
            copies=copies,
        )


def is_half_written(top: Collection[str]) -> bool:
    """Whether the names at a checkpoint's top are those of a rewrite that did not come to its end."""
    return INCOMPLETE_NAME in top and INDEX_NAME not in top


def refuse_half_written(top: Collection[str], where: FilePath) -> None:
    """Raises SourceError if the names at a checkpoint's top are such."""
    if is_half_written(top):
        raise SourceError(
            f"holds {INCOMPLETE_NAME} and no index: a rewrite to this place was killed, or is still going; finish it "
            "with --resume",
            file=where,
        )


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts `model-2` before `model-10`; names that only differ in leading zeros stay apart."""
    parts: list[tuple[int, int, str]] = []
    for part in re.split("([0-9]+)", name):
        # int() of thousands of digits is slow and refused by Python: such a part is compared as text
        parts.append(
            (0, int(part), part) if part[:1].isdecimal() and part.isascii() and len(part) < 20 else (1, 0, part)
        )
    return parts


# ---------------------------------------------------------------------------------------------------- headers


@gc_paused()
def read_header(
    path: str | os.PathLike[str], *, shard: int = 0, name: str | None = None
) -> tuple[Shard, list[TensorEntry]]:
    """Read and validate the header of one safetensors file.

    Args:
        path: the file; links are followed to a regular file.
        shard: the number that its entries carry.
        name: the shard's name; by default the last part of `path`.

    Returns:
        The shard and its tensors, ordered by offset.

    Raises:
        HeaderError: the file is malformed. SourceError: it is missing or no regular file. SystemFailure:
            unreadable.
    """
    given = Path(path)
    resolved = _resolve(given)
    with _opened(resolved, given) as fd:
        info = os.fstat(fd)
        length = header_length(_read(fd, 8, given), info.st_size, given)
        header = _read(fd, length, given)
    if len(header) != length:
        raise SourceChanged(f"shrank to {8 + len(header)} bytes while its header was read", file=given)
    base = 8 + length
    metadata, entries = parse_header(header, info.st_size - base, file=given, shard=shard, base=base)
    found = Shard(
        given.name if name is None else name,
        resolved,
        info.st_size,
        info.st_mtime_ns,
        info.st_ino,
        base,
        metadata,
        info.st_ctime_ns,
    )
    return found, entries


def header_length(prefix: bytes, size: int, file: object) -> int:
    """The header's length in bytes, from a file's first 8 bytes and its size; at most MAX_HEADER_BYTES."""
    if len(prefix) < 8:
        raise HeaderError(f"has {len(prefix)} bytes; a safetensors file has at least 8", file=file)
    length = int.from_bytes(prefix, "little")
    if prefix == b"version ":
        raise HeaderError("is a Git LFS pointer, not the file itself", file=file, advice="run `git lfs pull`")
    if length > MAX_HEADER_BYTES:
        raise HeaderError(f"says its header has {length} bytes; the format allows {MAX_HEADER_BYTES}", file=file)
    if length > size - 8:
        raise HeaderError(f"says its header has {length} bytes, but only {size - 8} follow: truncated?", file=file)
    return length


def parse_header(
    header: bytes, data_bytes: int, *, file: object = None, shard: int = 0, base: int = 0
) -> tuple[dict[str, str], list[TensorEntry]]:
    """Validate a header's JSON against the number of data bytes that follow it.

    Args:
        header: the JSON, without the length field.
        data_bytes: bytes of the file after the header.
        file: named in errors.
        shard: the number that the entries carry.
        base: offset of the first data byte in the file.

    Returns:
        `__metadata__`, and the tensors, ordered by offset.

    Raises:
        HeaderError: anything that the module's docstring lists.
    """
    try:
        text = header.decode("utf-8")
    except UnicodeDecodeError as e:
        raise HeaderError(f"header is not UTF-8 at byte {8 + e.start}", file=file) from None
    found = _parse_serialized(text, data_bytes, shard, base)
    return _parse_any(text, data_bytes, file, shard, base) if found is None else found


_NUMBER = "(?:0|[1-9][0-9]{0,18})"  # 19 digits fit 64 bits
# `[^"]` is passed over at a glance, a class of several characters is not: what else no name may hold is looked for in
# all names at once. The start of a tensor may be anything here, since it must be the end of the one before.
_TENSOR = re.compile(
    rf'"([^"]*)":{{"dtype":("[^"]*","shape":\[[0-9,]*\]),"data_offsets":\[([^,]*),({_NUMBER})\]}}(?:,(?=")|\Z)'
)
_TENSOR_FRAME = len('"":{"dtype":,"data_offsets":[,]},')  # what of a tensor is in no group
_KIND = re.compile(rf'"([^"\\\x00-\x1f]*)","shape":\[((?:{_NUMBER}(?:,{_NUMBER})*)?)\]')
_NOT_PLAIN = "\\" + "".join(map(chr, range(0x20)))  # begins an escape, or is not allowed in a string
_METADATA = '{"__metadata__":'


def _parse_serialized(
    text: str, data_bytes: int, shard: int, base: int
) -> tuple[dict[str, str], list[TensorEntry]] | None:
    """What `_parse_any` returns, in a quarter of the time, for a valid header in the form that serializers write:
    compact, metadata first or absent, tensors in the order of their offsets. None for anything else.

    The matches are the whole header, since their lengths add up to its length.
    """
    close = text.rfind("}")
    if not text.startswith("{") or text[close + 1 :].strip(" "):
        return None
    metadata: Any = {}
    at = 1
    if text.startswith(_METADATA):
        try:
            metadata, at = _STRICT.raw_decode(text, len(_METADATA))
        except (ValueError, RecursionError):
            return None
        if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
            return None
        if text[at : at + 1] != "," or _SURROGATE.search(text, 0, at):
            return None
        at += 1
    found = _TENSOR.findall(text, at, close)
    if not found:
        return None
    names, kinds, starts, ends = zip(*found, strict=True)
    del found
    all_names, *others = ("".join(column) for column in (names, kinds, starts, ends))
    covered = len(all_names) + sum(map(len, others)) + _TENSOR_FRAME * len(names) - 1
    unique = set(names)
    if covered != close - at or len(unique) != len(names) or "__metadata__" in unique:
        return None
    if starts[0] != "0" or starts[1:] != ends[:-1] or int(ends[-1]) != data_bytes:
        return None
    if any(character in all_names for character in _NOT_PLAIN):
        return None
    stops = list(map(base.__add__, map(int, ends)))
    begins = [base, *stops[:-1]]
    dtypes: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for kind, size in set(zip(kinds, map(operator.sub, stops, begins), strict=True)):
        match = _KIND.fullmatch(kind)
        if match is None or size < 0:
            return None
        dtypes[kind] = match[1]
        shapes[kind] = tuple(map(int, match[2].split(","))) if match[2] else ()
        try:
            _check_size(dtypes[kind], shapes[kind], _elements(shapes[kind], None, ""), 0, size, None, "")
        except HeaderError:
            return None
    columns = (names, map(dtypes.__getitem__, kinds), map(shapes.__getitem__, kinds), repeat(shard), begins, stops)
    return metadata, list(rows_of(TensorEntry, zip(*columns, strict=False)))


def _parse_any(
    text: str, data_bytes: int, file: object, shard: int, base: int
) -> tuple[dict[str, str], list[TensorEntry]]:
    """`parse_header` for a header of any form.

    Raises:
        HeaderError: as there.
    """
    try:
        root = _strict_json(text)
    except _BadJson as e:
        raise HeaderError(f"header is no valid JSON for this format: {e}", file=file) from None
    if type(root) is tuple:  # three tensors named dtype, shape, data_offsets: legal names, though no legal tensors
        root = _as_dict(root)
    if type(root) is not dict:
        raise HeaderError(f"header is {_kind(root)}; expected an object", file=file)
    metadata = _header_metadata(root.pop("__metadata__", None), file)

    rows: list[tuple[int, int, str, str, tuple[int, ...]]] = []  # start, end, name, dtype, shape
    shapes: dict[tuple[int, ...], tuple[tuple[int, ...], int]] = {}
    for name, info in root.items():
        dtype, shape, offsets = info if type(info) is tuple else _tensor_fields(name, info, file)
        if type(dtype) is not str:
            raise HeaderError(f"dtype is {_kind(dtype)}; expected a string", file=file, tensor=name)
        if type(shape) is not list:
            raise HeaderError(f"shape is {_kind(shape)}; expected an array", file=file, tensor=name)
        for dim in shape:
            if type(dim) is not int or not 0 <= dim <= _U64_MAX:
                _bad_number("shape", dim, file, name)
        if type(offsets) is not list or len(offsets) != 2:
            raise HeaderError("data_offsets are no array of two numbers", file=file, tensor=name)
        start, end = offsets
        if not (type(start) is type(end) is int and 0 <= start <= end <= _U64_MAX):
            for offset in offsets:
                if type(offset) is not int or not 0 <= offset <= _U64_MAX:
                    _bad_number("data_offsets", offset, file, name)
            raise HeaderError(f"data_offsets [{start}, {end}] run backwards", file=file, tensor=name)
        key = tuple(shape)
        known = shapes.get(key)
        if known is None:
            known = shapes[key] = key, _elements(key, file, name)
        _check_size(dtype, key, known[1], start, end, file, name)
        rows.append((start, end, name, dtype, known[0]))

    rows.sort(key=_by_offset)
    expected = 0
    for start, end, name, _, _ in rows:
        if start != expected:
            problem = "overlaps the tensor before it" if start < expected else "leaves a hole before it"
            raise HeaderError(
                f"data_offsets [{start}, {end}]: {problem}; expected to start at {expected}",
                file=file,
                tensor=name,
            )
        expected = end
    if expected != data_bytes:
        what = "truncated" if expected > data_bytes else f"{data_bytes - expected} trailing bytes"
        raise HeaderError(f"{data_bytes} bytes of data, but its tensors end at {expected}: {what}", file=file)
    return metadata, [
        TensorEntry(name, dtype, shape, shard, base + start, base + end) for start, end, name, dtype, shape in rows
    ]


def _by_offset(row: tuple[Any, ...]) -> tuple[int, int]:
    return row[0], row[1]


def _check_size(
    dtype: str, shape: tuple[int, ...], elements: int, start: int, end: int, file: object, name: str
) -> None:
    """The offsets hold as many bytes as a known dtype and the shape take."""
    bits = DTYPE_BITS.get(dtype)
    if bits is None:
        return
    total = elements * bits
    if total > _U64_MAX:
        raise HeaderError(f"shape {list(shape)[:20]} of {dtype} overflows 64 bits", file=file, tensor=name)
    if total % 8:
        raise HeaderError(f"{total} bits of {dtype} are no whole number of bytes", file=file, tensor=name)
    if end - start != total // 8:
        raise HeaderError(
            f"data_offsets [{start}, {end}] hold {end - start} bytes; {dtype} {list(shape)[:20]} takes {total // 8}",
            file=file,
            tensor=name,
        )


def _elements(shape: tuple[int, ...], file: object, name: str) -> int:
    """Product of the dimensions, refused where it overflows on the way (a later 0 does not save it, as in
    Rust).
    """
    count = 1
    for dim in shape:
        count *= dim
        if count > _U64_MAX:
            raise HeaderError("the number of elements overflows 64 bits", file=file, tensor=name)
    return count


def _tensor_fields(name: str, info: Any, file: object) -> tuple[Any, Any, Any]:
    """dtype, shape and offsets of a tensor whose fields come in another order or with unknown ones beside
    them.
    """
    if type(info) is not dict:
        raise HeaderError(
            f"is {_kind(info)}; expected an object with dtype, shape, data_offsets", file=file, tensor=name
        )
    for member in ("dtype", "shape", "data_offsets"):
        if member not in info:
            raise HeaderError(f"lacks {member}", file=file, tensor=name)
    for member, value in info.items():
        if member not in ("dtype", "shape", "data_offsets"):
            _check_ignored(value, file, name)
    return info["dtype"], info["shape"], info["data_offsets"]


def _check_ignored(value: Any, file: object, name: str) -> None:
    """Fields nobody knows are ignored, but bounded: nesting as serde_json bounds it, numbers within a double."""
    waiting = [(value, 3)]
    while waiting:
        value, depth = waiting.pop()
        if type(value) is tuple:
            value = _as_dict(value)
        if type(value) in (dict, list):
            if depth > MAX_DEPTH:
                raise HeaderError(f"nested more than {MAX_DEPTH} deep", file=file, tensor=name)
            waiting.extend((child, depth + 1) for child in (value.values() if type(value) is dict else value))
        elif type(value) in (int, float):
            try:
                finite = math.isfinite(value)
            except OverflowError:
                finite = False
            if not finite:
                raise HeaderError("a number is out of range", file=file, tensor=name)


def _header_metadata(found: Any, file: object) -> dict[str, str]:
    """`__metadata__`: absent, null, or an object of strings."""
    if found is None:
        return {}
    if type(found) is tuple:
        found = _as_dict(found)
    if type(found) is not dict:
        raise HeaderError(f"__metadata__ is {_kind(found)}; expected an object of strings", file=file)
    for key, value in found.items():
        if type(value) is not str:
            raise HeaderError(f"__metadata__ '{shown(key)}' is {_kind(value)}; expected a string", file=file)
    return found


def _bad_number(field: str, value: Any, file: object, name: str) -> NoReturn:
    found = shown(value) if type(value) is int and abs(value) < 2**200 else _kind(value)
    raise HeaderError(f"{field} holds {found}; expected whole numbers from 0 to 2^64 - 1", file=file, tensor=name)


def _kind(value: Any) -> str:
    """What a JSON value is, for messages."""
    if value is None:
        return "null"
    if type(value) is tuple:
        return "an object"
    names = {
        bool: "a boolean",
        int: "a number",
        float: "a fraction",
        str: "a string",
        list: "an array",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)


# ------------------------------------------------------------------------------------------------ strict JSON


class _BadJson(ValueError):
    """Why a text is not the JSON we accept."""


_FIELDS = ("dtype", "shape", "data_offsets")


def _as_dict(fields: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(_FIELDS, fields, strict=True))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | tuple[Any, Any, Any]:
    """An object from its members, none of which may come twice.

    A tensor's three fields in their usual order become a tuple: a header has up to half a million of them,
    and a dictionary each would take 500 MB. Nothing else in parsed JSON is a tuple.
    """
    if len(pairs) == 3:
        (a, first), (b, second), (c, third) = pairs
        if a == "dtype" and b == "shape" and c == "data_offsets":
            return first, second, third
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _BadJson(f"'{shown(key)}' comes twice in one object")
            seen.add(key)
    return found


def _no_constant(found: str) -> NoReturn:
    raise _BadJson(f"{found} is not JSON")


def _whole(digits: str) -> int | float:
    return -0.0 if digits == "-0" else int(digits)  # serde_json reads -0 as a fraction


_STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


def _strict_json(text: str) -> Any:
    """Parse JSON as serde_json does, but refuse an object with a key twice. Tensor objects come as tuples.

    Raises:
        _BadJson: with the reason.
    """
    try:
        found = _parsed(text)
        if _SURROGATE.search(text):
            _refuse_half_pairs(text)
        return found
    except RecursionError:
        raise _BadJson(f"nested more than {MAX_DEPTH} deep") from None
    except json.JSONDecodeError as e:
        raise _BadJson(f"{e.msg} at character {e.pos}") from None
    except _BadJson:
        raise
    except ValueError as e:  # an integer of more digits than Python converts
        raise _BadJson(str(e)) from None


def _parsed(text: str) -> Any:
    if "-0" in text:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant, parse_int=_whole)
    return _STRICT.decode(text)


def _refuse_half_pairs(text: str) -> None:
    """Python accepts half a surrogate pair in a string, which is no Unicode text and could not be written
    again.
    """
    for match in _STRING.finditer(text):
        token = match.group()
        if _SURROGATE.search(token):
            try:
                json.loads(token).encode("utf-8")
            except UnicodeEncodeError:
                raise _BadJson(f"half a surrogate pair in a string at character {match.start()}") from None


# -------------------------------------------------------------------------------------------------- the index


def read_index(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Read and validate an index file by itself.

    Returns:
        Its `metadata` ({} if absent) and its `weight_map` {tensor name: file name}.

    Raises:
        ShardIndexError: not the JSON expected, a key twice, or a file name that is more than a name.
        SourceError: missing or no regular file. SystemFailure: unreadable.
    """
    path = Path(path)
    raw = _read_small(path, MAX_INDEX_BYTES, ShardIndexError)
    try:
        root = _strict_json(raw.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise ShardIndexError(f"is not UTF-8 at byte {e.start}", file=path) from None
    except _BadJson as e:
        raise ShardIndexError(f"is no valid JSON: {e}", file=path) from None
    if type(root) is not dict:
        raise ShardIndexError(f"is {_kind(root)}; expected an object with weight_map", file=path)
    metadata = root.get("metadata")
    metadata = {} if metadata is None else _as_dict(metadata) if type(metadata) is tuple else metadata
    if type(metadata) is not dict:
        raise ShardIndexError(f"metadata is {_kind(metadata)}; expected an object", file=path)
    metadata = _plain(metadata, path)
    weight_map = root.get("weight_map")
    if type(weight_map) is tuple:
        weight_map = _as_dict(weight_map)
    if type(weight_map) is not dict:
        what = "lacks weight_map" if "weight_map" not in root else f"weight_map is {_kind(weight_map)}"
        raise ShardIndexError(f"{what}; expected an object of tensor names and file names", file=path)
    if not weight_map:
        raise ShardIndexError("weight_map is empty; it must list the tensors", file=path)
    checked: set[str] = set()
    for key, name in weight_map.items():
        if type(name) is not str:
            raise ShardIndexError(f"its file is {_kind(name)}; expected a file name", file=path, tensor=key)
        if name not in checked:
            if not name or name in (".", "..") or any(c in name for c in "/\\\0") or re.match("[A-Za-z]:", name):
                raise ShardIndexError(
                    f"its file '{shown(name)}' is not a plain file name; shards lie beside the index",
                    file=path,
                    tensor=key,
                )
            checked.add(name)
    return metadata, weight_map


def _plain(value: Any, path: Path, depth: int = 2) -> Any:
    """`value` with the tuples that stand for tensor-like objects turned back into dictionaries."""
    if depth > MAX_DEPTH:
        raise ShardIndexError(f"nested more than {MAX_DEPTH} deep", file=path)
    if type(value) is tuple:
        value = _as_dict(value)
    if type(value) is dict:
        return {key: _plain(child, path, depth + 1) for key, child in value.items()}
    if type(value) is list:
        return [_plain(child, path, depth + 1) for child in value]
    return value


def _check_shard_link(root: Path, name: str, index_path: Path) -> None:
    """An indexed file may be a link, but only to a file of this folder or of the hub cache that the folder is
    in.
    """
    path = root / name
    try:
        resolved = _resolve(path)
    except SourceError as e:
        raise ShardIndexError(f"names '{shown(name)}', which cannot be found: {e}", file=index_path) from None
    if not _belongs(root, resolved):
        raise ShardIndexError(
            f"names '{shown(name)}', a link that leaves the folder to {shown(resolved)}",
            file=index_path,
            advice="put the file itself there",
        )


def _belongs(root: Path, resolved: Path) -> bool:
    """Whether a link's end is the folder's own: below it, or a blob of the hub cache whose snapshot the
    folder is.

    The cache keeps `models--<org>--<name>/snapshots/<revision>/<file>` as links to `blobs/<hash>` beside `snapshots`
    (https://huggingface.co/docs/huggingface_hub/guides/manage-cache). Since huggingface_hub 2 those may be links
    themselves, to `blobs/<2 digits>/<hash>` beside all `models--*` (its `utils/_shared_blobs.py`).
    """
    if resolved.is_relative_to(root):
        return True
    for folder in root.parents:
        if folder.name == "snapshots":
            if resolved.is_relative_to(folder.parent / "blobs"):
                return True
            shared = folder.parent.parent / "blobs"
            if folder.parent.name.startswith("models--") and resolved.is_relative_to(shared):
                return True
    return False


def _check_against_index(
    weight_map: dict[str, str], tensors: dict[str, TensorEntry], shards: list[Shard], index_path: Path
) -> None:
    """Every key of the index must be in the shard that the index says."""
    files = [shard.name for shard in shards]
    for key, name in weight_map.items():
        entry = tensors.get(key)
        if entry is None or files[entry[3]] != name:
            where = "no shard holds it" if entry is None else f"it is in {shown(files[entry.shard])}"
            raise ShardIndexError(f"listed as in {shown(name)}, but {where}", file=index_path, tensor=key)


def _check_total(metadata: dict[str, Any], tensors: dict[str, TensorEntry], warnings: list[str]) -> None:
    if "total_size" in metadata:
        total = sum([end - start for _, _, _, _, start, end in tensors.values()])
        if metadata["total_size"] != total:
            said = metadata["total_size"]
            text = str(said) if type(said) is float or (type(said) is int and abs(said) < 2**200) else _kind(said)
            warnings.append(f"{INDEX_NAME} says total_size {text}; its tensors have {total} bytes")


# --------------------------------------------------------------------------------- configurations, side files


def _read_config(path: Path, warnings: list[str]) -> dict[str, Any]:
    """A JSON object from a configuration file, as `json.load` sees it (NaN and Infinity included); {} if
    absent.
    """
    if not os.path.lexists(path):
        return {}
    raw = _read_small(path, MAX_CONFIG_BYTES, ConfigError)
    repeated: list[str] = []

    def pairs_hook(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            repeated.append(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
        return found

    try:
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=pairs_hook)
    except UnicodeDecodeError as e:
        raise ConfigError(f"is not UTF-8 at byte {e.start}; {_MEND_JSON}", file=path) from None
    except RecursionError:
        raise ConfigError(f"is nested too deeply; {_MEND_JSON}", file=path) from None
    except ValueError as e:
        raise ConfigError(f"is no valid JSON: {e}; {_MEND_JSON}", file=path) from None
    if type(found) is not dict:
        raise ConfigError(f"is {_kind(found)}; expected an object: {_MEND_JSON}", file=path)
    if repeated:
        warnings.append(f"{path.name}: '{shown(repeated[0])}' comes twice in one object; the last one counts")
    return found


def what_is_here(names: list[str]) -> str:
    """What a folder without safetensors holds instead, for the error."""
    if not names:
        return "the folder is empty"
    weights = [n for n in names if n.endswith((".bin", ".pt", ".pth", ".gguf", ".ckpt", ".msgpack", ".h5", ".onnx"))]
    if weights:
        listed = ", ".join(shown(name) for name in weights[:5])
        return f"found weights in other formats ({listed}): convert them to safetensors first"
    listed = ", ".join(shown(name) for name in names[:8])
    return f"found {listed}{' ...' if len(names) > 8 else ''}; give the folder that holds the shards"


def _walk(root: Path, leave_out: set[str], warnings: list[str]) -> tuple[tuple[SideFile, ...], tuple[str, ...]]:
    """All other files and all folders below `root`, links followed; `leave_out` are names at the top."""
    files: list[SideFile] = []
    folders: list[str] = []
    waiting: list[tuple[str, Path, tuple[Path, ...]]] = [("", root, (root,))]
    while waiting:
        prefix, folder, above = waiting.pop()
        for name in _list_dir(folder):
            if not prefix and name in leave_out:
                continue
            if len(files) + len(folders) >= MAX_SIDE_ENTRIES:
                raise SourceError(f"holds more than {MAX_SIDE_ENTRIES} files and folders", file=root)
            path = folder / name
            relative = prefix + name
            linked = path.is_symlink()
            resolved = _resolve(path) if linked else path
            info = _stat(resolved, path)
            if stat.S_ISDIR(info.st_mode):
                if resolved in above:
                    raise SourceError("is a link to a folder that holds it, a loop: remove it", file=path)
                if linked and not _belongs(root, resolved):
                    raise SourceError(
                        f"is a link to the folder {shown(resolved)}, outside of the checkpoint; "
                        "copy it, or remove the link",
                        file=path,
                    )
                folders.append(relative)
                waiting.append((relative + "/", resolved, (*above, resolved)))
            elif stat.S_ISREG(info.st_mode):
                if linked and not _belongs(root, resolved):
                    warnings.append(f"{shown(relative)} is a link to {shown(resolved)}: that file is copied")
                files.append(SideFile(relative, resolved, info.st_size, info.st_mtime_ns))
            else:
                what = f"is {_mode(info.st_mode)}; only regular files can be copied: move it away"
                raise SourceError(what, file=path)
    return tuple(sorted(files, key=lambda side: side.name)), tuple(sorted(folders))


# -------------------------------------------------------------------------------------------- the file system


def _mode(mode: int) -> str:
    for test, text in (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISBLK, "a block device"),
    ):
        if test(mode):
            return text
    return "no regular file"


def _failed(e: OSError | ValueError, path: Path) -> TierewriteError:
    """The error that an exception of the system stands for: a wrong source, or a system that does not let us
    read.
    """
    if isinstance(e, ValueError):
        return SourceError("its name holds a NUL character", file=path)
    if e.errno == errno.ELOOP:
        return SourceError("is a link that leads to itself; remove it, or put the file there", file=path)
    if e.errno in (errno.ENOENT, errno.ENOTDIR):
        what = "is a link to nothing; remove it, or put the file there" if path.is_symlink() else "does not exist"
        return SourceError(what, file=path)
    if e.errno in (errno.ENAMETOOLONG, errno.ENXIO):
        return SourceError(f"cannot be opened: {e.strerror}", file=path)
    advice = "check its permissions, or read it as another user" if e.errno in (errno.EACCES, errno.EPERM) else None
    return SystemFailure(f"cannot be read: {e.strerror or e}", file=path, advice=advice)


def _resolve(path: Path) -> Path:
    """`path` with every link resolved; it exists."""
    try:
        return Path(os.path.realpath(path, strict=True))
    except (OSError, ValueError) as e:
        raise _failed(e, path) from None


def _stat(path: Path, given: Path) -> os.stat_result:
    try:
        return os.stat(path)
    except (OSError, ValueError) as e:
        raise _failed(e, given) from None


def _list_dir(path: Path) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError as e:
        raise _failed(e, path) from None


@contextlib.contextmanager
def _opened(resolved: Path, given: Path) -> Iterator[int]:
    """A descriptor, for reading, of a regular file whose links are resolved already.

    Looked at before it is opened, because opening a device can do things; opened without waiting, because
    opening a FIFO waits for its writer; looked at again, because it may have been exchanged in between.
    """
    try:
        info = os.stat(resolved)
        fd = -1
        if stat.S_ISREG(info.st_mode):
            fd = os.open(resolved, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY)
            info = os.fstat(fd)
    except (OSError, ValueError) as e:
        raise _failed(e, given) from None
    try:
        if fd < 0 or not stat.S_ISREG(info.st_mode):
            raise SourceError(f"is {_mode(info.st_mode)}; expected a regular file", file=given)
        yield fd
    finally:
        if fd >= 0:
            os.close(fd)


def _read(fd: int, count: int, path: Path) -> bytes:
    """`count` bytes from where `fd` stands, fewer only where the file ends."""
    pieces: list[bytes] = []
    try:
        while count:
            piece = os.read(fd, count)
            if not piece:
                break
            pieces.append(piece)
            count -= len(piece)
    except OSError as e:
        raise _failed(e, path) from None
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _read_small(path: Path, limit: int, error: type[SourceError]) -> bytes:
    """A whole file of at most `limit` bytes."""
    with _opened(_resolve(path), path) as fd:
        size = os.fstat(fd).st_size
        if size > limit:
            raise error(f"has {size} bytes; at most {limit} are read", file=path)
        raw = _read(fd, limit + 1, path)
    if len(raw) > limit:
        raise error(f"has more than {limit} bytes", file=path)
    return raw
