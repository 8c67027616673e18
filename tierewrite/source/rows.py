"""Named tuples by the hundred thousand: as many as a checkpoint has tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import Any, TypeVar, cast

_Row = TypeVar("_Row", bound=tuple[Any, ...])


def rows_of(kind: type[_Row], rows: Iterable[Iterable[Any]]) -> Iterator[_Row]:
    """`map(kind._make, rows)` without a call of Python's for each, in a quarter of the time.

    Args:
        kind: a NamedTuple's class.
        rows: the fields of each, all of them: that is not checked.
    """
    return cast("Iterator[_Row]", map(tuple.__new__, repeat(kind), rows))
