"""Input scales of experts that calibration never reached, taken from the layer's other experts.

A consumer that finds no `input_scale` for one expert uses uninitialised memory. The tied side's value has been taken
already by the merge; where no side has one, the widest of the same projection's other experts in the layer stands in:
an expert that calibration never routed to sees the same activations as they do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tierewrite.errors import shown
from tierewrite.formats import Companion
from tierewrite.numbers import merging
from tierewrite.planning.plan import RewritePlan
from tierewrite.source.bytes import read_tensors
from tierewrite.source.table import Checkpoint
from tierewrite.values.content import Added, Content, Patch


@dataclass(frozen=True, slots=True)
class Filled:
    """A scale that was missing or never calibrated.

    Attributes:
        target: its key in the output.
        missing: True if no tensor of that name was there.
        taken_from: the expert's scale whose value it got; None if the values differ by channel.
    """

    target: str
    missing: bool
    taken_from: str | None

    def to_json(self) -> dict[str, Any]:
        """One entry of `filled` in the report's JSON."""
        return {"target": self.target, "missing": self.missing, "taken_from": self.taken_from}


@dataclass(frozen=True)
class FilledScales:
    """What is filled in.

    Attributes:
        contents: output key -> what is written there.
        filled: the record, in the order of the plan.
        unfillable: output keys that nothing can be chosen for: no expert of the layer has a valid scale.
        warnings: projections of which no expert has a valid scale.
    """

    contents: Mapping[str, Content]
    filled: tuple[Filled, ...]
    unfillable: frozenset[str] = frozenset()
    warnings: tuple[str, ...] = ()


def fill_missing_scales(checkpoint: Checkpoint, plan: RewritePlan, merged: Mapping[str, Patch]) -> FilledScales:
    """Chooses the values for the plan's sets of experts.

    Args:
        merged: output key -> content of the scales that are merged already.

    Raises:
        SourceChanged, SystemFailure: reading failed.
    """
    keys = [key for group in plan.expert_scales for key in group.members.values()]
    data = read_tensors(checkpoint, keys)
    contents: dict[str, Content] = {}
    filled: list[Filled] = []
    unfillable: set[str] = set()
    warnings: list[str] = []
    for group in plan.expert_scales:
        by_key = {key: target for target, key in group.members.items()}
        sides = [
            merging.Side(
                key,
                checkpoint.tensors[key].dtype,
                checkpoint.tensors[key].shape,
                merged[target].data if target in merged else data[key],
            )
            for target, key in group.members.items()
        ]
        result, why = _widest(sides, group.companion)
        if result is None:
            unfillable.update(group.missing)
            warnings.append(f"'{shown(group.name)}': nothing to fill in: {why}")
            continue
        source = by_key.get(result.taken_from or "")
        for target in group.missing:
            contents[target] = Added(result.data)
            filled.append(Filled(target, True, source))
        for key, own in result.own.items():
            contents[by_key[key]] = Patch(own, data[key], key)
            filled.append(Filled(by_key[key], False, source))
    return FilledScales(contents, tuple(filled), frozenset(unfillable), tuple(warnings))


class _Widest(NamedTuple):
    """What the experts of a projection get.

    Attributes:
        data: for one that has no scale, in the first side's dtype.
        own: key of each scale that calibration never set -> its new bytes, in its own dtype.
        taken_from: as in `MergeResult`.
    """

    data: bytes
    own: dict[str, bytes]
    taken_from: str | None


def _widest(sides: Sequence[merging.Side], companion: Companion) -> tuple[_Widest | None, str]:
    """The value that covers all `sides`, or None and why there is none."""
    kinds = ", ".join(dict.fromkeys(f"{side.dtype} {list(side.shape)}" for side in sides))
    no_value = f"no one value fits the scales of all experts of the layer ({kinds})"
    if merging.mergeable([(side.dtype, side.shape) for side in sides]) is not None:
        return None, no_value
    own: dict[str, bytes] = {}
    try:
        (result,) = merging.merge_many([(sides, companion)])
        for side in sides if result.calibrated else ():
            if side.key in result.invalid:
                alike = side.dtype == result.dtype
                first = [side, *(other for other in sides if other is not side)]
                own[side.key] = result.data if alike else merging.merge_many([(first, companion)])[0].data
    except ValueError:  # one of the dtypes cannot hold it
        return None, no_value
    if not result.calibrated:
        return None, "no expert of the layer has a valid scale"
    return _Widest(result.data, own, result.taken_from), ""
