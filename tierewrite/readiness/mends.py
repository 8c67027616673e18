"""What a rewrite for vLLM has to change besides the ties: computed here, written by the rewrite.

Both functions look at a checkpoint and return data; neither writes. What cannot be mended (a weight that is not there,
an expert that was left unquantized among quantized ones) is left to the findings.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tierewrite import formats
from tierewrite.formats import Companion, Role
from tierewrite.readiness.vllm import SMALLEST_NORMAL, VllmSubject, split_expert
from tierewrite.readiness.vllm_quant import Ignore


def consistent_ignore(s: VllmSubject) -> list[str] | None:
    """An ignore list that says to vLLM what lies on disk, or None where the present one does or no list can.

    Entries that exclude a quantized module, or a part of a fused one, go; in their place, and where nothing named
    them, come the unquantized linear modules by their own names, under every side's spelling, with all shards of a
    fused parameter. All other entries stay as they are.
    """
    q = s.quantization
    if q is None or not q.modelopt or q.problem is not None or s.declared_otherwise or not s.quantized:
        return None
    drop: set[int] = set()
    plain: list[str] = []
    for name, parts in s.linear.items():
        quantized = [p for p in parts if p in s.quantized]
        if quantized:
            drop |= s.ignore.reasons(name).keys()
            named = s.ignore.partly(name)
            parent = name.rpartition(".")[0]
            for shard in named:
                full = f"{parent}.{shard}"
                drop |= {i for i, e in enumerate(q.ignore) if s.backbone.map(e.removesuffix("*")) == full}
        else:
            plain.append(name)
    kept = tuple(e for i, e in enumerate(q.ignore) if i not in drop)
    verdict = Ignore(kept, s.backbone)
    added: list[str] = []
    head = s.model is None or any(n.rpartition(".")[0].endswith("lm_head") for n in s.model.shapes)
    if head and "lm_head" not in s.quantized and not verdict.reasons("lm_head"):
        added.append("lm_head")
    for name in plain:
        if name == "lm_head" or (verdict.reasons(name) and not verdict.partly(name)):
            continue
        parent, _, leaf = name.rpartition(".")
        for shard in s.backbone.fused.get(leaf, (leaf,)):
            added += _spellings(s, f"{parent}.{shard}")
    # What a dropped entry protected without being a linear module of vLLM's (a router, a vision tower) needs no entry
    # there; other consumers read the list too, so it is named again.
    for number in drop:
        alone = Ignore((q.ignore[number],), s.backbone)
        for name, module in s.modules.items():
            weight = module.weight
            if name in s.quantized or weight is None or name.endswith("embed_tokens"):
                continue
            if len(s.entries[weight].shape) != 2:
                continue
            if s.built_as(name) not in s.linear and alone.reasons(name) and not verdict.reasons(name):
                added += [k.rpartition(".")[0] for ks in module.leaves.values() for k in ks]
    found = list(dict.fromkeys([*kept, *added]))
    return None if found == list(q.ignore) else found


def _spellings(s: VllmSubject, name: str) -> list[str]:
    """A backbone name as the checkpoint spells it, on every side."""
    sides = [side for side in s.backbone.sides if s.backbone.map(side) and name.startswith(s.backbone.map(side))]
    return [side + name.removeprefix(s.backbone.map(side)) for side in sides] or [name]


@dataclass(frozen=True, slots=True)
class Filled:
    """One activation scale of an expert that no side has validly, with the value to write.

    Attributes:
        key: the tensor to write: the canonical side's name, there or not.
        there: the checkpoint has a tensor of that name, with an invalid value, whose place it takes.
        dtype, shape, data: what to write; F32, little-endian.
        taken_from: the expert's tensor whose value it is.
    """

    key: str
    there: bool
    dtype: str
    shape: tuple[int, ...]
    data: bytes
    taken_from: str


def fill_missing_scales(s: VllmSubject) -> tuple[Filled, ...]:
    """Values for the experts' `input_scale` (`input_global_scale`) that are missing or invalid on every side.

    The widest range among the same projection's other experts of the layer serves: the largest scale, or the smallest
    where the reciprocal is stored. Where a tied side has a valid value nothing is to be done here: merging the sides
    takes that one. Layers in which no expert of the projection was calibrated are left out.
    """
    scheme = s.scheme
    leaf = next((x for x in scheme.scalars if x.startswith("input")), None) if scheme is not None else None
    companion = formats.classify("weight", leaf, s.families) if leaf is not None else None
    if leaf is None or companion is None or companion.role is not Role.ACTIVATION:
        return ()
    layers: dict[tuple[str, str], list[str]] = {}
    for name in s.sound:
        container, expert, projection = split_expert(name)
        if expert is not None:
            layers.setdefault((container, projection), []).append(name)
    found: list[Filled] = []
    for modules in layers.values():
        valid: list[tuple[float, str]] = []
        empty: list[str] = []
        for name in modules:
            keys = [k for k in s.modules[name].leaves.get(leaf, ()) if k in s.scalars and _set(s.scalars[k], companion)]
            valid.extend((float(s.scalars[k].item()), k) for k in keys)
            if not keys:
                empty.append(name)
        if not valid:
            continue
        widest = max(valid) if companion.merge == "max" else min(valid)
        found.extend(_filled(s, name, leaf, widest) for name in empty)
    return tuple(found)


def _set(values: Any, companion: Companion) -> bool:
    """One value that calibration set."""
    if values.size != 1:
        return False
    value = values.item()
    return bool(np.isfinite(value)) and value >= SMALLEST_NORMAL and value not in companion.uncalibrated


def _filled(s: VllmSubject, name: str, leaf: str, widest: tuple[float, str]) -> Filled:
    keys: Sequence[str] = s.modules[name].leaves.get(leaf, ())
    key = keys[0] if keys else f"{s.modules[name].stem}.{leaf}"
    shape = s.entries[widest[1]].shape
    return Filled(key, bool(keys), "F32", shape, struct.pack("<f", widest[0]), widest[1])
