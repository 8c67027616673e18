"""NVFP4 blobs that are encoded anew: which ones, to what scale, and the streaming of it.

Two occasions. `--on-mismatch repack`: the sides of a tie hold the same weight under different `weight_scale_2`; one
blob is written, re-encoded to the largest. `--unify-fused-scales`: projections that a consumer fuses (q/k/v, gate/up)
get one `weight_scale_2`, the largest of them, because a fused kernel has one for all. compressed-tensors'
`weight_global_scale` is the reciprocal: there the smallest.

Refused: sides whose decoded weights differ by more than the rounding of the coarser encoding, and scales that are zero,
negative or not finite (`nvfp4.widest` says so).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from blake3 import blake3

from tierewrite.errors import system_errors
from tierewrite.formats.nvfp4_blobs import blob_of, fused_sets
from tierewrite.numbers import nvfp4
from tierewrite.output.files import write_all
from tierewrite.planning.plan import Action, GroupPlan, RewritePlan
from tierewrite.source.bytes import open_source, read_tensors
from tierewrite.source.table import Checkpoint, TensorEntry

_CHUNK_BLOCKS = 1 << 19
"""Blocks read at a time: 4 MiB of codes."""


@dataclass(frozen=True, slots=True)
class Blob:
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


@dataclass(frozen=True, slots=True)
class Reencoding:
    """One blob of the output that is not a copy.

    Attributes:
        module: its module in the output.
        blob: the side that is re-encoded.
        others: the other sides that it stands for.
        scale: the new scale's four bytes.
        reason: "mismatch" (the sides differed by scaling) or "fused" (unified with its fused siblings).
        largest, rms: how far decoded weights moved, over all sides; None before it is done.
    """

    module: str
    blob: Blob
    others: tuple[Blob, ...]
    scale: bytes
    reason: str
    largest: float | None = None
    rms: float | None = None

    @property
    def parts(self) -> tuple[str, str]:
        """Source keys of the tensors that are encoded anew: codes and block scales. (The third is a patch.)"""
        return self.blob.weight, self.blob.weight_scale

    def to_json(self) -> dict[str, object]:
        return {
            "module": self.module,
            "reason": self.reason,
            "scale": float(np.frombuffer(self.scale, "<f4")[0]),
            "largest_change": self.largest,
            "rms_change": self.rms,
        }


@dataclass(frozen=True)
class Reencodings:
    """All of a plan's, with what could not be unified."""

    work: tuple[Reencoding, ...]
    warnings: tuple[str, ...] = ()

    @property
    def copied_elsewhere(self) -> set[str]:
        """Source keys whose output bytes are not theirs: codes and block scales."""
        return {key for job in self.work for key in job.parts}


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
            return frozenset(), f"'{row[0]}' and its twin differ, and are no part of an NVFP4 weight"
        modules[module] = None
    for module in modules:
        sides = _sides(checkpoint, module, rows)
        first = sides[0]
        for other in sides[1:]:
            reason = _why_apart(checkpoint, first, other)
            if reason is not None:
                return frozenset(), f"'{first.weight}' and '{other.weight}' {reason}"
    return frozenset(modules), None


def _sides(checkpoint: Checkpoint, module: str, rows: Mapping[str, tuple[str, ...]]) -> list[Blob]:
    _, parts = blob_of(f"{module}.weight_scale", checkpoint.tensors)
    assert parts is not None
    codes, scales, scale = (rows[f"{module}.{part}"] for part in parts)
    reciprocal = parts[0] != "weight"
    return [Blob(c, s, t, reciprocal) for c, s, t in zip(codes, scales, scale, strict=True)]


def _why_apart(checkpoint: Checkpoint, first: Blob, other: Blob) -> str | None:
    """Why two blobs cannot stem from one weight; None if they can."""
    scales = read_tensors(checkpoint, (first.scale, other.scale))
    left, right = (_value(scales[key]) for key in (first.scale, other.scale))
    elements = outside = 0
    worst = 0.0
    try:
        nvfp4.widest((left, right), reciprocal=first.reciprocal)
        for (codes, blocks), (codes_2, blocks_2) in zip(
            _stream(checkpoint, first), _stream(checkpoint, other), strict=True
        ):
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
            f"differ by more than their scaling: {outside:,} of {elements:,} elements are farther apart than rounding "
            f"allows (up to {worst:.3g} steps)"
        )
    return None


def reencodings(checkpoint: Checkpoint, plan: RewritePlan) -> Reencodings:
    """What the plan encodes anew, with the new scales. Reads the scales only."""
    jobs: dict[str, Reencoding] = {}
    warnings: list[str] = []
    for group in plan.planned():
        rows = {row[0]: row for row in group.differing}
        for module in sorted(group.repacked):
            first, *others = _sides(checkpoint, module, rows)
            scales = read_tensors(checkpoint, [first.scale, *(blob.scale for blob in others)])
            new = nvfp4.widest([_value(data) for data in scales.values()], reciprocal=first.reciprocal)
            target = plan.tensors[first.weight].target.rpartition(".")[0]
            jobs[target] = Reencoding(target, first, tuple(others), new.astype("<f4").tobytes(), "mismatch")
    if plan.policy.unify_fused_scales:
        by_target = {t.target: t.name for t in plan.tensors.values() if t.action is not Action.DROP}
        targets = {target: checkpoint.tensors[name] for target, name in by_target.items()}
        for modules in fused_sets(targets):
            warnings.extend(_unify(checkpoint, modules, by_target, jobs))
    return Reencodings(tuple(jobs[module] for module in sorted(jobs)), tuple(warnings))


def _unify(
    checkpoint: Checkpoint,
    modules: Mapping[str, tuple[str, str, str]],
    by_target: Mapping[str, str],
    jobs: dict[str, Reencoding],
) -> list[str]:
    blobs = {
        module: Blob(
            by_target[f"{module}.{parts[0]}"],
            by_target[f"{module}.{parts[1]}"],
            by_target[f"{module}.{parts[2]}"],
            parts[0] != "weight",
        )
        for module, parts in modules.items()
    }
    read = read_tensors(checkpoint, [blob.scale for blob in blobs.values()])
    scales = {
        module: jobs[module].scale if module in jobs else read[blob.scale] for module, blob in blobs.items()
    }
    if len(set(scales.values())) == 1:
        return []
    reciprocal = next(iter(blobs.values())).reciprocal
    try:
        new = nvfp4.widest([_value(data) for data in scales.values()], reciprocal=reciprocal)
    except ValueError as error:
        return [f"the fused scales of {', '.join(modules)} are not unified: {error}"]
    data = new.astype("<f4").tobytes()
    for module, blob in blobs.items():
        if module in jobs:
            jobs[module] = replace(jobs[module], scale=data)
        elif scales[module] != data:
            jobs[module] = Reencoding(module, blob, (), data, "fused")
    return []


def write(
    checkpoint: Checkpoint, job: Reencoding, codes_to: tuple[Path, int], scales_to: tuple[Path, int]
) -> tuple[Reencoding, dict[str, bytes]]:
    """Encodes one blob anew and writes it, a few megabytes at a time.

    Args:
        codes_to, scales_to: file and absolute byte offset of the codes and the block scales in the output.

    Returns:
        The job with how far it moved the weights, and the digests of what was written, by source key.

    Raises:
        SourceChanged, SystemFailure: reading or writing failed.
    """
    moved = Moved()
    hashers = blake3(), blake3()
    files: list[int] = []
    try:
        for path, _ in (codes_to, scales_to):
            with system_errors("opening", path):
                files.append(os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW))
        offsets = [codes_to[1], scales_to[1]]
        for parts in encoded(checkpoint, job, moved):
            for i, data in enumerate(parts):
                hashers[i].update(data)
                with system_errors("writing", (codes_to, scales_to)[i][0]):
                    write_all(files[i], data, offsets[i])
                offsets[i] += len(data)
    finally:
        for fd in files:
            os.close(fd)
    digests = {part: hasher.digest() for part, hasher in zip(job.parts, hashers, strict=True)}
    return moved.entered(job), {**digests, job.blob.scale: blake3(job.scale).digest()}


@dataclass
class Moved:
    """How far decoded weights moved, piece by piece."""

    largest: float = 0.0
    squares: float = 0.0
    elements: int = 0

    def entered(self, job: Reencoding) -> Reencoding:
        """`job` with what was found."""
        rms = (self.squares / self.elements) ** 0.5 if self.elements else 0.0
        return replace(job, largest=self.largest, rms=rms)


def encoded(checkpoint: Checkpoint, job: Reencoding, moved: Moved | None = None) -> Iterator[tuple[bytes, bytes]]:
    """The new codes and block scales of a blob, a few megabytes at a time.

    Args:
        moved: told how far the weights of every side moved.
    """
    sides = (job.blob, *(job.others if moved is not None else ()))
    old = {key: _value(data) for key, data in read_tensors(checkpoint, [b.scale for b in sides]).items()}
    new = _value(job.scale)
    for pieces in zip(*(_stream(checkpoint, side) for side in sides), strict=True):
        codes, blocks = pieces[0]
        result = nvfp4.repack(codes, blocks, old[job.blob.scale], new, reciprocal=job.blob.reciprocal)
        if moved is not None:
            for side, (side_codes, side_blocks) in zip(sides, pieces, strict=True):
                change = nvfp4.change(
                    (side_codes, side_blocks, old[side.scale]), (*result, new), reciprocal=side.reciprocal
                )
                moved.largest = max(moved.largest, change.largest)
                moved.squares += change.rms**2 * side_codes.size * 2
                moved.elements += side_codes.size * 2
        yield result[0].tobytes(), result[1].tobytes()


def _value(data: bytes) -> np.ndarray:
    return np.frombuffer(data, "<f4")


def _stream(checkpoint: Checkpoint, blob: Blob) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Codes [blocks, bytes a block] and block scales [blocks, 1] of a blob, uint8, a few megabytes at a time."""
    codes, scales = checkpoint.tensors[blob.weight], checkpoint.tensors[blob.weight_scale]
    if scales.nbytes == 0:
        return
    width = codes.nbytes // scales.nbytes
    for start in range(0, scales.nbytes, _CHUNK_BLOCKS):
        blocks = min(_CHUNK_BLOCKS, scales.nbytes - start)
        yield (
            _read(checkpoint, codes, start * width, blocks * width).reshape(blocks, width),
            _read(checkpoint, scales, start, blocks).reshape(blocks, 1),
        )


def _read(checkpoint: Checkpoint, entry: TensorEntry, start: int, length: int) -> np.ndarray:
    data = np.empty(length, np.uint8)
    with open_source(checkpoint.shards[entry.shard]) as source:
        source.read_runs([(entry.start + start, entry.start + start + length)], data.data)
    return data
