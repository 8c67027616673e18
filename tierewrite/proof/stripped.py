"""With `strip_prefix`: the names that the rest of the proof goes by are those of SRC without names of wrappers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tierewrite.proof import Problem
from tierewrite.source.table import Names
from tierewrite.ties.wrappers import INNER, OUTER


def check_stripped(before: Names, after: Names) -> list[Problem]:
    """Row by row, `after` has to be a name of SRC, or that name without wrappers: all of them, or none.

    Args:
        before: the names in SRC.
        after: what the proof takes as their names, in the same order.
    """
    if before.names == after.names:
        return []
    wanted = list(_without(before.names))
    return [
        Problem("prefix", name, f"the name that '{key}' of SRC gets is '{name}'; expected '{want}'")
        for key, name, want in zip(before.names, after.names, wanted, strict=True)
        if name != want
    ]


def _without(names: Sequence[str]) -> Iterator[str]:
    """The names, word by word: no wrapper that all of them begin with, and none of torch's anywhere."""
    rows = [name.split(".") for name in names]
    wrappers = [wrapper.split(".") for wrapper in OUTER]
    at = 0
    while True:
        found = next((w for w in wrappers if all(row[at : at + len(w)] == w for row in rows)), None)
        if found is None:
            break
        at += len(found)
    for row in rows:
        yield ".".join(word for place, word in enumerate(row[at:]) if word not in INNER or place == len(row) - at - 1)
