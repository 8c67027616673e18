"""What is planned for each tie, and which of its sides are kept: all of them, or those that differ from the others.

A side is what one name of the tie became on disk, in all of its slots. Where one of several aliases differs (the
trained head of a model whose other embeddings are one), `on_mismatch="keep"` keeps that side whole and plans the
others. The canonical side must be on disk in every slot for that: what stays is then stored under its own name, and
what is dropped is loaded from the canonical side, which it equals.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tierewrite import formats
from tierewrite.formats import descriptions
from tierewrite.planning.fates import Fates
from tierewrite.planning.groups import Draft, GroupPlanner, Unconfirmed
from tierewrite.planning.sides import Sides
from tierewrite.source.table import Checkpoint
from tierewrite.ties.on_disk import DiskTies, TieGroup

Differing = Mapping[str, Mapping[str, str]]
"""Group id -> alias -> why its side is known to differ from the canonical one."""


@dataclass(frozen=True)
class Outcome:
    """A tie, and what is planned for it or why it stays whole.

    Attributes:
        tie: with all of its sides.
        planned: the sides that are planned together: `tie` without those that are kept.
        draft: what is planned; None where all sides stay.
        reason: why all sides stay.
        differing_aliases, absent: as in `GroupPlan`.
    """

    tie: TieGroup
    planned: TieGroup
    draft: Draft | None = None
    reason: str | None = None
    differing_aliases: Mapping[str, str] = field(default_factory=dict)
    absent: tuple[str, ...] = ()


@dataclass(frozen=True)
class _OnDisk:
    """A tie with what its sides are on disk.

    Attributes:
        first, composition: [slots, sides], as `Sides` has them.
        there: bool [slots, sides], whether a side has anything of the weight.
    """

    tie: TieGroup
    first: np.ndarray
    composition: np.ndarray
    there: np.ndarray

    @property
    def absent(self) -> tuple[str, ...]:
        """The aliases of which nothing is on disk."""
        sides = zip(self.tie.aliases, self.there.T[1:], strict=True)
        return tuple(alias for alias, there in sides if not np.any(there))

    def only(self, numbers: Sequence[int]) -> _OnDisk:
        """The same with the sides of these numbers alone, 0 for the canonical one."""
        tie = self.tie
        aliases = [number - 1 for number in numbers if number]
        part = replace(
            tie,
            aliases=tuple(tie.aliases[at] for at in aliases),
            origins=tuple(tie.origins[at] for at in aliases),
            slots=tuple(tuple(slot[number] for number in numbers) for slot in tie.slots),
        )
        return _OnDisk(part, self.first[:, numbers], self.composition[:, numbers], self.there[:, numbers])

    def without(self, aliases: Collection[str]) -> _OnDisk:
        """The same without the sides of `aliases`."""
        return self.only([0, *(at for at, alias in enumerate(self.tie.aliases, 1) if alias not in aliases)])

    def can_be_split(self, kept: Collection[str]) -> bool:
        """Whether sides may be kept by themselves: the canonical side is in every slot, and another one agrees."""
        canonical, *others = self.there.T
        staying = [side for alias, side in zip(self.tie.aliases, others, strict=True) if alias not in kept]
        return bool(kept) and bool((canonical | ~self.there.any(axis=1)).all()) and any(map(np.any, staying))


def outcomes(
    checkpoint: Checkpoint,
    ties: DiskTies,
    families: tuple[str, ...],
    fates: Fates,
    refuted: Mapping[str, str],
    differing: Differing,
    split: bool,
) -> list[Outcome]:
    """Plans one tie after the other; what is decided is entered into `fates`.

    Args:
        refuted: group id -> why its bytes refute it.
        differing: the sides that do, of ties with several aliases.
        split: whether a tie may be planned without the sides that differ.
    """
    tensors = checkpoint.tensors
    names = [name for tie in ties.groups for slot in tie.slots for name in slot]
    sides = Sides(tensors, families, names, ties.owned)
    there = np.array([bool(one.exact) for one in sides.compositions], bool)
    adjacency = _adjacency(checkpoint)
    canonical_of = {name: slot[0] for tie in ties.groups for slot in tie.slots for name in slot if adjacency.smoothed}
    metadata = descriptions.described(shard.metadata for shard in checkpoint.shards)
    planner = _TiePlanner(GroupPlanner(tensors, sides, adjacency, canonical_of, metadata), fates)
    found: list[Outcome] = []
    at = 0
    for number, tie in enumerate(ties.groups):
        shape = (len(tie.slots), len(tie.slots[0]))
        here = slice(at, at := at + shape[0] * shape[1])
        first, composition = sides.first[here].reshape(shape), sides.composition[here].reshape(shape)
        on_disk = _OnDisk(tie, first, composition, there[composition])
        outcome = planner.outcome(number, on_disk, refuted.get(tie.id), differing.get(tie.id, {}), split)
        outcome = replace(outcome, absent=on_disk.absent)
        kept = [n for n, alias in enumerate(tie.aliases, 1) if alias in outcome.differing_aliases]
        columns = kept if outcome.draft is not None else list(range(shape[1]))
        if columns:
            fates.keep(number, sides.rows_of(first[:, columns].ravel(), composition[:, columns].ravel()))
        found.append(outcome)
    return found


@dataclass(frozen=True)
class _TiePlanner:
    """Plans one tie after the other, with or without the sides that differ."""

    planner: GroupPlanner
    fates: Fates

    def outcome(
        self, number: int, on_disk: _OnDisk, refuted: str | None, differing: Mapping[str, str], split: bool
    ) -> Outcome:
        """What is planned for the tie of this number.

        Args:
            refuted: why its bytes refute it.
            differing: the aliases whose bytes differ, and why.
            split: whether it may be planned without the sides that differ.
        """
        tie = on_disk.tie
        if tie.problem is not None or (refuted is not None and not on_disk.can_be_split(differing)):
            return Outcome(tie, tie, reason=refuted or tie.problem)
        part = on_disk.without(differing)
        try:
            return self._claimed(number, tie, part, differing)
        except Unconfirmed as error:
            reason = refuted or error.reason
        found = {**differing, **self._refuted_by_headers(part)}
        if not on_disk.can_be_split(found):
            return Outcome(tie, tie, reason=reason)
        if split:
            try:
                return self._claimed(number, tie, on_disk.without(found), found)
            except Unconfirmed as error:
                return Outcome(tie, tie, reason=error.reason)
        return Outcome(tie, tie, reason=reason, differing_aliases=found)

    def _claimed(self, number: int, tie: TieGroup, part: _OnDisk, differing: Mapping[str, str]) -> Outcome:
        """Plans `part` of `tie` and claims its tensors. Raises Unconfirmed."""
        draft = self.planner.planned(part.tie, part.first, part.composition)
        self.fates.claim(number, draft.decisions)
        return Outcome(tie, part.tie, draft, differing_aliases=differing)

    def _refuted_by_headers(self, part: _OnDisk) -> dict[str, str]:
        """The aliases that cannot be planned together with the canonical side, and why."""
        found: dict[str, str] = {}
        for at, alias in enumerate(part.tie.aliases, 1):
            pair = part.only([0, at])
            try:
                self.fates.check(self.planner.planned(pair.tie, pair.first, pair.composition).decisions)
            except Unconfirmed as error:
                found[alias] = error.reason
        return found


def _adjacency(checkpoint: Checkpoint) -> formats.Adjacency:
    """In a smoothed checkpoint, which it is by its configs or by the last words of its keys, what was smoothed."""
    configs = checkpoint.config, checkpoint.quant_config
    shown = formats.Adjacency(checkpoint.tensors.leaves, *configs)
    return formats.Adjacency(checkpoint.tensors.keys(), *configs) if shown.smoothed else shown
