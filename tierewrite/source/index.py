"""The index of a checkpoint: which file holds which tensor, held against what the files hold."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from tierewrite.errors import ShardIndexError, shown
from tierewrite.source.regular_files import read_small
from tierewrite.source.strict_json import MAX_DEPTH, BadJson, as_dict, kind_of_json, strict_json
from tierewrite.source.table import INDEX_NAME, Shard, Tensors
from tierewrite.stores.base import PathLike

MAX_INDEX_BYTES = 256 * 1024**2  # three times the index of 500,000 tensors


def read_index(path: PathLike) -> tuple[dict[str, Any], dict[str, str]]:
    """Read and validate an index file by itself.

    Returns:
        Its `metadata` ({} if absent) and its `weight_map` {tensor name: file name}.

    Raises:
        ShardIndexError: not the JSON expected, a key twice, or a file name that is more than a name.
        SourceError: missing or no regular file. SystemFailure: unreadable.
    """
    path = Path(path)
    raw = read_small(path, MAX_INDEX_BYTES, ShardIndexError)
    try:
        root = strict_json(raw.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise ShardIndexError(f"is not UTF-8 at byte {e.start}", file=path) from None
    except BadJson as e:
        raise ShardIndexError(f"is no valid JSON: {e}", file=path) from None
    if type(root) is not dict:
        raise ShardIndexError(f"is {kind_of_json(root)}; expected an object with weight_map", file=path)
    metadata = root.get("metadata")
    metadata = {} if metadata is None else as_dict(metadata) if type(metadata) is tuple else metadata
    if type(metadata) is not dict:
        raise ShardIndexError(f"metadata is {kind_of_json(metadata)}; expected an object", file=path)
    metadata = _plain(metadata, path)
    weight_map = root.get("weight_map")
    if type(weight_map) is tuple:
        weight_map = as_dict(weight_map)
    if type(weight_map) is not dict:
        what = "lacks weight_map" if "weight_map" not in root else f"weight_map is {kind_of_json(weight_map)}"
        raise ShardIndexError(f"{what}; expected an object of tensor names and file names", file=path)
    if not weight_map:
        raise ShardIndexError("weight_map is empty; it must list the tensors", file=path)
    checked: set[str] = set()
    for key, name in weight_map.items():
        if type(name) is not str:
            raise ShardIndexError(f"its file is {kind_of_json(name)}; expected a file name", file=path, tensor=key)
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
        value = as_dict(value)
    if type(value) is dict:
        return {key: _plain(child, path, depth + 1) for key, child in value.items()}
    if type(value) is list:
        return [_plain(child, path, depth + 1) for child in value]
    return value


def check_against_index(
    weight_map: dict[str, str], tensors: Tensors, shards: Sequence[Shard], index_path: Path
) -> None:
    """Every key of the index must be in the shard that the index says.

    Raises:
        ShardIndexError: one is not.
    """
    number = {shard.name: shard_number for shard_number, shard in enumerate(shards)}
    count = len(weight_map)
    rows = np.fromiter(map(tensors.row.get, weight_map, repeat(-1)), np.int64, count)
    said = np.fromiter(map(number.__getitem__, weight_map.values()), np.int32, count)
    held = np.append(tensors.shard, np.int32(-1))[rows]  # row -1, of a key that no shard holds, is the one appended
    wrong = np.flatnonzero(held != said)
    if len(wrong):
        key, name = list(weight_map.items())[wrong[0]]
        shard = int(held[wrong[0]])
        where = "no shard holds it" if shard < 0 else f"it is in {shown(shards[shard].name)}"
        raise ShardIndexError(f"listed as in {shown(name)}, but {where}", file=index_path, tensor=key)


def check_total(metadata: dict[str, Any], tensors: Tensors, warnings: list[str]) -> None:
    """Warns where the index's `total_size` is not the bytes of its tensors."""
    total = tensors.total_bytes
    said = metadata.get("total_size", total)
    if said != total:
        plain = type(said) is float or (type(said) is int and abs(said) < 2**200)
        text = str(said) if plain else kind_of_json(said)
        warnings.append(f"{INDEX_NAME} says total_size {text}; its tensors have {total} bytes")
