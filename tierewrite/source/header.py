"""TODO."""

from __future__ import annotations

import math
import operator
import os
import re
from itertools import repeat
from pathlib import Path
from typing import Any, NoReturn

from tierewrite.errors import (
    HeaderError,
    SourceChanged,
    shown,
)
from tierewrite.source.regular_files import opened, read_from, resolved_path
from tierewrite.source.rows import rows_of
from tierewrite.source.strict_json import MAX_DEPTH, STRICT, SURROGATE, BadJson, as_dict, kind_of_json, strict_json
from tierewrite.source.table import DTYPE_BITS, Shard, TensorEntry, gc_paused

MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit (MAX_HEADER_SIZE)
_U64_MAX = 2**64 - 1


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
    resolved = resolved_path(given)
    with opened(resolved, given) as fd:
        info = os.fstat(fd)
        length = header_length(read_from(fd, 8, given), info.st_size, given)
        header = read_from(fd, length, given)
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
            metadata, at = STRICT.raw_decode(text, len(_METADATA))
        except (ValueError, RecursionError):
            return None
        if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
            return None
        if text[at : at + 1] != "," or SURROGATE.search(text, 0, at):
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
        root = strict_json(text)
    except BadJson as e:
        raise HeaderError(f"header is no valid JSON for this format: {e}", file=file) from None
    if type(root) is tuple:  # three tensors named dtype, shape, data_offsets: legal names, though no legal tensors
        root = as_dict(root)
    if type(root) is not dict:
        raise HeaderError(f"header is {kind_of_json(root)}; expected an object", file=file)
    metadata = _header_metadata(root.pop("__metadata__", None), file)

    rows: list[tuple[int, int, str, str, tuple[int, ...]]] = []  # start, end, name, dtype, shape
    shapes: dict[tuple[int, ...], tuple[tuple[int, ...], int]] = {}
    for name, info in root.items():
        dtype, shape, offsets = info if type(info) is tuple else _tensor_fields(name, info, file)
        if type(dtype) is not str:
            raise HeaderError(f"dtype is {kind_of_json(dtype)}; expected a string", file=file, tensor=name)
        if type(shape) is not list:
            raise HeaderError(f"shape is {kind_of_json(shape)}; expected an array", file=file, tensor=name)
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
            f"is {kind_of_json(info)}; expected an object with dtype, shape, data_offsets", file=file, tensor=name
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
            value = as_dict(value)
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
        found = as_dict(found)
    if type(found) is not dict:
        raise HeaderError(f"__metadata__ is {kind_of_json(found)}; expected an object of strings", file=file)
    for key, value in found.items():
        if type(value) is not str:
            raise HeaderError(f"__metadata__ '{shown(key)}' is {kind_of_json(value)}; expected a string", file=file)
    return found


def _bad_number(field: str, value: Any, file: object, name: str) -> NoReturn:
    found = shown(value) if type(value) is int and abs(value) < 2**200 else kind_of_json(value)
    raise HeaderError(f"{field} holds {found}; expected whole numbers from 0 to 2^64 - 1", file=file, tensor=name)
