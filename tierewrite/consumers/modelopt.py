"""What ModelOpt's configs say and what its modules hold, for consumers that have no reading of their own here.

The layout is formats/modelopt.py's: NVFP4 packs two values a byte, with one E4M3 scale for 16 of them (`weight_scale`)
and one F32 scale for the tensor (`weight_scale_2`); `input_scale` is F32, of the activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from tierewrite.consumers import common_rules
from tierewrite.consumers.subject import FLOATS, Module, Subject
from tierewrite.formats.experts import split_expert
from tierewrite.formats.numbered import pattern_of

CONFIG = "config.json: quantization_config"
HF_QUANT = "hf_quant_config.json: quantization"
FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Projections that become one parameter: SGLang quantization/utils.py `_FALLBACK_FUSED_SHARDS`, TensorRT-LLM
_torch/models/modeling_utils.py `params_map`."""
EXPERTS_FUSED = (("gate_proj", "up_proj"), ("w1", "w3"))


@dataclass(frozen=True)
class Layout:
    """What a quantized module has on disk.

    Attributes:
        dtype: of `weight`.
        block: leaf of the E4M3 block scales; None if there are none.
        scalars: leaves of the F32 scales that have to be there.
        shared: leaf of the weight scale that fused projections have in common; None where each may have its own.
    """

    dtype: str
    block: str | None
    scalars: tuple[str, ...]
    shared: str | None = None


LAYOUTS: Mapping[str, Layout] = {
    "NVFP4": Layout("U8", "weight_scale", ("weight_scale_2", "input_scale"), "weight_scale_2"),
    "W4A16_NVFP4": Layout("U8", "weight_scale", ("weight_scale_2",), "weight_scale_2"),
    "NVFP4_AWQ": Layout("U8", "weight_scale", ("weight_scale_2", "input_scale"), "weight_scale_2"),
    "FP8": Layout("F8_E4M3", None, ("weight_scale", "input_scale")),
}


@dataclass(frozen=True)
class Declared:
    """One quantization config as ModelOpt writes it, of either file.

    Attributes:
        where: the file and entry.
        algo: `quant_algo` in upper case; "" where it is missing.
        group_size: of the block scales; None where it does not say.
        exclude: the modules that stay unquantized; patterns.
        kv: the KV cache has scales of its own.
    """

    where: str
    algo: str
    group_size: int | None
    exclude: tuple[str, ...]
    kv: bool

    @property
    def layout(self) -> Layout | None:
        """What its modules hold; None for algorithms that are not known here."""
        return LAYOUTS.get(self.algo)

    @property
    def entry(self) -> str:
        """The config entry of the list of excluded modules."""
        return f"{self.where}.{'ignore' if self.where == CONFIG else 'exclude_modules'}"


def declared(s: Subject) -> tuple[Declared | None, Declared | None]:
    """What config.json says and what hf_quant_config.json says; None for one that has nothing of ModelOpt's."""
    inside = s.config.get("quantization_config")
    beside = s.folder.quant_config.get("quantization")
    return (
        _declared(CONFIG, inside) if isinstance(inside, dict) and _is_modelopt(inside) else None,
        _declared(HF_QUANT, beside) if isinstance(beside, dict) else None,
    )


def _is_modelopt(config: Mapping[str, Any]) -> bool:
    method = str(config.get("quant_method") or "").lower()
    return method.startswith("modelopt") or (not method and "quant_algo" in config)


def _declared(where: str, data: Mapping[str, Any]) -> Declared:
    listed = data.get("ignore", data.get("exclude_modules"))
    groups = data.get("config_groups")
    first: Any = next(iter(groups.values()), {}) if isinstance(groups, dict) else {}
    weights = first.get("weights", {}) if isinstance(first, dict) else {}
    size = data.get("group_size", weights.get("group_size") if isinstance(weights, dict) else None)
    return Declared(
        where=where,
        algo=str(data.get("quant_algo") or "").upper(),
        group_size=size if isinstance(size, int) else None,
        exclude=tuple(x for x in listed if isinstance(x, str)) if isinstance(listed, list) else (),
        kv=bool(data.get("kv_cache_quant_algo") or data.get("kv_cache_scheme")),
    )


def quantized_modules(s: Subject, excluded: Callable[[str], bool]) -> dict[str, Module]:
    """Modules that are quantized on disk and not excluded by the config, by name."""
    return {name: m for name, m in s.quantized.items() if m.weight is not None and not excluded(name)}


def missing_scales(modules: Mapping[str, Module], layout: Layout) -> list[str]:
    """Names of the scales that the modules should have and have not."""
    wanted = (*((layout.block,) if layout.block else ()), *layout.scalars)
    return [f"{m.stem}.{leaf}" for m in modules.values() for leaf in wanted if leaf not in m.leaves]


def wrong_dtypes(s: Subject, modules: Mapping[str, Module], layout: Layout) -> Iterator[tuple[str, str]]:
    """(key, dtype that is expected) of weights and block scales that have another one."""
    for module in modules.values():
        for leaf, dtype in (("weight", layout.dtype), (layout.block, "F8_E4M3")):
            key = module.key(leaf) if leaf else None
            if key is not None and s.entries[key].dtype != dtype:
                yield key, dtype


def wrong_weight_shapes(s: Subject, modules: Mapping[str, Module], layout: Layout | None) -> list[str]:
    """Keys of weights that have not the size that the model class gives them, of experts too: of plain ones, and of
    the quantized ones of `modules` where their layout is known.
    """
    plain = common_rules.of_other_shape(s, experts=True)
    return list(dict.fromkeys([*plain, *(_wrong_quantized(s, modules, layout) if layout is not None else [])]))


def _wrong_quantized(s: Subject, modules: Mapping[str, Module], layout: Layout) -> list[str]:
    wrong = []
    for module in modules.values():
        size = s.size(module.weight) if module.weight is not None else None
        if size is None or len(size) != 2 or module.weight is None or s.entries[module.weight].dtype != layout.dtype:
            continue
        if s.entries[module.weight].shape != (size[0], size[1] // (2 if layout.dtype == "U8" else 1)):
            wrong.append(module.weight)
    return wrong


def wrong_scale_shapes(s: Subject, modules: Mapping[str, Module], layout: Layout, group: int | None) -> list[str]:
    """Keys of scales that do not fit their weight: block scales are [rows, columns / group], the others one value."""
    wrong = []
    for module in modules.values():
        weight = s.entries[module.weight] if module.weight is not None else None
        for leaf in layout.scalars:
            key = module.key(leaf)
            if key is not None and prod(s.entries[key].shape) != 1:
                wrong.append(key)
        key = module.key(layout.block) if layout.block is not None else None
        if key is None or weight is None or len(weight.shape) != 2 or weight.dtype != layout.dtype or not group:
            continue
        rows, columns = weight.shape[0], weight.shape[1] * (2 if layout.dtype == "U8" else 1)
        if s.entries[key].shape != (rows, columns // group):
            wrong.append(key)
    return wrong


def invalid_scales(s: Subject, modules: Mapping[str, Module], layout: Layout) -> tuple[list[str], list[str]]:
    """Keys of scalar scales that are not finite, and of those that are zero or negative."""
    wanted = {k for m in modules.values() for leaf in layout.scalars for k in m.leaves.get(leaf, ())}
    infinite, low = [], []
    for key in s.scalars:
        values = s.scalars[key]
        if key not in wanted or not values.size:
            continue
        if not np.isfinite(values).all():
            infinite.append(key)
        elif (values <= 0).any():
            low.append(key)
    return infinite, low


def fused_scales(s: Subject, modules: Mapping[str, Module], leaf: str) -> Iterator[tuple[bool, list[str]]]:
    """Keys of the scale `leaf` of projections that share one parameter, where the values differ.

    Yields:
        Whether they are experts', and the keys.
    """
    groups: dict[tuple[bool, str], list[Module]] = {}
    for name, module in modules.items():
        parent, _, projection = name.rpartition(".")
        expert = split_expert(name)[1] is not None
        for shards in EXPERTS_FUSED if expert else FUSED.values():
            if projection in shards:
                groups.setdefault((expert, f"{parent}.{shards[0]}"), []).append(module)
    for (expert, _), group in groups.items():
        keys = [key for m in group if (key := m.key(leaf)) is not None and key in s.scalars]
        if len({s.scalars[key].tobytes() for key in keys}) > 1:
            yield expert, keys


def plain_linears(s: Subject, modules: Mapping[str, Module]) -> dict[str, Module]:
    """Unquantized modules of a kind that is quantized in another layer, by name."""
    kinds = {pattern_of(name) for name in modules}
    plain = {name: m for name, m in s.modules.items() if name not in s.quantized and pattern_of(name) in kinds}
    return {name: m for name, m in plain.items() if (key := m.key("weight")) and s.entries[key].dtype in FLOATS}


def fused_name(module: str) -> str:
    """The module that a consumer makes of it: ...self_attn.q_proj becomes ...self_attn.qkv_proj."""
    container, expert, _ = split_expert(module)
    if expert is not None:
        return container
    parent, dot, leaf = module.rpartition(".")
    return next((f"{parent}{dot}{fused}" for fused, shards in FUSED.items() if leaf in shards), module)
