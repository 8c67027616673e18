"""Which elements of a parameter were written, and by whom: boxes in the parameter's own dimensions, counted exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod

Box = tuple[tuple[int, int], ...]
"""Start and end in each dimension."""
MOST_CELLS = 1 << 21


@dataclass(frozen=True)
class Write:
    """One write into a parameter's memory.

    Attributes:
        keys: the checkpoint's tensors that the values come from; () for the loader's own, such as padding.
        offset, shape, stride: the region in the memory, in elements.
    """

    keys: tuple[str, ...]
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass
class Coverage:
    """What the writes into one parameter come to.

    Attributes:
        missing: elements that nothing wrote.
        rows: numbers of the first dimension's rows of which nothing was written.
        overwritten: (first keys, last keys) -> elements that both wrote.
        known: False where some region is no box of the parameter's dimensions.
    """

    missing: int = 0
    rows: list[int] = field(default_factory=list)
    overwritten: dict[tuple[tuple[str, ...], tuple[str, ...]], int] = field(default_factory=dict)
    known: bool = True


def box_of(shape: Sequence[int], stride: Sequence[int], base: int, write: Write) -> Box | None:
    """The region of `write` as a box of a parameter that lies at `base`; None if it is none."""
    order = sorted((d for d in range(len(shape)) if shape[d] > 1), key=lambda d: -stride[d])
    rest = write.offset - base
    start = [0] * len(shape)
    for d in order:
        start[d], rest = divmod(rest, stride[d]) if stride[d] else (0, rest)
    if rest or write.offset < base:
        return None
    length = [1] * len(shape)
    for size, step in zip(write.shape, write.stride):  # noqa: B905 (both are of one tensor)
        if size == 1:
            continue
        at = next((i for i, d in enumerate(order) if stride[d] == step and length[d] == 1), None)
        if at is None:
            return None
        # A dimension of the region may run over several of the parameter's, the inner ones whole.
        while size > shape[order[at]]:
            d = order[at]
            if at == 0 or start[d] or size % shape[d] or stride[order[at - 1]] != stride[d] * shape[d]:
                return None
            length[d], size, at = shape[d], size // shape[d], at - 1
        length[order[at]] = size
    box = tuple((s, s + n) for s, n in zip(start, length))  # noqa: B905
    return box if all(end <= size for (_, end), size in zip(box, shape)) else None  # noqa: B905


def coverage(shape: Sequence[int], stride: Sequence[int], base: int, writes: Sequence[Write]) -> Coverage:
    """What `writes`, in their order, come to."""
    boxes: list[tuple[Box, tuple[str, ...]]] = []
    for write in dict.fromkeys(writes):
        if prod(write.shape) == 0:
            continue
        box = box_of(shape, stride, base, write)
        if box is None:
            return Coverage(known=False)
        boxes.append((box, write.keys))
    cuts = [sorted({0, size, *(x for box, _ in boxes for x in box[d])}) for d, size in enumerate(shape)]
    places = [{x: i for i, x in enumerate(each)} for each in cuts]
    if prod(len(each) for each in cuts) > MOST_CELLS:
        return Coverage(known=False)
    owner: dict[tuple[int, ...], tuple[str, ...]] = {}
    found = Coverage()
    for box, keys in boxes:
        ranges = [range(places[d][a], places[d][b]) for d, (a, b) in enumerate(box)]
        for cell in product(*ranges):
            before = owner.get(cell)
            if before is not None and before and keys and before != keys:
                size = prod(cuts[d][i + 1] - cuts[d][i] for d, i in enumerate(cell))
                found.overwritten[before, keys] = found.overwritten.get((before, keys), 0) + size
            owner[cell] = keys if keys or before is None else before
    written = sum(prod(cuts[d][i + 1] - cuts[d][i] for d, i in enumerate(cell)) for cell in owner)
    found.missing = prod(shape) - written
    if found.missing and shape:
        touched = {cell[0] for cell in owner}
        gaps = [(cuts[0][i], cuts[0][i + 1]) for i in range(len(cuts[0]) - 1) if i not in touched]
        found.rows = [row for a, b in gaps for row in range(a, b)]
    return found
