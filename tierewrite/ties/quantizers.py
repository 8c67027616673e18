"""The quantizers that transformers loads itself, and what becomes of their tensors when it ties weights.

Read in transformers 5.24, the files named below.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# quantizers/auto.py AUTO_QUANTIZATION_CONFIG_MAPPING
QUANT_METHODS = frozenset(
    {
        "awq", "bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit", "gptq", "aqlm", "quanto", "quark",
        "fouroversix", "fp_quant", "eetq", "higgs", "hqq", "compressed-tensors", "fbgemm_fp8", "torchao", "bitnet",
        "vptq", "spqr", "fp8", "mxfp8", "auto-round", "mxfp4", "metal", "sinq", "nvfp4", "gguf", "gemma",
    }
)  # fmt: skip
# Quantizers with a "deserialize" operation (quantizers/base.py `get_load_operations`): what they store beside a weight
# becomes part of the one tied parameter, and a side that has it without its weight cannot be loaded.
ONE_PARAMETER = frozenset(
    {"bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit", "torchao", "sinq", "fp_quant", "bitnet", "gguf"}
)
# Quantizers that keep the scales in the module on a GPU, and decode the weight where there is none (quantizers/
# quantizer_finegrained_fp8.py, quantizer_mxfp4.py): only sides that are complete suit both.
BY_MACHINE = frozenset({"fp8", "mxfp8", "fbgemm_fp8", "mxfp4", "metal"})
# Quantizers whose FP8 weights stay FP8 once they are loaded, seen with amd-quark 0.13 and compressed-tensors 0.20.
FLOAT8_STAYS = frozenset({"quark", "compressed-tensors"})


def quant_method(config: Mapping[str, Any]) -> str | None:
    """The quantizer of a config.json, if transformers loads it itself; else None."""
    found = config.get("quantization_config")
    method = str(found.get("quant_method") or "").lower() if isinstance(found, dict) else ""
    return method if method in QUANT_METHODS else None
