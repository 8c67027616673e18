"""What vLLM demands of scales: all there, finite, positive, calibrated, and alike where projections are fused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from tierewrite import formats
from tierewrite.consumers.findings import Finding
from tierewrite.consumers.rules import Rule, RuleSet
from tierewrite.consumers.subject import Module
from tierewrite.consumers.vllm.sources import FILL, KV_CACHE, MODELOPT
from tierewrite.consumers.vllm.subject import VllmSubject
from tierewrite.formats import Role
from tierewrite.formats.experts import split_expert
from tierewrite.formats.numbered import pattern_of

RULES: RuleSet[VllmSubject] = RuleSet()
SMALLEST_NORMAL = 2.0**-126  # of F32: what is below was never computed from data
KV_LEAVES = {"k_scale": "k", "v_scale": "v"}

SCALE_MISSING = Rule(
    id="scale-missing",
    title="scales are missing",
    when="any other scale",
    severity="error",
    consequence="uninitialised memory is used",
    fix="calibrate and export again",
    source=f"{MODELOPT} process_weights_after_loading",
    decided_by_loader=True,
)
INVALID = {
    which: replace(
        SCALE_MISSING,
        id=which,
        title=title,
        consequence="vLLM computes with it; infinities and NaN follow",
        decided_by_loader=False,
    )
    for which, title in (
        ("scale-not-finite", "scales are infinite or NaN"),
        ("scale-not-positive", "scales are zero or negative"),
        ("scale-uncalibrated", "activation scales were never calibrated (uninitialised or default values)"),
    )
}
FILLED = {
    rule.id: replace(
        rule,
        when="input scales of experts",
        fix="rewrite --fill-missing-scales takes it from the tied side, else from the layer's other experts",
        fixed_by=FILL,
    )
    for rule in (SCALE_MISSING, *INVALID.values())
}
"""The same where a rewrite has a value to put in its place."""


@RULES.add(SCALE_MISSING, FILLED["scale-missing"])
def missing_scales(s: VllmSubject) -> Iterator[Finding]:
    """modelopt.py `process` (only a NaN `weight_scale` of a dense layer is noticed); fused_moe creates its scales with
    torch.empty. https://github.com/vllm-project/vllm/issues/45212: inf, then NaN and pad tokens.
    """
    scheme = s.scheme
    if scheme is None or s.folder.absent:
        return
    fill: list[str] = []
    lost: list[str] = []
    for name, module in s.sound.items():
        for leaf in (*((scheme.block,) if scheme.block else ()), *scheme.scalars):
            if leaf not in module.leaves:
                expert = split_expert(name)[1] is not None
                can = expert and leaf in ("input_scale", "input_global_scale")
                (fill if can else lost).append(f"{module.stem}.{leaf}")
    yield from _found(SCALE_MISSING, fill, lost)


def _found(rule: Rule, fill: list[str], lost: list[str]) -> Iterator[Finding]:
    for each, keys in ((FILLED[rule.id], fill), (rule, lost)):
        if keys:
            yield each.at(keys, f"{len(keys)} {rule.title}")


@RULES.add(*(rule for which, rule in INVALID.items()), *(FILLED[which] for which in INVALID))
def invalid_scales(s: VllmSubject) -> Iterator[Finding]:
    """modelopt.py `KNvfp4Dynamic.process`, `KNvfp4Static.process`, `ModelOptNvFp4FusedMoE`: no scale is looked at,
    but for NaN block scales of a dense layer. quantization/kv_cache.py: negative KV scales count as not stored, zero
    fails an assertion.
    """
    fill: dict[str, list[str]] = {which: [] for which in INVALID}
    lost: dict[str, list[str]] = {which: [] for which in INVALID}
    computed_with = s.scheme.scalars if s.scheme is not None else ()
    relevant = {k for m in s.sound.values() for leaf, keys in m.leaves.items() if leaf in computed_with for k in keys}
    if s.quantization is not None and s.quantization.kv_fp8:
        relevant |= {k for k in s.entries if k.rpartition(".")[2] in KV_LEAVES}
    for key, values in s.scalars.items():
        if key not in relevant or not values.size:
            continue
        leaf = key.rpartition(".")[2]
        companion = formats.classify("weight", leaf, s.families) or formats.classify("weight", leaf)
        activation = companion is not None and companion.role is Role.ACTIVATION
        unset = companion.uncalibrated if companion is not None else ()
        if not np.isfinite(values).all():
            which = "scale-not-finite"
        elif (values <= 0).any():
            which = "scale-not-positive"
        elif activation and ((values < SMALLEST_NORMAL).any() or np.isin(values, unset).any()):
            which = "scale-uncalibrated"
        else:
            continue
        expert = split_expert(s.backbone.map(key).rpartition(".")[0])[1] is not None
        (fill if activation and expert else lost)[which].append(key)
    for which, key in _invalid_blocks(s):
        lost[which].append(key)
    for which, rule in INVALID.items():
        yield from _found(rule, fill[which], lost[which])


def _invalid_blocks(s: VllmSubject) -> Iterator[tuple[str, str]]:
    """Id of the rule and key, for every tensor of F8_E4M3 block scales with a NaN or a negative among them."""
    block = s.scheme.block if s.scheme is not None else None
    wide = [k for m in s.sound.values() if block for k in m.leaves.get(block, ()) if s.entries[k].dtype == "F8_E4M3"]
    for key, data in s.read(wide):
        codes = np.frombuffer(data, np.uint8)
        # Positive finite E4M3 codes are 0x00 to 0x7E; one pass over the bytes settles nearly every tensor.
        if codes.size and codes.max() > 0x7E:
            if ((codes & 0x7F) == 0x7F).any():
                yield "scale-not-finite", key
            elif (codes > 0x80).any():
                yield "scale-not-positive", key


WEIGHT_SCALES_DIFFER = Rule(
    id="fused-weight-scale-differs",
    title="weight scales of projections that share one parameter differ",
    when="ModelOpt's NVFP4",
    severity="error",
    consequence="vLLM uses one of them for all shards: the others' weights come out scaled",
    fix="rewrite --unify-fused-scales re-encodes to one scale",
    fixed_by="rewrite --unify-fused-scales",
    source=f"{MODELOPT} KNvfp4Static.process, ModelOptNvFp4FusedMoE.process_weights_after_loading",
)
WEIGHT_SCALES_DIFFER_PACKED = replace(
    WEIGHT_SCALES_DIFFER,
    when="any other format",
    fix="export again with one scale for fused projections",
    fixed_by=None,
)
INPUT_SCALES_DIFFER = Rule(
    id="fused-input-scale-differs",
    title="input scales of projections that share one parameter differ",
    severity="warning",
    consequence="vLLM uses the largest for all shards; a little precision is lost",
    fix="",
    source=f"{MODELOPT} KNvfp4Dynamic.process",
)


@RULES.add(WEIGHT_SCALES_DIFFER, WEIGHT_SCALES_DIFFER_PACKED, INPUT_SCALES_DIFFER)
def fused_scales(s: VllmSubject) -> Iterator[Finding]:
    """modelopt.py `KNvfp4Static.process` (the largest is used for all shards), `ModelOptNvFp4FusedMoE.
    process_weights_after_loading` (w1's is used for w3); `KNvfp4Dynamic.process` for input scales (the largest).
    """
    scheme = s.scheme
    if scheme is None or scheme.shared is None:
        return
    weights: list[str] = []
    inputs: list[str] = []
    moving = next((x for x in scheme.scalars if x.startswith("input")), None)
    for leaf, found in ((scheme.shared, weights), (moving, inputs)):
        for shards in _sharing(s, leaf) if leaf is not None else ():
            keys = [k for k in shards if k in s.scalars]
            if leaf == moving and any(split_expert(k.rpartition(".")[0])[1] is not None for k in keys):
                continue
            values = {s.scalars[k].tobytes() for k in keys}
            if len(values) > 1 and all(np.isfinite(s.scalars[k]).all() and (s.scalars[k] > 0).all() for k in keys):
                found.extend(keys)
    if weights:
        # ModelOpt's is the one form that a rewrite re-encodes.
        rule = WEIGHT_SCALES_DIFFER if scheme.shared == "weight_scale_2" else WEIGHT_SCALES_DIFFER_PACKED
        yield rule.at(weights, f"{len(weights)} {scheme.shared} of projections that share one parameter differ")
    if inputs:
        yield INPUT_SCALES_DIFFER.at(inputs, f"{len(inputs)} {moving} of projections that share one parameter differ")


def _sharing(s: VllmSubject, leaf: str) -> Iterator[list[str]]:
    """Keys of companions `leaf` that share one parameter of vLLM's: of q/k/v, gate/up, and each expert's gate/up."""
    if s.loaded is not None and s.loaded.loaded:
        yield from s.sharing(leaf)
        return
    groups: dict[tuple[str, int | None], list[Module]] = {}
    for name, module in s.sound.items():
        shared = s.shared_parameter(name)
        if shared is not None:
            groups.setdefault(shared, []).append(module)
    for modules in groups.values():
        if len(modules) > 1:
            yield [key for module in modules if (key := module.key(leaf)) is not None]


KV_SCALES_UNUSED = Rule(
    id="kv-scales-unused",
    title="KV scales are stored, and no config declares an FP8 cache",
    severity="warning",
    consequence="vLLM keeps the cache in 16 bits unless told otherwise (--kv-cache-dtype fp8)",
    fix="restore kv_cache_scheme if the cache is meant to be FP8",
    source=f"{KV_CACHE} BaseKVCacheMethod",
)
ONE_KV_SCALE = Rule(
    id="kv-scale-missing",
    title="the config declares an FP8 cache, and layers have no scales for it",
    when="one of k_scale and v_scale is there",
    severity="error",
    consequence="vLLM uses that one for both",
    fix="calibrate the cache and export again",
    source=f"{KV_CACHE} BaseKVCacheMethod",
)
NO_KV_SCALE = replace(ONE_KV_SCALE, when="none is there", severity="warning", consequence="vLLM uses 1.0, and warns")


@RULES.add(KV_SCALES_UNUSED, ONE_KV_SCALE, NO_KV_SCALE)
def kv_scales(s: VllmSubject) -> Iterator[Finding]:
    """quantization/kv_cache.py `BaseKVCacheMethod.process_weights_after_loading`: none stored means 1.0, one of the two
    serves for both; without an FP8 cache they are dropped.
    """
    q = s.quantization
    if q is None or not (q.modelopt or q.lists_known) or q.problem is not None:
        return
    stored = _kv_stored(s)
    if not q.kv_fp8:
        keys = [k for kinds in stored.values() for ks in kinds.values() for k in ks]
        if keys:
            yield KV_SCALES_UNUSED.at(keys, f"{len(keys)} {KV_SCALES_UNUSED.title}")
        return
    if s.loaded is not None and s.loaded.loaded:
        half, none = s.loaded.kv_scales()
    else:
        half, none = _kv_missing(s, stored)
    if half:
        yield ONE_KV_SCALE.at(half, f"{len(half)} layers have only one of k_scale and v_scale")
    if none:
        yield NO_KV_SCALE.at(none, f"{len(none)} layers have no KV scale, and the config declares an FP8 cache")


def _kv_missing(s: VllmSubject, stored: dict[str, dict[str, list[str]]]) -> tuple[list[str], list[str]]:
    """KV scales whose other half is there, and attention modules without any, by the names of q, k and v."""
    half, none = [], []
    for module in sorted(_attentions(s)):
        kinds = stored.get(module, {})
        if len(kinds) == 1:
            there = next(iter(kinds.values()))[0]
            half.append(_of_other_kind(there))
        elif not kinds:
            none.append(module.rstrip("."))
    return half, none


def _of_other_kind(key: str) -> str:
    """The name of the V scale that belongs to a K scale, and the other way round."""
    return re.sub(r"\b[kv](?=_(?:scale|proj)\b)", lambda found: "v" if found[0] == "k" else "k", key)


def _attentions(s: VllmSubject) -> set[str]:
    """The modules that hold an attention of vLLM's, each with a dot at its end."""
    if s.facts is None:
        return {f"{n.rpartition('.')[0]}." for n in s.modules if n.endswith(".self_attn.q_proj")}
    holders = {name.rpartition(".")[0] for name, kind in s.facts.takes.items() if kind == "attention"}
    found: set[str] = set()
    for name in s.modules:
        if pattern_of(s.built_as(name).rpartition(".")[0]) in holders:
            found.add(f"{name.rpartition('.')[0]}.")
    return found


def _kv_stored(s: VllmSubject) -> dict[str, dict[str, list[str]]]:
    """Keys of the KV scales, by attention module and by "k" or "v"."""
    stored: dict[str, dict[str, list[str]]] = {}
    for key in s.entries:
        kind = KV_LEAVES.get(key.rpartition(".")[2])
        hit = formats.kv_scale(key, s.families) if kind else None
        if hit is not None and kind is not None:
            holder = s.backbone.map(f"{hit[0]}.")
            module = s.modules.get(holder.rstrip("."))
            if module is not None and module.weight is not None:  # under a fused qkv_proj
                holder = f"{module.name.rpartition('.')[0]}."
            stored.setdefault(holder, {}).setdefault(kind, []).append(key)
    return stored
