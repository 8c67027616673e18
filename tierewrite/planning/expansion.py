"""The reverse of deduplication: which names a canonical checkpoint lacks, and the tensors that they are copies of.

A side of a tie of which nothing is on disk gets everything that the first side has of the weight: what was computed
from it, and the activation scales. What belongs to each side by itself (a bias, a KV-cache scale) is there already, or
was never there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from tierewrite import formats
from tierewrite.errors import Refused, shown
from tierewrite.planning.alignment import data_start_of
from tierewrite.planning.groups import canonical_key
from tierewrite.planning.kv_scales import Attentions, common_sides, kv_tensors
from tierewrite.planning.layout import fullest, shard_name, shards
from tierewrite.planning.plan import Action, OutShard, RewritePlan
from tierewrite.planning.policy import KVScales, Policy
from tierewrite.planning.sides import Composition, Sides
from tierewrite.source.table import Checkpoint, Tensors
from tierewrite.ties.on_disk import DiskTies


class Alias(NamedTuple):
    """A name that is written out.

    Attributes:
        name: its key.
        row: of the tensor that it is a copy of.
        group: id of the tie.
        beside: what its side has of the weight already: rows of the first side's tensors, each with its own. Where one
            pair differs, the side would become a mixture of two weights.
    """

    name: str
    row: int
    group: str
    beside: tuple[tuple[int, int], ...] = ()


def missing_aliases(checkpoint: Checkpoint, ties: DiskTies, kv_scales: KVScales = "keep") -> list[Alias]:
    """The names that the ties give and the checkpoint lacks, tie by tie.

    Args:
        kv_scales: "merge" where KV-cache scales were merged: they are written out for every side that has none.

    Raises:
        Refused: a tensor beside a tied parameter is of no known format, or a name is that of another tensor.
    """
    tensors = checkpoint.tensors
    families = formats.detect(checkpoint.config, checkpoint.quant_config, tensors.leaves)
    names = [name for tie in ties.groups for slot in tie.slots for name in slot]
    sides = Sides(tensors, families, names, ties.owned)
    found: list[Alias] = []
    attentions = Attentions()
    at = 0
    for tie in ties.groups:
        for slot in tie.slots:
            places = range(at, at := at + len(slot))
            if tie.problem is None:
                found.extend(_of_slot(sides, slot, places, tie.id))
        if tie.problem is None:
            attentions.add(tie, range(len(tie.slots)))
    if kv_scales == "merge":
        found.extend(_kv_aliases(tensors, families, attentions))
    _refuse_clashes(tensors, found)
    return found


def _of_slot(sides: Sides, slot: Sequence[str], places: Sequence[int], group: str) -> Iterator[Alias]:
    """What the sides of a slot of the tie `group` lack.

    Raises:
        Refused: the side that is there has a tensor of no known format.
    """
    compositions = [sides.compositions[sides.composition[place]] for place in places]
    lead = next((n for n, one in enumerate(compositions) if one.exact), None)
    if lead is None:
        return
    there = compositions[lead]
    if there.unknown >= 0:
        raise Refused(
            f"no known format has the suffix '{shown(there.suffixes[there.unknown])}' beside the tied parameter "
            f"'{shown(slot[lead])}', so what its other names are on disk is not known"
        )
    parts = {**there.exact, **{part: index for part, (index, _) in there.ranges.items()}}
    first = sides.first[places[lead]]
    for name, one, place in zip(slot, compositions, places, strict=True):
        if one.unknown < 0 and _is_lacking(one, there):
            lacking = parts.keys() - one.exact.keys() - one.ranges.keys()
            beside = tuple(
                (int(sides.rows[first + there.exact[part]]), int(sides.rows[sides.first[place] + index]))
                for part, index in one.exact.items()
            )
            for part in (part for part in parts if part in lacking):
                yield Alias(canonical_key(name, part), int(sides.rows[first + parts[part]]), group, beside)


def _is_lacking(side: Composition, lead: Composition) -> bool:
    """Whether a side has less of the weight than the first one, and nothing else: it is not a tensor of its own."""
    return side.exact.keys() < lead.exact.keys() and ("*" not in side.exact or len(lead.exact) == 1)


def _kv_aliases(tensors: Tensors, families: tuple[str, ...], attentions: Attentions) -> Iterator[Alias]:
    """The KV-cache scales of attention modules that have none while the canonical one has."""
    by_module = kv_tensors(tensors, families)
    for canonical, owners in attentions.paired():
        for side in common_sides(owners):
            if side not in by_module:
                for rest, (row, _) in by_module.get(canonical, {}).items():
                    yield Alias(f"{side}.{rest}", row, min(owners))


def _refuse_clashes(tensors: Tensors, aliases: Collection[Alias]) -> None:
    """Raises Refused: a name is there already, or belongs to two ties."""
    taken: set[str] = set()
    for alias in aliases:
        if alias.name in taken or alias.name in tensors:
            raise Refused(
                f"'{shown(alias.name)}', a name of the tie of '{shown(alias.group)}', is that of another tensor",
                tensor=alias.name,
            )
        taken.add(alias.name)


def expansion(
    checkpoint: Checkpoint, aliases: Sequence[Alias], max_shard_size: int | None, warnings: Sequence[str]
) -> RewritePlan:
    """The plan that keeps every tensor and adds `aliases`.

    The files of the source stay as they are, and the aliases come in files of their own, none fuller than the fullest.
    So a rewrite with the default options leaves the source's files again.

    Args:
        max_shard_size: most bytes in a file, then of all tensors; None as above.
    """
    tensors = checkpoint.tensors
    order = np.lexsort((tensors.start, tensors.shard))
    names = [tensors.names[row] for row in order.tolist()]
    added = [(alias.name, alias.row) for alias in aliases]
    count = len(tensors)
    unmerged = np.zeros(count, bool)
    if max_shard_size is None:
        nothing = np.empty(0, np.int64)
        copied = shards(tensors, nothing, [], unmerged, added, fullest(tensors)) if added else ()
        apart = [*_as_they_are(tensors, order, len(checkpoint.shards)), *copied]
        files = tuple(replace(file, name=shard_name(number, len(apart))) for number, file in enumerate(apart))
    else:
        files = shards(tensors, order, names, unmerged, added, max_shard_size)
    return RewritePlan(
        source=tensors,
        action=np.full(count, Action.KEEP.code, np.int8),
        stands_for=np.arange(count, dtype=np.int64),
        merged=unmerged,
        group=np.full(count, -1, np.int32),
        new_names={},
        groups=(),
        shards=files,
        policy=Policy(max_shard_size=max_shard_size),
        warnings=tuple(warnings),
        source_bytes=tensors.total_bytes,
        source_shards=len(checkpoint.shards),
    )


def _as_they_are(tensors: Tensors, order: np.ndarray, count: int) -> Iterator[OutShard]:
    """The files of the source, each with its tensors in their order."""
    for number in range(count):
        rows = order[tensors.shard[order] == number]
        names = [tensors.names[row] for row in rows.tolist()]
        place = data_start_of(tensors, rows)
        yield OutShard("", tensors, names, rows, np.cumsum(tensors.nbytes[rows]), np.zeros(len(rows), bool), place)
