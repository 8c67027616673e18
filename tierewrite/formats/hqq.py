"""HQQ: packed integers, with every setting of the layer as a tensor of its own.

Source: hqq 0.2.8, core/quantize.py `HQQLinear.state_dict_keys`, which `save_to_safetensors` (models/base.py) and
transformers before 5.0 wrote. All of it comes from the weight and its settings; numbers and words are tensors too
(core/utils.py `encode_safetensor_type`).

Most of these names are usual ones of parameters (DiffusionGemma has a `router.scale`): they count only beside `W_q`.
"""

from __future__ import annotations

from tierewrite.formats.family import Family, Signs, main, weight

_OF_WEIGHT = (
    "scale",
    "zero",
    "shape",
    "nbits",
    "group_size",
    "axis",
    "packing",
    "unpack_view_dtype",
    "view_as_float",
    "quant_scale",
    "quant_zero",
    "compute_dtype",
    "offload_meta",
    "encoded_state_dict",
    "stores_quant_config",
    "channel_wise",
    "optimize",
    "round_zero",
)

FAMILY = Family(
    name="hqq",
    signs=Signs(methods=("hqq",), endings=("W_q",)),
    companions=(*main("W_q"), *weight(*_OF_WEIGHT)),
    own_only=frozenset(_OF_WEIGHT),
)
