"""Unpacked experts: which fused parameter `...experts.3.gate_proj.weight` is a part of.

Exporters unpack a fused parameter that transformers keeps fused on disk (ModelOpt, llm-compressor):
`experts.gate_up_proj` becomes `experts.<e>.gate_proj` and `experts.<e>.up_proj`, `experts.down_proj` becomes
`experts.<e>.down_proj`, and so for every leaf `A_B_proj`, with or without `_bias`.
"""

from __future__ import annotations

from collections.abc import Iterable

from tierewrite.ties.tie_group import Part

ENDINGS = (".weight", ".bias")


def projections(fused: str) -> tuple[str, ...]:
    """The modules that exporters unpack a fused parameter into: gate_up_proj -> gate_proj, up_proj."""
    words = fused.split("_")
    return tuple(f"{word}_{words[-1]}" for word in words[:-1]) if len(words) > 2 else (fused,)


class FusedParameters:
    """The parameters of a model that experts may have been unpacked from; remembers every answer."""

    def __init__(self, known: Iterable[str]) -> None:
        """`known`: the names of all parameters in memory."""
        self._known = known
        self._leaves: dict[str, list[str]] | None = None
        self._fused: dict[tuple[str, str, str], str | None] = {}

    def part(self, name: str) -> tuple[str, Part] | None:
        """`...experts.3.gate_proj.weight` as a part of the fused `...experts.gate_up_proj`."""
        path = name.rsplit(".", 3)
        if len(path) < 4:
            return None
        container, index, projection, leaf = path
        if not container or not index.isdecimal() or not index.isascii():
            return None
        kind = container, projection, leaf
        if kind not in self._fused:
            self._fused[kind] = self._fused_of(*kind)
        fused = self._fused[kind]
        return None if fused is None else (fused, ("expert", projection, leaf, int(index)))

    def _fused_of(self, container: str, projection: str, leaf: str) -> str | None:
        """The parameter of `container` that holds the experts' `projection`."""
        end = "_bias" if leaf == "bias" else ""
        stems = {fused.removesuffix(end): fused for fused in self._fused_leaves(container) if fused.endswith(end)}
        if projection in stems:
            return f"{container}.{stems[projection]}"
        found = (fused for stem, fused in stems.items() if projection in projections(stem))
        return next((f"{container}.{fused}" for fused in found), None)

    def _fused_leaves(self, container: str) -> list[str]:
        if self._leaves is None:
            self._leaves = {}
            for name in self._known:
                parent, _, leaf = name.rpartition(".")
                if leaf not in ("weight", "bias"):
                    self._leaves.setdefault(parent, []).append(leaf)
        return self._leaves.get(container, [])
