"""Activation scales of unpacked experts: which are there, and which are missing."""

from __future__ import annotations

from collections.abc import Iterable

from tierewrite import formats
from tierewrite.formats import Companion, Role
from tierewrite.formats.experts import ExpertKey, expert_key
from tierewrite.planning.plan import ExpertScales


def expert_scales(
    survivors: Iterable[tuple[str, str]], families: tuple[str, ...], unfillable: frozenset[str]
) -> tuple[ExpertScales, ...]:
    """The activation scales of the output's unpacked experts, projection by projection.

    Args:
        survivors: key in the output and in the source, in the order of the source.
        families: the formats that the source shows.
        unfillable: keys of scales that are missing and stay so.
    """
    members: dict[tuple[str, str, str], dict[str, str]] = {}  # experts, projection, suffix -> expert -> source key
    weights: dict[tuple[str, str], dict[str, None]] = {}  # experts, projection -> experts that have it
    scales: dict[str, Companion] = {}  # suffix -> companion
    for target, name in survivors:
        found = expert_key(target)
        if found is None:
            continue
        companion = formats.classify("weight", found.suffix, families) or formats.classify("weight", found.suffix)
        if companion is None:
            continue
        if companion.main:
            weights.setdefault((found.experts, found.projection), {})[found.number] = None
        elif companion.role is Role.ACTIVATION and companion.merge is not None:
            scales[found.suffix] = companion
            members.setdefault((found.experts, found.projection, found.suffix), {})[found.number] = name
    sets = []
    for (experts, projection, suffix), here in members.items():
        missing = [
            ExpertKey(experts, number, projection, suffix).key
            for number in weights.get((experts, projection), {})
            if number not in here
        ]
        sets.append(
            ExpertScales(
                ExpertKey(experts, "*", projection, suffix).key,
                scales[suffix],
                {ExpertKey(experts, number, projection, suffix).key: name for number, name in here.items()},
                tuple(key for key in missing if key not in unfillable),
            )
        )
    return tuple(sets)
