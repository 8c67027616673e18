"""What becomes of the tensors of one tie, if its bytes agree: slots that are alike are planned together, as columns.

Refused here (the group is kept whole and the reason recorded):
  - sides with different sets of weight-derived tensors, or with different dtypes or shapes of them;
  - a companion that no family knows (`suffix` below the module of a tied weight);
  - activation scales that cannot become one value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tierewrite import formats
from tierewrite.formats import Companion
from tierewrite.numbers import merging
from tierewrite.planning.checks import Checks, ScaleMerges, keys_of
from tierewrite.planning.plan import Action
from tierewrite.planning.sides import Composition, Sides
from tierewrite.source.table import Tensors
from tierewrite.ties.on_disk import TieGroup


class Unconfirmed(Exception):
    """Headers refute a group: `reason` says why, `slot` is the position of the first slot that they refute."""

    def __init__(self, reason: str, slot: int = 0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.slot = slot


@dataclass(frozen=True)
class Decisions:
    """What becomes of some tensors, as columns; where a row occurs twice the later one counts.

    Attributes:
        row: int64, rows of the source.
        action: int8, position in `ACTIONS`.
        stands_for: int64, the row that holds it in the output.
        merged: bool, whether a merged value is written in its place.
        new_names: row -> key in the output, of those that are renamed.
    """

    row: np.ndarray
    action: np.ndarray
    stands_for: np.ndarray
    merged: np.ndarray
    new_names: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Draft:
    """A group whose headers agree.

    Attributes:
        decisions: what becomes of its tensors, slot by slot.
        checks: what must be equal, slot by slot: weight-derived tensors, in a smoothed checkpoint their neighbours too.
        merges: activation scales that become one, slot by slot.
        slots: int64, the positions of the slots of which any side is there, ascending.
        touched: False where nothing is to be done: the canonical side alone is there.
    """

    decisions: Decisions
    checks: Checks
    merges: ScaleMerges
    slots: np.ndarray
    touched: bool


@dataclass(frozen=True)
class _Line:
    """One part of slots that are alike: the tensors of which one survives.

    Attributes:
        part: what `Composition` calls it.
        rows: int64 [slots, sides that have it]; the first side's survives.
        renamed: whether the survivor takes the canonical side's name.
        companion: the role of an activation scale; None for what must be equal.
    """

    part: str
    rows: np.ndarray
    renamed: bool
    companion: Companion | None = None

    @property
    def merged(self) -> bool:
        """Whether a merged value takes the survivor's place."""
        return self.companion is not None and (self.renamed or self.rows.shape[1] > 1)

    @property
    def action(self) -> Action:
        """What becomes of the survivor."""
        return Action.RENAME if self.renamed else Action.MERGE if self.merged else Action.KEEP


@dataclass(frozen=True)
class _Together:
    """Slots that are alike, planned.

    Attributes:
        slots: int64 [slots], their positions in the tie, ascending.
        present: the sides that are there; the first one's tensors survive.
        lines: one a part: first those that must be equal, then the activation scales.
        exact: how many of `lines` must be equal.
        neighbours: of a smoothed checkpoint: position in `slots`, the two rows that must be equal too, and the sides
            that they belong to.
        touched: whether there is anything to do.
    """

    slots: np.ndarray
    present: list[int]
    lines: list[_Line]
    exact: int
    neighbours: list[tuple[int, int, int, int, int]]
    touched: bool


class GroupPlanner:
    """Plans one tie after the other.

    Args:
        tensors: the source.
        sides: what each parameter became on disk.
        adjacency: in a smoothed checkpoint, what a module's scale was folded into.
        canonical_of: there, parameter -> canonical parameter of its slot.
        metadata: of all headers, where it describes parameters by name.
    """

    def __init__(
        self,
        tensors: Tensors,
        sides: Sides,
        adjacency: formats.Adjacency,
        canonical_of: dict[str, str],
        metadata: Mapping[str, str],
    ) -> None:
        self._tensors = tensors
        self._sides = sides
        self._adjacency = adjacency
        self._canonical_of = canonical_of
        self._metadata = metadata
        self._mergeable: dict[tuple[int, ...], str | None] = {}

    def planned(self, tie: TieGroup, first: np.ndarray, composition: np.ndarray) -> Draft:
        """What becomes of the tensors of `tie`.

        Args:
            first, composition: [slots, sides], as `Sides` has them.

        Raises:
            Unconfirmed: headers refute one of the slots: the first that they do.
        """
        done: list[_Together] = []
        refused: Unconfirmed | None = None
        for slots in _alike(composition):
            try:
                together = self._together(tie, slots, first[slots], composition[slots[0]])
            except Unconfirmed as error:
                if refused is None or error.slot < refused.slot:
                    refused = error
            else:
                if together is not None:
                    done.append(together)
        if refused is not None:
            raise refused
        return Draft(
            _decisions(tie, done),
            Checks(self._tensors, *_checks(done, composition.shape[1])),
            self._merges(tie, done, composition.shape[1]),
            np.sort(np.concatenate([_empty(), *(together.slots for together in done)])),
            any(together.touched for together in done),
        )

    def _together(
        self, tie: TieGroup, slots: np.ndarray, first: np.ndarray, composition: np.ndarray
    ) -> _Together | None:
        """Plans `slots`, of which each side has one composition; None where no side has any weight.

        Raises:
            Unconfirmed: headers refute one of them.
        """
        compositions = [self._sides.compositions[number] for number in composition]
        names = tie.slots[slots[0]]
        for side, one in enumerate(compositions):
            if one.unknown >= 0:
                key = self._tensors.names[self._sides.rows[first[0, side] + one.unknown]]
                raise Unconfirmed(
                    f"no known format has the tensor '{key}' (suffix '{one.suffixes[one.unknown]}') beside the tied "
                    f"parameter '{names[side]}'",
                    int(slots[0]),
                )
        present = [side for side, one in enumerate(compositions) if one.exact]
        if not present:
            return None
        self._same_parts(names, present, compositions, first[0], int(slots[0]))
        self._same_descriptions(tie, slots, present)
        exact = [
            self._line(part, present, [compositions[side].exact[part] for side in present], first)
            for part in compositions[present[0]].exact
        ]
        ranges = self._ranges(present, compositions, first)
        neighbours, refusals = self._neighbours(tie, slots, present)
        refusals.extend(self._differing(exact, present, compositions))
        refusals.extend(self._unmergeable(ranges))
        if refusals:
            at, _, reason = min(refusals)
            raise Unconfirmed(reason, int(slots[at]))
        touched = present[0] != 0 or len(present) > 1
        return _Together(slots, present, [*exact, *ranges], len(exact), neighbours, touched)

    def _line(
        self,
        part: str,
        sides: list[int],
        indices: list[int],
        first: np.ndarray,
        companion: Companion | None = None,
    ) -> _Line:
        """`part` on `sides`, where it is the tensor number `indices` of each."""
        return _Line(part, self._sides.rows[first[:, sides] + indices], sides[0] != 0, companion)

    def _ranges(self, present: list[int], compositions: list[Composition], first: np.ndarray) -> list[_Line]:
        """The activation scales of the sides that are there."""
        companions = {part: found for side in present for part, (_, found) in compositions[side].ranges.items()}
        lines = []
        for part, companion in companions.items():
            having = [side for side in present if part in compositions[side].ranges]
            indices = [compositions[side].ranges[part][0] for side in having]
            lines.append(self._line(part, having, indices, first, companion))
        return lines

    def _same_descriptions(self, tie: TieGroup, slots: np.ndarray, present: Sequence[int]) -> None:
        """Raises Unconfirmed where metadata says that the sides are of another type or block size."""
        for slot in slots.tolist() if self._metadata else ():
            described = [name for side in present if (name := tie.slots[slot][side]) in self._metadata]
            for name in described[1:]:
                if self._metadata[name] != self._metadata[described[0]]:
                    why = f"the header's metadata describes '{described[0]}' and '{name}' differently"
                    raise Unconfirmed(why, slot)

    def _same_parts(
        self, names: Sequence[str], present: list[int], compositions: list[Composition], first: np.ndarray, slot: int
    ) -> None:
        """All sides have the same set of weight-derived tensors; in the first slot with the same headers.

        Raises:
            Unconfirmed: one has not.
        """
        lead = present[0]
        parts = compositions[lead].exact
        rows, kind = self._sides.rows, self._tensors.kind
        for side in present[1:]:
            other = compositions[side].exact
            if other.keys() != parts.keys():
                lacking, extra = sorted(parts.keys() - other.keys()), sorted(other.keys() - parts.keys())
                at = first[lead] + parts[lacking[0]] if lacking else first[side] + other[extra[0]]
                raise Unconfirmed(
                    f"'{names[lead]}' and '{names[side]}' are stored differently: '{self._tensors.names[rows[at]]}' "
                    "has no twin",
                    slot,
                )
            for part, index in other.items():
                mine, theirs = rows[first[lead] + parts[part]], rows[first[side] + index]
                if kind[mine] != kind[theirs]:
                    raise Unconfirmed(f"{self._described(mine)} but {self._described(theirs)}", slot)

    def _differing(
        self, lines: list[_Line], present: list[int], compositions: list[Composition]
    ) -> list[tuple[int, int, str]]:
        """The first slot whose headers differ where they must not: its position, 0 and the reason; or nothing."""
        kind = self._tensors.kind
        differs = np.zeros(len(lines[0].rows), bool)
        for line in lines:
            kinds = kind[line.rows]
            differs |= (kinds != kinds[:, :1]).any(axis=1)
        if not differs.any():
            return []
        at = int(differs.argmax())
        rows = {line.part: line.rows[at].tolist() for line in lines}
        pairs = [(rows[part][0], rows[part][n]) for n, side in enumerate(present) for part in compositions[side].exact]
        mine, theirs = next((mine, theirs) for mine, theirs in pairs if kind[mine] != kind[theirs])
        return [(at, 0, f"{self._described(mine)} but {self._described(theirs)}")]

    def _unmergeable(self, lines: list[_Line]) -> Iterator[tuple[int, int, str]]:
        """For each of the activation scales, the first slot whose sides cannot become one by their headers."""
        for number, line in enumerate(lines):
            kinds = self._tensors.kind[line.rows]
            alike = kinds[:1] if (kinds == kinds[0]).all() else np.unique(kinds, axis=0)
            for some in alike:
                reason = self._why_unmergeable(tuple(some.tolist()))
                if reason is not None:
                    at = int((kinds == some).all(axis=1).argmax())
                    keys = keys_of(self._tensors.names, line.rows[at].tolist())
                    yield at, 2 + number, f"{', '.join(map(repr, keys))}: {reason}"

    def _why_unmergeable(self, kinds: tuple[int, ...]) -> str | None:
        """Why scales of these kinds cannot become one; None if they can."""
        if kinds not in self._mergeable:
            self._mergeable[kinds] = merging.mergeable(tuple([self._tensors.kinds[kind] for kind in kinds]))
        return self._mergeable[kinds]

    def _described(self, row: int) -> str:
        return f"'{self._tensors.names[row]}' is {self._header(row)}"

    def _header(self, row: int) -> str:
        dtype, shape = self._tensors.kinds[self._tensors.kind[row]]
        return f"{dtype} {list(shape)}"

    def _neighbours(
        self, tie: TieGroup, slots: np.ndarray, present: list[int]
    ) -> tuple[list[tuple[int, int, int, int, int]], list[tuple[int, int, str]]]:
        """In a smoothed checkpoint, what a side's scale was folded into must be one as well.

        Returns:
            `_Together.neighbours`; and the first slot of which the headers of two differ: its position, 1 and the
            reason.
        """
        pairs: list[tuple[int, int, int, int, int]] = []
        if not self._adjacency.smoothed or len(present) < 2:
            return pairs, []
        kind = self._tensors.kind
        for at, slot in enumerate(slots.tolist()):
            names = [tie.slots[slot][side] for side in present]
            for twin, row, other in self._twins(names):
                if kind[twin] != kind[row]:
                    reason = (
                        f"{self._described(twin)} but {self._described(row)}, and both were smoothed together with "
                        f"'{names[0]}'"
                    )
                    return pairs, [(at, 1, reason)]
                pairs.append((at, twin, row, present[0], present[other]))
        return pairs, []

    def _twins(self, names: Sequence[str]) -> Iterator[tuple[int, int, int]]:
        """The rows of the tied neighbours of a slot's sides, the first side's and another's, and which other."""
        row = self._tensors.row
        first, *others = (
            {self._canonical_name(key): key for key in self._adjacency.of(name.rpartition(".")[0])} for name in names
        )
        for number, other in enumerate(others, 1):
            for canonical, key in other.items():
                twin = first.get(canonical, key)
                if twin != key:
                    yield row[twin], row[key], number

    def _canonical_name(self, key: str) -> str:
        """The canonical name of a tied parameter or of its companion; any other key as it is."""
        if key in self._canonical_of:
            return self._canonical_of[key]
        parent, _, suffix = key.rpartition(".")
        canonical = self._canonical_of.get(f"{parent}.weight")
        return key if canonical is None else f"{canonical.rpartition('.')[0]}.{suffix}"

    def _merges(self, tie: TieGroup, done: Sequence[_Together], sides: int) -> ScaleMerges:
        """The activation scales that become one, slot by slot."""
        rows, slot, companion = [_empty(sides)], [_empty()], [_empty()]
        companions: dict[Companion, int] = {}
        names: list[str | None] = []  # in the order of `rows`: the key in the output, where it is not the carrier's
        for together in done:
            lines = [line for line in together.lines if line.merged]
            if not lines:
                continue
            count = len(together.slots)
            numbers = [companions.setdefault(line.companion, len(companions)) for line in lines if line.companion]
            rows.append(np.stack([_padded(line.rows, sides) for line in lines], axis=1).reshape(-1, sides))
            slot.append(np.repeat(together.slots, len(lines)))
            companion.append(np.tile(np.array(numbers, np.int64), count))
            for at in together.slots.tolist():
                names.extend(canonical_key(tie.slots[at][0], line.part) if line.renamed else None for line in lines)
        order = np.argsort(np.concatenate(slot), kind="stable")
        targets = {at: name for at, old in enumerate(order.tolist()) if (name := names[old]) is not None}
        return ScaleMerges(
            self._tensors,
            np.concatenate(rows)[order],
            np.concatenate(companion)[order],
            tuple(companions),
            targets,
        )


def canonical_key(name: str, part: str) -> str:
    """The key of `part` of the parameter `name`: see `Composition`."""
    parent, _, leaf = name.rpartition(".")
    suffix = part.replace("*", leaf, 1)
    return f"{parent}.{suffix}" if parent else suffix


def _alike(composition: np.ndarray) -> Iterator[np.ndarray]:
    """Positions of the slots that have the same composition on every side, set by set; each set ascending.

    Args:
        composition: [slots, sides].
    """
    left = np.arange(len(composition))
    while len(left):
        here = (composition[left] == composition[left[0]]).all(axis=1)
        yield left[here]
        left = left[~here]


def _decisions(tie: TieGroup, done: Sequence[_Together]) -> Decisions:
    """What becomes of the tensors of all slots, slot by slot, and in a slot part by part."""
    slot, row, action, stands_for, merged = [_empty()], [_empty()], [_empty()], [_empty()], [_empty()]
    renamed: list[tuple[int, int, str]] = []  # slot, row, key in the output
    for together in done:
        count = len(together.slots)
        rows = [line.rows for line in together.lines]
        row.append(np.concatenate(rows, axis=1).ravel())
        width = sum(some.shape[1] for some in rows)
        slot.append(np.repeat(together.slots, width))
        stands_for.append(np.concatenate([np.broadcast_to(some[:, :1], some.shape) for some in rows], axis=1).ravel())
        actions = [
            code
            for line in together.lines
            for code in (line.action.code, *[Action.DROP.code] * (line.rows.shape[1] - 1))
        ]
        action.append(np.tile(np.array(actions, np.int64), count))
        values = [value for line in together.lines for value in (line.merged, *[False] * (line.rows.shape[1] - 1))]
        merged.append(np.tile(np.array(values, np.int64), count))
        for line in together.lines:
            if line.renamed:
                slots = together.slots.tolist()
                keys = [canonical_key(tie.slots[at][0], line.part) for at in slots]
                renamed.extend(zip(slots, line.rows[:, 0].tolist(), keys, strict=True))
    order = np.argsort(np.concatenate(slot), kind="stable")
    renamed.sort(key=lambda entry: entry[0])
    return Decisions(
        np.concatenate(row)[order],
        np.concatenate(action)[order].astype(np.int8),
        np.concatenate(stands_for)[order],
        np.concatenate(merged)[order].astype(bool),
        {at: name for _, at, name in renamed},
    )


def _checks(done: Sequence[_Together], sides: int) -> tuple[np.ndarray, np.ndarray]:
    """Two int64 [checks, sides]: the rows that must be equal, slot by slot, and the side that each belongs to."""
    slot, rows, owner = [_empty()], [_empty(sides)], [_empty(sides)]
    for together in done:
        exact = [line.rows for line in together.lines[: together.exact]]
        if exact[0].shape[1] < 2:
            continue
        slot.append(np.repeat(together.slots, len(exact)))
        rows.append(_padded(np.stack(exact, axis=1).reshape(-1, exact[0].shape[1]), sides))
        owner.append(np.broadcast_to(_padded(np.array([together.present], np.int64), sides), rows[-1].shape))
        if together.neighbours:
            found = np.array(together.neighbours, np.int64)
            slot.append(together.slots[found[:, 0]])
            rows.append(_padded(found[:, 1:3], sides))
            owner.append(_padded(found[:, 3:], sides))
    order = np.argsort(np.concatenate(slot), kind="stable")
    return np.concatenate(rows)[order], np.concatenate(owner)[order]


def _padded(rows: np.ndarray, sides: int) -> np.ndarray:
    """`rows` [n, fewer sides] with -1 for the sides that are not there."""
    return np.pad(rows, ((0, 0), (0, sides - rows.shape[1])), constant_values=-1)


def _empty(sides: int | None = None) -> np.ndarray:
    """The first of arrays to concatenate: none of them may be there."""
    return np.empty(0 if sides is None else (0, sides), np.int64)
