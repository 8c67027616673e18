"""bitsandbytes: 4-bit (NF4, FP4) with nested statistics, and LLM.int8().

Sources (bitsandbytes 0.50):
- 4-bit: bitsandbytes/nn/modules.py `Linear4bit._save_to_state_dict` writes `weight` U8 and `weight.` + each
  key of functional.py `QuantState.as_dict(packed=True)`: `absmax`, `quant_map`, `nested_absmax`,
  `nested_quant_map` and `quant_state.bitsandbytes__nf4` or `__fp4` (a JSON text as U8).
- 4-bit parameters of other names (fused experts): nn/parametrize.py writes `gate_up_proj.absmax` and so on.
- 8-bit: nn/modules.py `Linear8bitLt._save_to_state_dict`: `SCB` F32 [out] and `weight_format` U8 ().
All of them come from the weight alone; activations are quantized on the fly.
"""

from __future__ import annotations

from tierewrite.formats.family import Family, Signs, main, weight

_STATE = (
    "absmax",
    "quant_map",
    "nested_absmax",
    "nested_quant_map",
    "quant_state.bitsandbytes__nf4",
    "quant_state.bitsandbytes__fp4",
)

FAMILY = Family(
    name="bitsandbytes",
    signs=Signs(
        methods=("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"),
        endings=("absmax", "quant_map", "bitsandbytes__nf4", "bitsandbytes__fp4", "SCB"),
    ),
    companions=(*main("weight"), *weight(*(f"weight.{key}" for key in _STATE)), *weight("SCB", "weight_format")),
    fused=(*main("{leaf}"), *weight(*(f"{{leaf}}.{key}" for key in _STATE))),
)
