"""Input scales of experts that calibration never reached, taken from the layer's other experts.

A consumer that finds no `input_scale` for one expert uses uninitialised memory. The tied side's value has been taken
already by the merge; where no side has one, the widest of the same projection's other experts in the layer stands in:
an expert that calibration never routed to sees the same activations as they do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tierewrite.errors import shown
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
        reason = merging.mergeable([(side.dtype, side.shape) for side in sides])
        (result,) = merging.merge_many([(sides, group.companion)]) if reason is None else (None,)
        if result is None or not result.calibrated:
            unfillable.update(group.missing)
            warnings.append(f"'{shown(group.name)}': nothing to fill in: no expert of the layer has a valid scale")
            continue
        source = by_key.get(result.taken_from or "")
        for target in group.missing:
            contents[target] = Added(result.data)
            filled.append(Filled(target, True, source))
        for key in result.invalid:
            contents[by_key[key]] = Patch(result.data, data[key], key)
            filled.append(Filled(by_key[key], False, source))
    return FilledScales(contents, tuple(filled), frozenset(unfillable), tuple(warnings))
