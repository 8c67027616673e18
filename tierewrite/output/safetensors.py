"""TODO."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

from tierewrite.errors import UsageError, shown
from tierewrite.json_text import quoted
from tierewrite.planning.plan import OutShard
from tierewrite.source.header import MAX_HEADER_BYTES
from tierewrite.source.table import Checkpoint, TensorEntry, gc_paused


@gc_paused()
def shard_header(shard: OutShard, entries: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> bytes:
    """The length field and JSON header of an output shard, padded to 8 bytes as safetensors' serializer pads.

    Raises:
        UsageError: the header would be longer than the format allows.
    """
    encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
    rows = [f'"__metadata__":{encode(dict(metadata))}'] if metadata else []
    kinds: dict[tuple[str, tuple[int, ...]], str] = {}  # the text of dtype and shape: there are few
    for name, source, start, end, _ in shard.tensors:
        entry = entries[source]
        kind = kinds.get(entry[1:3])
        if kind is None:
            kind = f'"dtype":{encode(entry.dtype)},"shape":{encode(entry.shape)}'
            kinds[entry.dtype, entry.shape] = kind
        rows.append(f'{quoted(name)}:{{{kind},"data_offsets":[{start},{end}]}}')
    text = f"{{{','.join(rows)}}}".encode()
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


@gc_paused()
def index_bytes(shards: Sequence[OutShard], metadata: Mapping[str, Any] | None) -> bytes:
    """`model.safetensors.index.json`: canonical names, `total_size` in bytes of tensor data, other metadata kept."""
    about = {**(metadata or {}), "total_size": sum(shard.nbytes for shard in shards)}
    files = [(tensor.name, file) for shard in shards for file in [quoted(shard.name)] for tensor in shard.tensors]
    files.sort(key=itemgetter(0))
    head = json.dumps({"metadata": about}, indent=2, sort_keys=True, ensure_ascii=False).removesuffix("\n}")
    # What json.dumps(indent=2) prints, ten times as fast: the C encoder does not indent.
    rows = ",\n    ".join([f"{quoted(name)}: {file}" for name, file in files])
    body = f"{{\n    {rows}\n  }}" if rows else "{}"
    return f'{head},\n  "weight_map": {body}\n}}\n'.encode()
