"""Ties of tensors that are packed in a format which nobody knows: they are refused, as under a class's tie.

A ties file may name such a tensor itself (`b.q_proj.qdata`). Tied tensor by tensor, one could go and what describes it
stay. So where a module holds a packed tensor and one that no format explains, no tie of that module is carried out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from tierewrite import formats
from tierewrite.source.table import TensorEntry
from tierewrite.ties.tie_group import TieGroup

_UNPACKED = frozenset({"F64", "F32", "F16", "BF16", "C64", "I64", "U64", "BOOL"})
"""Dtypes of parameters and buffers as models have them; all others only come from quantization."""


def with_unknown_formats_refused(
    groups: Sequence[TieGroup], entries: Mapping[str, TensorEntry], owned: Collection[str]
) -> tuple[TieGroup, ...]:
    """`groups`, those with a `problem` that tie tensors of a module in a format which nobody knows.

    Args:
        groups: the ties on disk.
        entries: key -> header of all tensors.
        owned: keys that the model class says are parameters or buffers of their own.
    """
    suspects = {
        name.rpartition(".")[0]
        for group in groups
        if not _is_usual(group.slots[0][0])
        for slot in group.slots
        for name in slot
        if not _is_usual(name)
    }
    if not suspects:
        return tuple(groups)
    below: dict[str, list[str]] = {}
    for key in entries:
        parent = key.rpartition(".")[0]
        if parent in suspects:
            below.setdefault(parent, []).append(key)
    strange = {
        module: unexplained
        for module, keys in below.items()
        if any(entries[key].dtype not in _UNPACKED for key in keys)
        and (unexplained := _unexplained(keys, entries, owned))
    }
    if not strange:
        return tuple(groups)
    return tuple(_refused(group, strange) for group in groups)


def _is_usual(name: str) -> bool:
    """Whether its suffix says what a parameter is: the weight of a module, or a bias."""
    return name.endswith("weight") or formats.is_own_parameter(name)


def _unexplained(keys: Iterable[str], entries: Mapping[str, TensorEntry], owned: Collection[str]) -> str | None:
    """The first of a module's `keys` that neither the model class nor a format knows."""
    return next((key for key in keys if key not in owned and not _is_explained(key, entries)), None)


def _is_explained(key: str, entries: Mapping[str, TensorEntry]) -> bool:
    if formats.is_own_parameter(key) or formats.main_parameter(key) is not None:
        return True
    part = formats.part_of_weight(key)
    if part is not None and any(main in entries for main in formats.main_names(part[0])):
        return True
    if any(main in entries for owner in formats.fused_parameters(key) for main in formats.main_names(owner)):
        return True
    return any(companion in entries for companion in formats.fused_companions(key))


def _refused(group: TieGroup, strange: Mapping[str, str]) -> TieGroup:
    for slot in group.slots:
        for name in slot:
            found = strange.get(name.rpartition(".")[0])
            if found is not None and not formats.is_own_parameter(name) and group.problem is None:
                return replace(group, problem=f"no known format has the tensor '{found}' beside the tied '{name}'")
    return group
