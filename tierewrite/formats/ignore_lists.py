"""Which modules a checkpoint's configs call unquantized, compared with what is on disk after the rewrite.

Exporters list the modules they left alone, under both names of a tie or under one. A consumer with a single backbone
merges the entries of both sides: an entry that names only the side that was dropped then unquantizes the side that
stayed, or fails to protect it. `inconsistencies` finds such entries, `fixed` rewrites them and nothing else.

Languages of the lists, by key:
- `exclude_modules` (hf_quant_config.json) and `ignore` of quant_method `modelopt`: shell wildcards on module
  names (ModelOpt export/quant_utils.py `_prefix_wildcard_summarize_exclude_modules`); a name covers what lies
  below it.
- `ignore` of compressed-tensors: exact names, or `re:` and a regular expression matched from the start
  (compressed_tensors/utils/match.py `match_name`).
- `exclude` of Quark: shell wildcards matched verbatim, a parent does not cover its children
  (quark/torch/quantization/config/config.py `QConfig`).
- `modules_to_not_convert`, `ignored_layers`, `llm_int8_skip_modules`: transformers' own rule, a prefix or a
  regular expression up to a dot, or a suffix (transformers/quantizers/quantizers_utils.py
  `should_convert_module`).

Refused: changing an entry because of a tie that was not confirmed, whose sides are quantized differently. No
list can say that to a single-backbone consumer; it is reported, with no fix.
"""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from tierewrite.bounded_regex import SHORT_NAME, BadPattern, BoundedRegex
from tierewrite.errors import ConfigError, shown
from tierewrite.formats import classify
from tierewrite.json_text import in_style_of
from tierewrite.source.table import CONFIG_NAME, QUANT_CONFIG_NAME


class EntryProblem(str, Enum):
    """What is wrong with an entry."""

    EXCLUDES_QUANTIZED = "excludes-quantized"  #: it names a tied module whose weight on disk is quantized
    MISSES_PLAIN = "misses-plain"  #: it names an alias whose canonical is unquantized, and nothing names that
    SIDES_DIFFER = "sides-differ"  #: it names one side of an unconfirmed tie; the other is quantized


@dataclass(frozen=True, slots=True)
class Inconsistency:
    """One entry of one list that does not fit what is on disk.

    Attributes:
        file: "config.json" or "hf_quant_config.json".
        path: the keys that lead to the list, e.g. ("quantization_config", "ignore").
        entry: the entry as it stands.
        problem: see `EntryProblem`.
        modules: the tied modules concerned, as (alias, canonical), at most 8 of them.
        replacement: the entries to stand in its place (none: the entry goes); None where no list can be
            right.
    """

    file: str
    path: tuple[str, ...]
    entry: str
    problem: EntryProblem
    modules: tuple[tuple[str, str], ...]
    replacement: tuple[str, ...] | None

    @property
    def message(self) -> str:
        """The finding as one sentence: where, what, and what to do."""
        alias, canonical = self.modules[0]
        more = f" (and {len(self.modules) - 1} more)" if len(self.modules) > 1 else ""
        remedy = "--fix-ignore rewrites the entry"
        where = f"{self.file}, {'.'.join(self.path)}: '{self.entry}'"
        if self.problem is EntryProblem.EXCLUDES_QUANTIZED:
            return f"{where} covers '{alias}', tied to '{canonical}', which is quantized{more}; {remedy}"
        if self.problem is EntryProblem.MISSES_PLAIN:
            return f"{where} covers '{alias}' but nothing covers '{canonical}', which stands for it{more}; {remedy}"
        return (
            f"{where} covers one of '{alias}' and '{canonical}' and the other is quantized{more}; a consumer with "
            "a single backbone cannot represent both"
        )


def _wildcard(entry: str) -> BoundedRegex:
    """Quark. What fnmatch makes of a wildcard never goes back behind a star that has matched."""
    return BoundedRegex(fnmatch.translate(entry), ours=True)


def _wildcard_and_below(entry: str) -> BoundedRegex:
    """ModelOpt: the pattern, or anything below a module that it matches."""
    return BoundedRegex(rf"(?:{fnmatch.translate(entry)}|{fnmatch.translate(entry + '.*')})", ours=True)


def _exact_or_regex(entry: str) -> BoundedRegex:
    """compressed-tensors."""
    if entry.startswith("re:"):
        return BoundedRegex(entry[3:])
    return BoundedRegex(rf"{re.escape(entry)}\Z", ours=True)


def _transformers(entry: str) -> BoundedRegex:
    """transformers: up to a dot from the start, by name or as a regular expression, or a suffix."""
    return BoundedRegex(entry, rf"(?:(?:{{}})(?:(?<=\.)|(?=\.|$))|.*{re.escape(entry)}\Z)")


Language = Callable[[str], BoundedRegex]
_LANGUAGES: Mapping[str, Language] = {
    "exclude_modules": _wildcard_and_below,
    "exclude": _wildcard,
    "ignore": _exact_or_regex,
    "modules_to_not_convert": _transformers,
    "ignored_layers": _transformers,
    "llm_int8_skip_modules": _transformers,
}


def _lists(
    config: Mapping[str, Any], quant_config: Mapping[str, Any]
) -> Iterable[tuple[str, tuple[str, ...], list[Any], Language]]:
    """Every list of unquantized modules: file, path to it, the list, and its language."""
    for file, root in ((CONFIG_NAME, config), (QUANT_CONFIG_NAME, quant_config)):
        for path, part in _parts(file, root):
            modelopt = file == QUANT_CONFIG_NAME or "modelopt" in str(part.get("quant_method")).lower()
            for key, value in part.items():
                if isinstance(value, list) and key in _LANGUAGES:
                    language = _wildcard_and_below if modelopt and key == "ignore" else _LANGUAGES[key]
                    yield file, (*path, key), value, language


def _parts(file: str, root: Mapping[str, Any]) -> Iterable[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """The mappings that can hold such a list, with the path to each."""
    if file == QUANT_CONFIG_NAME:
        yield (), root
        if isinstance(inner := root.get("quantization"), Mapping):
            yield ("quantization",), inner
        return
    nested = [((), root), *(((key,), value) for key, value in root.items() if isinstance(value, Mapping))]
    for path, part in nested:
        for name in ("quantization_config", "compression_config"):
            if isinstance(inner := part.get(name), Mapping):
                yield (*path, name), inner
                if isinstance(deeper := inner.get("quantization"), Mapping):
                    yield (*path, name, "quantization"), deeper


def _beginning(entry: str, language: Language) -> str:
    """What every name that the entry covers begins with, as far as that is plain to see."""
    if language in (_wildcard, _wildcard_and_below):
        return re.split(r"[*?[]", entry, maxsplit=1)[0]
    return entry if language is _exact_or_regex and not entry.startswith("re:") else ""


class _Entries:
    """The entries of one list, compiled, with the modules that each covers.

    Raises:
        ConfigError: an entry takes too long.
    """

    def __init__(self, entries: Sequence[Any], language: Language, modules: Collection[str], file: str) -> None:
        patterns: dict[str, BoundedRegex] = {}
        for entry in entries:
            if isinstance(entry, str):
                with contextlib.suppress(BadPattern):  # no consumer can read it either: it covers nothing
                    patterns[entry] = language(entry)
        likely = _covered_by_simple(
            {entry: pattern for entry, pattern in patterns.items() if pattern.simple}, language, modules
        )
        self.covers: dict[str, list[str]] = {}
        for entry, pattern in patterns.items():
            try:
                self.covers[entry] = pattern.matching(likely if pattern.simple else modules)
            except BadPattern as problem:
                raise ConfigError(f"the entry '{shown(entry)}' of an ignore list: {problem}", file=file) from problem
        self.covered = {module for covered in self.covers.values() for module in covered}


def _covered_by_simple(patterns: Mapping[str, BoundedRegex], language: Language, modules: Collection[str]) -> list[str]:
    """The modules that some simple pattern may cover: most are covered by none, and one look at each tells."""
    beginnings = tuple({_beginning(entry, language) for entry in patterns})
    likely = [module for module in modules if module.startswith(beginnings)]
    if "" not in beginnings:
        return likely
    try:
        anything = re.compile("|".join(f"(?:{pattern.text})" for pattern in patterns.values()))
    except re.error:
        return likely
    return [module for module in likely if len(module) > SHORT_NAME or anything.match(module)]


def sorted_modules(tensors: Iterable[tuple[str, tuple[int, ...]]]) -> tuple[frozenset[str], frozenset[str]]:
    """The modules of a checkpoint as `inconsistencies` wants them: (quantized, plain).

    Args:
        tensors: key and shape of each that is (or will be) on disk.

    Returns:
        Modules that hold a companion of a quantized weight, and those that hold a matrix `weight` and none.
    """
    quantized: set[str] = set()
    plain: set[str] = set()
    companions: dict[str, bool] = {}  # suffix -> whether it makes its module a quantized one
    for key, shape in tensors:
        module, _, suffix = key.rpartition(".")
        if suffix == "weight":
            if len(shape) > 1:
                plain.add(module)
            continue
        quantizes = companions.get(suffix)
        if quantizes is None:
            companion = classify("weight", suffix)
            quantizes = companion is not None and companion.role.quantizes
            companions[suffix] = quantizes
        if quantizes:
            quantized.add(module)
    return frozenset(quantized), frozenset(plain - quantized)


def inconsistencies(
    config: Mapping[str, Any],
    quant_config: Mapping[str, Any],
    pairs: Iterable[tuple[str, str]],
    quantized: Collection[str],
    plain: Collection[str],
) -> tuple[Inconsistency, ...]:
    """The entries that do not fit what is on disk, of all lists in both configs.

    Args:
        config: config.json, or {}.
        quant_config: hf_quant_config.json, or {}.
        pairs: (alias module, canonical module) of every tie, by their names on disk.
        quantized: modules whose weight in the result is quantized.
        plain: modules whose weight in the result is not, matrices only (a norm is never quantized and never
            listed).

    Raises:
        ConfigError: a regular expression in a list takes too long.
    """
    lists = list(_lists(config, quant_config))
    if not lists:
        return ()
    pairs = tuple(dict.fromkeys(pairs))
    quantized, plain = frozenset(quantized), frozenset(plain)
    aliases: dict[str, list[tuple[str, str]]] = {}
    for pair in pairs:
        for name in pair:
            aliases.setdefault(name, []).append(pair)
    modules = dict.fromkeys((*aliases, *sorted(plain)))  # the order of what is written in an entry's place
    found: list[Inconsistency] = []
    known: list[tuple[list[Any], Language, _Entries]] = []  # ModelOpt writes the same list into both files
    for file, path, values, language in lists:
        entries = next((e for v, spoken, e in known if v == values and spoken is language), None)
        if entries is None:
            entries = _Entries(values, language, modules, file)
            known.append((values, language, entries))
        for entry, covered in entries.covers.items():
            wrong: dict[EntryProblem, list[tuple[str, str]]] = {problem: [] for problem in EntryProblem}
            for pair in (pair for name in covered for pair in aliases.get(name, ())):
                problem = _problem(pair, quantized, plain, entries.covered)
                if problem is not None:
                    wrong[problem].append(pair)
            excluded, missing = wrong[EntryProblem.EXCLUDES_QUANTIZED], wrong[EntryProblem.MISSES_PLAIN]
            differing = wrong[EntryProblem.SIDES_DIFFER]
            if excluded:
                # What else the entry covers stays named, one by one. An entry that also covers sides of
                # unconfirmed ties keeps those that are plain.
                kept = tuple(name for name in covered if name in plain)
                found.append(_finding(file, path, entry, EntryProblem.EXCLUDES_QUANTIZED, excluded, kept))
            elif missing:
                added = tuple(dict.fromkeys(canonical for _, canonical in missing))
                found.append(_finding(file, path, entry, EntryProblem.MISSES_PLAIN, missing, (entry, *added)))
            if differing:
                found.append(_finding(file, path, entry, EntryProblem.SIDES_DIFFER, differing, None))
    return tuple(found)


def _problem(
    pair: tuple[str, str], quantized: Collection[str], plain: Collection[str], covered: Collection[str]
) -> EntryProblem | None:
    """What is wrong with an entry that covers a module of `pair`; `covered`: by any entry of its list."""
    alias, canonical = pair
    if (alias in quantized and canonical in plain) or (alias in plain and canonical in quantized):
        return None if alias in covered and canonical in covered else EntryProblem.SIDES_DIFFER
    if canonical in quantized:
        return EntryProblem.EXCLUDES_QUANTIZED
    # A head tied to an embedding is listed; the embedding, which no recipe targets, is not.
    same_leaf = alias.rpartition(".")[2] == canonical.rpartition(".")[2]
    if canonical in plain and canonical not in covered and same_leaf:
        return EntryProblem.MISSES_PLAIN
    return None


def _finding(
    file: str,
    path: tuple[str, ...],
    entry: str,
    problem: EntryProblem,
    pairs: Sequence[tuple[str, str]],
    replacement: tuple[str, ...] | None,
) -> Inconsistency:
    return Inconsistency(file, path, entry, problem, tuple(dict.fromkeys(pairs))[:8], replacement)


def fixed(config: Mapping[str, Any], file: str, findings: Iterable[Inconsistency]) -> dict[str, Any]:
    """`config` (the content of `file`) with the entries of `findings` replaced; everything else as it was.

    Order is kept; an entry that a replacement would repeat is not repeated.
    """
    result: dict[str, Any] = copy.deepcopy(dict(config))
    by_path: dict[tuple[str, ...], dict[str, tuple[str, ...]]] = {}
    for finding in findings:
        if finding.file == file and finding.replacement is not None:
            by_path.setdefault(finding.path, {})[finding.entry] = finding.replacement
    for path, replacements in by_path.items():
        parent: Any = result
        for key in path[:-1]:
            parent = parent[key]
        entries: list[Any] = []
        there = {entry for entry in parent[path[-1]] if isinstance(entry, str)} - set(replacements)
        for entry in parent[path[-1]]:
            new = replacements.get(entry) if isinstance(entry, str) else None
            if new is None:
                entries.append(entry)
            else:
                entries.extend(name for name in new if name not in entries and name not in there)
        parent[path[-1]] = entries
    return result


def fixed_text(text: str, file: str, findings: Iterable[Inconsistency]) -> str:
    """The JSON `text` of `file` with the entries replaced, in its order of keys and its style.

    Returns `text` itself when nothing changes.
    """
    config = json.loads(text)
    result = fixed(config, file, findings)
    if result == config:
        return text
    return in_style_of(text, result)
