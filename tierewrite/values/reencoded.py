"""NVFP4 blobs that are re-encoded: which ones, to what scale.

Two occasions. `--on-mismatch repack`: the sides of a tie hold the same weight under different `weight_scale_2`; one
blob is written, re-encoded to the largest. `--unify-fused-scales`: projections that a consumer fuses (q/k/v, gate/up)
get one `weight_scale_2`, the largest of them, because a fused kernel has one for all. compressed-tensors'
`weight_global_scale` is the reciprocal: there the smallest.

Refused: sides whose decoded weights differ by more than the rounding of the coarser encoding, and scales that are zero,
negative or not finite (`nvfp4.widest` says so), block scales that are negative or NaN. A fused set with such a scale is
left as it is, with a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from tierewrite.errors import shown
from tierewrite.formats.fused import FusedSets
from tierewrite.formats.nvfp4_blobs import blob_of, fused_sets
from tierewrite.numbers import nvfp4
from tierewrite.planning.plan import GroupPlan, RewritePlan
from tierewrite.source.bytes import read_tensors
from tierewrite.source.table import Checkpoint, TensorEntry
from tierewrite.values.content import (
    Blob,
    Content,
    Encode,
    Made,
    Patch,
    blocks_of,
    has_sound_scales,
    range_of,
    scale_value,
)


@dataclass(frozen=True, slots=True)
class BlobKeys:
    """The three tensors of an NVFP4 weight, by their source keys.

    Attributes:
        weight: codes, uint8.
        weight_scale: block scales, E4M3.
        scale: `weight_scale_2`, or with `reciprocal` compressed-tensors' `weight_global_scale`; F32, one value.
    """

    weight: str
    weight_scale: str
    scale: str
    reciprocal: bool

    def located(self, checkpoint: Checkpoint, scale: bytes) -> Blob:
        """The weight in its files; `scale` are the bytes of its third tensor."""
        return Blob(range_of(checkpoint, self.weight), range_of(checkpoint, self.weight_scale), scale, self.reciprocal)


@dataclass(frozen=True, slots=True)
class Reencoding:
    """One weight of the output that is not a copy, for the report.

    Attributes:
        module: its module in the output.
        reason: "mismatch" (the sides differed by scaling) or "fused" (unified with its fused siblings).
        scale: the new scale's four bytes.
        weight: output key of its codes.
        blob: the side that is re-encoded.
        others: the other sides that it stands for.
        largest, rms: how far decoded weights moved, over all sides; None before it is done.
    """

    module: str
    reason: str
    scale: bytes
    weight: str
    blob: BlobKeys
    others: tuple[BlobKeys, ...]
    largest: float | None = None
    rms: float | None = None

    def done(self, made: Mapping[str, Made]) -> Reencoding:
        """This, with how far it moved the weights (`made`: output key -> what was written)."""
        moved = made[self.weight].moved
        return replace(self, largest=moved.largest, rms=moved.rms)

    def to_json(self) -> dict[str, object]:
        """One entry of `reencoded` in the report's JSON."""
        return {
            "module": self.module,
            "reason": self.reason,
            "scale": float(np.frombuffer(self.scale, "<f4")[0]),
            "largest_change": self.largest,
            "rms_change": self.rms,
        }


@dataclass(frozen=True)
class Reencodings:
    """All of a plan's, with what could not be unified.

    Attributes:
        contents: output key -> what is written there: three tensors a weight.
    """

    work: tuple[Reencoding, ...]
    contents: Mapping[str, Content]
    warnings: tuple[str, ...] = ()


def reconcile(
    checkpoint: Checkpoint, group: GroupPlan, digests: Mapping[str, bytes]
) -> tuple[frozenset[str], str | None]:
    """Whether the sides of a refuted group differ only by how they are scaled.

    Returns:
        The modules (canonical or surviving side) whose blobs differ by scaling alone, and None; or nothing and the
        reason why the group stays refuted.
    """
    rows = {row[0]: row for row in group.checks}
    modules: dict[str, None] = {}
    for row in group.checks:
        if all(digests[key] == digests[row[0]] for key in row):
            continue
        module, parts = blob_of(row[0], checkpoint.tensors)
        if parts is None or not all(f"{module}.{part}" in rows for part in parts):
            return frozenset(), f"'{row[0]}' is no part of an NVFP4 weight, and is not re-encoded"
        modules[module] = None
    for module in modules:
        sides = _sides(checkpoint, module, rows)
        first = sides[0]
        for other in sides[1:]:
            reason = _why_different(checkpoint, first, other)
            if reason is not None:
                return frozenset(), f"'{first.weight}' and '{other.weight}' {reason}"
    return frozenset(modules), None


def _sides(checkpoint: Checkpoint, module: str, rows: Mapping[str, tuple[str, ...]]) -> list[BlobKeys]:
    _, parts = blob_of(f"{module}.weight_scale", checkpoint.tensors)
    assert parts is not None
    codes, scales, scale = (rows[f"{module}.{part}"] for part in parts)
    reciprocal = parts[0] != "weight"
    return [BlobKeys(c, s, t, reciprocal) for c, s, t in zip(codes, scales, scale, strict=True)]


def _why_different(checkpoint: Checkpoint, first: BlobKeys, other: BlobKeys) -> str | None:
    """Why two blobs cannot stem from one weight; None if they can."""
    scales = read_tensors(checkpoint, (first.scale, other.scale))
    left, right = (scale_value(scales[key]) for key in (first.scale, other.scale))
    elements = outside = 0
    worst = 0.0
    try:
        nvfp4.widest((left, right), reciprocal=first.reciprocal)
        streams = [blocks_of(blob.located(checkpoint, scales[blob.scale])) for blob in (first, other)]
        for (codes, blocks), (codes_2, blocks_2) in zip(*streams, strict=True):
            found = nvfp4.agree_up_to_scaling(
                (codes, blocks, left), (codes_2, blocks_2, right), reciprocal=first.reciprocal
            )
            elements += found.elements
            outside += found.outside
            worst = max(worst, found.worst)
    except ValueError as error:
        return f"cannot be compared: {error}"
    if outside:
        return (
            f"differ by more than their scaling: {outside:,} of {elements:,} elements differ by more than rounding "
            f"allows (up to {worst:.3g} steps)"
        )
    return None


def reencodings(checkpoint: Checkpoint, plan: RewritePlan) -> Reencodings:
    """What the plan re-encodes, with the new scales. Reads the scales only, those of blocks in fused sets.

    Raises:
        SourceChanged, SystemFailure: reading failed.
    """
    by_module: dict[str, Reencoding] = {}
    warnings: list[str] = []
    for group in plan.planned():
        rows = {row[0]: row for row in group.differing}
        for module in sorted(group.repacked):
            first, *others = _sides(checkpoint, module, rows)
            scales = read_tensors(checkpoint, [first.scale, *(blob.scale for blob in others)])
            new = nvfp4.widest([scale_value(data) for data in scales.values()], reciprocal=first.reciprocal)
            weight = plan.tensors[first.weight].target
            target = weight.rpartition(".")[0]
            by_module[target] = Reencoding(
                target, "mismatch", new.astype("<f4").tobytes(), weight, first, tuple(others)
            )
    if plan.policy.unify_fused_scales:
        survivors = plan.survivors()
        for modules in fused_sets(survivors, FusedSets.of(checkpoint.config)):
            warnings.extend(_unify(checkpoint, modules, survivors, by_module))
    work = tuple(by_module[module] for module in sorted(by_module))
    return Reencodings(work, _contents(checkpoint, plan, work), tuple(warnings))


def _contents(checkpoint: Checkpoint, plan: RewritePlan, work: tuple[Reencoding, ...]) -> dict[str, Content]:
    keys = [blob.scale for reencoding in work for blob in (reencoding.blob, *reencoding.others)]
    scales = read_tensors(checkpoint, keys)
    contents: dict[str, Content] = {}
    for reencoding in work:
        blob, *others = (keys.located(checkpoint, scales[keys.scale]) for keys in (reencoding.blob, *reencoding.others))
        targets = [
            plan.tensors[key].target
            for key in (reencoding.blob.weight, reencoding.blob.weight_scale, reencoding.blob.scale)
        ]
        contents[targets[0]] = Encode(blob, tuple(others), reencoding.scale, codes=True)
        contents[targets[1]] = Encode(blob, tuple(others), reencoding.scale, codes=False)
        contents[targets[2]] = Patch(reencoding.scale, blob.scale, reencoding.blob.scale)
    return contents


def _unify(
    checkpoint: Checkpoint,
    modules: Mapping[str, tuple[str, str, str]],
    survivors: Mapping[str, TensorEntry],
    by_module: dict[str, Reencoding],
) -> list[str]:
    """Gives the modules of one fused set one scale, in `by_module`; returns why not, if it cannot be."""
    blobs = {
        module: BlobKeys(
            survivors[f"{module}.{parts[0]}"].name,
            survivors[f"{module}.{parts[1]}"].name,
            survivors[f"{module}.{parts[2]}"].name,
            parts[0] != "weight",
        )
        for module, parts in modules.items()
    }
    read = read_tensors(checkpoint, [blob.scale for blob in blobs.values()])
    scales = {
        module: by_module[module].scale if module in by_module else read[blob.scale] for module, blob in blobs.items()
    }
    if len(set(scales.values())) == 1:
        return []
    reciprocal = next(iter(blobs.values())).reciprocal
    try:
        new = nvfp4.widest([scale_value(data) for data in scales.values()], reciprocal=reciprocal)
    except ValueError as error:
        return [f"the fused scales of {', '.join(modules)} are not unified: {error}"]
    data = new.astype("<f4").tobytes()
    unsound = [
        module
        for module, blob in blobs.items()
        if read[blob.scale] != data and not has_sound_scales(blob.located(checkpoint, read[blob.scale]))
    ]
    if unsound:
        why = f"{shown(unsound[0])}.weight_scale holds a NaN or a negative scale"
        return [f"the fused scales of {', '.join(modules)} are not unified: {why}"]
    for module, blob in blobs.items():
        if module in by_module:
            by_module[module] = replace(by_module[module], scale=data)
        elif scales[module] != data:
            weight = f"{module}.{modules[module][0]}"
            by_module[module] = Reencoding(module, "fused", data, weight, blob, ())
    return []
