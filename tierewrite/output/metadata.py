"""The metadata of index and headers: what depends on what is stored says what the output stores.

- `total_size` of the index is the bytes of the tensors, `total_parameters` the number of the model's parameters.
- safetensors' `save_model` notes under the name of a tensor that it left out which stored tensor it is.
- torchao describes every parameter under its name, and lists them in `tensor_names`.

Everything else is carried over as it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tierewrite import formats
from tierewrite.errors import shown
from tierewrite.formats.descriptions import TENSOR_NAMES, all_names
from tierewrite.planning.plan import Action, RewritePlan
from tierewrite.source.table import Checkpoint

_ONE_EACH = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I8", "F4"})
"""Dtypes whose elements are one parameter each; in others several may be packed, of two bits at least."""


def header_metadata(checkpoint: Checkpoint, plan: RewritePlan) -> tuple[dict[str, str], list[str]]:
    """The `__metadata__` of every shard of the output: the union of the source's, and warnings.

    Where two shards of the source disagree the first one wins.
    """
    union: dict[str, str] = {}
    warnings = []
    for shard in checkpoint.shards:
        for key, value in shard.metadata.items():
            if union.setdefault(key, value) != value and key != TENSOR_NAMES:
                warnings.append(
                    f"metadata '{shown(key)}' is {shown(union[key])!r} in an earlier shard and {shown(value)!r} in "
                    f"'{shown(shard.name)}'; the first is kept"
                )
    names = all_names(shard.metadata for shard in checkpoint.shards)
    if names and names != _names_in(union[TENSOR_NAMES]):  # every shard lists its own
        union[TENSOR_NAMES] = json.dumps(names)
    return (_of_the_output(union, plan) if len(union) > 1 else union), warnings


def _of_the_output(metadata: Mapping[str, str], plan: RewritePlan) -> dict[str, str]:
    """`metadata` with its statements about tensors as they are true of the output."""
    moved = _Moved(plan)
    made: dict[str, str] = {}
    for key, value in metadata.items():
        stored = moved.target(value)
        if stored is not None:  # a note of save_model
            made[value if stored == key else key] = stored
        elif key == TENSOR_NAMES:
            made[key] = _listed(value, moved)
        else:
            name = moved.parameter(key)
            if name == key or name not in metadata:
                made[name] = value
    return made


def with_descriptions(metadata: Mapping[str, str], copies: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """`metadata` of an output that has tensors under other names as well: what describes a parameter is there for each.

    Args:
        copies: module -> the modules that hold the same tensors.
    """

    def others(parameter: str) -> list[str]:
        module, _, leaf = parameter.rpartition(".")
        return [f"{other}.{leaf}" for other in copies.get(module, ())]

    made = dict(metadata)
    for key in metadata:
        if key == TENSOR_NAMES:
            made[key] = _listed_with(metadata[key], others)
        else:
            made.update((name, metadata[key]) for name in others(key) if name not in made)
    return made


def _listed_with(text: str, others: Callable[[str], list[str]]) -> str:
    names = _names_in(text)
    if names is None:
        return text
    made = list(dict.fromkeys([*names, *(other for name in names for other in others(name))]))
    return text if made == names else json.dumps(made)


class _Moved:
    """Under which names the output has what the source has under another."""

    def __init__(self, plan: RewritePlan) -> None:
        self._targets = plan.targets()
        self._row = plan.source.row
        self._parameters = moved_parameters(plan)

    def target(self, name: str) -> str | None:
        """The key in the output of the tensor `name` of the source; None if it has none."""
        return self._targets[self._row[name]] if name in self._row else None

    def parameter(self, name: str) -> str:
        """What the parameter `name` is called in the output."""
        return self.target(name) or self._parameters.get(name, name)


def moved_parameters(plan: RewritePlan) -> dict[str, str]:
    """The parameters that the output stores under another name, packed ones included -> that name."""
    names, targets = plan.source.names, plan.targets()
    gone = [*np.flatnonzero(plan.action == Action.DROP.code).tolist(), *plan.new_names]
    return {
        formats.main_parameter(names[row]) or names[row]: formats.main_parameter(targets[row]) or targets[row]
        for row in gone
    }


def _listed(text: str, moved: _Moved) -> str:
    """A JSON list of parameters with the names of the output, each once."""
    names = _names_in(text)
    if names is None:
        return text
    made = list(dict.fromkeys(map(moved.parameter, names)))
    return text if made == names else json.dumps(made)


def _names_in(text: str) -> list[str] | None:
    """The names in a JSON list; None if it is none."""
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def index_metadata(checkpoint: Checkpoint, plan: RewritePlan) -> dict[str, Any]:
    """The `metadata` of the output's index."""
    about = {**(checkpoint.index_metadata or {}), "total_size": plan.total_bytes}
    said = about.get("total_parameters")
    gone = _dropped_weights(plan)
    if type(said) is int and said > _most_parameters(plan) and not _packed(plan)[gone].any():
        about["total_parameters"] = said - int(_parameters(plan)[gone].sum())
    return about


def _most_parameters(plan: RewritePlan) -> int:
    """As many parameters as the output may hold: a higher number counts tied ones under each of their names."""
    rows = np.concatenate([shard.rows for shard in plan.shards])
    return int(np.where(_packed(plan), plan.source.nbytes * 4, _parameters(plan))[rows].sum())


def _dropped_weights(plan: RewritePlan) -> np.ndarray:
    """int64, rows of the parameters that are dropped; companions of weights are none."""
    weight = np.array([not formats.is_companion(leaf) for leaf in plan.source.leaves], bool)
    return np.flatnonzero((plan.action == Action.DROP.code) & weight[plan.source.leaf])


def _packed(plan: RewritePlan) -> np.ndarray:
    """bool [rows], whether an element may hold several parameters."""
    packed: np.ndarray = np.array([dtype not in _ONE_EACH for dtype, _ in plan.source.kinds], bool)[plan.source.kind]
    return packed


def _parameters(plan: RewritePlan) -> np.ndarray:
    """int64 [rows], the elements of each tensor."""
    counts: np.ndarray = np.array([math.prod(shape) for _, shape in plan.source.kinds], np.int64)[plan.source.kind]
    return counts
