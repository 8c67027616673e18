"""torchao's tensor subclasses, flattened for safetensors: integers, FP8, MX and NVFP4 of many layouts.

Sources (torchao 0.18):
- prototype/safetensors/safetensors_support.py `flatten_tensor_state_dict`: the parameter `q_proj.weight` becomes
  `q_proj._weight_` + each of the subclass's `tensor_data_names` and `optional_tensor_data_names`; any other parameter
  likewise (`experts._gate_up_proj_qdata`). Its type, block size and such stand in the header's `__metadata__`, under
  the parameter's name: see `formats.descriptions`. transformers writes its torchao checkpoints by this function.
- those names: quantization/quantize_/workflows/*/*_tensor.py, prototype/mx_formats/*_tensor.py and
  prototype/quantization/*/*.py. All of them come from the weight, but for
  - `act_pre_scale` (AWQ, SmoothQuant): what the input is multiplied by because the weight was divided by it;
  - `act_quant_scale`, `output_act_quant_scale`, `act_per_tensor_scale`: calibrated ranges of activations, as factors;
    `act_quant_zero_point` shifts such a range, so scales merge only where the zero points are equal.
"""

from __future__ import annotations

from tierewrite.formats.family import Companion, Family, Role, Signs, activation, main, weight

_MAIN = ("qdata", "packed_weights", "packed_weight", "qdata_and_metadata")
_OF_WEIGHT = (
    "scale",
    "zero_point",
    "scale_and_zero",
    "per_tensor_scale",
    "group_scale",
    "group_zero",
    "row_scale",
    "qzeros",
    "compensation",
    "sparse_metadata",
    "act_quant_zero_point",
)
_RANGES = ("act_quant_scale", "output_act_quant_scale", "act_per_tensor_scale")


def _companions(parameter: str) -> tuple[Companion, ...]:
    """What a parameter of this name becomes."""
    return (
        *main(*(f"_{parameter}_{name}" for name in _MAIN)),
        *weight(*(f"_{parameter}_{name}" for name in _OF_WEIGHT)),
        *activation("max", *(f"_{parameter}_{name}" for name in _RANGES)),
        Companion(f"_{parameter}_act_pre_scale", Role.ADJACENT),
    )


FAMILY = Family(
    name="torchao",
    signs=Signs(
        methods=("torchao",),
        endings=("_weight_packed_weights", "_weight_packed_weight"),
        tails=("_qdata", "_qdata_and_metadata"),
    ),
    companions=(*main("weight"), *_companions("weight")),
    fused=_companions("{leaf}"),
)
