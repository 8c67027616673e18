"""Names of the keys that would have filled a parameter, by those that filled its like in another layer or row."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from tierewrite.consumers.loaded import Rank, Unfilled
from tierewrite.formats.numbered import pattern_of


class ExpectedKeys:
    """What one rank's facts say of keys that are not there."""

    def __init__(self, rank: Rank) -> None:
        self.rank = rank

    @cached_property
    def _filled(self) -> dict[str, list[str]]:
        """Parameters that are filled whole, by their names without numbers."""
        partly = {one.parameter for one in self.rank.unfilled}
        found: dict[str, list[str]] = {}
        for parameter in self.rank.written:
            if parameter not in partly:
                found.setdefault(pattern_of(parameter), []).append(parameter)
        return found

    def is_scale(self, parameter: str) -> bool:
        """The parameter stands beside a weight, and is a scale or zero point of it by its name."""
        module, _, leaf = parameter.rpartition(".")
        return ("scale" in leaf or "zero" in leaf) and module in self._with_weight

    @cached_property
    def _with_weight(self) -> set[str]:
        names = (*self.rank.written, *(one.parameter for one in self.rank.unfilled))
        return {module for module, _, leaf in (name.rpartition(".") for name in names) if is_weight(leaf)}

    def has_like(self, unfilled: Unfilled) -> bool:
        """Whether some key wrote into a parameter of that name, whatever its numbers."""
        return pattern_of(unfilled.parameter) in self._written

    @cached_property
    def _written(self) -> set[str]:
        return {pattern_of(parameter) for parameter in self.rank.written}

    def of(self, unfilled: Unfilled) -> tuple[str, ...]:
        """Keys that would have filled it, without those that wrote into it; () where none is known."""
        there = dict.fromkeys(self.rank.written.get(unfilled.parameter, ()))
        like = next(iter(self._filled.get(pattern_of(unfilled.parameter), ())), None)
        wanted: dict[str, None] = {}
        if like is not None:
            numbers = _numbers(like), _numbers(unfilled.parameter)
            wanted = {name: None for key in self.rank.written[like] if (name := _renumbered(key, *numbers)) is not None}
        elif unfilled.rows:
            numbers = _numbers(unfilled.parameter), _numbers(unfilled.parameter)
            for key in there:
                for row in unfilled.rows:
                    name = _renumbered(key, *numbers, row)
                    if name is not None:
                        wanted[name] = None
        return tuple(name for name in wanted if name not in there)


def is_weight(leaf: str) -> bool:
    """The last part of a parameter's name is a weight's: `weight`, `w13_weight`, `qweight`, `weight_packed`."""
    return "weight" in leaf and "scale" not in leaf and "zero" not in leaf


def _numbers(name: str) -> list[str]:
    return [part for part in name.split(".") if part.isdecimal()]


def _renumbered(key: str, numbers: Sequence[str], wanted: Sequence[str], row: int | None = None) -> str | None:
    """`key` with the parameter's `numbers` replaced by the `wanted` ones, and the one that is left over, an expert's,
    by `row`; None where that does not fit.
    """
    parts = key.split(".")
    used = 0
    replaced = False
    for at, part in enumerate(parts):
        if not part.isdecimal():
            continue
        if used < len(numbers) and part == numbers[used]:
            parts[at] = wanted[used]
            used += 1
        elif row is not None and not replaced:
            parts[at] = str(row)
            replaced = True
    fits = used == len(numbers) and (row is None or replaced)
    return ".".join(parts) if fits else None
