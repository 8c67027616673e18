"""Do the bytes agree, and what do the scales become: the plan's checks, answered.

A tie is confirmed by digests alone: never by values (equal bytes may hold a NaN, unequal ones may compare equal) and
never by addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tierewrite import scales
from tierewrite.checkpoint import Checkpoint, gc_paused
from tierewrite.errors import Refused, shown
from tierewrite.planning import GroupPlan, Merge, RewritePlan
from tierewrite.reading import read_tensors
from tierewrite.report import MergedScale

_LISTED = 12


@dataclass(frozen=True)
class ScaleValues:
    """The merged scales of a plan.

    Attributes:
        patches: carrying source key -> bytes to write in its place.
        originals: carrying source key -> the bytes that were read.
        merged: target -> how the value came about, with the id of its group.
        apart: targets of KV-scale merges that must not be carried out, since the layer's biases or scales differ.
        warnings: for the report.
    """

    patches: Mapping[str, bytes]
    originals: Mapping[str, bytes]
    merged: Mapping[str, tuple[str, MergedScale]]
    apart: frozenset[str]
    warnings: tuple[str, ...]


@gc_paused()
def merge_scales(
    checkpoint: Checkpoint,
    plan: RewritePlan,
    read: Callable[[Checkpoint, Iterable[str]], dict[str, bytes]] = read_tensors,
) -> ScaleValues:
    """Reads every scale that the plan merges, and merges it.

    Args:
        read: gives the bytes of the tensors of these keys; by default it reads the shards.

    Raises:
        SourceChanged, SystemFailure: reading failed.
        Refused: a scale that cannot be represented in its stored dtype.
    """
    work = [(group.id, merge) for group in plan.planned() for merge in group.merges]
    wanted = {key for _, merge in work for key in merge.keys}
    wanted.update(key for _, merge in work for row in merge.only_if_equal for key in row)
    data = read(checkpoint, wanted)
    apart = frozenset(
        merge.target
        for _, merge in work
        if merge.only_if_equal
        and any(data[key] != data[row[0]] for row in merge.only_if_equal for key in row[1:])
    )
    todo = [
        (group, merge)
        for group, merge in work
        if merge.companion.merge is not None and merge.target not in apart
    ]
    tensors = checkpoint.tensors
    jobs = [
        ([scales.Side(key, *tensors[key][1:3], data[key]) for key in merge.keys], merge.companion)
        for _, merge in todo
    ]
    try:
        results = scales.merge_many(jobs)
    except ValueError as error:
        raise Refused(f"{error}; store that scale in the other side's dtype, or use --on-mismatch keep") from error
    patches: dict[str, bytes] = {}
    originals: dict[str, bytes] = {}
    merged: dict[str, tuple[str, MergedScale]] = {}
    warnings: list[str] = []
    for (group, merge), result in zip(todo, results, strict=True):
        carrier = merge.keys[0]
        originals[carrier] = data[carrier]
        patches[carrier] = result.data
        merged[merge.target] = (
            group,
            MergedScale(merge.target, merge.keys, result.ratio, result.calibrated, result.invalid, merge.kv),
        )
        warnings.extend(_scale_warnings(merge, result))
    return ScaleValues(patches, originals, merged, apart, tuple(warnings))


def apart_warnings(targets: Iterable[str]) -> list[str]:
    """For the KV scales that were to be merged and could not be."""
    return [
        f"KV scales stay on both sides of '{shown(target)}': the layer has biases and its sides differ"
        for target in sorted(targets)
    ]


def _scale_warnings(merge: Merge, result: scales.Merged) -> list[str]:
    if not result.calibrated:
        return [f"'{shown(merge.target)}' was never calibrated on any side; its bytes are kept as they are"]
    if merge.kv and not result.equal:
        return [
            f"KV scale '{shown(merge.target)}' differed between the sides (ratio {result.ratio or 1:.3g}); "
            "the larger range is kept"
        ]
    return []


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
    "groups with --on-mismatch keep, or export the checkpoint anew."
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
