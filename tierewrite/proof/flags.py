"""`tie_word_embeddings` of DST's config.json: each flag that differs from SRC's has a reason in the bytes of SRC."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tierewrite.proof import Problem
from tierewrite.proof.judge import Group
from tierewrite.source.table import CONFIG_NAME, Checkpoint
from tierewrite.ties.tie import FLAG, ConfigPath
from tierewrite.ties.tie_map import TieMap


def check_flags(source: Checkpoint, target: Checkpoint, groups: Sequence[Group], ties: TieMap) -> Iterator[Problem]:
    """A flag may become true only where a name is gone, false only where a head is kept and no name is gone.

    Args:
        groups: the declared ties, judged by the bytes of SRC.
    """
    before, after = dict(_flags(source.config)), dict(_flags(target.config))
    for place in sorted(before.keys() - after.keys()):
        yield Problem("side-file", CONFIG_NAME, f"lacks {'.'.join((*place, FLAG))}, which SRC has")
    for place, value in after.items():
        if value is before.get(place):
            continue
        hanging = [group for group in groups if _hangs_on(group, place, ties)]
        gone = any(group.reason is None or _absent(group, source) for group in hanging)
        kept = any(group.reason is not None or group.kept for group in hanging)
        if (gone, kept) != (value, not value):
            said = f"{'.'.join((*place, FLAG))} is {value}; SRC gives no reason for that"
            yield Problem("side-file", CONFIG_NAME, said)


def _hangs_on(group: Group, place: ConfigPath, ties: TieMap) -> bool:
    """Whether the flag at `place` may speak of the tie: it switches it, or is one that switches none."""
    flags = ties.model.flags if ties.model is not None else {}
    names = {group.tie.id, *group.tie.aliases, *group.kept}
    own = {at for name in names for at in flags.get(name, ())}
    return not own or any(at[: len(place)] == place for at in own) or place not in _switching(flags)


def _switching(flags: Mapping[str, tuple[ConfigPath, ...]]) -> set[ConfigPath]:
    return {place for places in flags.values() for place in places}


def _absent(group: Group, source: Checkpoint) -> bool:
    """Whether SRC has nothing of one of the names."""
    modules = {name.rpartition(".")[0] for name in source.tensors}
    sides = zip(*group.tie.slots, strict=True)
    return any(all(name not in source.tensors and name.rpartition(".")[0] not in modules for name in s) for s in sides)


def _flags(value: Any, place: ConfigPath = ()) -> Iterator[tuple[ConfigPath, bool]]:
    if isinstance(value, dict):
        if isinstance(value.get(FLAG), bool):
            yield place, value[FLAG]
        for key, below in value.items():
            yield from _flags(below, (*place, key))
