"""What DST has to hold, tensor by tensor: worked out from SRC, the declared ties and the options, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from blake3 import blake3

from tierewrite import formats
from tierewrite.formats import Companion, Role
from tierewrite.formats.fused import FusedSets
from tierewrite.numbers import nvfp4
from tierewrite.planning.policy import Policy
from tierewrite.proof.judge import Group, Stand
from tierewrite.proof.reading import Contents, read_array
from tierewrite.proof.values import BLOBS, Value, covering, is_blob, why_no_value
from tierewrite.source.table import Checkpoint, TensorEntry

_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.([^.]+)\.([^.]+)")


@dataclass(frozen=True, slots=True)
class Want:
    """One tensor of DST.

    Attributes:
        like: the tensor of SRC that gives dtype and shape.
        digest: BLAKE3 of the bytes.
        problem: the id of the problem if they are others.
        because: what they are, for people.
    """

    like: TensorEntry
    digest: bytes
    problem: str
    because: str


@dataclass
class Expected:
    """All of DST's tensors.

    Attributes:
        wants: by name in DST.
        stands: by name in DST, the tensors of SRC that it stands for; not those that are added.
        merged: by name in DST, the values that several scales became.
        repacked: names in DST of NVFP4 codes, block scales and scales that are encoded again.
        refused: what makes a rewrite with these options refuse SRC: group id -> reason.
        notes: what a reader should know.
    """

    wants: dict[str, Want] = field(default_factory=dict)
    stands: dict[str, Stand] = field(default_factory=dict)
    merged: dict[str, Value] = field(default_factory=dict)
    repacked: set[str] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def expected(source: Checkpoint, before: Contents, stands: Mapping[str, Stand], policy: Policy) -> Expected:
    """What DST has to hold for `stands`.

    Args:
        source: SRC.
        before: digests of all its tensors, and the values of its scales.
        stands: by name in DST, what stands for which tensors of SRC.
        policy: the options that the caller names.
    """
    found = Expected(stands=dict(stands))
    for name, stand in stands.items():
        _plain_or_merged(source, before, stand, found, name)
    if policy.fill_missing_scales:
        families = formats.detect(source.config, source.quant_config, source.tensors.keys())
        _filled(source, before, found, families)
    if policy.on_mismatch == "repack" or policy.unify_fused_scales:
        _encoded(source, before, found, policy)
    return found


def _plain_or_merged(source: Checkpoint, before: Contents, stand: Stand, found: Expected, name: str) -> None:
    first = source.tensors[stand.sources[0]]
    if stand.merge is None or stand.merge.merge is None or why_no_value([first]) is not None:
        because = f"the bytes of '{first.name}'"
        found.wants[name] = Want(first, before.digests[first.name], "bytes", because)
        return
    value = covering(stand.merge, [(source.tensors[key], before.values[key]) for key in stand.covered])
    if value is None:
        found.refused[stand.group or name] = f"no {first.dtype} covers {', '.join(stand.covered)}"
        found.wants[name] = Want(first, before.digests[first.name], "merge", f"the bytes of '{first.name}'")
        return
    found.merged[name] = value
    side = "the smallest" if stand.merge.merge == "min" else "the largest"
    because = f"{side} of its sides ({value.said})"
    if not value.calibrated:
        because = f"the bytes of '{first.name}', since no side was ever calibrated"
    found.wants[name] = Want(first, blake3(value.data).digest(), "merge", because)


def _filled(source: Checkpoint, before: Contents, found: Expected, families: tuple[str, ...]) -> None:
    """The widest of a projection's experts stands in where one has no scale, or one that was never calibrated."""
    have: dict[tuple[str, str, str], dict[str, str]] = {}  # container, projection, suffix -> expert -> name in DST
    weights: dict[tuple[str, str], list[str]] = {}
    companions: dict[str, Companion] = {}
    for name in found.stands:
        hit = _EXPERT.fullmatch(name)
        companion = hit and (formats.classify("weight", hit[4], families) or formats.classify("weight", hit[4]))
        if not hit or not companion:
            continue
        if companion.main:
            weights.setdefault((hit[1], hit[3]), []).append(hit[2])
        elif companion.role is Role.ACTIVATION and companion.merge is not None:
            have.setdefault((hit[1], hit[3], hit[4]), {})[hit[2]] = name
            companions[hit[4]] = companion
    for (container, projection, suffix), members in have.items():
        sides = []
        for name in members.values():
            like = found.wants[name].like
            data = found.merged[name].data if name in found.merged else before.values[like.name]
            sides.append((like._replace(name=name), data))
        where = f"'{container}.*.{projection}.{suffix}'"
        try:
            value, own = _widest(companions[suffix], sides)
        except ValueError as error:
            found.notes.append(f"{where}: {error}, so that nothing is filled in")
            continue
        because = f"the widest of the layer's experts ({value.said})"
        lacking = [number for number in weights.get((container, projection), ()) if number not in members]
        for name in (f"{container}.{number}.{projection}.{suffix}" for number in lacking):
            found.wants[name] = Want(sides[0][0], blake3(value.data).digest(), "fill", because)
        for name, data in own.items():
            found.wants[name] = Want(found.wants[name].like, blake3(data).digest(), "fill", because)


def _widest(companion: Companion, sides: Sequence[tuple[TensorEntry, bytes]]) -> tuple[Value, dict[str, bytes]]:
    """The value that covers all experts, and the bytes of each that has no valid one, in its own dtype.

    Raises:
        ValueError: there is none.
    """
    value = _covering(companion, sides)
    if not value.calibrated:
        raise ValueError("no expert has a valid scale")
    own: dict[str, bytes] = {}
    for side in sides:
        if side[0].name in value.invalid:
            alike = side[0].dtype == sides[0][0].dtype
            first = [side, *(other for other in sides if other is not side)]
            own[side[0].name] = (value if alike else _covering(companion, first)).data
    return value, own


def _covering(companion: Companion, sides: Sequence[tuple[TensorEntry, bytes]]) -> Value:
    """`covering`, or ValueError where there is no such value."""
    value = covering(companion, sides) if why_no_value([entry for entry, _ in sides]) is None else None
    if value is None:
        raise ValueError("no one value fits the scales of all experts")
    return value


@dataclass(frozen=True, slots=True)
class _Blob:
    """An NVFP4 weight of DST: the names of its three tensors, and those of each side in SRC."""

    names: tuple[str, str, str]
    sides: tuple[tuple[str, str, str], ...]
    reciprocal: bool


def _encoded(source: Checkpoint, before: Contents, found: Expected, policy: Policy) -> None:
    """Sides that differ by their scaling become one at the scale that covers them; fused linears get one scale."""
    blobs = {blob.names[0].rpartition(".")[0]: blob for blob in _blobs(source, found.stands)}
    scales = {module: _float32(before, blob.sides[0][2]) for module, blob in blobs.items()}
    again: set[str] = set()
    if policy.on_mismatch == "repack":
        for module, blob in blobs.items():
            if any(found.stands[name].repacked for name in blob.names):
                sides = [_float32(before, side[2]) for side in blob.sides]
                scales[module] = nvfp4.widest(sides, reciprocal=blob.reciprocal).reshape(scales[module].shape)
                again.add(module)
    if policy.unify_fused_scales:
        for fused in _fused(blobs, FusedSets.of(source.config)):
            values = [scales[module] for module in fused]
            if len({value.tobytes() for value in values}) == 1:
                continue
            try:
                one = nvfp4.widest(values, reciprocal=blobs[fused[0]].reciprocal)
                _check_block_scales(source, before, [blobs[module].sides[0] for module in fused], one)
            except ValueError as error:
                found.notes.append(f"the scales of {', '.join(fused)} cannot be unified: {error}")
                continue
            again.update(module for module in fused if scales[module].tobytes() != one.tobytes())
            scales.update((module, one.reshape(scales[module].shape)) for module in fused)
    for module in again:
        blob, scale = blobs[module], scales[module]
        first = [read_array(source, key) for key in blob.sides[0]]
        codes, blocks = nvfp4.repack(first[0], first[1], first[2], scale, reciprocal=blob.reciprocal)
        for name, data in zip(blob.names, (codes.tobytes(), blocks.tobytes(), scale.tobytes()), strict=True):
            because = f"'{found.stands[name].sources[0]}' encoded to the scale {scale.item():.9g}"
            problem = "not-unified" if policy.unify_fused_scales and not found.stands[name].repacked else "bytes"
            found.wants[name] = Want(found.wants[name].like, blake3(data).digest(), problem, because)
            found.repacked.add(name)


def _check_block_scales(
    source: Checkpoint, before: Contents, weights: Iterable[tuple[str, str, str]], scale: np.float32
) -> None:
    """Raises ValueError if one of the weights that are not under `scale` has a block scale that is NaN or negative."""
    for _, blocks, own in weights:
        if before.values[own] != scale.tobytes() and not nvfp4.are_sound(read_array(source, blocks)):
            raise ValueError(f"'{blocks}' holds a NaN or a negative scale")


def _float32(contents: Contents, key: str) -> np.ndarray:
    return np.frombuffer(contents.values[key], "<f4")


def _blobs(source: Checkpoint, stands: Mapping[str, Stand]) -> Iterator[_Blob]:
    for name in stands:
        module, _, suffix = name.rpartition(".")
        for parts in BLOBS:
            names = (f"{module}.{parts[0]}", f"{module}.{parts[1]}", f"{module}.{parts[2]}")
            if suffix != parts[2] or not all(other in stands for other in names):
                continue
            codes, scales, scale = (stands[other].sources for other in names)
            if is_blob([source.tensors[row[0]] for row in (codes, scales, scale)]):
                # Sides of a tie have all three; a name that stands alone has one of each.
                yield _Blob(names, tuple(zip(codes, scales, scale, strict=False)), parts[0] != "weight")


def _fused(blobs: Mapping[str, _Blob], fused: FusedSets) -> Iterable[Sequence[str]]:
    """Modules that consumers load into one parameter, encoded alike."""
    sets: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for module in blobs:
        parent, _, word = module.rpartition(".")
        for words in fused.below(parent):
            if word in words:
                sets.setdefault((parent, words), []).append(module)
    for modules in sets.values():
        if len(modules) > 1 and len({blobs[module].reciprocal for module in modules}) == 1:
            yield modules


def agree(source: Checkpoint, group: Group) -> str | None:
    """Why the NVFP4 weights of a group's sides are not one weight under several scales; None if they are."""
    for blob in _blobs(source, group.stands):
        if not any(group.stands[name].repacked for name in blob.names):
            continue
        sides = [
            (read_array(source, codes), read_array(source, scales), read_array(source, scale))
            for codes, scales, scale in blob.sides
        ]
        try:
            nvfp4.widest([side[2] for side in sides], reciprocal=blob.reciprocal)
            for other in sides[1:]:
                if not nvfp4.agree_up_to_scaling(sides[0], other, reciprocal=blob.reciprocal):
                    return f"the sides of '{blob.names[0]}' differ by more than their scaling"
        except ValueError as error:
            return f"the sides of '{blob.names[0]}' cannot be compared: {error}"
    return None
