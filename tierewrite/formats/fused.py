"""Which linears a consumer loads into one parameter, so that their NVFP4 weights must have one scale.

Most classes fuse alike (`USUAL`). Those of vLLM 0.33 that do otherwise are in fused_sets.json, which
tests/vllm_loader/classes.py makes from what their own loaders do: cross-attention's q is not fused with k and v, MLA's
q_a is with kv_a.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from tierewrite.formats.numbered import pattern_of

Sets = tuple[tuple[str, ...], ...]

USUAL: Sets = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Projections of one module that are fused (vLLM: QKVParallelLinear, MergedColumnParallelLinear, FusedMoE)."""


class FusedSets:
    """The sets of one model class.

    Args:
        others: module, with `*` for every number -> the sets of its projections; all other modules have `USUAL`.
    """

    def __init__(self, others: Mapping[str, Sets]) -> None:
        self._others = others

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> FusedSets:
        """Those of the class that a config.json names first."""
        named = config.get("architectures")
        architecture = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
        return cls(_table().get(architecture, {}))

    def below(self, module: str) -> Sets:
        """The sets of projections of one module."""
        return self._others.get(pattern_of(module), USUAL) if self._others else USUAL


@lru_cache(maxsize=1)
def _table() -> Mapping[str, Mapping[str, Sets]]:
    path = Path(__file__).parent / "fused_sets.json"
    read = json.loads(path.read_text(encoding="utf-8"))["classes"]
    return {
        name: {module: tuple(map(tuple, sets)) for module, sets in modules.items()} for name, modules in read.items()
    }
