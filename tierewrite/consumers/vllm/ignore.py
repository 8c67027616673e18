"""Which modules an ignore list of ModelOpt's leaves unquantized in vLLM, and by which of its entries.

Follows vllm/model_executor/layers/quantization/modelopt.py (`apply_vllm_mapper`, `is_layer_excluded`) and
quant_utils.py (`is_layer_skipped`) of vLLM 0.33, quirks included: that is what the rules have to predict.
"""

from __future__ import annotations

from fnmatch import fnmatch
from functools import cached_property

from tierewrite.consumers.backbone import Backbone


class Ignore:
    """vLLM's verdict on modules, with the patterns that led to it.

    Every entry is mapped to backbone names first; `X*` becomes `X` and `X.*`. A module is excluded when an entry
    is its name (for fused modules: the name of every shard), contains its name (for experts), is contained
    anywhere in its name, or matches it as a wildcard.
    """

    def __init__(self, entries: tuple[str, ...], backbone: Backbone) -> None:
        self.entries = entries
        self.backbone = backbone
        self.patterns: list[tuple[str, int]] = []
        for number, entry in enumerate(entries):
            if len(entry) >= 2 and entry[-1] == "*" and entry[-2] != ".":
                self.patterns += [(backbone.map(entry[:-1]), number), (backbone.map(entry[:-1] + ".*"), number)]
            else:
                self.patterns.append((backbone.map(entry), number))
        self._memo: dict[str, dict[int, str]] = {}

    @cached_property
    def _exact(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for pattern, number in self.patterns:
            found.setdefault(pattern, []).append(number)
        return found

    def partly(self, module: str) -> tuple[str, ...]:
        """The shards of a fused module that entries name while others are not named: vLLM refuses that."""
        parent, _, leaf = module.rpartition(".")
        shards = self.backbone.fused.get(leaf, ())
        if not shards or module in self._exact:
            return ()
        named = tuple(s for s in shards if f"{parent}.{s}" in self._exact)
        return named if len(named) < len(shards) else ()

    def reasons(self, module: str) -> dict[int, str]:
        """Why vLLM leaves `module` (its own name, fused) unquantized: number of the entry -> kind of match.

        Kinds: "exact", "expert" (the entry names something inside), "prefix" (the entry is the module or one
        above it), "substring", "wildcard". Empty where the module is quantized.
        """
        if module not in self._memo:
            self._memo[module] = self._reasons(module)
        return self._memo[module]

    def _reasons(self, module: str) -> dict[int, str]:
        parent, _, leaf = module.rpartition(".")
        found: dict[int, str] = {}
        for number in self._exact.get(module, ()):
            found[number] = "exact"
        shards = self.backbone.fused.get(leaf, ())
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
