"""compressed-tensors, llm-compressor's format: packed NVFP4, MXFP4 and integers, plain FP8, INT8 and MXFP8.

Sources (compressed-tensors 0.19, llmcompressor 0.14):
- nvfp4-pack-quantized: compressors/nvfp4/base.py `compression_param_names` (`weight_packed`, `weight_scale`,
  `weight_global_scale`, `weight_zero_point`, `input_global_scale`). Both global scales are reciprocals,
  448 * 6 / amax (quantization/utils/helpers.py `generate_gparam`), so the smallest has the largest range.
  `input_global_scale` starts as `torch.empty` (quantization/lifecycle/initialize.py) and an amax of zero
  becomes 1.0 (`generate_gparam`): both mean that calibration never reached the module.
- mxfp4-pack-quantized: compressors/mxfp4/base.py. pack-quantized: compressors/pack_quantized/base.py
  (`weight_shape`); `weight_g_idx`: GPTQ with activation ordering, written by llm-compressor before 0.10 and
  still read by vLLM.
- naive-quantized, int-quantized, float-quantized, mxfp8-quantized: compressors/naive_quantized/base.py and
  compressors/mxfp8/base.py (`weight`, `weight_scale`, `weight_zero_point`).
- static activations: quantization/lifecycle/initialize.py registers `input_scale`, `input_zero_point`,
  `output_scale`, `output_zero_point`, `output_global_scale`; zero points leave the state dict only for
  symmetric schemes (compressors/base.py). A zero point shifts the range, so scales merge only where the zero
  points are equal: hence byte-identical.
- KV cache and attention: `initialize_attn_qparams` registers `k_scale`, `v_scale`, `q_scale` and their zero
  points (and global scales) on the attention module.
"""

from __future__ import annotations

from tierewrite.formats.family import Family, Signs, activation, kv_cache, main, weight

FAMILY = Family(
    name="compressed-tensors",
    signs=Signs(
        methods=("compressed-tensors", "compressed_tensors"),
        formats=(
            "nvfp4-pack-quantized",
            "mxfp4-pack-quantized",
            "mxfp8-quantized",
            "pack-quantized",
            "float-quantized",
            "int-quantized",
            "naive-quantized",
            "mixed-precision",
        ),
        endings=("weight_packed", "weight_global_scale", "input_global_scale"),
    ),
    companions=(
        *main("weight", "weight_packed"),
        *weight("weight_scale", "weight_global_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
        *activation("max", "input_scale", "output_scale"),
        *activation("min", "input_global_scale", "output_global_scale", uncalibrated=(1.0,)),
        *weight("input_zero_point", "output_zero_point"),
    ),
    kv=(
        *kv_cache("max", "k_scale", "v_scale", "q_scale", "k_proj.output_scale", "v_proj.output_scale"),
        *kv_cache("min", "k_global_scale", "v_global_scale", "q_global_scale"),
        *kv_cache(None, "k_zero_point", "v_zero_point", "q_zero_point"),
        *kv_cache(None, "k_proj.output_zero_point", "v_proj.output_zero_point"),
    ),
)
