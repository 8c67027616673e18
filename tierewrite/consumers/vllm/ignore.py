"""Which modules an ignore list leaves unquantized in vLLM, and by which of its entries.

Follows vLLM 0.33, below model_executor/layers/quantization/, quirks included, since that is what the rules have to
predict: modelopt.py (`apply_vllm_mapper`, `is_layer_excluded`) and utils/quant_utils.py (`is_layer_skipped`) for
ModelOpt's lists; compressed_tensors/utils.py (`should_ignore_layer`) and fp8.py for those that name modules exactly.
"""

from __future__ import annotations

from fnmatch import fnmatch
from functools import cached_property
from typing import Protocol

from tierewrite.bounded_regex import BadPattern, BoundedRegex
from tierewrite.consumers.backbone import Backbone


class Ignore(Protocol):
    """vLLM's verdict on modules, with the patterns that led to it."""

    entries: tuple[str, ...]
    unreadable: tuple[str, ...]  # entries that cannot be matched, or take too long

    def partly(self, module: str) -> tuple[str, ...]:
        """The shards of a fused module that entries name while others are not named: vLLM refuses that."""

    def reasons(self, module: str) -> dict[int, str]:
        """Why vLLM leaves `module` (its own name, fused) unquantized: number of the entry -> kind of match.

        Kinds: "exact", "expert" (the entry names something inside), "prefix" (the entry is the module or one
        above it), "substring", "wildcard", "regex". Empty where the module is quantized.
        """

    def touches(self, number: int, module: str) -> bool:
        """Whether the entry says anything of `module` (its own name), of a shard of it, or of something inside."""


class ModeloptIgnore:
    """ModelOpt's: every entry is mapped to backbone names first; `X*` becomes `X` and `X.*`. A module is excluded when
    an entry is its name (for fused modules: the name of every shard), contains its name (for experts), is contained
    anywhere in its name, or matches it as a wildcard.
    """

    def __init__(self, entries: tuple[str, ...], backbone: Backbone) -> None:
        self.entries = entries
        self.unreadable: tuple[str, ...] = ()
        self.fused = backbone.fused
        self.patterns: list[tuple[str, int]] = []
        for number, entry in enumerate(entries):
            if len(entry) >= 2 and entry[-1] == "*" and entry[-2] != ".":
                names = [entry[:-1], entry[:-1] + ".*"]
            else:
                names = [entry]
            self.patterns += [(backbone.listed(name), number) for name in names]
        self._memo: dict[str, dict[int, str]] = {}

    @cached_property
    def _exact(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for pattern, number in self.patterns:
            found.setdefault(pattern, []).append(number)
        return found

    def partly(self, module: str) -> tuple[str, ...]:
        """See Ignore."""
        parent, _, leaf = module.rpartition(".")
        shards = self.fused.get(leaf, ())
        if not shards or module in self._exact:
            return ()
        named = tuple(s for s in shards if f"{parent}.{s}" in self._exact)
        return named if len(named) < len(shards) else ()

    def reasons(self, module: str) -> dict[int, str]:
        """See Ignore."""
        if module not in self._memo:
            self._memo[module] = self._reasons(module)
        return self._memo[module]

    def _reasons(self, module: str) -> dict[int, str]:
        parent, _, leaf = module.rpartition(".")
        found: dict[int, str] = {}
        for number in self._exact.get(module, ()):
            found[number] = "exact"
        shards = self.fused.get(leaf, ())
        if shards and all(f"{parent}.{s}" in self._exact for s in shards):
            for shard in shards:
                for number in self._exact[f"{parent}.{shard}"]:
                    found[number] = "exact"
        for pattern, number in self.patterns:
            if number in found:
                continue
            if "experts" in leaf and "experts" in pattern and module in pattern:
                found[number] = "expert"
            elif pattern in module or (
                module.startswith("language_model.") and pattern in module.removeprefix("language_model.")
            ):
                above = module == pattern or module.startswith(f"{pattern}.")
                found[number] = "prefix" if above else "substring"
            elif fnmatch(module, pattern):
                found[number] = "wildcard"
        return found

    def touches(self, number: int, module: str) -> bool:
        """See Ignore."""
        mine = [pattern for pattern, other in self.patterns if other == number]
        return bool(module) and any(
            pattern in module or pattern.startswith(f"{module}.") or fnmatch(module, pattern) for pattern in mine
        )


class ExactIgnore:
    """compressed-tensors' and fp8's: an entry is a module's name, or a pattern after `re:`. A fused module is excluded
    when all of its shards are, experts when expert 0 is; to fp8 and Quark when an entry names anything of them.

    Args:
        any_expert: it is fp8's or Quark's.
    """

    def __init__(self, entries: tuple[str, ...], backbone: Backbone, *, any_expert: bool = False) -> None:
        self.entries = entries
        self.unreadable: tuple[str, ...] = ()
        self.fused = backbone.fused
        old = backbone.facts is not None and any(key.endswith(".experts.*.w1.weight") for key in backbone.facts.reads)
        self._any_expert = any_expert
        self._projections = ("w1", "w3", "w2") if old else ("gate_proj", "up_proj", "down_proj")
        self._exact: dict[str, list[int]] = {}
        self._patterns: list[tuple[BoundedRegex, int]] = []
        self._memo: dict[str, dict[int, str]] = {}
        for number, entry in enumerate(entries):
            mapped = backbone.listed(entry)
            if not mapped.startswith("re:"):
                self._exact.setdefault(mapped, []).append(number)
                continue
            try:
                self._patterns.append((BoundedRegex(mapped[3:]), number))
            except BadPattern:
                self.unreadable += (entry,)

    def _named(self, name: str) -> dict[int, str]:
        if name not in self._memo:
            found = dict.fromkeys(self._exact.get(name, ()), "exact")
            for pattern, number in self._patterns:
                try:
                    if pattern.matching([name]):
                        found[number] = "regex"
                except BadPattern:
                    self.unreadable += (self.entries[number],)
            self._memo[name] = found
        return self._memo[name]

    def _parts(self, module: str) -> tuple[str, ...]:
        """The names that entries are compared with."""
        parent, _, leaf = module.rpartition(".")
        if leaf in self.fused:
            return tuple(f"{parent}.{shard}" for shard in self.fused[leaf])
        if leaf == "experts":
            return tuple(f"{module}.0.{projection}" for projection in self._projections)
        return (module,)

    def _inside(self, module: str) -> dict[int, str]:
        """Entries that name something of a layer's experts (quant_utils.py `is_layer_skipped`; quark/utils.py)."""
        if not self._any_expert or module.rpartition(".")[2] != "experts":
            return {}
        return {n: "expert" for entry, numbers in self._exact.items() if module in entry for n in numbers}

    def partly(self, module: str) -> tuple[str, ...]:
        """See Ignore."""
        if self._inside(module):
            return ()
        parts = self._parts(module)
        named = tuple(part.rpartition(".")[2] for part in parts if self._named(part))
        return named if len(named) < len(parts) and module not in self._exact else ()

    def reasons(self, module: str) -> dict[int, str]:
        """See Ignore."""
        parts = [self._named(part) for part in self._parts(module)]
        found = dict(self._named(module)) if module in self._exact else self._inside(module)
        if all(parts):
            for part in parts:
                found |= part
        return found

    def touches(self, number: int, module: str) -> bool:
        """See Ignore."""
        return any(number in self._named(name) for name in (module, *self._parts(module)))
