"""What a suffix means: the quantization families, and the questions that `plan` asks of them.

Each family is a small file with one `Family` of data; `MODULES` lists them, in the order in which they are
named for a suffix that several share. Adding a format is adding such a file, its name here, and a fixture.

What is refused: guessing. A suffix under a tied module that no family knows is None, and the group that holds
it is left alone by whoever asked.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from tierewrite.formats.family import Companion, Family, Role, Signs
from tierewrite.formats.smoothing import Adjacency

__all__ = [
    "FAMILIES",
    "Adjacency",
    "Companion",
    "Family",
    "Role",
    "Signs",
    "classify",
    "concerns",
    "detect",
    "kv_scale",
]

MODULES = (
    "plain",
    "modelopt",
    "compressed_tensors",
    "deepseek_fp8",
    "fbgemm_fp8",
    "mxfp4",
    "gptq_awq",
    "bitsandbytes",
    "quark",
)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {family.name: family for family in (importlib.import_module(f"{__name__}.{module}").FAMILY for module in MODULES)}
)


def _named(companion: Companion, family: Family, suffix: str | None = None) -> Companion:
    return Companion(
        suffix or companion.suffix,
        companion.role,
        companion.merge,
        family.name,
        companion.uncalibrated,
        companion.main,
    )


@lru_cache(maxsize=256)
def _tables(
    families: tuple[str, ...] | None,
) -> tuple[dict[str, Companion], dict[str, Companion], dict[str, Companion]]:
    """The companions, fused patterns and KV tensors of `families` (None: the union without
    contradictions)."""
    tables: tuple[dict[str, Companion], ...] = ({}, {}, {})
    for family in FAMILIES.values():
        if families is not None and family.name not in families and family.name != "plain":
            continue
        for table, rows in zip(tables, (family.companions, family.fused, family.kv), strict=True):
            for row in rows:
                if families is None and row.suffix in family.own_only:
                    continue
                table.setdefault(row.suffix, _named(row, family))
    # What sits on an attention module is also a companion of the projection it hangs on: "k_proj.k_scale" is
    # `k_scale` under `k_proj`, and has to be known there.
    for row in tables[2].values():
        tables[0].setdefault(row.suffix.rpartition(".")[2], row)
    return tables[0], tables[1], tables[2]


def concerns(leaf: str, suffix: str) -> bool:
    """Whether a tensor `parent.suffix` can be part of the parameter `parent.leaf` at all.

    `weight` speaks for its module. A parameter of any other name (`bias`, `gate_up_proj`) speaks for itself
    and for what its name begins: `gate_up_proj_scale`, `gate_up_proj.absmax`.
    """
    return leaf == "weight" or suffix == leaf or suffix.startswith((f"{leaf}_", f"{leaf}."))


@lru_cache(maxsize=65536)
def classify(leaf: str, suffix: str, families: tuple[str, ...] | None = None) -> Companion | None:
    """What the tensor `parent.suffix` is to the tied parameter `parent.leaf`.

    Args:
        leaf: the last component of the parameter's name, unquantized: `weight` mostly, `gate_up_proj` for a
            fused container, `bias`, ...
        suffix: the rest of the key after `parent.`; may contain dots.
        families: names from `detect`. None asks the union of all families, in which no suffix has two
            meanings.

    Returns:
        The companion, or None when no family knows the suffix (or when it does not concern the leaf).
    """
    companions, fused, _ = _tables(families)
    if leaf == "weight":
        return companions.get(suffix)
    if not concerns(leaf, suffix):
        return None
    found = fused.get("{leaf}" + suffix[len(leaf) :])
    return None if found is None else _named(found, FAMILIES[found.family], suffix)


def kv_scale(key: str, families: tuple[str, ...] | None = None) -> tuple[str, str, Companion] | None:
    """Split the key of a KV-cache tensor into its attention module and the rest.

    `model.layers.0.self_attn.k_proj.k_scale` gives (`model.layers.0.self_attn`, `k_proj.k_scale`, companion);
    `model.layers.0.self_attn.k_scale` gives (`model.layers.0.self_attn`, `k_scale`, companion). The
    projection need not exist: full-attention layers can share keys and values and still have a
    `v_proj.v_scale`. None for any other key.
    """
    table = _tables(families)[2]
    head, _, last = key.rpartition(".")
    parent, _, projection = head.rpartition(".")
    both = f"{projection}.{last}"
    if parent and both in table:
        return parent, both, table[both]
    if head and last in table:
        return head, last, table[last]
    return None


def _lower(values: Iterable[object]) -> set[str]:
    return {value.lower() for value in values if isinstance(value, str)}


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _configs(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Every quantization config in config.json: the top one and those of nested model configs."""
    nested = (config, *(value for value in config.values() if isinstance(value, Mapping)))
    return [_mapping(c.get(name)) for c in nested for name in ("quantization_config", "compression_config")]


def detect(config: Mapping[str, Any], quant_config: Mapping[str, Any], keys: Collection[str]) -> tuple[str, ...]:
    """The families present in a checkpoint, by its configs and by its keys; a mixture is normal.

    Args:
        config: config.json, or {}.
        quant_config: hf_quant_config.json, or {}.
        keys: the names of all tensors.

    Returns:
        Names of families in the order of `FAMILIES`; ("plain",) when none shows.
    """
    configs = _configs(config)
    methods = _lower(c.get("quant_method") for c in configs)
    groups = [_mapping(g) for c in configs for g in _mapping(c.get("config_groups")).values()]
    formats = _lower(c.get("format") for c in (*configs, *groups))
    producers = _lower(_mapping(c.get("producer")).get("name") for c in (*configs, quant_config))
    last = {key.rpartition(".")[2] for key in keys}
    found = []
    for family in FAMILIES.values():
        signs = family.signs
        tails = tuple(e for e in signs.endings if e.startswith("_"))
        if (
            methods & _lower(signs.methods)
            or formats & _lower(signs.formats)
            or producers & _lower(signs.producers)
            or last & set(signs.endings)
            or (tails and any(name.endswith(tails) for name in last))
        ):
            found.append(family.name)
    return tuple(found) or ("plain",)
