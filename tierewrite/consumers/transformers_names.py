"""Which names transformers' own loaders would miss in a checkpoint that holds each tied weight once.

transformers builds both sides of a tie and ties parameters, by the names in `_tied_weights_keys`. What a quantizer adds
to a module (scales, zero points, a packed weight under another name) is tied by nothing: on the alias's side it has to
be on disk. modeling_utils.py `PreTrainedModel.tie_weights`, `get_expanded_tied_weights_keys`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tierewrite import formats
from tierewrite.planning.plan import NeededNames
from tierewrite.values.opened import Opened

# quantizers/auto.py AUTO_QUANTIZATION_CONFIG_MAPPING
QUANT_METHODS = frozenset(
    {
        "awq", "bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit", "gptq", "aqlm", "quanto", "quark",
        "fouroversix", "fp_quant", "eetq", "higgs", "hqq", "compressed-tensors", "fbgemm_fp8", "torchao", "bitnet",
        "vptq", "spqr", "fp8", "mxfp8", "auto-round", "mxfp4", "metal", "sinq", "nvfp4", "gguf", "gemma",
    }
)  # fmt: skip


def quant_method(config: dict[str, Any]) -> str | None:
    """The quantizer of a config.json, if transformers loads it itself; else None."""
    found = config.get("quantization_config")
    method = str(found.get("quant_method") or "").lower() if isinstance(found, dict) else ""
    return method if method in QUANT_METHODS else None


def needed_names(opened: Opened) -> NeededNames:
    """The names in the source that transformers' loader would miss if each tie were stored once."""
    method = quant_method(opened.checkpoint.config)
    if method is None:
        return NeededNames("transformers")
    note = f"which of them the loader of '{method}' would miss was not asked, but follows from what its class ties"
    return NeededNames("transformers", frozenset(_untied_companions(opened)), (note,))


def _untied_companions(opened: Opened) -> Iterator[str]:
    """Tensors that belong to an alias's weight and have no parameter's name themselves."""
    aliases = {name for group in opened.disk.groups for slot in group.slots for name in slot[1:]}
    for key in opened.checkpoint.tensors:
        part = formats.part_of_weight(key)
        owners = (part[0],) if part is not None and part[1].role.of_weight else formats.fused_parameters(key)
        if key not in aliases and not aliases.isdisjoint(owners):
            yield key
