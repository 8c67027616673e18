"""The bytes of the safetensors format: headers of shards, their metadata, and the index."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from tierewrite.errors import UsageError
from tierewrite.planning.plan import OutShard
from tierewrite.source.header import MAX_HEADER_BYTES
from tierewrite.stores.sharing import BLOCK_BYTES

_LENGTH = struct.Struct("<Q")


class HeaderEntry(msgspec.Struct, gc=False):
    """What a header says of one tensor; offsets are bytes in the data section."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def shard_header(shard: OutShard, metadata: Mapping[str, str]) -> bytes:
    """The length field and JSON header of an output shard, padded with spaces.

    It is a multiple of 8 bytes, as from safetensors' serializer, or ends where the plan wants the data to start, unless
    that alone makes it longer than the format allows.

    Raises:
        UsageError: the header would be longer than the format allows.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    kinds = map(shard.source.kinds.__getitem__, shard.source.kind[shard.rows].tolist())
    offsets = zip(shard.start.tolist(), shard.end.tolist(), strict=True)
    for name, (dtype, shape), place in zip(shard.names, kinds, offsets, strict=True):
        header[name] = HeaderEntry(dtype, shape, place)
    text = msgspec.json.encode(header)
    size = _LENGTH.size + len(text)
    padding = -size % 8 if shard.data_start is None else (shard.data_start - size) % BLOCK_BYTES
    text += b" " * (padding if len(text) + padding <= MAX_HEADER_BYTES else -size % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise UsageError(
            f"the header of '{shard.name}' would be {len(text):,} bytes, more than the {MAX_HEADER_BYTES:,} that the "
            "format allows; use a smaller --max-shard-size"
        )
    return _LENGTH.pack(len(text)) + text


def index_bytes(shards: Sequence[OutShard], metadata: Mapping[str, Any]) -> bytes:
    """`model.safetensors.index.json`: which shard holds which name, and its `metadata`."""
    files = {name: shard.name for shard in shards for name in shard.names}
    text = json.dumps({"metadata": dict(metadata), "weight_map": files}, sort_keys=True, ensure_ascii=False)
    # What json.dumps(indent=2) prints, ten times as fast: the C encoder does not indent.
    return msgspec.json.format(text, indent=2).encode() + b"\n"
