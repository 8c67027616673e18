"""TODO."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from tierewrite.errors import Refused, shown
from tierewrite.numbers import merging
from tierewrite.planning.plan import Merge, RewritePlan
from tierewrite.report import MergedScale
from tierewrite.source.bytes import read_tensors
from tierewrite.source.table import Checkpoint, gc_paused


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
        ([merging.Side(key, *tensors[key][1:3], data[key]) for key in merge.keys], merge.companion)
        for _, merge in todo
    ]
    try:
        results = merging.merge_many(jobs)
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


def _scale_warnings(merge: Merge, result: merging.Merged) -> list[str]:
    if not result.calibrated:
        return [f"'{shown(merge.target)}' was never calibrated on any side; its bytes are kept as they are"]
    if merge.kv and not result.equal:
        return [
            f"KV scale '{shown(merge.target)}' differed between the sides (ratio {result.ratio or 1:.3g}); "
            "the larger range is kept"
        ]
    return []
