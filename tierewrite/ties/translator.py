"""Disk -> memory: which parameter a name on disk is loaded into, as `from_pretrained` has it.

Every name is translated with transformers' own conversion mapping for the class (`renames`); no table of names is held
here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from tierewrite.source.table import Names
from tierewrite.ties.renames import Session, Transform
from tierewrite.ties.tie import ModelNames
from tierewrite.ties.tie_group import WHOLE, Part
from tierewrite.ties.unpacked import ENDINGS, FusedParameters


class Translator:
    """Names on disk of one model; remembers every answer."""

    def __init__(self, model: ModelNames | None, tied: Mapping[str, str]) -> None:
        # Where the class was not asked (or not built), the only parameters known are the tied ones.
        self.known: Mapping[str, Any] = model.shapes if model is not None and model.shapes else dict.fromkeys(tied, ())
        self.prefix = model.base_model_prefix if model is not None else ""
        self._memo: dict[str, tuple[str, tuple[Any, ...]] | None] = {}
        # Name on disk -> all parameters that it is loaded into, where it is several (a fused q/k/v).
        self.covers: dict[str, tuple[str, ...]] = {}
        self._converters: list[Transform] = []
        self._fused = FusedParameters(self.known)
        self._in_order = False
        self.session: Session | None = None
        """How transformers renames; None where names on disk are those in memory."""
        if model is not None:
            transforms = model.renames.transforms
            self.session = Session(model.renames, self.prefix, self.known, own=bool(model.shapes))
            self._converters = [t for t in transforms if t.converts]
            # A renaming that keeps state must meet the keys in transformers' order.
            self._in_order = model.renames.in_order
            texts = [_required_text(p) for t in transforms for p in t.sources]
            self._texts = None if None in texts else tuple(dict.fromkeys(t for t in texts if t is not None))

    def in_loading_order(self, keys: Collection[str]) -> Collection[str]:
        """The keys in the order in which transformers meets them, where that makes a difference."""
        if not self._in_order:
            return keys
        from transformers.core_model_loading import dot_natural_key

        return sorted(keys, key=dot_natural_key)

    def loading_order(self, keys: Names) -> np.ndarray:
        """int64 [keys], the rows of `keys` in the order in which they are loaded."""
        if not self._in_order:
            return np.arange(len(keys))
        return np.array([keys.row[key] for key in self.in_loading_order(keys)], np.int64)

    def may_be_located(self, keys: Names) -> np.ndarray:
        """bool [keys], false for keys that `locate` has no place for, as far as their last words tell."""
        if self.session is not None:
            return np.ones(len(keys), bool)
        # Names on disk are those in memory: only these, and parts of fused parameters, have a place.
        possible: np.ndarray = np.array([f".{leaf}" in ENDINGS for leaf in keys.leaves], bool)[keys.leaf]
        possible[[keys.row[name] for name in self.known if name in keys]] = True
        return possible

    def locate(self, name: str) -> tuple[str, Part] | None:
        """The parameter that the unquantized name `name` is loaded into, and which part of it; None if none."""
        if self.session is None:  # names on disk are those in memory: a look-up is cheaper than remembering it
            if name in self.known:
                return name, WHOLE
            return self._fused.part(name) if name.endswith(ENDINGS) else None
        if name not in self._memo:
            self._memo[name] = self._locate(name)
        return self._memo[name]

    def _locate(self, name: str) -> tuple[str, Part] | None:
        renamed, pattern = self._forward(name)
        if renamed in self.known:
            if pattern is None:
                return renamed, WHOLE
            return renamed, self._converted_part(name, renamed, pattern)
        return self._fused.part(renamed) if renamed.endswith(ENDINGS) else None

    def _forward(self, name: str) -> tuple[str, str | None]:
        """transformers' `rename_source_key`, with the fallback that loading makes for names that are right already."""
        texts = self._texts
        if texts is not None:
            for text in texts:
                if text in name:
                    break
            else:
                return self._with_prefix(name), None
        assert self.session is not None
        renamed, pattern = self.session.loaded(name)
        if renamed not in self.known:
            if name in self.known:
                return name, None
            plain = self._with_prefix(name)
            if plain in self.known:
                return plain, None
        return renamed, pattern

    def _with_prefix(self, name: str) -> str:
        """What transformers' function does where no transform matches: the base model's prefix comes or goes."""
        prefix = self.prefix
        if not prefix:
            return name
        if name.startswith(prefix) and name[len(prefix) + 1 :] in self.known:
            return name[len(prefix) + 1 :]
        added = f"{prefix}.{name}"
        return added if added in self.known else name

    def _converted_part(self, name: str, renamed: str, pattern: str) -> Part:
        """Which part of the parameter a name is that a `WeightConverter` matched."""
        converter = next(c for c in self._converters if pattern in c.sources)
        index = converter.sources.index(pattern)
        if len(converter.targets) > 1:
            first = converter.targets[0]
            self.covers[name] = tuple(renamed.replace(first, t) for t in converter.targets)
        if len(converter.sources) == 1 and "*" not in pattern:
            return WHOLE
        return ("converter", pattern, index, _expert_of(pattern, name) if "*" in pattern else 0)


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
