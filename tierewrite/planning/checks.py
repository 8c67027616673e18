"""What a group's bytes decide: which tensors must be equal, and which scales become one. Rows, read as keys."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, overload

import numpy as np

from tierewrite.formats import Companion
from tierewrite.source.table import Tensors


class ScaleMerge(NamedTuple):
    """Scales of several sides that become one value.

    Attributes:
        target: key in the output.
        keys: source keys, the carrying one first: its dtype, shape and place are kept.
        companion: the role, with the direction of the merge.
        kv: True for a KV-cache scale (merged only on request).
        only_if_equal: keys per companion bias, one tuple a bias, that must agree byte for byte, or nothing is merged.
    """

    target: str
    keys: tuple[str, ...]
    companion: Companion
    kv: bool = False
    only_if_equal: tuple[tuple[str, ...], ...] = ()


class Checks(Sequence[tuple[str, ...]]):
    """Tuples of keys whose tensors must be equal byte for byte, the side that stays first.

    Attributes:
        rows: int64 [tuples, sides], rows of the source; -1 where a tuple has fewer sides.
        sides: int64 [tuples, sides], which side of the tie each row belongs to, 0 for the canonical one; -1 as above.
    """

    def __init__(self, source: Tensors, rows: np.ndarray, sides: np.ndarray) -> None:
        self._names = source.names
        self.rows = rows
        self.sides = sides

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> tuple[str, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> Checks: ...
    def __getitem__(self, index: int | slice) -> tuple[str, ...] | Checks:
        if isinstance(index, slice):
            return self.where(index)
        return keys_of(self._names, self.rows[index].tolist())

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        return (keys_of(self._names, rows) for rows in self.rows.tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def all_keys(self) -> list[str]:
        """All keys, as often as they occur."""
        return list(map(self._names.__getitem__, self.present_rows().tolist()))

    def present_rows(self) -> np.ndarray:
        """int64, the rows of all keys, as often as they occur."""
        found: np.ndarray = self.rows[self.rows >= 0]
        return found

    def where(self, chosen: slice | np.ndarray) -> Checks:
        """Those of a slice, a mask or an array of positions."""
        part = Checks.__new__(Checks)
        part._names, part.rows, part.sides = self._names, self.rows[chosen], self.sides[chosen]
        return part

    def __repr__(self) -> str:
        return f"<{len(self):,} checks>"


class ScaleMerges(Sequence[ScaleMerge]):
    """The merges of a group: those beside its weights as columns, then those of KV-cache scales.

    Attributes:
        rows: int64 [merges, sides], rows of the source, the carrying one first; -1 where a merge has fewer sides.
        companion: int32 [merges], position in `companions`.
        companions: the roles that occur.
        targets: position in `rows` -> key in the output, where that is not the carrying key itself.
        kv: the merges of KV-cache scales.
    """

    def __init__(
        self,
        source: Tensors,
        rows: np.ndarray,
        companion: np.ndarray,
        companions: Sequence[Companion],
        targets: Mapping[int, str],
        kv: Sequence[ScaleMerge] = (),
    ) -> None:
        self._names = source.names
        self.rows = rows
        self.companion = companion
        self.companions = tuple(companions)
        self.targets = targets
        self.kv = tuple(kv)

    def __len__(self) -> int:
        return len(self.rows) + len(self.kv)

    @overload
    def __getitem__(self, index: int) -> ScaleMerge: ...
    @overload
    def __getitem__(self, index: slice) -> list[ScaleMerge]: ...
    def __getitem__(self, index: int | slice) -> ScaleMerge | list[ScaleMerge]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        if at >= len(self.rows):
            return self.kv[at - len(self.rows)]
        return self._made(at, self.rows[at].tolist(), int(self.companion[at]))

    def __iter__(self) -> Iterator[ScaleMerge]:
        columns = zip(self.rows.tolist(), self.companion.tolist(), strict=True)
        for at, (rows, companion) in enumerate(columns):
            yield self._made(at, rows, companion)
        yield from self.kv

    def _made(self, at: int, rows: list[int], companion: int) -> ScaleMerge:
        keys = keys_of(self._names, rows)
        return ScaleMerge(self.targets.get(at, keys[0]), keys, self.companions[companion])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{len(self):,} merges>"


def keys_of(names: Sequence[str], rows: Iterable[int]) -> tuple[str, ...]:
    """The keys of `rows`, without the -1 that fill a line up."""
    return tuple([names[row] for row in rows if row >= 0])
