"""KV-cache scales of attention modules whose projections are tied: one value for all sides, on request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tierewrite import formats
from tierewrite.formats import Companion
from tierewrite.numbers import merging
from tierewrite.planning.checks import ScaleMerge, keys_of
from tierewrite.planning.fates import Fates
from tierewrite.planning.groups import Decisions
from tierewrite.planning.plan import Action
from tierewrite.source.table import Tensors
from tierewrite.ties.on_disk import TieGroup

Owners = Mapping[str, tuple[str, ...]]
"""Group id -> the attention modules around the slot of that projection, canonical first."""


class Attentions:
    """Which attention modules are paired: those around the tied projections.

    A layer which has a `v_proj.v_scale` but no `v_proj.weight` is paired too.
    """

    def __init__(self) -> None:
        self._owners: dict[str, dict[str, tuple[str, ...]]] = {}
        self._blocked: set[str] = set()

    def add(self, tie: TieGroup, slots: Iterable[int]) -> None:
        """Enters a planned group with the slots of which any side is there."""
        found: dict[str, tuple[str, ...]] = {}
        for at in slots:
            slot = tie.slots[at]
            attention = attention_of(slot[0])
            if attention and len(slot) > 1:
                found[attention] = tuple(map(attention_of, slot))
        for attention, sides in found.items():
            self._owners.setdefault(attention, {}).setdefault(tie.id, sides)

    def block(self, tie: TieGroup) -> None:
        """A group that is kept whole keeps the scales of its attention modules too."""
        self._blocked.update(attention_of(slot[0]) for slot in tie.slots)

    def paired(self) -> list[tuple[str, Owners]]:
        """The canonical attention modules with the groups that pair them, in the order of their names."""
        return sorted((name, owners) for name, owners in self._owners.items() if name not in self._blocked)


def attention_of(name: str) -> str:
    """The module around a projection: "a.self_attn" for "a.self_attn.k_proj.weight"."""
    return name.rpartition(".")[0].rpartition(".")[0]


@dataclass(frozen=True)
class _Layer:
    """One attention module on all its sides.

    Attributes:
        canonical: its name on the canonical side.
        sides: its names.
        found: for each side, what follows the name ("k_proj.k_scale") -> row and companion, of the KV-cache tensors.
    """

    canonical: str
    sides: tuple[str, ...]
    found: tuple[Mapping[str, tuple[int, Companion]], ...]

    def rests(self) -> list[str]:
        """What follows the name, of the tensors of any side."""
        return sorted({rest for side in self.found for rest in side})

    def rows(self, rest: str) -> tuple[int, ...]:
        """The rows of that tensor, on the sides that have it."""
        return tuple(side[rest][0] for side in self.found if rest in side)

    def companion(self, rest: str) -> Companion:
        """Its role, as the first side has it."""
        return next(side[rest][1] for side in self.found if rest in side)

    def exact(self) -> list[str]:
        """Biases and zero points: they have no common value, so they are equal or the layer's scales stay."""
        return [rest for rest in self.rests() if any(s[rest][1].merge is None for s in self.found if rest in s)]

    def lone_bias(self) -> bool:
        """Whether a bias is there on some of the sides only that have KV-cache tensors."""
        having = sum(bool(side) for side in self.found)
        return any(len(self.rows(rest)) != having for rest in self.exact())


class KvScales:
    """Plans the merges of KV-cache scales.

    Args:
        tensors: the source.
        families: the formats that it shows.
        fates: what is decided already; the merges are entered there.
        groups: group id -> its number.
        separate: targets of merges that are not to be carried out (their biases differ).

    Attributes:
        merges: group id -> its merges.
        warnings: scales that stay on every side, and why.
    """

    def __init__(
        self,
        tensors: Tensors,
        families: tuple[str, ...],
        fates: Fates,
        groups: Mapping[str, int],
        separate: frozenset[str],
    ) -> None:
        self._tensors = tensors
        self._fates = fates
        self._groups = groups
        self._separate = separate
        self._families = families
        self.merges: dict[str, list[ScaleMerge]] = {}
        self.warnings: list[str] = []

    def plan(self, paired: Iterable[tuple[str, Owners]]) -> None:
        """Plans the attention modules that are `paired`."""
        by_module = kv_tensors(self._tensors, self._families)
        for canonical, owners in paired:
            sides = common_sides(owners)
            layer = _Layer(canonical, sides, tuple(by_module.get(side, {}) for side in sides))
            if layer.lone_bias():
                self.warnings.append(f"KV scales of '{canonical}' are kept separate: a bias is not on every side")
                continue
            self._plan_layer(layer, owners)

    def _plan_layer(self, layer: _Layer, owners: Owners) -> None:
        names = self._tensors.names
        # With a bias the zero point moves too: only equal scales and biases stand for each other.
        biased = any(len(layer.rows(rest)) > 1 for rest in layer.exact())
        equal = tuple(keys_of(names, layer.rows(rest)) for rest in layer.rests()) if biased else ()
        claimed = {rest: self._fates.claimed(np.array(layer.rows(rest))) for rest in layer.rests()}
        for rest in layer.rests():
            rows, companion = layer.rows(rest), layer.companion(rest)
            keys, target = keys_of(names, rows), f"{layer.canonical}.{rest}"
            if keys == (target,) or target in self._separate:
                continue
            if claimed[rest].any():  # another attention has merged them, whose projections are tied otherwise
                if not claimed[rest].all():
                    self.warnings.append(
                        f"KV scale '{target}' is kept separate: some of its sides are merged elsewhere"
                    )
                continue
            untied = self._untied_weight((key for key in keys if key != target), target)
            if untied is not None:
                what = "is stored too, and not tied to the projection of that name"
                self.warnings.append(f"KV scale '{target}' is kept separate: '{untied}' {what}")
                continue
            if not self._mergeable(rows, companion):
                self.warnings.append(f"KV scale '{target}' is kept separate: its sides are stored differently")
                continue
            owner = _owner(rest, owners)
            self.merges.setdefault(owner, []).append(ScaleMerge(target, keys, companion, kv=True, only_if_equal=equal))
            new_name = None if keys[0] == target else target
            decisions = _one_survives(rows, new_name, merged=companion.merge is not None)
            self._fates.enter(self._groups[owner], decisions)

    def _untied_weight(self, keys: Iterable[str], target: str) -> str | None:
        """A weight beside one of these scales that has no part in the weight beside `target`: its own tie, or nobody,
        decides where its scale is.
        """
        fates = self._fates
        own = set(_weights_beside(target))
        for key in keys:
            for name in _weights_beside(key):
                row = self._tensors.row.get(name)
                if row is None or fates.kept_name[row]:
                    continue
                holder = int(fates.stands_for[row])
                if (fates.new_names.get(holder) or self._tensors.names[holder]) not in own:
                    return name
        return None

    def _mergeable(self, rows: Sequence[int], companion: Companion) -> bool:
        """Whether the headers allow that one stands for all."""
        headers = [self._tensors.kinds[self._tensors.kind[row]] for row in rows]
        return len(set(headers)) == 1 if companion.merge is None else merging.mergeable(headers) is None


def kv_tensors(tensors: Tensors, families: tuple[str, ...]) -> dict[str, dict[str, tuple[int, Companion]]]:
    """Attention module -> what follows its name -> row and companion, of all KV-cache tensors."""
    words = formats.kv_words()
    leaves = [number for number, leaf in enumerate(tensors.leaves) if leaf in words]
    found: dict[str, dict[str, tuple[int, Companion]]] = {}
    for row in np.flatnonzero(np.isin(tensors.leaf, leaves)).tolist():
        key = tensors.names[row]
        hit = formats.kv_scale(key, families) or formats.kv_scale(key)
        if hit is not None:
            module, rest, companion = hit
            found.setdefault(module, {})[rest] = (row, companion)
    return found


def common_sides(owners: Owners) -> tuple[str, ...]:
    """The sides of an attention on which all of its tied projections agree, canonical first, each once."""
    first, *others = owners.values()
    return tuple(dict.fromkeys(side for side in first if all(side in other for other in others)))


def _weights_beside(scale: str) -> Iterable[str]:
    """The names that the weight of the projection may have which a scale belongs to."""
    return formats.main_names(f"{scale.rpartition('.')[0]}.weight")


def _owner(rest: str, owners: Owners) -> str:
    """The group that a KV scale is listed under: its own projection's, else the attention's first."""
    word = rest.partition(".")[0]
    for group in sorted(owners):
        if f".{word}." in f".{group}.":
            return group
    return min(owners)


def _one_survives(rows: Sequence[int], new_name: str | None, merged: bool) -> Decisions:
    """The first of `rows` stays, under `new_name` if there is one; the others are dropped for it."""
    stays = Action.RENAME if new_name is not None else Action.MERGE if merged else Action.KEEP
    count = len(rows)
    return Decisions(
        np.array(rows, np.int64),
        np.array([stays.code, *[Action.DROP.code] * (count - 1)], np.int8),
        np.full(count, rows[0], np.int64),
        np.array([merged, *[False] * (count - 1)]),
        {} if new_name is None else {rows[0]: new_name},
    )
