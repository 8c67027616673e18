"""Do the bytes agree, and what do the scales become: the plan's checks, answered.

A tie is confirmed by digests alone: never by values (equal bytes may hold a NaN, unequal ones may compare equal) and
never by addresses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tierewrite.errors import Refused, shown
from tierewrite.planning.plan import GroupPlan, RewritePlan
from tierewrite.source.table import Checkpoint

_LISTED = 12


def refuted(checkpoint: Checkpoint, plan: RewritePlan, digests: Mapping[str, bytes]) -> dict[str, str]:
    """Groups whose bytes disagree: id -> reason, naming the first pair that differs and how many do.

    Args:
        digests: BLAKE3 of every key of every check of the planned groups.
    """
    result: dict[str, str] = {}
    for group in plan.planned():
        differing = [
            (row[0], key) for row in group.checks for key in row[1:] if digests[key] != digests[row[0]]
        ]
        if differing:
            first, other = differing[0]
            entry = checkpoint.tensors[first]
            more = f" (and {len(differing) - 1} more of {sum(len(r) - 1 for r in group.checks)} pairs)"
            result[group.id] = (
                f"'{shown(first)}' and '{shown(other)}' ({entry.dtype} {list(entry.shape)}) differ: "
                f"BLAKE3 {digests[first].hex()[:12]} and {digests[other].hex()[:12]}{more if differing[1:] else ''}"
            )
    return result


ADVICE = (
    "The model declares these tensors to be one, but the files do not hold them as one. Keep both sides of these "
    "groups with --on-mismatch keep, or export the checkpoint again."
)


def refusal(groups: Sequence[GroupPlan], reasons: Mapping[str, str], advice: str = ADVICE) -> Refused:
    """The error that lists every unconfirmed group; `advice` says what it means and what to do."""
    listed: list[dict[str, Any]] = []
    for group in groups:
        reason = reasons.get(group.id) or group.reason
        if reason is not None:
            listed.append(
                {
                    "id": group.id,
                    "canonical": group.canonical,
                    "aliases": list(group.aliases),
                    "reason": reason,
                }
            )
    lines = [
        f"  {shown(', '.join(entry['aliases']))} -> {shown(entry['canonical'])}: {entry['reason']}"
        for entry in listed[:_LISTED]
    ]
    if len(listed) > _LISTED:
        lines.append(f"  ... and {len(listed) - _LISTED} more (all of them with --json)")
    count = f"{len(listed)} declared tie{'s' if len(listed) > 1 else ''}"
    return Refused(
        f"{count} not confirmed, nothing was written:\n" + "\n".join(lines) + f"\n{advice}",
        details={"groups": listed},
    )
