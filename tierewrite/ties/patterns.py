"""Declarations without a model: a ties file, a mapping or config.json, expanded over what the checkpoint holds.

A declaration is `{alias: canonical}`: names of parameters, names of modules, or regular expressions as transformers
writes them. Which keys are parameters, and which only belong to one, is for `formats` to say.

The form of the declarations is transformers' own: `PreTrainedModel.get_expanded_tied_weights_keys` (transformers 5).
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import compress, cycle
from pathlib import Path
from typing import Any

import numpy as np

from tierewrite import formats
from tierewrite.bounded_regex import LONGEST, BadPattern, BoundedRegex
from tierewrite.errors import ConfigError, TieFileError, shown
from tierewrite.json_text import plain_text
from tierewrite.source.regular_files import read_bounded
from tierewrite.source.strict_json import BadJson, kind_of_json, strict_json
from tierewrite.source.table import as_names
from tierewrite.ties.scopes import Scopes
from tierewrite.ties.tie import Declared, Tie, rooted
from tierewrite.ties.unpacked import projections
from tierewrite.ties.wrappers import unwrapped

TIES_WANTED = "expected a JSON object {alias: canonical}"
_MAX_TIES_BYTES = 1 << 30  # a million ties have 50 MB
PLAIN_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*\Z")


def is_regex(pattern: str) -> bool:
    """Whether a declared name is a pattern; a plain one is words with dots between."""
    return PLAIN_NAME.match(pattern) is None


def parameters_of(keys: Collection[str]) -> dict[str, None]:
    """Names of parameters that the keys of a checkpoint speak of, as if nothing were quantized; an ordered set.

    A companion (`weight_scale`, `input_scale`, `gate_up_proj_scales`) is never a parameter: it speaks of the weight
    that it belongs to, as `formats` says, and so does the weight's packed form. Nor is what no format knows, where it
    stands in a quantized module: the module's tie is refused because of it (planning), and must not be split. Unpacked
    experts (`experts.3.gate_proj.weight`) also speak of the fused parameters that they may be in memory.
    """
    table = as_names(keys)
    kind = np.array([_kind_of(leaf) for leaf in table.leaves], np.int8)[table.leaf]
    names = dict.fromkeys(compress(table.names, kind == _WEIGHT))
    modules = list(table.modules)
    packed = np.zeros(len(modules), bool)
    packed[table.module[kind == _OF_WEIGHT]] = True
    quantized = set(compress(modules, packed))
    packed[table.module[kind == _WEIGHT]] = False
    names.update((f"{module}.weight" if module else "weight", None) for module in compress(modules, packed))
    unknown: list[str] = []
    for row in np.flatnonzero((kind == _UNKNOWN) | (kind == _SEVERAL_WORDS)).tolist():
        part = formats.part_of_weight(table.names[row]) if kind[row] == _SEVERAL_WORDS else None
        if part is None:
            unknown.append(table.names[row])
        elif part[1].role.of_weight:
            names[part[0]] = None
            quantized.add(part[0].rpartition(".")[0])
    for key in unknown:
        if _is_parameter(key, table, names, quantized):
            names[formats.main_parameter(key) or key] = None
    names.update(dict.fromkeys(_fused_experts(names)))
    return names


_WEIGHT, _OF_WEIGHT, _OTHER, _UNKNOWN, _SEVERAL_WORDS = range(5)


def _kind_of(leaf: str) -> int:
    """What the last word of a key says of it: which of the above."""
    if leaf in ("weight", ".weight"):
        return _WEIGHT
    if leaf.startswith(".") or formats.ends_longer_suffix(leaf):
        return _SEVERAL_WORDS
    part = formats.part_of_weight(leaf)
    if part is None:
        return _UNKNOWN
    return _OF_WEIGHT if part[1].role.of_weight else _OTHER


def _is_parameter(key: str, keys: Collection[str], names: Collection[str], quantized: Collection[str]) -> bool:
    """Whether a key that is no part of a weight by its suffix is a parameter, or one in a fused one's packed form."""
    if any(main in keys for owner in formats.fused_parameters(key) for main in formats.main_names(owner)):
        return formats.is_own_parameter(key)
    if formats.is_own_parameter(key):
        return True
    parent, _, leaf = key.rpartition(".")
    above = parent.rpartition(".")[0]
    return (
        parent not in quantized
        and above not in quantized
        and not (leaf.startswith("weight_") and f"{parent}.weight" in names)
    )


def _fused_experts(names: Iterable[str]) -> Iterator[str]:
    """The parameters in memory that unpacked experts may be parts of."""
    containers: dict[str, set[str]] = defaultdict(set)
    for name in names:
        words = name.rsplit(".", 3)
        if len(words) == 4 and words[3] == "weight" and words[0] and words[1].isdecimal():
            containers[words[0]].add(words[2])
    for container, found in containers.items():
        for projection in sorted(found):
            yield f"{container}.{projection}"
        if found.issuperset(_HALVES):
            yield f"{container}.{_BOTH}"


_BOTH = "gate_up_proj"
_HALVES = projections(_BOTH)


def parameters_declared(declared: Mapping[str, str], keys: Collection[str], names: Collection[str]) -> dict[str, str]:
    """`declared` with the parameters that are meant where it has names of packed tensors."""
    pairs = {_parameter_named(a, keys, names): _parameter_named(c, keys, names) for a, c in declared.items()}
    return {alias: canonical for alias, canonical in pairs.items() if alias != canonical}


def _parameter_named(name: str, keys: Collection[str], names: Collection[str]) -> str:
    """The parameter that a declaration means by `name`, which may be the name of its packed tensor."""
    if name in names or is_regex(name):
        return name
    main = formats.main_parameter(name)
    if main is not None:
        return main
    if name in keys and formats.part_of_weight(name) is None:  # of a format that nobody knows, in a quantized module
        parent = name.rpartition(".")[0]
        for module in (parent, parent.rpartition(".")[0]):
            if f"{module}.weight" in names:
                return f"{module}.weight"
    return name


def _matcher(pattern: str, file: Path | None, error: type[TieFileError] | type[ConfigError]) -> BoundedRegex:
    """`pattern` as transformers searches it (anchored at the start), ended at a dot or at the name's end."""
    try:
        # The end is ours: transformers searches `^...weight` over parameters only, where nothing longer exists.
        return BoundedRegex(pattern, r"(?:{})(?=\.|\Z)")
    except BadPattern as problem:
        raise _bad_pattern(pattern, problem, file, error) from problem


def _bad_pattern(
    pattern: str, problem: BadPattern, file: Path | None, error: type[TieFileError] | type[ConfigError]
) -> TieFileError | ConfigError:
    return error(f"the tie pattern '{shown(pattern)}' cannot be used: {problem}", file=file)


_TAIL = re.compile(r"(?<![\\A-Za-z0-9_])[A-Za-z0-9_]+\Z")


def _tail_of(matcher: BoundedRegex, pattern: str) -> str:
    """Text that every match of `pattern` ends with; "" where that takes more than a look. Only a filter for speed."""
    found = _TAIL.search(pattern)
    return found[0] if found and "|" not in pattern and not matcher.has_flags else ""


def _matches(
    pattern: str, ordered: Sequence[str], file: Path | None, error: type[TieFileError] | type[ConfigError]
) -> list[str]:
    """The names that `pattern` speaks of, in order: itself and what is below it, or what a regex matches."""
    if is_regex(pattern):
        matcher = _matcher(pattern, file, error)
        tail = _tail_of(matcher, pattern)
        try:
            return matcher.matching(name for name in ordered if tail in name)
        except BadPattern as problem:
            raise _bad_pattern(pattern, problem, file, error) from problem
    found = []
    at = bisect_left(ordered, pattern)
    if at < len(ordered) and ordered[at] == pattern:
        found.append(pattern)
    below = pattern + "."
    for at in range(bisect_left(ordered, below), len(ordered)):
        if not ordered[at].startswith(below):
            break
        found.append(ordered[at])
    return found


def expand(
    declared: Mapping[str, str],
    names: Collection[str],
    file: Path | None,
    error: type[TieFileError] | type[ConfigError],
) -> tuple[dict[str, str], list[str]]:
    """Expand declarations over `names` by transformers' rule; returns (pairs, idle declarations).

    The rule (`PreTrainedModel.get_expanded_tied_weights_keys`): both patterns are searched, anchored at the start; the
    sorted matches of the alias pattern are paired with the sorted matches of the canonical pattern, cycled. Where the
    canonical side is incomplete on disk that pairing would be off by one, so here each alias is first paired with the
    name that differs from it as the patterns do (`_pair`), and the cycle serves only what remains.
    """
    pairs: dict[str, str] = {}
    idle: list[str] = []
    known = names if isinstance(names, (set, frozenset, dict)) else set(names)
    ordered: list[str] | None = None
    for alias, canonical in declared.items():
        if not is_regex(alias) and not is_regex(canonical) and (alias in known or canonical in known):
            pairs[alias] = canonical
            continue
        if ordered is None:
            ordered = sorted(known)
        targets = _matches(alias, ordered, file, error)
        sources = _matches(canonical, ordered, file, error)
        if not targets and not sources:
            idle.append(alias)
            continue
        made = _pair(alias, canonical, targets, sources)
        if made is None:
            raise error(
                f"the tie '{shown(alias)}' -> '{shown(canonical)}' matches {len(targets)} and {len(sources)} "
                "parameters: they cannot be paired; name each alias and its canonical parameter",
                file=file,
                details={"alias": targets[:20], "canonical": sources[:20]},
            )
        for target, source in made:
            if target != source:
                root = pairs.get(source, source)
                pairs[target] = source if root == target else root
    _prefer_fused(pairs)
    return pairs, idle


def _prefer_fused(pairs: dict[str, str]) -> None:
    """Where patterns tie a fused parameter and its unpacked parts alike, the fused one speaks: one group, not many."""
    covered: list[str] = []
    for alias, canonical in pairs.items():
        module, _, leaf = alias.rpartition(".")
        if leaf in ("weight", "bias"):
            head, _, projection = module.rpartition(".")
            container, _, index = head.rpartition(".")
            if not container or not index.isdecimal():
                continue
            tail = f".{index}.{projection}.{leaf}"
        else:
            container, projection, tail = module, leaf, f".{leaf}"
        words = (projection, _BOTH) if projection in _HALVES else (projection,)
        fused = (f"{container}.{word}" for word in words)
        others = [pairs[name] for name in fused if name in pairs and name != alias]
        if any(canonical == other.rpartition(".")[0] + tail for other in others):
            covered.append(alias)
    for alias in covered:
        del pairs[alias]


_HEAD = re.compile(r"(?:[A-Za-z0-9_.]|\\\.)*")


def _split_pattern(pattern: str) -> tuple[str, str]:
    """The part of a pattern that every match starts with (a dot in it counts as a literal dot), and the rest."""
    head = _HEAD.match(pattern)
    text = head.group(0) if head else ""
    rest = pattern[len(text) :]
    if rest[:1] in ("*", "?", "{", "+") and text:
        kept = text[:-2] if text.endswith("\\.") else text[:-1]
        text, rest = kept, pattern[len(kept) :]
    return text.replace("\\.", "."), rest


def _pair(alias: str, canonical: str, targets: Sequence[str], sources: Sequence[str]) -> list[tuple[str, str]] | None:
    """Pair the names that two patterns match; None where nothing says how."""
    alias_head, alias_tail = _split_pattern(alias)
    canonical_head, canonical_tail = _split_pattern(canonical)
    if not is_regex(alias) and not is_regex(canonical):
        # Names of modules: what is below one is what is below the other.
        alias_head, canonical_head, alias_tail, canonical_tail = f"{alias}.", f"{canonical}.", "", ""
    if alias_tail == canonical_tail and alias_head != canonical_head:
        # The patterns differ in their heads only: a name's counterpart is the name with the other head.
        by_head = {t: canonical_head + t[len(alias_head) :] for t in targets if t.startswith(alias_head)}
        for source in sources:
            if source.startswith(canonical_head):
                by_head.setdefault(alias_head + source[len(canonical_head) :], source)
        if all(t in by_head for t in targets):
            return sorted(by_head.items())
    if not targets or not sources or len(targets) % len(sources) != 0:
        return None
    return list(zip(targets, cycle(sources)))


def read_ties(path: Path) -> dict[str, str]:
    """The object of a ties file: alias -> canonical, names or patterns. Raises TieFileError."""
    try:
        text = read_bounded(path, _MAX_TIES_BYTES).decode()
    except (OSError, ValueError) as exc:  # ValueError: it is not UTF-8, or its name holds a NUL
        why = exc.strerror if isinstance(exc, OSError) and exc.strerror else exc
        raise TieFileError(f"the ties file cannot be read: {why}; {TIES_WANTED}", file=path) from exc

    try:
        data = strict_json(text)
    except BadJson as exc:
        raise TieFileError(f"the ties file is not JSON: {exc}; {TIES_WANTED}", file=path) from exc
    return checked_mapping(data, path, TieFileError, "the ties file")


def checked_mapping(
    data: Any, file: Path | None, error: type[TieFileError] | type[ConfigError], what: str
) -> dict[str, str]:
    """`data` as an object alias -> canonical; `what` is its name in messages. Raises `error`."""
    if not isinstance(data, dict):
        raise error(f"{what} holds {kind_of_json(data)}; expected an object {{alias: canonical}}", file=file)
    for alias, canonical in data.items():
        if not isinstance(alias, str):  # a mapping of Python's
            raise error(f"{what} has the key {shown(repr(alias))}; expected the name of a parameter", file=file)
        if not isinstance(canonical, str) or not canonical or not alias:
            found = json.dumps(canonical, default=repr)
            raise error(
                f"{what} ties '{shown(alias)}' to {shown(found)}; expected the name of a parameter",
                file=file,
            )
        if alias == canonical:
            raise error(f"{what} ties '{shown(alias)}' to itself", file=file, details={"cycle": [alias]})
    return {plain_text(alias): plain_text(canonical) for alias, canonical in data.items()}


def spellings(keys: Collection[str]) -> Iterator[Collection[str]]:
    """`keys`, and if they hold names of wrappers, `keys` without these: declarations may speak of either."""
    yield keys
    worn = unwrapped(keys)
    if worn is not None:
        yield worn.names


def expanded_over_keys(
    declared: Mapping[str, str],
    path: Path | None,
    keys: Collection[str],
    what: str,
    *,
    both: bool = False,
    done: bool = False,
) -> Declared:
    """The ties of a checked mapping, which messages call `what`; `path` is the file it came from, if any.

    Args:
        both: names without those of wrappers count only where both sides of a tie are there.
        done: aliases may be missing altogether, as after a rewrite, if a canonical name is there.

    Raises:
        TieFileError: it is cyclic, or none of its aliases is in the checkpoint (then `details` has "idle").
    """
    label = what if path is None else path.name
    # A cycle among the declarations is an error whatever is on disk.
    rooted(declared, dict.fromkeys(declared, label), TieFileError, path)
    if not declared:
        return Declared((), "ties-file")
    for spelled in spellings(keys):
        found = _expanded_over(declared, path, spelled, what, done)
        if found is not None and (spelled is keys or not both or _any_whole(found.ties, spelled)):
            return found
    raise TieFileError(
        f"{what} matches nothing of the checkpoint: none of its aliases is there; write the names as they "
        "are in the checkpoint (without companions such as weight_scale), or patterns that match them",
        file=path,
        details={"idle": list(declared)[:50]},
    )


def _any_whole(ties: Iterable[Tie], keys: Collection[str]) -> bool:
    """Whether both sides of a tie are there."""
    names = parameters_of(keys)
    return any(tie.alias in names and tie.canonical in names for tie in ties)


def _expanded_over(
    declared: Mapping[str, str], path: Path | None, keys: Collection[str], what: str, done: bool
) -> Declared | None:
    """The ties of a mapping under names that are spelled like `keys`; None if nothing of them is there."""
    label = what if path is None else path.name
    names = parameters_of(keys)
    declared = parameters_declared(declared, keys, names)
    pairs, idle = expand(declared, names, path, TieFileError)
    aliases = any(alias in names for alias in pairs)
    if not aliases and not (done and any(canonical in names for canonical in pairs.values())):
        return None
    warned = [f"{label}: the tie of '{shown(a)}' matches nothing of the checkpoint" for a in idle]
    if not aliases:
        warned.append(
            f"{label}: no alias is in the checkpoint, only canonical names: nothing is left to do, unless the aliases "
            "are misspelt"
        )
    scopes = Scopes(keys)
    for alias, canonical in pairs.items():
        # Only names that the file spells out can be misspelt; what a pattern pairs may well be absent (exporters that
        # keep the first name of shared tensors write no canonical side).
        written_out = declared.get(alias) == canonical
        if written_out and alias in names and canonical not in names and canonical not in pairs:
            scope = canonical.rpartition(".")[0].rpartition(".")[0]
            if scope and scope not in scopes and scope.rpartition(".")[0] not in scopes:
                raise TieFileError(
                    f"{what} ties '{shown(alias)}' to '{shown(canonical)}', but the checkpoint has neither that "
                    f"parameter nor anything under '{shown(scope)}': correct the name",
                    file=path,
                    tensor=canonical,
                )
            warned.append(f"{label}: '{shown(canonical)}' is not in the checkpoint; '{shown(alias)}' takes its name")
    ties = rooted(pairs, dict.fromkeys(pairs, label), TieFileError, path)
    return Declared(ties, "ties-file", warnings=tuple(warned))


def entries_matched(
    entries: Iterable[str], names: Collection[str], file: Path | None
) -> Iterator[tuple[str, list[str]]]:
    """Each entry of a legacy list, and the names that it is found in: as a regular expression, if it is one.

    Raises:
        ConfigError: one takes too long.
    """
    for entry in entries:
        try:
            pattern = BoundedRegex(entry if len(entry) > LONGEST else safe_pattern(entry))
            yield entry, pattern.matching(names, anywhere=True)
        except BadPattern as problem:
            raise _bad_pattern(entry, problem, file, ConfigError) from problem


def safe_pattern(pattern: str) -> str:
    """`pattern`, or what matches its text where it is no regular expression."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return re.escape(pattern)
    return pattern
