"""Parameter <-> key: under which names on disk the sides of every tie are found.

A tie speaks of parameters in memory; a checkpoint may write them under those names, under the hub's names (transformers
renames and fuses on load), with the base model's prefix missing or added, with fused experts unpacked into one module
per expert, or any mixture. Every key is translated the way `from_pretrained` translates it, with transformers' own
conversion mapping for the class (`transformers.conversion_mapping` and `rename_source_key` of `core_model_loading`);
this room holds no table of names. Names are translated as if nothing were quantized: `...w1.weight_packed` counts as
`...w1.weight`; which tensors a module then has is for the formats to say.

The one rule of its own is how exporters unpack a fused parameter that transformers keeps fused on disk (ModelOpt,
llm-compressor): `experts.gate_up_proj` becomes `experts.<e>.gate_proj` and `experts.<e>.up_proj`, `experts.down_proj`
becomes `experts.<e>.down_proj`, and so for every leaf `A_B_proj`, with or without `_bias`.

This room refuses nothing. What cannot be paired (one side fused, the other unpacked) is said in `TieGroup.problem`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

from tierewrite.ties.tie_map import ModelNames, Scopes, TieMap

# How a tensor on disk stands for (a part of) a parameter: () for all of it; else the expert's part.
Part = tuple[Any, ...]
WHOLE: Part = ()

_UNPACKED = (".weight", ".bias")


@dataclass(frozen=True, slots=True)
class TieGroup:
    """One canonical parameter with everything that is tied to it.

    Attributes:
        id: the canonical parameter's name in memory; unique.
        canonical: the same name.
        aliases: the parameters tied to it, in the order of their declaration.
        origins: who declared each, as `Tie.origin`, one per alias.
        slots: one tuple per tensor that the parameter is on disk: its name under the canonical side, then under each
            alias, as if unquantized (`...experts.3.gate_proj.weight`). A name need not exist as a key. Slots of which
            no side has anything on disk are left out.
        problem: why the sides cannot be compared slot by slot, or None.
    """

    id: str
    canonical: str
    aliases: tuple[str, ...]
    origins: tuple[str, ...]
    slots: tuple[tuple[str, ...], ...]
    problem: str | None = None


@dataclass(frozen=True)
class DiskTies:
    """The ties of a checkpoint under its own names.

    Attributes:
        groups: every group with at least one slot, in the order of the declarations.
        owned: the keys that are a parameter or buffer of the model themselves (never a companion of a neighbour);
            empty when no model class was asked.
        idle: canonical parameters of declared ties of which nothing is on disk, on no side.
    """

    groups: tuple[TieGroup, ...]
    owned: Set[str]
    idle: tuple[str, ...]


def on_disk(ties: TieMap, keys: Collection[str]) -> DiskTies:
    """Find the sides of every tie among `keys`.

    Time is linear in the number of keys (every key is translated once); no tensor is read.
    """
    if not ties.ties:
        return DiskTies((), _owned_by(ties.model, keys), ())
    sides: dict[str, list[str]] = {}
    origins: dict[str, list[str]] = {}
    for tie in ties.ties:
        sides.setdefault(tie.canonical, [tie.canonical]).append(tie.alias)
        origins.setdefault(tie.canonical, []).append(tie.origin)
    tied = {name: root for root, names in sides.items() for name in names}
    translator = _Translator(ties.model, tied)

    knows_all = ties.model is not None and bool(ties.model.shapes)
    owned: set[str] = set()
    # Per tied parameter: its parts on disk and the name of each.
    found: dict[str, dict[Part, str]] = {name: {} for name in tied}
    weak: list[str] = []
    # Modules whose weight is found: their other tensors tell nothing new.
    settled: set[str] = set()
    for key in translator.in_loading_order(keys):
        place = translator.locate(key)
        if place is None:
            weak.append(key)
            continue
        if knows_all:
            owned.add(key)
        parameter, part = place
        if parameter in tied:
            found[parameter].setdefault(part, key)
        if key.endswith(".weight"):
            settled.add(key[: -len(".weight")])
    # A companion says that its parameter is there in some form.
    for key in weak:
        parent = key.rpartition(".")[0]
        if parent in settled:
            continue
        for name in _unquantized(key):
            place = translator.locate(name)
            if place is not None:
                if place[0] in tied:
                    found[place[0]].setdefault(place[1], name)
                if name == f"{parent}.weight":
                    settled.add(parent)
                break

    groups: list[TieGroup] = []
    idle: list[str] = []
    covered: set[str] = set()
    scopes = Scopes(keys)
    for root, names in sides.items():
        parts: dict[Part, None] = {}
        for name in names:
            parts.update(dict.fromkeys(found[name]))
        if not parts:
            idle.append(root)
            continue
        problem = _layout_problem(names, found) or translator.sharing_problem(names, found, tied, covered)
        ordered = sorted(parts, key=_part_order)
        on_side = [found[name] for name in names]
        slots: list[tuple[str, ...]] = []
        if all(len(side) == len(parts) for side in on_side):  # every part is on every side
            slots.extend(zip(*[map(side.__getitem__, ordered) for side in on_side], strict=True))
        else:
            for part in ordered:
                there = {name: side[part] for name, side in zip(names, on_side, strict=True) if part in side}
                slots.append(tuple(there.get(n) or translator.spell(n, part, scopes, there) for n in names))
        groups.append(TieGroup(root, root, tuple(names[1:]), tuple(origins[root]), tuple(slots), problem))
    idle = [root for root in idle if root not in covered]
    return DiskTies(tuple(groups), owned, tuple(idle))


def _owned_by(model: ModelNames | None, keys: Collection[str]) -> Set[str]:
    if model is None or not model.shapes:
        return frozenset()
    translator = _Translator(model, {})
    return {key for key in translator.in_loading_order(keys) if translator.locate(key) is not None}


def places(model: ModelNames, names: Iterable[str]) -> dict[str, tuple[str, Part]]:
    """Where each of `names` (as if unquantized) is loaded: the parameter or buffer in memory, and which part of it.

    A part of an unpacked fused parameter is `("expert", projection, leaf, expert)`, e.g.
    `("expert", "gate_proj", "weight", 3)`; `WHOLE` is all of it. Names that are loaded nowhere are left out.
    """
    translator = _Translator(model, {})
    found = {}
    for name in translator.in_loading_order(names if isinstance(names, Collection) else list(names)):
        place = translator.locate(name)
        if place is not None:
            found[name] = place
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


def _strange(name: str, scopes: Scopes) -> int:
    """Number of trailing path segments of `name` (its own not counted) that no key shares."""
    scope = name.rpartition(".")[0]
    missing = 0
    while scope and scope not in scopes:
        scope = scope.rpartition(".")[0]
        missing += 1
    return missing


class _Translator:
    """Names of one model both ways; remembers every answer."""

    def __init__(self, model: ModelNames | None, tied: Mapping[str, str]) -> None:
        # Where the class was not asked (or not built), the only parameters known are the tied ones.
        self.known: Mapping[str, Any] = model.shapes if model is not None and model.shapes else dict.fromkeys(tied, ())
        self.prefix = model.base_model_prefix if model is not None else ""
        self._memo: dict[str, Any] = {}
        self._covers: dict[str, tuple[str, ...]] = {}
        self._renamings: list[Any] = []
        self._converters: list[Any] = []
        self._reverse: tuple[list[Any], list[Any]] | None = None
        self._model = model
        self._fused: dict[str, list[str]] | None = None
        self._fusing: dict[tuple[str, str, str], str | None] = {}
        self._stateful = False
        self._prefix_differs: bool | None = None
        self._rename: Any = None
        if model is not None:
            from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

            self._rename = rename_source_key
            fresh = [_fresh(t) for t in model.transforms]
            self._renamings = [t for t in fresh if isinstance(t, WeightRenaming)]
            self._converters = [t for t in fresh if isinstance(t, WeightConverter)]
            # A renaming that keeps state must meet the keys in transformers' order.
            self._stateful = any(type(t).__name__ == "GroupWeightRename" for t in fresh)
            texts = [_required_text(p) for t in fresh for p in t.source_patterns]
            self._texts = None if None in texts else tuple(dict.fromkeys(t for t in texts if t is not None))

    def in_loading_order(self, keys: Collection[str]) -> Collection[str]:
        if not self._stateful:
            return keys
        from transformers.core_model_loading import dot_natural_key

        return sorted(keys, key=dot_natural_key)

    # -- disk -> memory

    def locate(self, name: str) -> tuple[str, Part] | None:
        """The parameter that the unquantized name `name` is loaded into, and which part of it; None if none."""
        if self._rename is None:  # names on disk are those in memory: sooner found than remembered
            if name in self.known:
                return name, WHOLE
            return self._unpacked(name) if name.endswith(_UNPACKED) else None
        place = self._memo.get(name, False)
        if place is False:
            place = self._memo[name] = self._locate(name)
        return place

    def _locate(self, name: str) -> tuple[str, Part] | None:
        renamed, pattern = self._forward(name)
        if renamed in self.known:
            if pattern is None:
                return renamed, WHOLE
            return renamed, self._converted_part(name, renamed, pattern)
        return self._unpacked(renamed) if renamed.endswith(_UNPACKED) else None

    def _forward(self, name: str) -> tuple[str, str | None]:
        """transformers' `rename_source_key`, with the fallback that loading makes for names that are right already."""
        prefix = self.prefix or None
        texts = self._texts
        if texts is not None:
            for text in texts:
                if text in name:
                    break
            else:
                # No transform can match. What is left of transformers' function is the base model's prefix.
                if prefix is None:
                    return name, None
                if name.startswith(prefix) and name[len(prefix) + 1 :] in self.known:
                    return name[len(prefix) + 1 :], None
                added = f"{prefix}.{name}"
                return (added if added in self.known else name), None
        renamed, pattern = self._rename(name, self._renamings, self._converters, prefix, self.known)
        if renamed not in self.known:
            if name in self.known:
                return name, None
            plain, _ = self._rename(name, [], [], prefix, self.known)
            if plain in self.known:
                return plain, None
        return renamed, pattern

    def _converted_part(self, name: str, renamed: str, pattern: str) -> Part:
        """Which part of the parameter a name is that a `WeightConverter` matched."""
        converter = next(c for c in self._converters if pattern in c.source_patterns)
        index = converter.source_patterns.index(pattern)
        if len(converter.target_patterns) > 1:
            first = converter.target_patterns[0]
            self._covers[name] = tuple(renamed.replace(first, t) for t in converter.target_patterns)
        if len(converter.source_patterns) == 1 and "*" not in pattern:
            return WHOLE
        return ("converter", pattern, index, _expert_of(pattern, name) if "*" in pattern else 0)

    def _unpacked(self, renamed: str) -> tuple[str, Part] | None:
        """`...experts.3.gate_proj.weight` as a part of the fused `...experts.gate_up_proj`."""
        path = renamed.rsplit(".", 3)
        if len(path) < 4:
            return None
        container, index, projection, leaf = path
        if not container or not index.isdecimal() or not index.isascii():
            return None
        kind = container, projection, leaf
        fused = self._fusing.get(kind, "")
        if fused == "":
            fused = self._fusing[kind] = self._fused_of(*kind)
        return None if fused is None else (fused, ("expert", projection, leaf, int(index)))

    def _fused_of(self, container: str, projection: str, leaf: str) -> str | None:
        """The parameter of `container` that holds the experts' `projection`."""
        candidates = self._fused_leaves(container)
        end = "_bias" if leaf == "bias" else ""
        for fused in candidates:
            if end and not fused.endswith(end):
                continue
            stem = fused[: len(fused) - len(end)]
            if stem == projection:
                return f"{container}.{fused}"
        for fused in candidates:
            if end and not fused.endswith(end):
                continue
            words = fused[: len(fused) - len(end)].split("_")
            if len(words) > 2 and projection in {f"{word}_{words[-1]}" for word in words[:-1]}:
                return f"{container}.{fused}"
        return None

    def _fused_leaves(self, container: str) -> list[str]:
        if self._fused is None:
            self._fused = {}
            for name in self.known:
                parent, _, leaf = name.rpartition(".")
                if leaf not in ("weight", "bias"):
                    self._fused.setdefault(parent, []).append(leaf)
        return self._fused.get(container, [])

    # -- one tensor on disk for several parameters

    def sharing_problem(
        self,
        names: list[str],
        found: Mapping[str, Mapping[Part, str]],
        tied: Mapping[str, str],
        covered: set[str],
    ) -> str | None:
        """A tensor on disk that is several parameters (a fused q/k/v) may go only if all of them are tied alike."""
        for alias in names[1:]:
            for disk_name in found.get(alias, {}).values():
                for parameter in self._covers.get(disk_name, ()):
                    if tied.get(parameter, parameter) == parameter:
                        return f"'{disk_name}' also holds '{parameter}', which is not tied"
                    covered.add(tied[parameter])
        return None

    # -- memory -> disk

    def spell(self, parameter: str, part: Part, scopes: Scopes, beside: Mapping[str, str]) -> str:
        """The name on disk that `part` of `parameter` would have in this checkpoint.

        Of the names that load into it (under hub names, memory names, with and without the base model's prefix), the
        one whose path is most at home among the keys; among equals the one that is spelled as the sides that are there
        (`beside`: parameter -> name on disk), then the longest path, then the hub's.
        """
        spelled = self._spellings(parameter, part, scopes)
        right = {n: name for n, name in enumerate(spelled) if self.locate(name) == (parameter, part)}
        if right:
            strange = {n: _strange(name, scopes) for n, name in right.items()}
            least = min(strange.values())
            best = [n for n in right if strange[n] == least]
            if len({right[n] for n in best}) > 1:
                votes = dict.fromkeys(best, 0)
                for other, name in beside.items():
                    for n, candidate in enumerate(self._spellings(other, part, scopes)):
                        if n in votes and candidate == name:
                            votes[n] += 1
                best.sort(key=lambda n: (-votes[n], -right[n].count(".")))
            return right[best[0]]
        if part == WHOLE:
            return parameter
        container = parameter.rpartition(".")[0]
        return f"{container}.{part[3]}.{part[1]}.{part[2]}" if part[0] == "expert" else parameter

    def _spellings(self, parameter: str, part: Part, scopes: Scopes) -> list[str]:
        """Every way to spell it, in one order for all parameters, the hub's first; names may repeat."""
        stem = f"{self.prefix}." if self.prefix else ""
        if self._prefix_differs is None:
            # The base model's prefix is missing or added in a checkpoint as a whole.
            expected = any(name.startswith(stem) for name in self.known)
            self._prefix_differs = bool(stem) and (self.prefix in scopes) != expected
        names = list(self._plain_spellings(parameter, part))
        if self._prefix_differs:
            names += [n.removeprefix(stem) if n.startswith(stem) else stem + n for n in names]
        return names

    def _plain_spellings(self, parameter: str, part: Part) -> Iterator[str]:
        from_hub = self._hub_names(parameter, part)
        if part and part[0] == "expert":
            _, projection, leaf, index = part
            for whole in (*self._hub_names(parameter, WHOLE), parameter):
                yield f"{whole.rpartition('.')[0]}.{index}.{projection}.{leaf}"
            return
        yield from from_hub
        yield parameter

    def _hub_names(self, parameter: str, part: Part) -> Iterator[str]:
        """Names that `save_pretrained` would write (transformers' transforms reversed), prefix changes both ways."""
        if self._model is None or self._rename is None:
            return
        from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming

        if self._reverse is None:
            reversed_transforms = []
            for transform in reversed(self._model.hub_transforms):
                try:
                    reversed_transforms.append(_fresh(transform).reverse_transform())
                except Exception:
                    # A transform that transformers cannot reverse names nothing on save.
                    continue
            self._reverse = (
                [t for t in reversed_transforms if isinstance(t, WeightRenaming)],
                [t for t in reversed_transforms if isinstance(t, WeightConverter)],
            )
        renamings, converters = self._reverse
        without = [t for t in renamings if not isinstance(t, PrefixChange)]
        for chosen in (without, renamings) if len(without) != len(renamings) else (renamings,):
            for converted in self._unconverted(parameter, part, converters):
                yield self._rename(converted, chosen, [], None, None)[0]
        if part and part[0] == "converter":
            # Hub layout under memory paths.
            yield from self._unconverted(parameter, part, converters)

    def _unconverted(self, parameter: str, part: Part, converters: list[Any]) -> Iterator[str]:
        """`parameter` before the converter that makes it on load: the name of `part`, paths still as in memory."""
        for converter in converters:
            renamed, pattern = converter.rename_source_key(parameter)
            if pattern is None:
                continue
            targets = converter.target_patterns
            index = part[2] if part and part[0] == "converter" else 0
            if index < len(targets):
                name = renamed.replace(targets[0], targets[index])
                yield name.replace("*", str(part[3]) if part and part[0] == "converter" else "0")
            return
        yield parameter


def _fresh(transform: Any) -> Any:
    """A copy of a transform: matching sets flags in it that must not outlive one checkpoint."""
    from copy import deepcopy

    return deepcopy(transform)


def _expert_of(pattern: str, name: str) -> int:
    """The number that the last wildcard of a `WeightConverter`'s source pattern stands for in `name`."""
    match = re.search(pattern.replace("*.", r".*\."), name)  # as transformers compiles it
    text = match.group(0) if match else name
    tail = pattern.rpartition("*.")[2].replace("\\.", ".")
    numbers = re.findall(r"\d+", text.removesuffix(tail))
    return int(numbers[-1]) if numbers else 0


def _required_text(pattern: str) -> str | None:
    """A text that every match of `pattern` contains (the longest run of plain characters outside groups), or None.

    Only a filter for speed: most keys contain none of the texts of a class's patterns, and searching for a text is ten
    times faster than searching for a pattern.
    """
    runs: list[str] = [""]
    depth = 0
    at = 0
    while at < len(pattern):
        char = pattern[at]
        if char == "\\":
            following = pattern[at + 1 : at + 2]
            if following == "." and not depth:
                runs[-1] += "."
            else:
                runs.append("")
            at += 2
            continue
        if char in "([{":
            depth += 1
            if char == "{":
                runs[-1] = runs[-1][:-1]
            runs.append("")
        elif char in ")]}":
            depth -= 1
        elif char == "|" and not depth:
            return None
        elif char in "*?":
            # The character before may be absent.
            runs[-1] = runs[-1][:-1]
            runs.append("")
        elif char in "^$.+|":
            runs.append("")
        elif not depth:
            runs[-1] += char
        at += 1
    best = max(runs, key=len)
    return best if len(best) > 1 else None
