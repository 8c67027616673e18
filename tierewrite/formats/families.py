"""The quantization families that are known, in the order in which they are named for a suffix that several share."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType

from tierewrite.formats.family import Family

MODULES = (
    "plain",
    "modelopt",
    "compressed_tensors",
    "deepseek_fp8",
    "fbgemm_fp8",
    "mxfp4",
    "gptq_awq",
    "auto_round",
    "bitsandbytes",
    "quark",
    "torchao",
    "quanto",
    "mlx",
    "exl3",
    "hqq",
)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        family.name: family
        for family in (importlib.import_module(f"tierewrite.formats.{module}").FAMILY for module in MODULES)
    }
)
