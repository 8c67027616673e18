"""Which families a checkpoint is written in, by its configs and by its keys."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from tierewrite.formats.families import FAMILIES


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
