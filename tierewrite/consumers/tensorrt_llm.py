"""TensorRT-LLM as a consumer: by rules alone, which were read in its sources and never tried against it.

Its wheel comes from an index of NVIDIA's own, and its Python needs the compiled part of it. Read in single files of
NVIDIA/TensorRT-LLM between 1.0 and 1.2; the commits are named in TENSORRT_LLM.md. Every rule's source says "read,
not run". Differences between versions are named where they were seen.

Not checked: algorithms other than ModelOpt's NVFP4 and FP8 (a note says so), tensor-parallel layouts, and everything
about classes that are not listed here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import translate
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tierewrite.bounded_regex import BadPattern, BoundedRegex
from tierewrite.consumers import common_rules, modelopt
from tierewrite.consumers.backbone import BackboneTable
from tierewrite.consumers.consumer import Consumer
from tierewrite.consumers.findings import Finding
from tierewrite.consumers.modelopt import CONFIG, HF_QUANT, Declared, Layout
from tierewrite.consumers.rules import Rule, RuleSet
from tierewrite.consumers.subject import Module, Subject
from tierewrite.errors import shown
from tierewrite.formats.experts import split_expert
from tierewrite.planning.policy import FOR_CONSUMER

READ = "read, not run: _torch/"
LOADER = f"{READ}models/checkpoints/hf/weight_loader.py HfWeightLoader.load_weights"
LINEAR = f"{READ}modules/linear.py NVFP4LinearMethod.load_weight_scales"
EXPERTS = f"{READ}modules/fused_moe/quantization.py NVFP4FusedMoEMethod.load_expert_fc31_input_scale_nvfp4"
ALWAYS = "TensorRT-LLM was not run: what is said of it was read in its sources"


class TensorrtSubject(Subject):
    """A subject with TensorRT-LLM's reading of the quantization config."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.notes.append(ALWAYS)

    @cached_property
    def declared(self) -> Declared | None:
        """hf_quant_config.json, else config.json's (quantization/modelopt_config.py)."""
        inside, beside = modelopt.declared(self)
        return beside or inside

    @property
    def layout(self) -> Layout | None:
        """What a quantized module must have on disk, where that is known."""
        return self.declared.layout if self.declared is not None else None

    def excluded_by(self, module: str) -> list[int]:
        """Entries of the exclude list, by number, that leave the module unquantized: a wildcard of its fused name, of
        its own, or of a module that it is in (quantization/... `is_module_excluded_from_quantization`; older versions
        compare the fused name alone).
        """
        fused = modelopt.fused_name(module)
        if split_expert(module)[1] is not None:
            module = fused  # the experts of a layer are one module
        if module not in self._excluded:
            names = list(dict.fromkeys((*_ancestors(fused), module)))
            self._excluded[module] = [number for number, one in enumerate(self._patterns) if one.matching(names)]
        return self._excluded[module]

    @cached_property
    def _excluded(self) -> dict[str, list[int]]:
        return {}

    @cached_property
    def _patterns(self) -> list[BoundedRegex]:
        entries = self.declared.exclude if self.declared is not None else ()
        found = []
        for entry in entries:
            try:
                found.append(
                    BoundedRegex(entry[3:]) if entry.startswith("re:") else BoundedRegex(translate(entry), ours=True)
                )
            except BadPattern as e:
                self.notes.append(f"the entry '{shown(entry)}' of the excluded modules was not looked at: {e}")
                found.append(BoundedRegex("(?!)", ours=True))
        return found

    @cached_property
    def built_quantized(self) -> dict[str, Module]:
        """Modules that are quantized on disk and not excluded."""
        return (
            {} if self.layout is None else modelopt.quantized_modules(self, lambda name: bool(self.excluded_by(name)))
        )


def _ancestors(name: str) -> Iterator[str]:
    parts = name.split(".")
    yield from (".".join(parts[:count]) for count in range(len(parts), 0, -1))


@lru_cache(maxsize=1)
def known_architectures() -> frozenset[str]:
    """The model classes that TensorRT-LLM has."""
    file = Path(__file__).parent / "tensorrt_llm_classes.json"
    return frozenset(json.loads(file.read_text(encoding="utf-8"))["architectures"])


RULES: RuleSet[TensorrtSubject] = RuleSet()

INDEX_NAMES_MISSING_FILE = Rule(
    id="index-names-missing-file",
    title="the index names files that are not there",
    severity="error",
    consequence="TensorRT-LLM does not read the index: the load aborts at the first parameter that is missing",
    fix="bring the files, or export again",
    source=LOADER,
)
DUPLICATE_KEY = Rule(
    id="duplicate-key",
    title="a tensor is in several files",
    when="the bytes differ",
    severity="error",
    consequence="TensorRT-LLM reads every *.safetensors of the folder, in parallel: which one wins is left to chance",
    fix="keep one of them; remove files that the index does not name",
    source=LOADER,
)
DUPLICATE_KEY_EQUAL = replace(
    DUPLICATE_KEY, when="the bytes are equal", severity="warning", consequence="it is read twice"
)
DUPLICATE_KEY_UNREAD = replace(
    DUPLICATE_KEY, when="one of the files is not in the index, and its bytes were not compared", severity="warning"
)


@RULES.add(INDEX_NAMES_MISSING_FILE, DUPLICATE_KEY, DUPLICATE_KEY_EQUAL, DUPLICATE_KEY_UNREAD)
def files(s: TensorrtSubject) -> Iterator[Finding]:
    """weight_loader.py: `glob("*.safetensors")` without consolidated*, the index is not opened; `dict.update` as files
    come in.
    """
    yield from common_rules.absent_files(s, INDEX_NAMES_MISSING_FILE)
    yield from common_rules.repeated_keys(s, DUPLICATE_KEY, DUPLICATE_KEY_EQUAL)
    stray = {n: ks for n, ks in s.folder.unread.items() if not n.startswith("consolidated")}
    twice = [key for keys in stray.values() for key in keys if key in s.entries]
    if twice:
        yield DUPLICATE_KEY_UNREAD.at(twice, f"{len(twice)} tensors are in files that the index does not name, too")


ARCHITECTURES = Rule(
    id="architectures",
    title="TensorRT-LLM has no class of that name",
    severity="error",
    consequence="TensorRT-LLM refuses to load",
    fix="serve it with another server",
    source=f"{READ}models/modeling_utils.py get_model_architecture",
)


@RULES.add(ARCHITECTURES)
def architectures(s: TensorrtSubject) -> Iterator[Finding]:
    """modeling_utils.py `get_model_architecture`: "Unknown model architecture"; a later version may have it."""
    if s.architecture not in known_architectures():
        what = f"'{shown(s.architecture)}' is none of its classes" if s.architecture else "config.json names no class"
        yield ARCHITECTURES.at(("config.json: architectures",), what)


PARAMETER_MISSING = Rule(
    id="parameter-missing",
    title="parameters are filled by no key",
    severity="error",
    consequence="TensorRT-LLM aborts the load with an AssertionError or KeyError without more words",
    fix="export again, or copy them from a complete checkpoint",
    source=f"{READ}models/checkpoints/base_weight_mapper.py BaseWeightMapper.handle_manual_copy",
)
WRONG_SHAPE = Rule(
    id="wrong-shape",
    title="tensors have other shapes than their parameters",
    severity="error",
    consequence="TensorRT-LLM aborts the load",
    fix="correct the config, or export again",
    source=f"{READ}modules/linear.py copy_weight",
)


@RULES.add(PARAMETER_MISSING, WRONG_SHAPE)
def parameters(s: TensorrtSubject) -> Iterator[Finding]:
    """base_weight_mapper.py `handle_manual_copy`; a tied head is the embedding's parameter and passed over
    (modeling_utils.py `DecoderModelForCausalLM`). Names that are left over are never looked at.
    """
    plain, shards, experts = common_rules.missing_parameters(s)
    names = [*plain, *shards, *experts]
    if names:
        yield PARAMETER_MISSING.at(names, f"{len(names)} {PARAMETER_MISSING.title}")
    wrong = modelopt.wrong_weight_shapes(s, s.built_quantized, s.layout)
    if wrong:
        yield WRONG_SHAPE.at(wrong, f"{len(wrong)} {WRONG_SHAPE.title}")


QUANT_CONFIG_MISSING = Rule(
    id="quant-config-missing",
    title="modules are quantized, and no config says so",
    severity="error",
    consequence="TensorRT-LLM builds plain layers, and the load aborts",
    fix="restore hf_quant_config.json or quantization_config from the export, or export in a format that has one",
    source="read, not run: quantization/modelopt_config.py load_hf_quant_config",
)
QUANT_CONFIG_DISAGREES = Rule(
    id="quant-config-disagrees",
    title="hf_quant_config.json and config.json differ",
    when="in the algorithm or the excluded modules",
    severity="error",
    consequence="TensorRT-LLM uses hf_quant_config.json and builds other layers than readers of config.json",
    fix="make them equal",
    source="read, not run: quantization/modelopt_config.py load_hf_quant_config",
)
KV_DISAGREES = replace(
    QUANT_CONFIG_DISAGREES,
    when="in the KV cache",
    severity="warning",
    consequence="TensorRT-LLM uses hf_quant_config.json",
)


@RULES.add(QUANT_CONFIG_MISSING, QUANT_CONFIG_DISAGREES, KV_DISAGREES)
def configs(s: TensorrtSubject) -> Iterator[Finding]:
    """modelopt_config.py: hf_quant_config.json first; newer versions warn where the two differ."""
    inside, beside = modelopt.declared(s)
    if s.count_quantized and s.declared is None:
        if isinstance(s.config.get("quantization_config"), dict):
            s.notes.append("its quantization is not ModelOpt's and was not checked")
        else:
            found = f"{s.count_quantized} modules are quantized, and no config says so"
            yield QUANT_CONFIG_MISSING.at((CONFIG,), found)
    elif s.declared is not None and s.declared.layout is None:
        s.notes.append(f"quant_algo '{shown(s.declared.algo)}' was not checked")
    if inside is None or beside is None:
        return
    if inside.algo != beside.algo or set(inside.exclude) != set(beside.exclude):
        what = "quant_algo" if inside.algo != beside.algo else "the excluded modules"
        yield QUANT_CONFIG_DISAGREES.at((CONFIG, HF_QUANT), f"they differ in {what}")
    elif inside.kv != beside.kv:
        yield KV_DISAGREES.at((CONFIG, HF_QUANT), "one of them declares a KV cache with scales, the other does not")


IGNORED_BUT_QUANTIZED = Rule(
    id="ignored-but-quantized",
    title="the list of excluded modules names modules that are quantized on disk",
    severity="error",
    consequence="TensorRT-LLM builds them unquantized, and the load aborts",
    fix="take the entries out",
    source="read, not run: models/modeling_utils.py QuantConfig.is_module_excluded_from_quantization",
)
UNLISTED_UNQUANTIZED = Rule(
    id="unlisted-unquantized",
    title="modules are not quantized, and the list of excluded modules does not name them",
    severity="error",
    consequence="TensorRT-LLM builds them quantized and looks for scales that are not there",
    fix="add them to the list; older versions want the fused name (qkv_proj, gate_up_proj)",
    source=LINEAR,
)


@RULES.add(IGNORED_BUT_QUANTIZED, UNLISTED_UNQUANTIZED)
def excluded_modules(s: TensorrtSubject) -> Iterator[Finding]:
    """models/modeling_utils.py `is_module_excluded_from_quantization`: fnmatchcase. The head is built plain."""
    if s.declared is None or s.layout is None:
        return
    entry = s.declared.entry
    wrong: dict[str, set[str]] = {}
    for name in s.quantized:
        for number in s.excluded_by(name):
            wrong.setdefault(f"{entry}[{number}]", set()).add(name)
    if wrong:
        count = len({name for names in wrong.values() for name in names})
        yield IGNORED_BUT_QUANTIZED.at(
            sorted(wrong), f"{len(wrong)} entries exclude {count} modules that are quantized"
        )
    plain = modelopt.plain_linears(s, s.built_quantized)
    bare = [m.key("weight") or name for name, m in plain.items() if not s.excluded_by(name)]
    if bare:
        yield UNLISTED_UNQUANTIZED.at(bare, f"{len(bare)} modules are not quantized, and {entry} does not name them")


SCALE_MISSING = Rule(
    id="scale-missing",
    title="scales are missing",
    severity="error",
    consequence="TensorRT-LLM aborts the load with an AttributeError, of experts with a KeyError",
    fix="calibrate and export again",
    source=LINEAR,
)
WRONG_DTYPE = Rule(
    id="wrong-dtype",
    title="weights or scales have another dtype than their parameters",
    severity="error",
    consequence="TensorRT-LLM aborts the load, or takes other numbers",
    fix="export again",
    source=LINEAR,
)
NOT_FINITE = Rule(
    id="scale-not-finite",
    title="scales are infinite or NaN",
    severity="error",
    consequence="TensorRT-LLM computes with it; infinities and NaN follow",
    fix="calibrate and export again",
    source=LINEAR,
)
NOT_POSITIVE = replace(NOT_FINITE, id="scale-not-positive", title="scales are zero or negative")
SCALE_SHAPE = Rule(
    id="wrong-scale-shape",
    title="scales have other shapes than their weights need",
    severity="error",
    consequence="TensorRT-LLM aborts the load",
    fix="export again",
    source=LINEAR,
)


@RULES.add(SCALE_MISSING, WRONG_DTYPE, SCALE_SHAPE, NOT_FINITE, NOT_POSITIVE)
def scales(s: TensorrtSubject) -> Iterator[Finding]:
    """modules/linear.py `load_weight_scales`: `weight_scale` has to be E4M3; every scale is read, none is looked at."""
    if s.layout is None or s.folder.absent:
        return
    lost = modelopt.missing_scales(s.built_quantized, s.layout)
    if lost:
        yield SCALE_MISSING.at(lost, f"{len(lost)} {SCALE_MISSING.title}")
    wrong = [key for key, _ in modelopt.wrong_dtypes(s, s.built_quantized, s.layout)]
    if wrong:
        yield WRONG_DTYPE.at(wrong, f"{len(wrong)} {WRONG_DTYPE.title}")
    odd = modelopt.wrong_scale_shapes(s, s.built_quantized, s.layout, 16)
    if odd:
        yield SCALE_SHAPE.at(odd, f"{len(odd)} {SCALE_SHAPE.title}")
    for rule, keys in zip(
        (NOT_FINITE, NOT_POSITIVE), modelopt.invalid_scales(s, s.built_quantized, s.layout), strict=True
    ):
        if keys:
            yield rule.at(keys, f"{len(keys)} {rule.title}")


WEIGHT_SCALES_DIFFER = Rule(
    id="fused-weight-scale-differs",
    title="weight scales of projections that share one parameter differ",
    severity="error",
    consequence="TensorRT-LLM aborts the load with an AssertionError",
    fix="rewrite --unify-fused-scales re-encodes to one scale",
    fixed_by="rewrite --unify-fused-scales",
    source=LINEAR,
)
INPUT_SCALES_DIFFER = replace(
    WEIGHT_SCALES_DIFFER,
    id="fused-input-scale-differs",
    title="input scales of projections that share one parameter differ",
    fix="calibrate again with one input scale for projections that share their input",
    fixed_by=None,
    source=EXPERTS,
)


@RULES.add(WEIGHT_SCALES_DIFFER, INPUT_SCALES_DIFFER)
def fused_scales(s: TensorrtSubject) -> Iterator[Finding]:
    """modules/linear.py: `==`, of experts fused_moe/quantization.py: torch.allclose. Issues 6569 and 6530."""
    if s.layout is None or s.layout.shared is None:
        return
    for rule, leaf in ((WEIGHT_SCALES_DIFFER, s.layout.shared), (INPUT_SCALES_DIFFER, "input_scale")):
        keys = [
            key
            for experts, found in modelopt.fused_scales(s, s.built_quantized, leaf)
            if not (experts and _close(s, found))
            for key in found
        ]
        if keys:
            yield rule.at(keys, f"{len(keys)} {leaf} of projections that share one parameter differ")


def _close(s: TensorrtSubject, keys: list[str]) -> bool:
    """As torch.allclose compares: within a hundred-thousandth."""
    first, *others = (s.scalars[key] for key in keys)
    return all(first.shape == other.shape and np.allclose(first, other, rtol=1e-5, atol=1e-8) for other in others)


TENSORRT_LLM: Consumer[TensorrtSubject] = Consumer(
    name="tensorrt-llm",
    version="1.2.1",
    reads_alone="",
    presets=FOR_CONSUMER["tensorrt-llm"],
    backbones=BackboneTable.names_unchanged("_torch/models/modeling_utils.py"),
    rules=RULES,
    subject_type=TensorrtSubject,
)
