"""What a suffix means, by the tables of the families: a part of a parameter, the parameter itself, or nothing known.

This is the only place that knows suffixes; whoever has to tell a weight from what belongs to it asks here.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from tierewrite.formats.families import FAMILIES
from tierewrite.formats.family import Companion, Role


@lru_cache(maxsize=256)
def _tables(
    families: tuple[str, ...] | None,
) -> tuple[dict[str, Companion], dict[str, Companion], dict[str, Companion]]:
    """The companions, fused patterns and KV tensors of `families` (None: the union without contradictions)."""
    tables: tuple[dict[str, Companion], ...] = ({}, {}, {})
    for family in FAMILIES.values():
        if families is not None and family.name not in families and family.name != "plain":
            continue
        for table, rows in zip(tables, (family.companions, family.fused, family.kv), strict=True):
            for row in rows:
                if families is None and row.suffix in family.own_only:
                    continue
                table.setdefault(row.suffix, replace(row, family=family.name))
    # What sits on an attention module is also a companion of the projection it hangs on: "k_proj.k_scale" is
    # `k_scale` under `k_proj`, and has to be known there.
    for row in tables[2].values():
        tables[0].setdefault(row.suffix.rpartition(".")[2], row)
    return tables[0], tables[1], tables[2]


def concerns(leaf: str, suffix: str) -> bool:
    """Whether a tensor `parent.suffix` can be part of the parameter `parent.leaf` at all.

    `weight` speaks for its module. A parameter of any other name (`bias`, `gate_up_proj`) speaks for itself
    and for what its name begins: `gate_up_proj_scale`, `gate_up_proj.absmax`, `_gate_up_proj_qdata`.
    """
    return leaf == "weight" or suffix == leaf or suffix.startswith(beginnings(leaf))


def beginnings(leaf: str) -> tuple[str, ...]:
    """What the suffixes of all tensors begin with that can belong to a parameter called `leaf`, other than `weight`."""
    return f"{leaf}_", f"{leaf}.", f"_{leaf}_"


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
    found = fused.get(suffix.replace(leaf, "{leaf}", 1))
    return None if found is None else replace(found, suffix=suffix)


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


@lru_cache(maxsize=1)
def kv_words() -> frozenset[str]:
    """The last words of all keys that `kv_scale` knows, of any family."""
    return frozenset(row.suffix.rpartition(".")[2] for family in FAMILIES.values() for row in family.kv)


class _Forms(NamedTuple):
    """What the names of tensors can say, over all families.

    Attributes:
        parts: suffix below a module -> what it is to the module's weight.
        depth: the most components that a suffix has.
        ends: last components of the suffixes that have several.
        mains: what stands before and after a fused parameter's own name where the tensor is the parameter itself
            (`_blocks`; `_` and `_qdata`).
        companions: the same where the tensor only belongs to it (`_scales`, `.absmax`).
        alone: suffixes beside a weight that are parameters of their own (`bias`).
        alone_ends: the same, as endings of fused names (`_bias`).
    """

    parts: dict[str, Companion]
    depth: int
    ends: frozenset[str]
    mains: tuple[tuple[str, str], ...]
    companions: tuple[tuple[str, str], ...]
    alone: frozenset[str]
    alone_ends: tuple[str, ...]


@lru_cache(maxsize=1)
def _forms() -> _Forms:
    parts = dict(_tables(None)[0])
    fused: dict[tuple[str, str], Companion] = {}
    for family in FAMILIES.values():
        for row in family.fused:
            before, _, after = row.suffix.partition("{leaf}")
            fused.setdefault((before, after), replace(row, family=family.name))
    plain = FAMILIES["plain"]
    alone = frozenset(row.suffix for row in plain.companions if row.role is Role.PER_SIDE)
    alone_ends = tuple(row.suffix.removeprefix("{leaf}") for row in plain.fused if row.role is Role.PER_SIDE)
    for suffix in alone:
        del parts[suffix]
    return _Forms(
        parts,
        max(suffix.count(".") for suffix in parts) + 1,
        frozenset(suffix.rpartition(".")[2] for suffix in parts if "." in suffix),
        tuple(around for around, row in fused.items() if row.main and any(around)),
        tuple(around for around, row in fused.items() if not row.main and around[1] not in alone_ends),
        alone,
        alone_ends,
    )


def is_main(suffix: str) -> bool:
    """Whether `module.suffix` is the module's weight itself in some family's form (`weight`, `qweight`, ...)."""
    part = _forms().parts.get(suffix)
    return part is not None and part.main


def is_companion(suffix: str) -> bool:
    """Whether `module.suffix` belongs to the module's weight (or bias, or KV cache) in some family, and is not it."""
    part = _forms().parts.get(suffix)
    return part is not None and not part.main


def is_own_parameter(name: str) -> bool:
    """Whether `name` stands beside a weight as a parameter of its own: a bias."""
    forms = _forms()
    leaf = name.rpartition(".")[2]
    return leaf in forms.alone or leaf.endswith(forms.alone_ends)


def ends_longer_suffix(leaf: str) -> bool:
    """Whether some family has a suffix of several words that ends in `leaf`: it alone does not say what a key is."""
    return leaf in _forms().ends


def part_of_weight(key: str) -> tuple[str, Companion] | None:
    """The weight that the tensor `key` is a part of by its suffix, and as what; None where no family knows the suffix.

    `a.q_proj.weight.absmax` gives `a.q_proj.weight` and bitsandbytes' companion. The weight need not be there.
    """
    forms = _forms()
    words = key.rsplit(".", forms.depth)
    several = words[-1] in forms.ends
    for count in range(len(words) - 1 if several else 1, 0, -1):
        part = forms.parts.get(".".join(words[-count:]))
        if part is not None:
            module = ".".join(words[:-count])
            return (f"{module}.weight" if module else "weight"), part
    return None


def fused_parameters(key: str) -> tuple[str, ...]:
    """The parameters of other names than `weight` that `key` may belong to: `x_scales` to `x`. None need be there."""
    if not key.endswith(_companion_ends()):
        return ()
    owners = (_owner(key, before, after) for before, after in _forms().companions)
    return tuple(owner for owner in owners if owner is not None and owner.rpartition(".")[2] != "weight")


@lru_cache(maxsize=1)
def _companion_ends() -> tuple[str, ...]:
    return tuple({after for _, after in _forms().companions})


def _owner(key: str, before: str, after: str) -> str | None:
    """The fused parameter of which `key` is the tensor called by its name with `before` and `after` around it."""
    if not key.endswith(after):
        return None
    parent, dot, word = key[: len(key) - len(after)].rpartition(".")
    if not word.startswith(before) or word == before:
        return None
    return f"{parent}{dot}{word[len(before) :]}"


def main_parameter(key: str) -> str | None:
    """The parameter that the tensor `key` itself is, in a family's form that has another name; None for other keys.

    `a.q_proj.qweight` gives `a.q_proj.weight`, `a.experts.down_proj_blocks` gives `a.experts.down_proj`.
    """
    part = part_of_weight(key)
    if part is not None:
        return part[0] if part[1].main and part[0] != key else None
    owners = (_owner(key, before, after) for before, after in _forms().mains)
    return next((owner for owner in owners if owner is not None), None)


def main_names(parameter: str) -> tuple[str, ...]:
    """The names of the tensor that `parameter` itself may be on disk, its own name first."""
    forms = _forms()
    module, _, leaf = parameter.rpartition(".")
    stem = f"{module}." if module else ""
    if leaf != "weight":
        return (parameter, *(f"{stem}{before}{leaf}{after}" for before, after in forms.mains))
    return tuple(stem + suffix for suffix, part in forms.parts.items() if part.main)


def fused_companions(parameter: str) -> tuple[str, ...]:
    """The names that companions of `parameter` may have, a parameter of another name than `weight`."""
    module, dot, leaf = parameter.rpartition(".")
    return tuple(f"{module}{dot}{before}{leaf}{after}" for before, after in _forms().companions)
