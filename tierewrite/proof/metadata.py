"""What index and headers of DST have to say beside tensors and offsets: a reading of its own of what output/ writes.

Metadata are SRC's, but for statements about tensors whose names are gone or new in DST.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from tierewrite import formats
from tierewrite.proof.expected import Expected
from tierewrite.proof.judge import Stand
from tierewrite.source.table import Checkpoint, TensorEntry

_PLAIN = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I8", "F4")


def expected_header_metadata(source: Checkpoint, stands: Mapping[str, Stand]) -> dict[str, str]:
    """The `__metadata__` of each of DST's shards.

    Args:
        stands: by name in DST, what stands for which tensors of SRC.
    """
    union: dict[str, str] = {}
    for shard in source.shards:
        union = {**shard.metadata, **union}
    listed = [name for shard in source.shards for name in _list(shard.metadata.get("tensor_names", "")) or ()]
    if listed and list(dict.fromkeys(listed)) != _list(union["tensor_names"]):
        union["tensor_names"] = json.dumps(list(dict.fromkeys(listed)))
    place = {key: name for name, stand in stands.items() for key in stand.sources}
    # A packed parameter has another name: torchao stores `q_proj.weight` as `q_proj._weight_qdata` and others.
    packed = {_parameter(key): _parameter(name) for key, name in place.items() if key != name}

    def called(parameter: str) -> str:
        return place.get(parameter) or packed.get(parameter, parameter)

    found: dict[str, str] = {}
    for key, value in union.items():
        if value in place:  # the note that the tensor `key` was left out, being `value`
            found[value if place[value] == key else key] = place[value]
        elif key == "tensor_names":
            found[key] = _renamed_list(value, called)
        elif called(key) == key or called(key) not in union:
            found[called(key)] = value
    return found if len(union) > 1 else union


def _parameter(key: str) -> str:
    """The parameter that the packed tensor `key` is; `key` itself for all others."""
    return formats.main_parameter(key) or key


def _list(text: str) -> list[str] | None:
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return None if type(names) is not list or any(type(name) is not str for name in names) else names


def _renamed_list(text: str, called: Any) -> str:
    names = _list(text)
    if names is None:
        return text
    new: list[str] = []
    for name in map(called, names):
        if name not in new:
            new.append(name)
    return text if new == names else json.dumps(new)


def expected_index_metadata(source: Checkpoint, expected: Expected) -> dict[str, Any]:
    """The `metadata` of DST's index, but for `total_size`."""
    found = {key: value for key, value in (source.index_metadata or {}).items() if key != "total_size"}
    said = found.get("total_parameters")
    gone = [source.tensors[key] for stand in expected.stands.values() for key in stand.sources[1:]]
    gone = [entry for entry in gone if not formats.is_companion(entry.name.rpartition(".")[2])]
    most = sum(_at_most(want.like) for want in expected.wants.values())
    if type(said) is int and said > most and all(entry.dtype in _PLAIN for entry in gone):
        found["total_parameters"] = said - sum(math.prod(entry.shape) for entry in gone)
    return found


def _at_most(entry: TensorEntry) -> int:
    """How many parameters a tensor may hold: of a packed one, four a byte."""
    return math.prod(entry.shape) if entry.dtype in _PLAIN else 4 * entry.nbytes
