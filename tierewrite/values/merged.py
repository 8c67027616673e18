"""Scales of several sides that become one value: read, merged, and put in the place of the carrying side's bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from tierewrite.errors import Refused, shown
from tierewrite.numbers import merging
from tierewrite.planning.checks import ScaleMerge
from tierewrite.planning.plan import Action, RewritePlan
from tierewrite.source.bytes import read_tensors
from tierewrite.source.table import Checkpoint
from tierewrite.tables import count, repr_of
from tierewrite.values.content import Patch


class MergedScale(NamedTuple):
    """One scale that stands for several sides (a tuple: there is one an expert).

    Attributes:
        target: its key in the output.
        sources: the source keys that it stands for, the carrying one first.
        ratio: largest valid side over smallest valid side; None with fewer than two valid sides.
        calibrated: False when no side had a valid value, and the first side's bytes were kept.
        invalid: source keys that took no part: missing values, 0, negative, NaN, inf, denormal.
        kv: True for a KV-cache scale.
    """

    target: str
    sources: tuple[str, ...]
    ratio: float | None
    calibrated: bool
    invalid: tuple[str, ...] = ()
    kv: bool = False

    def __repr__(self) -> str:
        ratio = "" if self.ratio is None else f", {self.ratio:.2f}x"
        return repr_of(self, f"{count(len(self.sources), 'side')}{ratio}, {shown(self.target)}")

    def to_json(self) -> dict[str, Any]:
        """One entry of a group's `scales` in the report's JSON."""
        return {
            "target": self.target,
            "sources": list(self.sources),
            "ratio": self.ratio,
            "calibrated": self.calibrated,
            "invalid": list(self.invalid),
            "kv": self.kv,
        }


@dataclass(frozen=True)
class MergedScales:
    """The merged scales of a plan.

    Attributes:
        contents: output key -> what is written there.
        merged: output key -> how the value came about, with the id of its group.
        separate_kv: output keys of KV-scale merges that must not be carried out: the layer's biases or scales differ.
        warnings: for the report.
    """

    contents: Mapping[str, Patch]
    merged: Mapping[str, tuple[str, MergedScale]]
    separate_kv: frozenset[str]
    warnings: tuple[str, ...]


def merge_scales(
    checkpoint: Checkpoint,
    plan: RewritePlan,
    read: Callable[[Checkpoint, Iterable[str]], dict[str, bytes]] = read_tensors,
) -> MergedScales:
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
    separate_kv = frozenset(
        merge.target
        for _, merge in work
        if merge.only_if_equal and any(data[key] != data[row[0]] for row in merge.only_if_equal for key in row[1:])
    )
    mergeable = [
        (group, written)
        for group, merge in work
        if merge.companion.merge is not None and merge.target not in separate_kv
        for written in (merge, *_on_other_sides(plan, merge))
    ]
    tensors = checkpoint.tensors
    row_of, kind = tensors.row, tensors.kind.tolist()

    def side(key: str) -> merging.Side:
        dtype, shape = tensors.kinds[kind[row_of[key]]]
        return merging.Side(key, dtype, shape, data[key])

    sides = [([side(key) for key in merge.keys], merge.companion) for _, merge in mergeable]
    try:
        results = merging.merge_many(sides)
    except ValueError as error:
        raise Refused(f"{error}; store that scale in the other side's dtype, or use --on-mismatch keep") from error
    contents: dict[str, Patch] = {}
    merged: dict[str, tuple[str, MergedScale]] = {}
    warnings: list[str] = []
    for (group, merge), result in zip(mergeable, results, strict=True):
        contents[merge.target] = Patch(result.data, data[merge.keys[0]], merge.keys[0])
        scale = MergedScale(merge.target, merge.keys, result.ratio, result.calibrated, result.invalid, merge.kv)
        merged[merge.target] = (group, scale)
        warnings.extend(_scale_warnings(merge, result))
    return MergedScales(contents, merged, separate_kv, tuple(warnings))


def _on_other_sides(plan: RewritePlan, merge: ScaleMerge) -> Iterator[ScaleMerge]:
    """The same merge once more for each other side whose name stays: in the dtype and place of that side."""
    rows = plan.source.row
    for key in merge.keys[1:]:
        if plan.action[rows[key]] != Action.DROP.code:
            others = (other for other in merge.keys if other != key)
            yield merge._replace(target=key, keys=(key, *others))


def separate_kv_warnings(targets: Iterable[str]) -> list[str]:
    """For the KV scales that were to be merged and could not be."""
    return [
        f"KV scales stay on every side of '{shown(target)}': the layer has biases and its sides differ"
        for target in sorted(targets)
    ]


def _scale_warnings(merge: ScaleMerge, result: merging.MergeResult) -> list[str]:
    if not result.calibrated and merge.companion.optional and result.equal:
        return []
    if not result.calibrated:
        return [f"'{shown(merge.target)}' was never calibrated on any side; its bytes are kept as they are"]
    if merge.kv and not result.equal:
        return [
            f"KV scale '{shown(merge.target)}' differed between the sides (ratio {result.ratio or 1:.3g}); "
            "the larger range is kept"
        ]
    return []
