"""What a plan is told of the names that a consumer needs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NeededNames:
    """The names that a consumer has to find, though a tie makes another tensor stand for them.

    Of a confirmed tie such a name is not dropped: its tensor stays in its place, with the same value as the side that
    stands for the others (equal bytes, or the merged scale). Names that the source does not have are not added.

    Attributes:
        consumer: who needs them, for messages; "" where nobody does.
        names: keys of the source. Those that no tie would drop or rename may be among them, and change nothing.
        notes: how that is known, for the report.
        of_dropped: the notes speak of companions that are dropped: where none is, there is nothing to say.
    """

    consumer: str = ""
    names: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    of_dropped: bool = False
