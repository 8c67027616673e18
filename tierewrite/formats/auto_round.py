"""AutoRound under its own name: layouts of GPTQ and AWQ, FP8, packed FP4, and integers with FP8 activations.

Sources (auto-round 0.16.1, auto_round/export/; `packing_format` in config.json names the layout):
- auto_round:auto_gptq, auto_round:auto_awq and others: `qweight`, `qzeros`, `scales`, `g_idx`, as `gptq_awq` has them.
- auto_round:llm_compressor and auto_round for NVFP4 and MXFP4: export_to_autoround/qlinear_fp.py, with the names of
  `compressed_tensors`.
- auto_round for FP8: export_to_autoround/export_to_fp8.py (`weight`, `weight_scale`, `weight_zp`, `input_scale`).
- integers with FP8 activations: export_to_autoround/qlinear_triton_act.py (`w_bf16_to_fp8_scale`, `act_scales`).
"""

from __future__ import annotations

from tierewrite.formats.family import Family, Signs, activation, main, weight

FAMILY = Family(
    name="auto-round",
    signs=Signs(methods=("auto-round", "intel/auto-round"), endings=("weight_zp", "w_bf16_to_fp8_scale", "act_scales")),
    companions=(
        *main("weight", "qweight"),
        *weight("qzeros", "scales", "g_idx", "weight_scale", "weight_zp", "w_bf16_to_fp8_scale"),
        *activation("max", "input_scale", "act_scales"),
    ),
)
