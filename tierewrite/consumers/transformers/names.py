"""Which names transformers' own loaders would miss in a checkpoint that holds each tied weight once.

transformers builds both sides of a tie and ties parameters, by the names in `_tied_weights_keys` (modeling_utils.py
`PreTrainedModel.tie_weights`). What a quantizer adds to a module (scales, zero points, a packed weight of another name)
is tied by nothing: on the alias's side it has to be on disk. Where a Python is known that has the quantizer's package,
`from_pretrained` is asked for its missing keys, without reading a weight (`dry_load.py`). Else a rule decides, by how
the quantizer stores a weight.
"""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from tierewrite import formats
from tierewrite.consumers.dry_load import DryLoader, LoaderOptions, dry_load
from tierewrite.planning.needed_names import NeededNames
from tierewrite.planning.policy import Policy
from tierewrite.source.table import CONFIG_NAME, TensorEntry
from tierewrite.ties.on_disk import DiskTies
from tierewrite.ties.quantizers import BY_MACHINE, ONE_PARAMETER, quant_method
from tierewrite.values.opened import Opened

CONSUMER = "transformers"
LOADER = DryLoader("transformers", "transformers", Path(__file__).with_name("dry_load.py"))
TIMEOUT_SECONDS = 600.0

# The packages that transformers imports for a quantizer, where their name is another one.
PACKAGES = {
    "compressed-tensors": "compressed_tensors", "awq": "gptqmodel", "gptq": "gptqmodel", "auto-round": "auto_round",
    "quanto": "optimum",
}  # fmt: skip


def needed_names(opened: Opened) -> NeededNames:
    """The names in the source that transformers' loader would miss if each tie were stored once."""
    method = quant_method(opened.checkpoint.config)
    if method is None or method in ONE_PARAMETER:
        return NeededNames(CONSUMER)
    sides = _sides(opened.disk, opened.checkpoint.tensors, first=1)
    by_rule = needed_by_rule(method, sides)
    if not by_rule:
        return NeededNames(CONSUMER)
    if method in BY_MACHINE:
        note = f"'{method}' keeps scales in its modules on a GPU and decodes weights elsewhere: whole sides suit both"
        return NeededNames(CONSUMER, by_rule, (note,))
    asked = _needed_by_loader(opened, method, sides)
    if isinstance(asked, str):
        note = f"the loader of '{method}' was not asked which names it needs ({asked}); a rule decided"
        return NeededNames(CONSUMER, by_rule, (note,))
    return NeededNames(CONSUMER, asked)


def needed_by_rule(method: str, sides: Mapping[str, Sequence[str]]) -> frozenset[str]:
    """What a quantizer needs of the aliases' sides, by how it stores a weight.

    Args:
        method: one of `QUANT_METHODS`.
        sides: alias's name on disk, as if unquantized -> the keys that it became.
    """
    if method in ONE_PARAMETER:
        return frozenset()
    quantized = {name: keys for name, keys in sides.items() if any(key != name for key in keys)}
    return frozenset(key for name, keys in quantized.items() for key in keys if key != name or method in BY_MACHINE)


def dropped_names_warning(opened: Opened) -> tuple[str, ...]:
    """What a person should know who drops names that transformers' own loader needs; nothing where it needs none."""
    method = quant_method(opened.checkpoint.config)
    if method is None or method in ONE_PARAMETER:
        return ()
    aliases = {name for group in opened.disk.groups for slot in group.slots for name in slot[1:]}
    if all(aliases.isdisjoint(_owners(key)) for key in opened.checkpoint.tensors):
        return ()
    return (
        f"transformers loads the quantizer '{method}' itself, and ties no scales: it will not find those of the names "
        "that go. Write it with --for transformers, which keeps them, if transformers is to load it",
    )


def missed_names(config: Mapping[str, Any], disk: DiskTies, entries: Mapping[str, TensorEntry]) -> list[str]:
    """Names that transformers' quantizer needs on one side of a tie and that only another side has, by the rule.

    A side that is stored unquantized needs none, and where there is one, no side that is not stored either: it gets the
    plain weight (BART's embeddings beside a head that was quantized alone).
    """
    method = quant_method(config)
    if method is None or method in ONE_PARAMETER:
        return []
    sides = _sides(disk, entries, first=0)
    missed: list[str] = []
    for group in disk.groups:
        for slot in group.slots:
            stems = {name: name.rpartition(".")[0] for name in slot}
            added = {name: {key[len(stem) :] for key in sides[name] if key != name} for name, stem in stems.items()}
            packed = {entries[name].dtype for name in slot if added[name] and name in entries}
            plain = {name for name in slot if name in entries and not added[name] and entries[name].dtype not in packed}
            wanted = sorted(set[str]().union(*added.values()))
            for name, stem in stems.items():
                if name not in plain and (sides[name] or not plain):
                    missed.extend(stem + rest for rest in wanted if stem + rest not in entries)
    return missed


def _owners(key: str) -> tuple[str, ...]:
    """The weights that `key` may belong to, as if unquantized, without being one of them."""
    part = formats.part_of_weight(key)
    if part is None:
        return formats.fused_parameters(key)
    return (part[0],) if part[1].role.of_weight and part[0] != key else ()


def _sides(disk: DiskTies, keys: Iterable[str], *, first: int) -> dict[str, list[str]]:
    """For every side from number `first` on (0: the canonical one), by its name on disk as if unquantized: the keys of
    its weight and of what belongs to that.
    """
    sides: dict[str, list[str]] = {name: [] for group in disk.groups for slot in group.slots for name in slot[first:]}
    for key in keys:
        for owner in (key,) if key in sides else _owners(key):
            if owner in sides:
                sides[owner].append(key)
    return sides


def _needed_by_loader(opened: Opened, method: str, sides: Mapping[str, Sequence[str]]) -> frozenset[str] | str:
    """What `from_pretrained` misses in the canonical form and not in the source; or why it was not asked."""
    package = PACKAGES.get(method, method)
    if LOADER.variable not in os.environ and importlib.util.find_spec(package) is None:
        return f"this Python has no {package}; {LOADER.variable} may name one that has it"
    plan = replace(opened, needed=NeededNames()).plan(Policy(on_mismatch="keep"))
    kinds, kind = plan.source.kinds, plan.source.kind.tolist()
    survivors = plan.survivors()
    canonical = [(name, *kinds[kind[row]]) for name, row in survivors.row.items()]
    source = [(name, *kinds[number]) for name, number in zip(plan.source.names, kind, strict=True)]
    missing = _missed(json.dumps(opened.checkpoint.config), _header(canonical), _header(source))
    return missing if isinstance(missing, str) else _on_disk(opened.disk, sides, missing)


def _header(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> str:
    """The header of a safetensors file with these tensors (name, dtype, shape), which have no bytes."""
    return json.dumps({name: {"dtype": dtype, "shape": shape} for name, dtype, shape in tensors})


@lru_cache(maxsize=8)
def _missed(config: str, *headers: str) -> frozenset[str] | str:
    """Parameters and buffers that `from_pretrained` misses with the first header and not with the second; or why it
    was not asked. A rewrite and its proof ask the same.
    """
    with tempfile.TemporaryDirectory(prefix="tierewrite-names-") as home:
        folders = {Path(home, str(number)): "the checkpoint" for number in range(len(headers))}
        for folder, header in zip(folders, headers, strict=True):
            folder.mkdir()
            (folder / CONFIG_NAME).write_text(config, encoding="utf-8")
            text = header.encode()
            (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
        answers = dry_load(LOADER, folders, LoaderOptions(timeout=TIMEOUT_SECONDS))
    for answer in answers:
        if not answer.loaded:
            return answer.reason
    first, second = ({one.parameter for one in answer.ranks[0].unfilled} for answer in answers)
    return frozenset(first - second)


def _on_disk(disk: DiskTies, sides: Mapping[str, Sequence[str]], missing: Collection[str]) -> frozenset[str]:
    """The keys of the sides of which `missing` names something, in memory.

    A quantizer calls its tensors otherwise in memory than on disk (Quark's weight_scale is weight_quantizer.scale), so
    that all companions of such a side are taken; its weight only if that is missing itself.
    """
    needed: set[str] = set()
    for group in disk.groups:
        for number, alias in enumerate(group.aliases, start=1):
            module, _, leaf = alias.rpartition(".")
            below = (f"{module}.",) if leaf == "weight" else (f"{alias}.", f"{alias}_")
            if not any(name == alias or name.startswith(below) for name in missing):
                continue
            for slot in group.slots:
                needed.update(key for key in sides[slot[number]] if key != slot[number] or alias in missing)
    return frozenset(needed)
