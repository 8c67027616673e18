"""The bytes of the safetensors format: headers of shards, their metadata, and the index."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from tierewrite.errors import UsageError, shown
from tierewrite.planning.plan import OutShard
from tierewrite.source.header import MAX_HEADER_BYTES
from tierewrite.source.table import Checkpoint


class HeaderEntry(msgspec.Struct, gc=False):
    """What a header says of one tensor; offsets are bytes in the data section."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def shard_header(shard: OutShard, metadata: Mapping[str, str]) -> bytes:
    """The length field and JSON header of an output shard, padded to 8 bytes as safetensors' serializer pads.

    Raises:
        UsageError: the header would be longer than the format allows.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    kinds = map(shard.source.kinds.__getitem__, shard.source.kind[shard.rows].tolist())
    offsets = zip(shard.start.tolist(), shard.end.tolist(), strict=True)
    for name, (dtype, shape), place in zip(shard.names, kinds, offsets, strict=True):
        header[name] = HeaderEntry(dtype, shape, place)
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise UsageError(
            f"the header of '{shard.name}' would be {len(text):,} bytes, more than the {MAX_HEADER_BYTES:,} that the "
            "format allows; use a smaller --max-shard-size"
        )
    return struct.pack("<Q", len(text)) + text


def merged_metadata(checkpoint: Checkpoint) -> tuple[dict[str, str], list[str]]:
    """The union of the shards' `__metadata__`; where two disagree the first shard wins. Returns it with warnings."""
    union: dict[str, str] = {}
    warnings = []
    for shard in checkpoint.shards:
        for key, value in shard.metadata.items():
            if union.setdefault(key, value) != value:
                warnings.append(
                    f"metadata '{shown(key)}' is {shown(union[key])!r} in an earlier shard and {shown(value)!r} in "
                    f"'{shown(shard.name)}'; the first is kept"
                )
    return union, warnings


def index_bytes(shards: Sequence[OutShard], metadata: Mapping[str, Any] | None) -> bytes:
    """`model.safetensors.index.json`: canonical names, `total_size` in bytes of tensor data, other metadata kept."""
    about = {**(metadata or {}), "total_size": sum(shard.nbytes for shard in shards)}
    files = {name: shard.name for shard in shards for name in shard.names}
    text = json.dumps({"metadata": about, "weight_map": files}, sort_keys=True, ensure_ascii=False)
    # What json.dumps(indent=2) prints, ten times as fast: the C encoder does not indent.
    return msgspec.json.format(text, indent=2).encode() + b"\n"
