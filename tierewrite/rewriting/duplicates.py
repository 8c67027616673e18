"""Large tensors that hold the same bytes though no tie is declared: a hint for people, never a reason to drop one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from tierewrite.engines import Engine
from tierewrite.errors import shown
from tierewrite.planning.plan import Action, RewritePlan
from tierewrite.source.bytes import read_tensors
from tierewrite.source.table import Checkpoint, TensorEntry, Tensors
from tierewrite.units import size

LEAST_BYTES = 1 << 20
"""Smaller tensors are equal by chance, or not worth a word."""
_SHOWN = 10
_SAMPLE_BYTES = 4096


def duplicate_hints(checkpoint: Checkpoint, plan: RewritePlan, workers: Engine) -> tuple[str, ...]:
    """A sentence for each set of large tensors that stay and hold the same bytes, ten of them at most.

    Raises:
        SourceChanged, SystemFailure: reading failed.
    """
    likely = _alike(checkpoint, _large_that_stay(plan))
    digests = workers.hash(checkpoint, likely, "hashing") if likely else {}
    same: dict[tuple[int, bytes], list[str]] = {}
    for name, digest in digests.items():
        same.setdefault((int(plan.source.kind[plan.source.row[name]]), digest), []).append(name)
    sets = [sorted(names, key=plan.source.row.__getitem__) for names in same.values() if len(names) > 1]
    sets.sort(key=lambda names: plan.source.row[names[0]])
    hints = [_hint(names, plan.source[names[0]].nbytes) for names in sets[:_SHOWN]]
    if len(sets) > _SHOWN:
        hints.append(f"hint: {len(sets) - _SHOWN} more sets of tensors hold the same bytes")
    return tuple(hints)


def _hint(names: list[str], nbytes: int) -> str:
    others = f" and {len(names) - 3} more" if len(names) > 3 else ""
    listed = ", ".join(f"'{shown(name)}'" for name in names[:3])
    return (
        f"hint: {listed}{others} hold the same {size(nbytes)}, and no tie between them is declared or confirmed: all "
        "are kept"
    )


def _large_that_stay(plan: RewritePlan) -> list[int]:
    rows: list[int] = np.flatnonzero((plan.source.nbytes >= LEAST_BYTES) & (plan.action != Action.DROP.code)).tolist()
    return rows


def _alike(checkpoint: Checkpoint, rows: Iterable[int]) -> list[str]:
    """Those of `rows` whose beginning, middle and end another one of the same dtype and shape has."""
    tensors = checkpoint.tensors
    by_kind: dict[int, list[int]] = {}
    for row in rows:
        by_kind.setdefault(int(tensors.kind[row]), []).append(row)
    several = [row for group in by_kind.values() if len(group) > 1 for row in group]
    pieces = {piece.name: piece for row in several for piece in _pieces(tensors, row)}
    read = read_tensors(Checkpoint.of(checkpoint.root, checkpoint.shards, pieces), pieces) if pieces else {}
    alike: dict[tuple[object, ...], list[str]] = {}
    for row in several:
        sample = (int(tensors.kind[row]), *(read[piece.name] for piece in _pieces(tensors, row)))
        alike.setdefault(sample, []).append(tensors.names[row])
    return [name for names in alike.values() if len(names) > 1 for name in names]


def _pieces(tensors: Tensors, row: int) -> Iterator[TensorEntry]:
    """A little of a tensor from its beginning, its middle and its end, as tensors of their own."""
    entry = tensors.entry(row)
    middle = (entry.start + entry.end - _SAMPLE_BYTES) // 2
    for at in (entry.start, middle, entry.end - _SAMPLE_BYTES):
        yield TensorEntry(f"{row} {at}", "U8", (_SAMPLE_BYTES,), entry.shard, at, at + _SAMPLE_BYTES)
