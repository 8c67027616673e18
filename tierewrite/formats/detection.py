"""Which families a checkpoint is written in, by its configs and by its keys."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tierewrite.formats.families import FAMILIES
from tierewrite.formats.family import Family
from tierewrite.formats.suffixes import (
    classify,
    fused_parameters,
    is_own_parameter,
    main_parameter,
    part_of_weight,
)


@dataclass(frozen=True, slots=True)
class Recognised:
    """A family, and what shows it.

    Attributes:
        family: its name; what a config calls it, where no family has that name.
        keys: last words of tensors' names that show it, the most frequent first; `*` stands for a parameter's own name.
            Empty: only a config speaks of it, so that no tensor is taken for one of it.
        configs: what configs say, one short text each: "quant_method torchao".
    """

    family: str
    keys: tuple[str, ...]
    configs: tuple[str, ...]

    @property
    def is_unknown(self) -> bool:
        """Whether it is a name in a config that no family has."""
        return self.family not in FAMILIES

    @property
    def by(self) -> str:
        """What it was recognised by, for people."""
        tensors = [f"tensors {', '.join(self.keys[:4])}{', ...' if len(self.keys) > 4 else ''}"] if self.keys else []
        return "; ".join((*tensors, *self.configs))


@dataclass(frozen=True, slots=True)
class _Said:
    """What the configs say of formats: value in lower case -> the text that says where."""

    methods: Mapping[str, str]
    formats: Mapping[str, str]
    producers: Mapping[str, str]
    members: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Words:
    """The last words of the names that a family gives tensors."""

    whole: frozenset[str]
    tails: tuple[str, ...]


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _configs(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Every quantization config in config.json: the top one and those of nested model configs."""
    nested = (config, *(value for value in config.values() if isinstance(value, Mapping)))
    return [_mapping(c.get(name)) for c in nested for name in ("quantization_config", "compression_config")]


def _texts(what: str, values: Iterable[object]) -> dict[str, str]:
    return {value.lower(): f"{what} {value}" for value in values if isinstance(value, str)}


def _said(config: Mapping[str, Any], quant_config: Mapping[str, Any]) -> _Said:
    configs = _configs(config)
    groups = [_mapping(g) for c in configs for g in _mapping(c.get("config_groups")).values()]
    return _Said(
        _texts("quant_method", (c.get("quant_method") for c in configs)),
        _texts("format", (c.get("format") for c in (*configs, *groups))),
        _texts("producer", (_mapping(c.get("producer")).get("name") for c in (*configs, quant_config))),
        {name.lower(): f"{name} in config.json" for name, value in config.items() if isinstance(value, Mapping)},
    )


@lru_cache(maxsize=64)
def _words(name: str) -> _Words:
    """What tensors of the family may be called, beyond what unquantized ones are."""
    family, plain = FAMILIES[name], FAMILIES["plain"]
    usual = {row.suffix for row in (*plain.companions, *plain.fused)}
    rows = [row.suffix for row in (*family.companions, *family.kv) if row.suffix not in usual]
    fused = [row.suffix.rpartition("{leaf}")[2] for row in family.fused if row.suffix not in usual]
    whole = frozenset(suffix.rpartition(".")[2] for suffix in rows)
    return _Words(
        whole | {rest.rpartition(".")[2] for rest in fused if rest.startswith(".")},
        tuple({rest for rest in fused if rest.startswith("_")}),
    )


def _mains(word: str, tail: str) -> tuple[str, ...]:
    """What the tensor may be called to which the companion `word` of a fused parameter belongs."""
    stem = word.removesuffix(tail)
    return stem, f"{stem}_blocks"


def _shown(
    words: Counter[str], whole: Collection[str], tails: tuple[str, ...], beside: Set[str] | None = None
) -> tuple[str, ...]:
    """Which of `words` show a family, the most frequent first; those with its tails as a pattern.

    Args:
        beside: words one of which a word with a tail has to belong to; None: its tails are enough.
    """
    found: Counter[str] = Counter()
    for word, count in words.items():
        if word in whole:
            found[word] += count
            continue
        for tail in tails:
            # `gate_up_proj_scale` beside `gate_up_proj`; a `per_expert_scale` is nobody's.
            if word.endswith(tail) and (beside is None or not beside.isdisjoint(_mains(word, tail))):
                found[f"*{tail}"] += count
                break
    return tuple(sorted(found, key=lambda word: (-found[word], word)))


def _recognised(family: Family, said: _Said, words: Counter[str]) -> Recognised | None:
    signs = family.signs
    configs = tuple(
        places[value.lower()]
        for places, values in (
            (said.methods, signs.methods),
            (said.formats, signs.formats),
            (said.producers, signs.producers),
            (said.members, signs.members),
        )
        for value in values
        if value.lower() in places
    )
    keys = _shown(words, signs.endings, signs.tails)
    if not keys and configs:
        known = _words(family.name)
        keys = _shown(words, known.whole, known.tails, words.keys())
    return Recognised(family.name, keys, configs) if keys or configs else None


def recognise(
    config: Mapping[str, Any], quant_config: Mapping[str, Any], keys: Collection[str]
) -> tuple[Recognised, ...]:
    """What shows which families, in the order of `FAMILIES`; at the end what configs speak of and no family is.

    Args:
        config: config.json, or {}.
        quant_config: hf_quant_config.json, or {}.
        keys: the names of all tensors, or their last words.
    """
    said = _said(config, quant_config)
    words = Counter(key.rpartition(".")[2] for key in keys)
    known = [found for f in FAMILIES.values() if (found := _recognised(f, said, words)) is not None]
    methods = {method.lower() for f in FAMILIES.values() for method in f.signs.methods}
    strange = [Recognised(value, (), (text,)) for value, text in said.methods.items() if value not in methods]
    return (*known, *strange)


def detect(config: Mapping[str, Any], quant_config: Mapping[str, Any], keys: Collection[str]) -> tuple[str, ...]:
    """The families that tensors are written in; a mixture is normal. Arguments as of `recognise`.

    Returns:
        Names of families in the order of `FAMILIES`; ("plain",) when none shows.
    """
    return written_in(recognise(config, quant_config, keys))


def written_in(recognised: Iterable[Recognised]) -> tuple[str, ...]:
    """`detect`, of what was recognised already."""
    return tuple(found.family for found in recognised if found.keys) or ("plain",)


_PACKED = re.compile(r"[IU](4|8|16|32)|F(4|6|8)_.*")


def unknown_words(tensors: Iterable[tuple[str, str]], families: tuple[str, ...]) -> dict[str, tuple[str, int]]:
    """Last words of packed tensors that no family explains -> dtype and number, the most frequent first.

    Args:
        tensors: name and dtype of each.
        families: as of `detect`.
    """
    found: Counter[tuple[str, str]] = Counter()
    for name, dtype in tensors:
        if _PACKED.fullmatch(dtype) and not _explained(name, families):
            found[name.rpartition(".")[2], dtype] += 1
    return {word: (dtype, number) for (word, dtype), number in found.most_common()}


def _explained(name: str, families: tuple[str, ...]) -> bool:
    """Whether some family gives a tensor this name, or it is a parameter or buffer of its own."""
    word = name.rpartition(".")[2]
    return (
        part_of_weight(name) is not None
        or main_parameter(name) is not None
        or is_own_parameter(name)
        or classify("weight", word, families) is not None
        or bool(fused_parameters(name))
        or word.endswith("_proj")
        or word in _BUFFERS
    )


_BUFFERS = frozenset({"position_ids", "token_type_ids", "num_batches_tracked", "relative_position_index"})
