"""What vLLM demands of sizes, shapes and dtypes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod

from tierewrite import formats
from tierewrite.consumers import common_rules
from tierewrite.consumers.findings import Finding
from tierewrite.consumers.rules import Rule, RuleSet
from tierewrite.consumers.subject import FLOATS, Module, numbers, rounded_to_e4m3
from tierewrite.consumers.vllm.schemes import Scheme
from tierewrite.consumers.vllm.sources import MODELOPT, QUANTIZATION_UTILS, WEIGHT_UTILS
from tierewrite.consumers.vllm.subject import VllmSubject
from tierewrite.formats.experts import split_expert
from tierewrite.tables import some

COUNTERS = {"I64", "BOOL"}  # of buffers such as num_batches_tracked, never of a weight

RULES: RuleSet[VllmSubject] = RuleSet()

NVFP4_GROUP = 16  # part of the format: E2M1 codes share a scale in blocks of 16

GROUP_SIZE_MISMATCH = Rule(
    id="group-size-mismatch",
    title="the config names other blocks than the scales are for",
    severity="error",
    consequence="vLLM builds scales of another shape; the load aborts",
    fix="set group_size to that of the scales on disk",
    source=f"{MODELOPT} KNvfp4Static.create_weights",
)


@RULES.add(GROUP_SIZE_MISMATCH)
def group_size(s: VllmSubject) -> Iterator[Finding]:
    """modelopt.py `KNvfp4Static.create_weights`, `ModelOptNvFp4FusedMoE.create_weights`: weight_scale has
    in / group_size columns; group_size is quantization_config's own (not config_groups'), by default 16.
    """
    q = s.quantization
    most = s.group_size
    if q is None or most is None or not q.modelopt or most == q.group_size or most != NVFP4_GROUP:
        return
    what = f"the config says blocks of {q.group_size}, the scales on disk are for blocks of {most}"
    yield replace(GROUP_SIZE_MISMATCH.at((f"{q.where}.group_size",), what), fix=f"set group_size to {most}")


NOT_DIVISIBLE = Rule(
    id="not-divisible",
    title="weights have a number of columns that is no multiple of 16",
    severity="error",
    consequence="vLLM refuses to load",
    fix="leave these modules out of the quantization",
    source=f"{MODELOPT} KNvfp4Static.create_weights",
)
ALIGNMENT = Rule(
    id="alignment",
    title="the experts' hidden size is no multiple of 128",
    severity="warning",
    consequence="vLLM's Marlin backend (GPUs without FP4) cannot serve them; others can",
    fix="",
    source=f"{QUANTIZATION_UTILS}/marlin_utils.py check_moe_marlin_supports_config",
)


@RULES.add(NOT_DIVISIBLE, ALIGNMENT)
def sizes(s: VllmSubject) -> Iterator[Finding]:
    """modelopt.py `KNvfp4Static.create_weights` (multiples of 16); marlin_utils.py `check_moe_marlin_supports_config`
    (experts: hidden size a multiple of 128, no padding), other backends pad.
    """
    scheme = s.scheme
    if scheme is None or scheme.block is None:
        return
    odd, narrow = [], set()
    for name, module in s.sound.items():
        columns = s.in_features(module.weight) if module.weight else None
        if columns is None:
            continue
        if columns % 16:
            odd.append(module.weight or name)
        container, expert, projection = split_expert(name)
        if expert is not None and columns % 128 and not projection.startswith("down"):
            narrow.add(container)
    if odd:
        yield NOT_DIVISIBLE.at(odd, f"{len(odd)} {NOT_DIVISIBLE.title}")
    if narrow:
        yield ALIGNMENT.at(sorted(narrow), ALIGNMENT.title)


WRONG_SHAPE = Rule(
    id="wrong-shape",
    title="tensors have other shapes than their parameters",
    when="any other tensor",
    severity="error",
    consequence="the load aborts; for an expert, what is missing stays uninitialised",
    fix="export again",
    source=f"{WEIGHT_UTILS} default_weight_loader",
    decided_by_loader=True,
)


BLOCKS_OF_OTHER_SIZE = replace(
    WRONG_SHAPE,
    when="block scales of NVFP4 are for other blocks than 16",
    consequence="the load aborts; with another group_size in the config the numbers would be garbage",
)


@RULES.add(WRONG_SHAPE, BLOCKS_OF_OTHER_SIZE)
def shapes(s: VllmSubject) -> Iterator[Finding]:
    """models/.. `default_weight_loader` (AssertionError); parameter.py `load_merged_column_weight`; for experts
    fused_moe/routed_experts.py `_narrow_expert_data_for_padding` copies what there is and leaves the rest.
    """
    other = _blocks_of_other_size(s)
    if other:
        found = f"{len(other)} block scales are for blocks of {s.group_size}; NVFP4 has blocks of {NVFP4_GROUP}"
        yield BLOCKS_OF_OTHER_SIZE.at(other, found)
    wrong = [
        key
        for key in common_rules.of_other_shape(s, experts=True)
        if not (prod(s.entries[key].shape) == prod(s.size(key) or ()) == 1)  # scalars of any shape are accepted
    ]
    scheme = s.scheme
    if scheme is not None and scheme.detailed:
        for module in s.sound.values():
            wrong += _packed_of_other_shape(s, scheme, module)
    elif scheme is not None:
        for name, module in s.sound.items():
            wrong += _scaled_of_other_shape(s, scheme, name, module)
    for name, entry in s.entries.items():
        if formats.kv_scale(name, s.families) and name.endswith("_scale") and prod(entry.shape) != 1:
            wrong.append(name)
    if wrong:
        keys = list(dict.fromkeys(wrong))
        yield WRONG_SHAPE.at(keys, f"{len(keys)} {WRONG_SHAPE.title}")


def _blocks_of_other_size(s: VllmSubject) -> list[str]:
    """Block scales of NVFP4 whose blocks are not of 16, where most are not."""
    block = s.scheme.block if s.scheme is not None else None
    group = s.group_size
    if block is None or group is None or group == NVFP4_GROUP:
        return []
    found = []
    for module in s.sound.values():
        key, weight = module.key(block), module.weight
        columns = s.in_features(weight) if weight is not None else None
        if key is not None and columns and s.entries[key].shape[-1:] != (columns // NVFP4_GROUP,):
            found.append(key)
    return found


def _scaled_of_other_shape(s: VllmSubject, scheme: Scheme, name: str, module: Module) -> Iterator[str]:
    """A weight of one element a byte, and the scales of a weight, that are of another shape than the config says."""
    key = module.weight
    assert key is not None
    entry, size = s.entries[key], s.size(key)
    if scheme.whole_elements and size not in (None, entry.shape):
        yield key
        return
    known = len(entry.shape) == 2 and (size is not None or entry.dtype == scheme.dtype)
    rows, columns = size or (entry.shape[0], entry.shape[1] * scheme.pack) if known else (0, 0)
    scale = module.key(scheme.covers[0]) if scheme.covers is not None else None
    if known and scale is not None and not _fits(s.entries[scale].shape, scheme.scale_shapes(rows, columns), name):
        yield scale


def _fits(found: tuple[int, ...], expected: tuple[tuple[int, ...], ...], module: str) -> bool:
    """One value is copied into all places that an expert's scales have (fused_moe/routed_experts.py)."""
    return found in expected or (split_expert(module)[1] is not None and prod(found) == 1)


def _packed_of_other_shape(s: VllmSubject, scheme: Scheme, module: Module) -> Iterator[str]:
    """Tensors of a quantized module whose shapes do not follow from its weight and the checkpoint's group size."""
    key = module.weight
    assert key is not None
    entry = s.entries[key]
    if scheme.pack == 2 and entry.dtype in FLOATS:
        return
    size, columns = s.size(key), s.in_features(key)
    rows = size[0] if size is not None else entry.shape[0] if entry.shape else 0
    if columns is not None and entry.shape != (rows, columns // scheme.pack):
        yield key
    scale = module.key(scheme.block) if scheme.block else None
    group = s.group_size
    blocks = (rows, columns // group) if columns and group and columns % group == 0 else None
    if scale is not None and blocks is not None and s.entries[scale].shape != blocks:
        yield scale
    for leaf in scheme.scalars:
        scalar = module.key(leaf)
        if scalar is not None and prod(s.entries[scalar].shape) != 1:
            yield scalar


WRONG_DTYPE = Rule(
    id="wrong-dtype",
    title="tensors have other dtypes than their parameters",
    when="values are lost",
    severity="error",
    consequence="vLLM converts them by value: other numbers come out",
    fix="export again",
    source=f"{WEIGHT_UTILS} default_weight_loader",
    decided_by_loader=True,
)
OTHER_DTYPE = replace(
    WRONG_DTYPE,
    when="every value survives",
    severity="warning",
    consequence="vLLM converts them by value; other consumers may not",
)


@RULES.add(WRONG_DTYPE, OTHER_DTYPE)
def dtypes(s: VllmSubject) -> Iterator[Finding]:
    """models/utils.py `_load_param` warns, weight_utils.py `default_weight_loader` and the fused loaders do not: each
    copies by value. Harmless where every value survives, or where bytes are only relabelled (I8 as U8).
    """
    harmful: list[str] = []
    harmless: list[str] = []
    floats: list[str] = []
    for name in s.places:
        owner = s.modules.get(s.backbone.map(name).rpartition(".")[0])
        if not _packed(s, owner, name) and s.entries[name].dtype not in FLOATS | COUNTERS:
            harmful.append(name)
    if harmful and not s.known:
        s.notes.append(f"whether vLLM's class has parameters for what are no floats is not known: {some(harmful)}")
        harmful.clear()
    scheme = s.scheme
    for module in s.sound.values() if scheme is not None and scheme.detailed else ():
        assert scheme is not None
        key = module.weight
        assert key is not None
        dtype = s.entries[key].dtype
        if dtype != scheme.dtype:
            (harmless if (dtype, scheme.dtype) == ("I8", "U8") else harmful).append(key)
        scale = module.key(scheme.block) if scheme.block else None
        if scale is not None and s.entries[scale].dtype != "F8_E4M3":
            (floats if s.entries[scale].dtype in FLOATS else harmful).append(scale)
        for leaf in scheme.scalars:
            scalar = module.key(leaf)
            if scalar is not None and s.entries[scalar].dtype != "F32":
                (harmless if s.entries[scalar].dtype in FLOATS else harmful).append(scalar)
    for key, data in s.read(floats):
        exact = bool(rounded_to_e4m3(numbers(s.entries[key].dtype, data)).all())
        (harmless if exact else harmful).append(key)
    if harmful:
        yield WRONG_DTYPE.at(harmful, f"{len(harmful)} tensors have dtypes that their parameters do not")
    if harmless:
        found = f"{len(harmless)} {OTHER_DTYPE.title}; the values survive the conversion"
        yield OTHER_DTYPE.at(harmless, found)


def _packed(s: VllmSubject, module: Module | None, key: str) -> bool:
    """The key is the weight of a quantized module, on whichever side, or a fused parameter in packed form."""
    if formats.main_parameter(key) is not None:
        return True
    if module is None or module.name not in s.quantized:
        return False
    return any(key in keys for leaf, keys in module.leaves.items() if formats.is_main(leaf))
