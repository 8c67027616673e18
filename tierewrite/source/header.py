"""The header of a safetensors file: its length, and its JSON into columns, with all that is refused.

A header is validated in full here, before anything is planned, so that no later room has to ask whether an offset lies
inside its file. Time and memory are bounded by the size of the header, whatever it says.

Refused: what safetensors' own reader refuses (length field beyond the file, over 100 MB, not UTF-8, not JSON, wrong
types, negative or huge numbers, overflow, overlaps, holes, trailing or missing bytes, sizes that disagree with dtype
and shape); and, unlike there, duplicate names or JSON keys anywhere, tensors given as arrays, dtypes given as objects.
Accepted, unlike there: dtypes that nobody here knows, as long as the offsets tile the file.

The format: https://github.com/huggingface/safetensors#format (8 bytes little-endian header length N, N bytes of JSON,
then the data). The rules were compared with `safetensors` 0.8.0 by running it; tests/test_fuzz.py keeps them equal.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from blake3 import blake3

from tierewrite.errors import HeaderError, SourceChanged, shown
from tierewrite.source.regular_files import opened, read_from, resolved_path
from tierewrite.source.strict_json import MAX_DEPTH, BadJson, as_dict, kind_of_json, strict_json
from tierewrite.source.table import DTYPE_BITS, Kind, Shard, TensorEntry, Tensors
from tierewrite.stores.base import PathLike

MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit (MAX_HEADER_SIZE)
_U64_MAX = 2**64 - 1
_I64_MAX = 2**63 - 1  # the columns of offsets are signed
_UNKNOWN = -1  # bytes of a dtype that nobody here knows


def read_header(path: PathLike, *, shard: int = 0, name: str | None = None) -> tuple[Shard, Tensors]:
    """Read and validate the header of one safetensors file.

    Args:
        path: the file; links are followed to a regular file.
        shard: the number that its tensors carry.
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
    metadata, tensors = parse_header(header, info.st_size - base, file=given, shard=shard, base=base)
    found = Shard(
        given.name if name is None else name,
        resolved,
        info.st_size,
        info.st_mtime_ns,
        info.st_ino,
        base,
        metadata,
        info.st_ctime_ns,
        header_digest=digest_of(header),
    )
    return found, tensors


def digest_of(header: bytes) -> str:
    """BLAKE3, in hex, of what stands before a file's data: the length field and `header`, the JSON."""
    return blake3(len(header).to_bytes(8, "little")).update(header).hexdigest()


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
) -> tuple[dict[str, str], Tensors]:
    """Validate a header's JSON against the number of data bytes that follow it.

    Args:
        header: the JSON, without the length field.
        data_bytes: bytes of the file after the header.
        file: named in errors.
        shard: the number that the tensors carry.
        base: offset of the first data byte in the file.

    Returns:
        `__metadata__`, and the tensors, ordered by offset.

    Raises:
        HeaderError: anything that the module's docstring lists.
    """
    return _parse_canonical(header, data_bytes, shard, base) or _parse_any(header, data_bytes, file, shard, base)


class _Tensor(msgspec.Struct, gc=False):
    """A tensor in a header: its fields, in the order in which serializers write them."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class _Metadata(msgspec.Struct):
    metadata: dict[str, str] = msgspec.field(name="__metadata__")


_TENSORS = msgspec.json.Decoder(dict[str, _Tensor])
_METADATA = msgspec.json.Decoder(_Metadata)
_ENCODER = msgspec.json.Encoder()


def _parse_canonical(header: bytes, data_bytes: int, shard: int, base: int) -> tuple[dict[str, str], Tensors] | None:
    """What `_parse_any` returns, in a fraction of the time, for a valid header in the form that serializers write:
    compact, metadata first or absent. None for anything else.

    The proof of that form is that the header comes out the same when it is written again: so no key comes twice, no
    field is unknown, no number is spelled in an odd way, and there is no white space but the padding at the end.
    """
    try:
        metadata, body = _without_metadata(header.rstrip(b" "))
        found = _TENSORS.decode(body)
        if not found or "__metadata__" in found or _ENCODER.encode(found) != body:
            return None
        table = _table(found, data_bytes, shard, base)
    except (msgspec.MsgspecError, UnicodeError, RecursionError, OverflowError, HeaderError):
        return None
    return None if table is None else (metadata, table)


def _without_metadata(header: bytes) -> tuple[dict[str, str], bytes]:
    """`__metadata__`, {} unless it comes first and in canonical form, and the header without it."""
    if not header.startswith(b'{"__metadata__":{'):
        return {}, header
    end = header.find(b'"},"') + 2  # of metadata that is not empty; where a string holds this, decoding fails
    metadata = _METADATA.decode(header[:end] + b"}" if end > 1 else header).metadata
    front = b'{"__metadata__":' + _ENCODER.encode(metadata) + b","
    return (metadata, b"{" + header[len(front) :]) if header.startswith(front) else ({}, header)


def _table(found: dict[str, _Tensor], data_bytes: int, shard: int, base: int) -> Tensors | None:
    """The tensors in order of their offsets; None where these do not tile the data or disagree with the shapes.

    Raises:
        HeaderError: a shape that no tensor can have. OverflowError: an offset beyond 63 bits.
    """
    names, infos = list(found), found.values()
    number: dict[Kind, int] = {}
    kind = np.array([number.setdefault((info.dtype, info.shape), len(number)) for info in infos], np.int32)
    offsets = chain.from_iterable(info.data_offsets for info in infos)
    starts, ends = np.fromiter(offsets, np.int64, 2 * len(names)).reshape(-1, 2).T
    order = np.lexsort((ends, starts))
    if (order[1:] < order[:-1]).any():
        names = [names[row] for row in order]
    kind, starts, ends = kind[order], starts[order], ends[order]
    tiled = starts[0] == 0 and (starts[1:] == ends[:-1]).all() and (starts <= ends).all() and ends[-1] == data_bytes
    if any(not 0 <= dim <= _U64_MAX for _, shape in number for dim in shape):
        return None
    sizes = np.array([_bytes_of(*each) for each in number], np.int64)[kind]
    if not tiled or ((sizes != ends - starts) & (sizes != _UNKNOWN)).any() or base + data_bytes > _I64_MAX:
        return None
    return Tensors(names, np.full(len(names), shard, np.int32), starts + base, ends + base, kind, tuple(number))


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """No cyclic garbage collection: it would scan a million young containers over and over, at twice the time."""
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


@gc_paused()  # parsed without a schema, every tensor is several containers for the collector to visit
def _parse_any(header: bytes, data_bytes: int, file: object, shard: int, base: int) -> tuple[dict[str, str], Tensors]:
    """`parse_header` for a header of any form.

    Raises:
        HeaderError: as there.
    """
    root = _root(header, file)
    metadata = _header_metadata(root.pop("__metadata__", None), file)
    sizes: dict[Kind, int] = {}
    rows = [_row(name, info, sizes, file) for name, info in root.items()]
    rows.sort(key=_by_offset)
    _check_tiled(rows, data_bytes, base, file)
    return metadata, Tensors.of(
        TensorEntry(name, dtype, shape, shard, base + start, base + end) for start, end, name, dtype, shape in rows
    )


_Row = tuple[int, int, str, str, tuple[int, ...]]  # start, end, name, dtype, shape


def _by_offset(row: _Row) -> tuple[int, int]:
    return row[0], row[1]


def _root(header: bytes, file: object) -> dict[str, Any]:
    try:
        root = strict_json(header.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise HeaderError(f"header is not UTF-8 at byte {8 + e.start}", file=file) from None
    except BadJson as e:
        raise HeaderError(f"header is no valid JSON for this format: {e}", file=file) from None
    if type(root) is tuple:  # three tensors named dtype, shape, data_offsets: legal names, though no legal tensors
        root = as_dict(root)
    if type(root) is not dict:
        raise HeaderError(f"header is {kind_of_json(root)}; expected an object", file=file)
    return root


def _row(name: str, info: Any, sizes: dict[Kind, int], file: object) -> _Row:
    """A tensor's fields, each of its type and range, its offsets in agreement with dtype and shape.

    `sizes` remembers the bytes that a dtype and a shape take.
    """
    dtype, shape, offsets = info if type(info) is tuple else _tensor_fields(name, info, file)
    if type(dtype) is not str:
        raise HeaderError(f"dtype is {kind_of_json(dtype)}; expected a string", file=file, tensor=name)
    if type(shape) is not list:
        raise HeaderError(f"shape is {kind_of_json(shape)}; expected an array", file=file, tensor=name)
    for dim in shape:
        _check_number("shape", dim, file, name)
    if type(offsets) is not list or len(offsets) != 2:
        raise HeaderError("data_offsets are no array of two numbers", file=file, tensor=name)
    for offset in offsets:
        _check_number("data_offsets", offset, file, name)
    start, end = offsets
    if start > end:
        raise HeaderError(f"data_offsets [{start}, {end}] run backwards", file=file, tensor=name)
    kind = dtype, tuple(shape)
    size = sizes.get(kind)
    if size is None:
        size = sizes[kind] = _bytes_of(*kind, file, name)
    if size not in (_UNKNOWN, end - start):
        raise HeaderError(
            f"data_offsets [{start}, {end}] hold {end - start} bytes; {dtype} {shape[:20]} takes {size}",
            file=file,
            tensor=name,
        )
    return start, end, name, *kind


def _check_tiled(rows: list[_Row], data_bytes: int, base: int, file: object) -> None:
    """The data of `rows`, ordered by offset, lies end to end in all of the file."""
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
    if base + data_bytes > _I64_MAX:
        raise HeaderError(f"{data_bytes} bytes of data are more than a file can have", file=file)


def _bytes_of(dtype: str, shape: tuple[int, ...], file: object = None, name: str = "") -> int:
    """Bytes of data that a dtype and a shape take; _UNKNOWN for a dtype that nobody here knows.

    Counted in Python's numbers, which do not overflow. The product is refused where it overflows on the way (a later 0
    does not save it, as in Rust).

    Raises:
        HeaderError: more than 64 bits can count, no whole number of bytes, or no dtype.
    """
    if not dtype.strip():
        raise HeaderError(
            "dtype is empty, which no reader of safetensors takes: the writer had an entry for this tensor, and no "
            "tensor; where it is tied, leave the entry out",
            file=file,
            tensor=name,
        )
    elements = 1
    for dim in shape:
        elements *= dim
        if elements > _U64_MAX:
            raise HeaderError("the number of elements overflows 64 bits", file=file, tensor=name)
    bits = DTYPE_BITS.get(dtype)
    if bits is None:
        return _UNKNOWN
    total = elements * bits
    if total > _U64_MAX:
        raise HeaderError(f"shape {list(shape)[:20]} of {dtype} overflows 64 bits", file=file, tensor=name)
    if total % 8:
        raise HeaderError(f"{total} bits of {dtype} are no whole number of bytes", file=file, tensor=name)
    return total // 8


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


def _check_number(field: str, value: Any, file: object, name: str) -> None:
    if type(value) is not int or not 0 <= value <= _U64_MAX:
        found = shown(value) if type(value) is int and abs(value) < 2**200 else kind_of_json(value)
        raise HeaderError(f"{field} holds {found}; expected whole numbers from 0 to 2^64 - 1", file=file, tensor=name)
