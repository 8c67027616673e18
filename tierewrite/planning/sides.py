"""What each tied parameter became on disk: the rows of the table that belong to it, and what their suffixes mean."""

from __future__ import annotations

import bisect
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tierewrite import formats
from tierewrite.formats import Companion, Role
from tierewrite.source.table import Tensors

_WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class Composition:
    """What the suffixes below one parameter are; the same for every expert, so it is worked out once.

    A part is the same on every side of a tie: the suffix below the module, with the parameter's own last word written
    as "*" (sides may call it differently).

    Attributes:
        suffixes: of the side's tensors, in the order of their names.
        exact: part -> index of its suffix, for the tensors that must be identical on all sides.
        ranges: part -> (index, companion), for the activation scales.
        unknown: index of the first suffix that no family knows, or -1.
    """

    suffixes: tuple[str, ...]
    exact: dict[str, int]
    ranges: dict[str, tuple[int, Companion]]
    unknown: int = -1


class Sides:
    """The tensors of each side of each slot, next to each other in one list of rows.

    Args:
        tensors: the source.
        families: the formats that it shows.
        names: the parameters, as if unquantized: every side of every slot.
        owned: keys that are parameters of the model themselves: never a companion of a neighbour.

    Attributes:
        rows: int64, rows of the source; those of one side follow each other, in the order of their names.
        first: int64 [names], where each side begins in `rows`.
        composition: int32 [names], the position of each side's composition in `compositions`.
        compositions: those that occur; the first is that of a side that is not there.
    """

    def __init__(
        self, tensors: Tensors, families: tuple[str, ...], names: Sequence[str], owned: Collection[str]
    ) -> None:
        self._tensors = tensors
        self._families = families
        self._numbers: dict[tuple[str, tuple[str, ...]], int] = {}
        self._known_members: dict[str, tuple[list[str], list[int]]] = {}
        self.compositions: list[Composition] = []
        self._numbered("weight", ())
        # A tied parameter's own name is never a companion of its neighbour (a tied bias beside a tied weight).
        self._reserved = {*names, *owned} if owned else set(names)
        self._place(names)
        self._sizes = np.array([len(one.suffixes) for one in self.compositions], np.int64)

    def _place(self, names: Sequence[str]) -> None:
        """Fills `rows`, `first` and `composition`."""
        rows, first, composition = self._modules
        # -1 is no module, and the last of `first` and `composition`.
        modules, cut = self._plain_modules, -len(_WEIGHT)
        module = np.array([modules.get(name[:cut], -1) if name.endswith(_WEIGHT) else -1 for name in names], np.int64)
        self.first, signature = first[module], composition[module]
        known = np.full(signature.max(initial=-1) + 2, -1, np.int32)  # the last one is for -1
        known[-1] = 0
        for number in np.flatnonzero(np.bincount(signature[signature >= 0])).tolist():
            known[number] = self._numbered("weight", self._signatures[number])
        self.composition = known[signature]
        found: list[int] = []
        for at in self._not_plain(names, module):
            below = self._below(names[at])
            self.first[at] = len(rows) + len(found)
            self.composition[at] = self._composition_of(names[at], below)
            found.extend(below)
        self.rows = np.concatenate([rows, np.array(found, np.int64)])

    def _not_plain(self, names: Sequence[str], module: np.ndarray) -> list[int]:
        """Positions of the parameters that are not simply the weight of a module without modules below it."""
        return [
            at
            for at in np.flatnonzero(module < 0).tolist()
            if not names[at].endswith(_WEIGHT)
            or names[at][: -len(_WEIGHT)] in self._with_modules_below
            or names[at] == _WEIGHT
        ]

    @cached_property
    def _with_modules_below(self) -> set[str]:
        """Every module that has another below it, and "": only the words of their names tell what belongs to them."""
        found: set[str] = {""}
        for module in self._tensors.modules:
            parent = module.rpartition(".")[0]
            while parent not in found:
                found.add(parent)
                parent = parent.rpartition(".")[0]
        return found

    @cached_property
    def _plain_modules(self) -> dict[str, int]:
        """Module -> number, of those that have no module below them."""
        nested = self._with_modules_below
        return {name: number for name, number in self._tensors.modules.items() if name not in nested}

    @cached_property
    def _modules(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The rows of all modules one after the other; for each module where it begins, and its signature.

        Left out are parameters of their own beside a weight. Modules whose leaves are the same have one signature.
        """
        tensors = self._tensors
        rank = np.argsort(np.argsort(np.array(tensors.leaves, object))) if tensors.leaves else np.zeros(0, np.int64)
        order = np.lexsort((rank[tensors.leaf], tensors.module))
        reserved = np.fromiter(map(self._reserved.__contains__, tensors.names), bool, len(tensors))
        weight = tensors.leaves.index("weight") if "weight" in tensors.leaves else -1
        order = order[~(reserved & (tensors.leaf != weight))[order]]
        count = np.bincount(tensors.module[order], minlength=len(tensors.modules))
        end = np.cumsum(count)
        first = np.append(end - count, 0)
        leaf = tensors.leaf[order].astype(np.int32)
        text, width = leaf.tobytes(), leaf.itemsize
        numbers: dict[bytes, int] = {}
        signature = [
            numbers.setdefault(text[a:b], len(numbers))
            for a, b in zip((first[:-1] * width).tolist(), (end * width).tolist(), strict=True)
        ]
        self._signatures = [
            tuple(tensors.leaves[leaf] for leaf in np.frombuffer(key, np.int32).tolist()) for key in numbers
        ]
        return order, first, np.array([*signature, -1], np.int64)

    def rows_of(self, first: np.ndarray, composition: np.ndarray) -> np.ndarray:
        """int64, the rows of all sides that begin at `first` and have these compositions, one after the other."""
        size = self._sizes[composition]
        before = np.cumsum(size) - size
        rows: np.ndarray = self.rows[np.repeat(first - before, size) + np.arange(size.sum())]
        return rows

    def _below(self, name: str) -> list[int]:
        """The rows of what the parameter `name` became on disk."""
        names, reserved = self._tensors.names, self._reserved
        parent, _, leaf = name.rpartition(".")
        if leaf == "weight":
            rows = self._starting_with(f"{parent}." if parent else leaf)
        else:
            stem = f"{parent}." if parent else ""
            rows = [row for start in formats.beginnings(leaf) for row in self._starting_with(stem + start)]
            if name in self._tensors:
                rows.insert(0, self._tensors.row[name])
        return [row for row in rows if names[row] not in reserved or names[row] == name]

    def _composition_of(self, name: str, rows: Sequence[int]) -> int:
        parent, _, leaf = name.rpartition(".")
        cut = len(parent) + 1 if parent else 0
        return self._numbered(leaf, tuple([self._tensors.names[row][cut:] for row in rows]))

    def _numbered(self, leaf: str, suffixes: tuple[str, ...]) -> int:
        """The number of the composition of a parameter called `leaf` with these suffixes below its module."""
        number = self._numbers.get((leaf, suffixes))
        if number is None:
            number = self._numbers[leaf, suffixes] = len(self.compositions)
            self.compositions.append(_classified(leaf, suffixes, self._families))
        return number

    def _starting_with(self, prefix: str) -> list[int]:
        """Rows of the keys that begin with `prefix`, in the order of their names."""
        modules = self._sorted_modules
        found = [row for module in modules[_beginning(modules, prefix)] for row in self._members(module)[1]]
        names, rows = self._members(prefix.rpartition(".")[0])
        found.extend(rows[_beginning(names, prefix)])
        found.sort(key=self._tensors.names.__getitem__)
        return found

    @cached_property
    def _sorted_modules(self) -> list[str]:
        return sorted(self._tensors.modules)

    def _members(self, module: str) -> tuple[list[str], list[int]]:
        """The keys directly in `module`, sorted, and their rows."""
        known = self._known_members.get(module)
        if known is None:
            order, first = self._all_modules
            number = self._tensors.modules.get(module)
            rows: list[int] = [] if number is None else order[first[number] : first[number + 1]].tolist()
            rows.sort(key=self._tensors.names.__getitem__)
            known = self._known_members[module] = ([self._tensors.names[row] for row in rows], rows)
        return known

    @cached_property
    def _all_modules(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows of all modules one after the other, nothing left out, and where each module begins."""
        module = self._tensors.module
        count = np.bincount(module, minlength=len(self._tensors.modules))
        return np.argsort(module, kind="stable"), np.concatenate([[0], np.cumsum(count)])


def _beginning(names: Sequence[str], prefix: str) -> slice:
    """Where in sorted `names` those are that begin with `prefix`."""
    start = end = bisect.bisect_left(names, prefix)
    while end < len(names) and names[end].startswith(prefix):
        end += 1
    return slice(start, end)


def _classified(leaf: str, suffixes: tuple[str, ...], families: tuple[str, ...]) -> Composition:
    """What the tensors with these suffixes are to the parameter `leaf` of their module."""
    exact: dict[str, int] = {}
    ranges: dict[str, tuple[int, Companion]] = {}
    for index, suffix in enumerate(suffixes):
        companion = formats.classify(leaf, suffix, families) or formats.classify(leaf, suffix)
        if companion is None:
            return Composition(suffixes, exact, ranges, unknown=index)
        part = suffix.replace(leaf, "*", 1) if suffix.startswith((leaf, f"_{leaf}_")) else suffix
        if companion.role.identical:
            exact[part] = index
        elif companion.role is Role.ACTIVATION:
            ranges[part] = (index, companion)
    return Composition(suffixes, exact, ranges)
