"""The dtypes of safetensors and what torch calls them.

safetensors' own table (safetensors/torch.py, `_TYPES`) is private and lacks the newest.
"""

from __future__ import annotations

from collections.abc import Mapping

SAFETENSORS_OF_TORCH: Mapping[str, str] = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "complex64": "C64",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "bool": "BOOL",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8",
    "float8_e4m3fn": "F8_E4M3", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0", "float4_e2m1fn_x2": "F4",
}  # fmt: skip
"""Attribute of torch -> name in a header."""

TORCH_OF_SAFETENSORS: Mapping[str, str] = {header: torch for torch, header in SAFETENSORS_OF_TORCH.items()}
"""Name in a header -> attribute of torch."""

PAIRS = "F4"
"""Two elements a byte: safetensors counts elements, torch pairs of them."""
