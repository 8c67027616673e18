"""AMD Quark's Hugging Face export: FP8, INT8, MXFP4 and two-level schemes.

Sources (amd-quark 0.13, quark/torch/export/):
- `weight_scale`, `weight_zero_point`, `input_scale`, `input_zero_point`, `output_scale`, `output_zero_point`,
  `bias_scale`, `bias_zero_point`, and the same with `_2` for a second level of scales: constants.py
  `LOAD_MAP`, `LOAD_MAP_MULTI`. A zero point shifts the range, so scales merge only where the zero points are
  equal: hence byte-identical. What belongs to the bias stays with the bias.
- MXFP4: utils.py `apply_export_state_dict_mappings` (`weight`, `weight_scale`, both U8).
- `input_rotation`, `input_prescale`: nn/modules/qparamslinear.py `QParamsLinearWithRotation`: what the input
  is multiplied by because the weight was multiplied by the inverse. Hence as strict as a `pre_quant_scale`.
- KV cache: main_export/model_post_process.py writes `k_scale` and `v_scale` on the attention module, or keeps
  `k_proj.output_scale` and `v_proj.output_scale`.
"""

from __future__ import annotations

from tierewrite.formats.family import Companion, Family, Role, Signs, activation, kv_cache, main, weight

FAMILY = Family(
    name="quark",
    signs=Signs(methods=("quark",), endings=("input_rotation", "input_prescale", "weight_zero_point_2")),
    companions=(
        *main("weight"),
        *weight("weight_scale", "weight_scale_2", "weight_zero_point", "weight_zero_point_2"),
        *activation("max", "input_scale", "input_scale_2", "output_scale", "output_scale_2"),
        *weight("input_zero_point", "input_zero_point_2", "output_zero_point", "output_zero_point_2"),
        *(
            Companion(suffix, Role.PER_SIDE)
            for suffix in ("bias_scale", "bias_scale_2", "bias_zero_point", "bias_zero_point_2")
        ),
        Companion("input_rotation", Role.ADJACENT),
        Companion("input_prescale", Role.ADJACENT),
    ),
    # A tied bias has its own: `{leaf}` is `bias` here.
    fused=weight("{leaf}_scale", "{leaf}_scale_2", "{leaf}_zero_point", "{leaf}_zero_point_2"),
    kv=kv_cache("max", "k_scale", "v_scale", "k_proj.output_scale", "v_proj.output_scale"),
)
