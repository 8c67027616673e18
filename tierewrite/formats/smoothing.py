"""Neighbours of a smoothed weight: what else has to be equal before its sides are one.

AWQ, SmoothQuant and SVDQuant move a scale from the input of a linear layer into whatever produced that input.
The scale is baked into both: two sides whose packed weights agree by chance may still have been smoothed
differently, and then an input scale of one is wrong for the other. So in a smoothed checkpoint a tied linear
is confirmed only together with its neighbours:

- the norms of its layer. ModelOpt finds the one whose output the linear reads by hooks
  (modelopt/torch/export/unified_export_hf.py `_fuse_shared_input_modules`, quant_utils.py
  `fuse_prequant_layernorm`: q/k/v into `input_layernorm`, gate/up into `post_attention_layernorm` or
  `pre_feedforward_layernorm`); AutoAWQ has a table per architecture (awq/models/*.py). The name cannot be
  known from the files, so every norm of the layer counts.
- the linear before it: `v_proj` for `o_proj`, `up_proj` for `down_proj` (quant_utils.py
  `PQS_FUSE_MODULE_MAPPING`; the AutoAWQ tables have the same two), which is also how ModelOpt makes the scale
  of such a pair disappear.

Once fused, no tensor tells of it; only the config does. A folded checkpoint whose config says nothing
(llm-compressor writes its AWQ and SmoothQuant recipes to recipe.yaml only) is treated like any other: all its
bytes must agree.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from tierewrite.formats.suffixes import classify

# ModelOpt's quant_algo of the formats with pre_quant_scale (export/quant_utils.py
# `process_layer_quant_config`).
_ALGORITHMS = re.compile(r"AWQ|SVD|_SQ_|_SQ$|SMOOTH", re.IGNORECASE)
_METHODS = frozenset({"awq"})
_TRACES = ("pre_quant_scale", "svdquant_lora_a", "input_prescale", "input_rotation")
_NORM = re.compile(r"norm|^ln(_|\d|$)", re.IGNORECASE)
# smoothed linear -> the linear that its scale can be folded into
_BEFORE = {
    "o_proj": "v_proj",
    "out_proj": "v_proj",
    "down_proj": "up_proj",
    "w2": "w3",
    "fc2": "fc1",
}


def _mappings(value: object) -> Iterable[Mapping[str, Any]]:
    if isinstance(value, Mapping):
        yield value
        for inner in value.values():
            yield from _mappings(inner)


def _smoothed(keys: Collection[str], configs: Iterable[object]) -> bool:
    for config in configs:
        for part in _mappings(config):
            algorithm, method = part.get("quant_algo"), part.get("quant_method")
            if isinstance(algorithm, str) and _ALGORITHMS.search(algorithm):
                return True
            if isinstance(method, str) and method.lower() in _METHODS:
                return True
            if part.get("pre_quant_scale") is True:
                return True
    return any(key.endswith(_TRACES) for key in keys)


def _layer(module: str) -> str | None:
    """The nearest enclosing repeated block that is not an expert: `model.layers.3` of any name below it."""
    parts = module.split(".")
    for at in range(len(parts) - 1, 0, -1):
        if parts[at].isdigit() and "expert" not in parts[at - 1].lower():
            return ".".join(parts[: at + 1])
    return None


class Adjacency:
    """Which keys have to be equal beside a module's own, by module. Built once, in one pass over the keys."""

    def __init__(self, keys: Collection[str], config: Mapping[str, Any], quant_config: Mapping[str, Any]) -> None:
        """Index `keys` (all names of tensors). `config` and `quant_config` are config.json and
        hf_quant_config.json.

        `smoothed` says whether the checkpoint shows any sign of smoothing; if not, `of` is always empty.
        """
        self.smoothed = _smoothed(keys, (config.get("quantization_config"), quant_config))
        self._norms: dict[str, list[str]] = {}
        self._linears: dict[str, list[str]] = {}
        self._quantized: set[str] = set()
        if not self.smoothed:
            return
        before = set(_BEFORE.values())
        for key in keys:
            module, _, suffix = key.rpartition(".")
            name = module.rpartition(".")[2]
            if suffix in ("weight", "bias") and _NORM.search(name):
                if layer := _layer(module):
                    self._norms.setdefault(layer, []).append(key)
                continue
            companion = classify("weight", suffix)
            if companion is None or not companion.role.identical:
                continue
            if suffix != "weight":
                self._quantized.add(module)
            if name in before:
                self._linears.setdefault(module, []).append(key)

    def of(self, module: str) -> tuple[str, ...]:
        """The keys that must be byte-identical to their counterparts before the sides of `module` are one.

        `module` is the tied weight's module on one side (`model.layers.0.self_attn.q_proj`). Keys are those
        of that side's checkpoint names: ask again for the other side and compare name by name, and only names
        that the ties pair (a norm that the model does not tie is rightly different). Empty where nothing was
        smoothed, and for modules that are not quantized.
        """
        if module not in self._quantized:
            return ()
        parent, _, name = module.rpartition(".")
        layer = _layer(module)
        norms = self._norms.get(layer, []) if layer else []
        before = _BEFORE.get(name)
        return (*norms, *(self._linears.get(f"{parent}.{before}", []) if before else ()))
