"""Do the bytes agree, and what do the scales become: the plan's checks, answered.

A tie is confirmed by digests alone: never by values (equal bytes may hold a NaN, unequal ones may compare equal) and
never by addresses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tierewrite.errors import Refused, shown
from tierewrite.formats.ignore_lists import sorted_modules
from tierewrite.planning.plan import GroupPlan, RewritePlan
from tierewrite.source.table import Checkpoint
from tierewrite.tables import of_which, some
from tierewrite.ties.tie import FLAG

_LISTED = 12


def refuted(checkpoint: Checkpoint, plan: RewritePlan, digests: Mapping[str, bytes]) -> dict[str, str]:
    """Groups whose bytes disagree: id -> reason, naming the first pair that differs, how many do, and which agree.

    Args:
        digests: BLAKE3 of every key of every check of the planned groups.
    """
    result: dict[str, str] = {}
    for group in plan.planned():
        pairs = [(row[0], key) for row in group.checks for key in row[1:]]
        reason = _why_different(checkpoint, pairs, digests)
        if reason is not None:
            result[group.id] = reason + _agreement(group, digests)
    return result


def _agreement(group: GroupPlan, digests: Mapping[str, bytes]) -> str:
    """The end of a reason: which sides of a refuted group agree though not with the first; "" if none do.

    Where all of them do, the first is the odd one: without a word it looks as if every alias had gone its own way.
    """
    names = group.side_names
    contents: dict[str, list[tuple[int, bytes]]] = {}
    for number, (keys, sides) in enumerate(zip(group.checks, group.checks.sides.tolist(), strict=True)):
        for key, side in zip(keys, sides, strict=False):
            contents.setdefault(names[side], []).append((number, digests[key]))
    alike: dict[tuple[tuple[int, bytes], ...], list[str]] = {}
    for name, content in contents.items():
        alike.setdefault(tuple(content), []).append(name)
    first, *others = alike.values()
    told = [of_one for of_one in others if of_one[1:]]
    if not told:
        return ""
    if not (first[1:] or others[1:]):
        return f"; only '{shown(first[0])}' differs: the others agree with each other"
    return "".join(f"; {some(of_one)} agree with each other" for of_one in told)


def differing_sides(checkpoint: Checkpoint, group: GroupPlan, digests: Mapping[str, bytes]) -> dict[str, str]:
    """Which sides of a refuted group differ from the canonical one: alias -> reason.

    Args:
        digests: as for `refuted`.
    """
    names = group.side_names
    pairs: dict[str, list[tuple[str, str]]] = {}
    for keys, sides in zip(group.checks, group.checks.sides.tolist(), strict=True):
        for key, side in zip(keys[1:], sides[1:], strict=False):
            pairs.setdefault(names[side], []).append((keys[0], key))
    reasons = {alias: _why_different(checkpoint, of_side, digests) for alias, of_side in pairs.items()}
    return {alias: reason for alias, reason in reasons.items() if reason is not None}


def _why_different(
    checkpoint: Checkpoint, pairs: Sequence[tuple[str, str]], digests: Mapping[str, bytes]
) -> str | None:
    """The first of `pairs` of keys whose bytes differ, and how many do; None if none does."""
    differing = [(first, other) for first, other in pairs if digests[other] != digests[first]]
    if not differing:
        return None
    first, other = differing[0]
    entry = checkpoint.tensors[first]
    more = f" (and {len(differing) - 1} more of {len(pairs)} pairs)" if differing[1:] else ""
    return (
        f"'{shown(first)}' and '{shown(other)}' ({entry.dtype} {list(entry.shape)}) differ: "
        f"BLAKE3 {digests[first].hex()[:12]} and {digests[other].hex()[:12]}{more}"
    )


TWO_TENSORS = "The model declares these tensors to be one, but the files do not hold them as one."
KEEP = "Keep both with --on-mismatch keep."
KEEP_AND_SAY = "Keep both with --on-mismatch keep; with --fix-config as well, tie_word_embeddings says what is stored."
"""Where no other tie has to hold: else the flag cannot say that this one does not."""
NO_DATA = (
    "'{}' has no elements: whoever wrote it had the name and not the data (a rank of a partitioned model, a tensor on "
    "the meta device). Export again, or leave that tensor out: its tie stands for it."
)
ONE_QUANTIZED = "'{}' is quantized and '{}' is not, so that they are two tensors now."


def refusal(
    checkpoint: Checkpoint,
    plan: RewritePlan,
    reasons: Mapping[str, str],
    digests: Mapping[str, bytes],
    advice: str | None = None,
) -> Refused:
    """The error that lists every group that is not confirmed.

    Args:
        reasons: group id -> why its bytes refute it.
        digests: as for `refuted`.
        advice: what to do; None: what the options of a rewrite can do.
    """
    refused = [group for group in plan.groups if group.id in reasons or group.reason is not None]
    listed: list[dict[str, Any]] = []
    for group in refused:
        differing = differing_sides(checkpoint, group, digests) if group.id in reasons else group.differing_aliases
        listed.append(
            {
                "id": group.id,
                "canonical": group.canonical,
                "aliases": list(group.aliases),
                "reason": reasons.get(group.id) or group.reason,
                "differing_aliases": dict(differing),
            }
        )
    lines = [_line(entry, group) for entry, group in zip(listed[:_LISTED], refused, strict=False)]
    if len(listed) > _LISTED:
        lines.append(f"  ... and {len(listed) - _LISTED} more (all of them with --json)")
    count = f"{len(listed)} declared tie{'s' if len(listed) > 1 else ''}"
    empty = [name for group in refused if (name := _without_data(checkpoint, group)) is not None]
    parts = [NO_DATA.format(shown(name)) for name in empty[:1]]
    if len(empty) < len(refused):
        if advice is None:
            advice = KEEP_AND_SAY if len(refused) == len(plan.groups) else KEEP
        parts += [_what_it_means(checkpoint, plan, refused), *_forced(checkpoint, plan), advice]
    said = " ".join(parts)
    return Refused(
        f"{count} not confirmed, nothing was written:\n" + "\n".join(lines) + f"\n{said}",
        details={"groups": listed},
    )


def _line(entry: Mapping[str, Any], group: GroupPlan) -> str:
    """One refused group, as a line for people: of several aliases those that differ are named.

    What is not stored is not named; nor does the side agree that the others are held against.
    """
    differing, aliases = entry["differing_aliases"], entry["aliases"]
    first = {group.side_names[side] for side in group.checks.sides.ravel()[:1].tolist()}
    others = [alias for alias in aliases if alias not in differing and alias not in group.absent]
    agreeing = [alias for alias in others if alias not in first] if differing else []
    told = list(differing) if agreeing else [alias for alias in aliases if alias not in group.absent]
    lead = f"{shown(', '.join(told))} -> {shown(entry['canonical'])}"
    said = f"  {of_which(lead, (entry['canonical'], *told), entry['reason'])}"
    return f"{said}; {shown(', '.join(agreeing))} agree{'' if agreeing[1:] else 's'}" if agreeing else said


def _without_data(checkpoint: Checkpoint, group: GroupPlan) -> str | None:
    """The tied parameter's name that holds nothing, where another of its names holds something."""
    sides = [name for name in (group.canonical, *group.aliases) if name in checkpoint.tensors]
    empty = [name for name in sides if not checkpoint.tensors[name].nbytes]
    return empty[0] if empty and len(empty) < len(sides) else None


def _what_it_means(checkpoint: Checkpoint, plan: RewritePlan, refused: Sequence[GroupPlan]) -> str:
    """Why the sides may differ: one of them is quantized by itself, or nothing that is plain to see."""
    numbers = [number for number, group in enumerate(plan.groups) if group in refused]
    for number in numbers:
        rows = np.flatnonzero(plan.group == number).tolist()
        shapes = [checkpoint.tensors.kinds[checkpoint.tensors.kind[row]][1] for row in rows]
        quantized, plain = sorted_modules(zip([plan.source.names[row] for row in rows], shapes, strict=True))
        # What lies below a quantized module is a part of it (`lm_head.centroids`), and no side.
        whole = [module for module in plain if not module.startswith(tuple(f"{one}." for one in quantized))]
        if quantized and whole:
            return ONE_QUANTIZED.format(shown(min(quantized)), shown(min(whole)))
    return TWO_TENSORS


def _forced(checkpoint: Checkpoint, plan: RewritePlan) -> Iterator[str]:
    """A sentence where config.json unties what the class ties all the same."""
    if plan.ties_source == "class" and checkpoint.config.get(FLAG) is False:
        yield f"config.json says that tie_word_embeddings is false; {shown(plan.ties_detail)} ties them all the same."
