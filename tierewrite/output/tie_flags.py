"""`tie_word_embeddings` in config.json, set to what the output holds (`fix_config`).

It is true where a name is gone that only a tie brings back, false where a differing or quantized head was kept beside
its embedding: in the (sub)config that the model class goes by, and in those that describe the same embedding for other
loaders. Where one flag stands for both it stays as it is: false would lose the names that are gone, and a loader that
compares takes the kept head as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tierewrite.errors import shown
from tierewrite.planning.plan import GroupPlan, RewritePlan
from tierewrite.ties.tie import FLAG, ConfigPath
from tierewrite.ties.tie_map import TieMap


def fixed_flags(
    config: Mapping[str, Any], plan: RewritePlan, ties: TieMap
) -> tuple[dict[ConfigPath, bool], tuple[str, ...]]:
    """The flags that have to change: place of the (sub)config -> what it is to say; and warnings.

    Args:
        config: config.json.
    """
    places = dict(_places(config))
    by_place: dict[ConfigPath, list[GroupPlan]] = {}
    for group in plan.groups:
        for place in _gates(group, ties, config, places):
            by_place.setdefault(place, []).append(group)
    gates = set(by_place)
    for place in places.keys() - gates:  # other loaders go by it
        same = [group for n, group in enumerate(plan.groups) if _describes(places[place], plan, n)]
        if same:
            by_place[place] = same
    changes: dict[ConfigPath, bool] = {}
    warnings: list[str] = []
    for place, groups in sorted(by_place.items()):
        # A class that ties although its flag is false does not go by it: the flag means something else there.
        now = places.get(place, {}).get(FLAG)
        if now is False and place in gates and ties.source == "class":
            continue
        lost = any(group.status != "unconfirmed" or group.absent for group in groups)
        kept = [name for group in groups for name in _kept(group)]
        if lost and kept:
            warnings.append(_both(place, kept))
        elif (lost or kept) and now is not lost and (now is not None or kept):
            changes[place] = lost
    return changes, tuple(warnings)


def _gates(
    group: GroupPlan, ties: TieMap, config: Mapping[str, Any], places: Mapping[ConfigPath, Mapping[str, Any]]
) -> set[ConfigPath]:
    """The (sub)configs whose flag switches a tie of `group`; where no class was asked, the config itself.

    None where the class ties in its code, whatever a flag says.
    """
    flags = ties.model.flags if ties.model is not None else {}
    found = {place for alias in group.aliases for place in flags.get(alias, ())}
    if not found and ties.source == "class":
        return set()
    if not found:
        return {place for place in places if place == ()}
    return {_nearest(place, config, places) for place in found}


def _nearest(
    place: ConfigPath, config: Mapping[str, Any], places: Mapping[ConfigPath, Mapping[str, Any]]
) -> ConfigPath:
    """The (sub)config at `place` or the nearest above it that has a flag; if none has, the nearest that is there."""
    there = [place[:length] for length in range(len(place), -1, -1) if _is_there(config, place[:length])]
    return next((at for at in there if at in places), there[0])


def _is_there(config: Mapping[str, Any], place: ConfigPath) -> bool:
    at: Any = config
    for key in place:
        at = at.get(key) if isinstance(at, Mapping) else None
    return isinstance(at, Mapping)


def _places(value: Any, place: ConfigPath = ()) -> Iterator[tuple[ConfigPath, Mapping[str, Any]]]:
    """Each (sub)config with a flag, and where it is."""
    if isinstance(value, dict):
        if isinstance(value.get(FLAG), bool):
            yield place, value
        for key, below in value.items():
            yield from _places(below, (*place, key))


def _describes(subconfig: Mapping[str, Any], plan: RewritePlan, number: int) -> bool:
    """Whether a tensor of the group of this number has as many rows as the (sub)config has words."""
    words = subconfig.get("vocab_size")
    kinds = np.unique(plan.source.kind[plan.group == number]).tolist()
    shapes = [plan.source.kinds[kind][1] for kind in kinds]
    return type(words) is int and any(len(shape) > 1 and shape[0] == words for shape in shapes)


def _kept(group: GroupPlan) -> list[str]:
    """The names that are stored beside what they are tied to, since they differ."""
    if group.status == "unconfirmed":
        return [alias for alias in group.aliases if alias not in group.absent]
    return list(group.differing_aliases)


def _both(place: ConfigPath, kept: list[str]) -> str:
    where = ".".join((*place, FLAG))
    return (
        f"config.json: {shown(where)} is left as it is. Names that are not stored need the tie, but "
        f"'{shown(kept[0])}' is stored and differs: a loader that does not compare the two may replace it"
    )


def with_flags(config: dict[str, Any], changes: Mapping[ConfigPath, bool]) -> dict[str, Any]:
    """`config` with these flags, everything else and its order as it was."""
    made = dict(config)
    for place, value in changes.items():
        at = made
        for key in place:
            at[key] = dict(at[key])
            at = at[key]
        at[FLAG] = value
    return made
