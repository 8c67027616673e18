"""Parameter <-> key: under which names on disk the sides of every tie are found.

A tie speaks of parameters in memory; a checkpoint may write them under those names, under the hub's names (transformers
renames and fuses on load), with the base model's prefix missing or added, with fused experts unpacked into one module
per expert, or any mixture. Every key is translated the way `from_pretrained` translates it, with transformers' own
conversion mapping for the class (`renames`: `rename_source_key` of transformers' `core_model_loading`);
this room holds no table of names. Names are translated as if nothing were quantized: `...w1.weight_packed` counts as
`...w1.weight`; which tensors a module then has is for the formats to say.

The one rule of its own is how exporters unpack a fused parameter that transformers keeps fused on disk (`unpacked`).

This room refuses nothing. What cannot be paired (one side fused, the other unpacked), and what is packed in a format
that nobody knows, is said in `TieGroup.problem`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from dataclasses import replace
from typing import Any

import numpy as np

from tierewrite.errors import shown
from tierewrite.source.table import Checkpoint, Names, TensorEntry, as_names
from tierewrite.ties.fit import one_of_each_kind
from tierewrite.ties.patterns import parameters_of
from tierewrite.ties.scopes import Scopes
from tierewrite.ties.spelling import Speller
from tierewrite.ties.tie import Declared, ModelNames
from tierewrite.ties.tie_group import WHOLE, DiskTies, Part, TieGroup
from tierewrite.ties.translator import Translator
from tierewrite.ties.unknown_formats import with_unknown_formats_refused
from tierewrite.ties.wrappers import Unwrapped, common_words, unwrapped

__all__ = ["WHOLE", "DiskTies", "Part", "TieGroup", "on_disk", "places"]

_Found = dict[str, dict[Part, str]]  # tied parameter -> its parts on disk and the name of each


def on_disk(ties: Declared, keys: Collection[str], entries: Mapping[str, TensorEntry] | None = None) -> DiskTies:
    """Find the sides of every tie among `keys`. No tensor is read; time is linear in the number of keys.

    Args:
        ties: what is declared.
        keys: the names of all tensors.
        entries: their headers; without them, ties of tensors in formats that nobody knows cannot be told.
    """
    disk = _through_wrappers(ties, keys)
    if ties.model is not None:
        ties.model.renames.settled()
    groups = disk.groups if entries is None else with_unknown_formats_refused(disk.groups, entries, disk.owned)
    return replace(disk, groups=tuple(groups), warnings=(*disk.warnings, *_idle_warnings(ties, keys, disk)))


def _through_wrappers(ties: Declared, keys: Collection[str]) -> DiskTies:
    """The ties among `keys`, or, where the model knows more of them so, among `keys` without the names of wrappers."""
    worn = wrappers_of(ties, keys)
    if worn is None:
        return _under_these_names(ties, keys)
    disk = worn.restored(_under_these_names(ties, worn.names))
    warning = (
        f"{worn.said}, which a wrapper left (torch.compile, FSDP, PEFT, ...): ties are found without it and the names "
        "are kept, but loaders do not know them; --strip-prefix takes it off"
    )
    return replace(disk, prefix=worn.prefix, warnings=(warning,))


def wrappers_of(ties: Declared, keys: Collection[str]) -> Unwrapped | None:
    """`keys` without the names of wrappers; None if there are none, or the model calls parts of its own like that."""
    worn = unwrapped(keys)
    if worn is None:
        return None
    kinds = one_of_each_kind(keys)
    bare = unwrapped(kinds)
    as_they_are = _known(ties, kinds)
    asked = ties.model is not None and ties.model.shapes
    if not as_they_are and not asked:
        return worn
    return worn if bare is not None and _known(ties, bare.names) > as_they_are else None


def without_wrappers(checkpoint: Checkpoint, ties: Declared) -> Checkpoint:
    """`checkpoint` with the names of its tensors as the model knows them; a warning says what was taken off."""
    worn = wrappers_of(ties, checkpoint.tensors)
    if worn is None:
        said = "--strip-prefix is given, and no name begins with one of a wrapper: the names are as they were"
        return replace(checkpoint, warnings=(*checkpoint.warnings, said))
    what = f"'{shown(worn.prefix)}' was taken off every name" if worn.prefix else "names of wrappers were taken off"
    said = f"{what} ({len(worn.names)} tensors), as --strip-prefix says"
    named = checkpoint.tensors.named(worn.names.names)
    return replace(checkpoint, tensors=named, warnings=(*checkpoint.warnings, said))


def _known(ties: Declared, keys: Collection[str]) -> int:
    """How many of `keys` the model, or where none was asked a tie, knows."""
    translator = Translator(ties.model, {name: "" for tie in ties.ties for name in (tie.alias, tie.canonical)})
    return sum(translator.locate(name) is not None for name in translator.in_loading_order(list(parameters_of(keys))))


def _idle_warnings(ties: Declared, keys: Collection[str], disk: DiskTies) -> Iterator[str]:
    """What to say of declared ties of which nothing is on disk."""
    if not disk.idle or not len(keys):
        return
    alias = {tie.canonical: tie.alias for tie in ties.ties}
    first = disk.idle[0]
    more = f" ({len(disk.idle)} ties in all)" if len(disk.idle) > 1 else ""
    said = f"nothing is on disk of the declared tie of '{shown(alias.get(first, first))}' to '{shown(first)}'{more}"
    if ties.model is not None and ties.model.shapes and not disk.owned:
        said += f": none of the {len(keys)} names is a parameter of {ties.model.class_name}"
        common = _common_beginning(keys)
        said += f"; all of them begin with '{shown(common)}'" if common else ""
    yield said


def _common_beginning(keys: Collection[str]) -> str:
    """The words that all names begin with, with the last dot."""
    return common_words(min(keys), max(keys))


def _under_these_names(ties: Declared, keys: Collection[str]) -> DiskTies:
    """The ties among `keys`, as they are spelled."""
    if not ties.ties:
        return DiskTies((), _owned_by(ties.model, keys), ())
    sides: dict[str, list[str]] = {}
    origins: dict[str, list[str]] = {}
    for tie in ties.ties:
        sides.setdefault(tie.canonical, [tie.canonical]).append(tie.alias)
        origins.setdefault(tie.canonical, []).append(tie.origin)
    tied = {name: root for root, names in sides.items() for name in names}
    translator = Translator(ties.model, tied)
    names_of_keys = as_names(keys)
    found, located = _found(translator, tied, names_of_keys)
    asked = ties.model is not None and ties.model.shapes
    owned = {names_of_keys.names[row] for row in located} if asked else set()

    groups: list[TieGroup] = []
    idle: list[str] = []
    covered: set[str] = set()
    speller = Speller(translator, Scopes(keys))
    for root, names in sides.items():
        if not any(found[name] for name in names):
            idle.append(root)
            continue
        problem = _layout_problem(names, found) or _sharing_problem(translator, names, found, tied, covered)
        slots = _slots(names, found, speller)
        groups.append(TieGroup(root, root, tuple(names[1:]), tuple(origins[root]), slots, problem))
    return DiskTies(tuple(groups), owned, tuple(root for root in idle if root not in covered))


def _found(translator: Translator, tied: Collection[str], keys: Names) -> tuple[_Found, list[int]]:
    """Where the `tied` parameters are on disk, and the rows that are a parameter or buffer themselves."""
    found: _Found = {name: {} for name in tied}
    located: list[int] = []
    order = translator.loading_order(keys)
    for row in order[translator.may_be_located(keys)[order]].tolist():
        key = keys.names[row]
        place = translator.locate(key)
        if place is None:
            continue
        located.append(row)
        parameter, part = place
        if parameter in tied:
            found[parameter].setdefault(part, key)
    companion = np.ones(len(keys), bool)
    companion[located] = False
    settled = np.zeros(len(keys.modules), bool)  # modules whose weight is found: their other tensors tell nothing new
    weight = np.array([leaf == "weight" for leaf in keys.leaves], bool)[keys.leaf]
    settled[keys.module[weight & ~companion]] = True
    # A companion says that its parameter is there in some form.
    for row in order[(companion & ~settled[keys.module])[order]].tolist():
        number = keys.module[row]
        if settled[number]:
            continue
        key = keys.names[row]
        for name in _unquantized(key):
            place = translator.locate(name)
            if place is not None:
                if place[0] in tied:
                    found[place[0]].setdefault(place[1], name)
                if name == f"{key.rpartition('.')[0]}.weight":
                    settled[number] = True
                break
    return found, located


def _slots(names: list[str], found: _Found, speller: Speller) -> tuple[tuple[str, ...], ...]:
    """One tuple per part of the tied parameters `names`: its name on disk on each side."""
    on_side = [found[name] for name in names]
    parts: dict[Part, None] = {}
    for side in on_side:
        parts.update(dict.fromkeys(side))
    ordered = sorted(parts, key=_part_order)
    if all(len(side) == len(parts) for side in on_side):  # every part is on every side
        return tuple(zip(*[map(side.__getitem__, ordered) for side in on_side], strict=True))
    slots = []
    for part in ordered:
        there = {name: side[part] for name, side in zip(names, on_side, strict=True) if part in side}
        slots.append(tuple(there.get(name) or speller.spell(name, part, there) for name in names))
    return tuple(slots)


def _owned_by(model: ModelNames | None, keys: Collection[str]) -> Set[str]:
    if model is None or not model.shapes:
        return frozenset()
    translator = Translator(model, {})
    return {key for key in translator.in_loading_order(keys) if translator.locate(key) is not None}


def places(model: ModelNames, names: Iterable[str]) -> dict[str, tuple[str, Part]]:
    """Where each of `names` (as if unquantized) is loaded: the parameter or buffer in memory, and which part of it.

    A part of an unpacked fused parameter is `("expert", projection, leaf, expert)`, e.g.
    `("expert", "gate_proj", "weight", 3)`; `WHOLE` is all of it. Names that are loaded nowhere are left out.
    """
    translator = Translator(model, {})
    found = {}
    for name in translator.in_loading_order(names if isinstance(names, Collection) else list(names)):
        place = translator.locate(name)
        if place is not None:
            found[name] = place
    model.renames.settled()
    return found


def _unquantized(key: str) -> Iterator[str]:
    """The parameters that `key` may be a companion of, likeliest first."""
    parent, _, leaf = key.rpartition(".")
    if leaf == "bias" or not parent:
        return
    yield f"{parent}.weight"  # q_proj.weight_scale, q_proj.input_scale, q_proj.qweight
    while "_" in leaf:  # experts.gate_up_proj_scale, experts.gate_up_proj_blocks
        leaf = leaf.rpartition("_")[0]
        if leaf:
            yield f"{parent}.{leaf}"
        if leaf.startswith("_"):  # experts._gate_up_proj_qdata
            yield f"{parent}.{leaf[1:]}"
    yield parent  # q_proj.weight.absmax
    above = parent.rpartition(".")[0]
    if above:
        yield f"{above}.weight"  # q_proj.weight_quantizer._svdquant_lora_a
        yield above  # q_proj.weight.quant_state.bitsandbytes__nf4


def _part_order(part: Part) -> tuple[Any, ...]:
    return (0,) if part == WHOLE else (1, part[-1], str(part[0]), str(part[1]))


def _layout_problem(names: list[str], found: Mapping[str, Mapping[Part, str]]) -> str | None:
    """Why the sides cannot be compared: one is whole on disk, another in parts of its own kind."""
    kinds = [{part and part[0] for part in found[name]} for name in names if found.get(name)]
    if all(kind == kinds[0] for kind in kinds):
        return None
    whole = [n for n in names if WHOLE in found.get(n, ())]
    parts = [n for n in names if found.get(n) and WHOLE not in found[n]]
    if whole and parts:
        return f"'{whole[0]}' is one tensor on disk, '{parts[0]}' is unpacked into parts: they cannot be compared"
    return f"the sides are laid out differently on disk: {', '.join(names)}"


def _sharing_problem(
    translator: Translator, names: list[str], found: _Found, tied: Mapping[str, str], covered: set[str]
) -> str | None:
    """A tensor on disk that is several parameters (a fused q/k/v) may go only if all of them are tied alike."""
    for alias in names[1:]:
        for disk_name in found[alias].values():
            for parameter in translator.covers.get(disk_name, ()):
                if tied.get(parameter, parameter) == parameter:
                    return f"'{disk_name}' also holds '{parameter}', which is not tied"
                covered.add(tied[parameter])
    return None
