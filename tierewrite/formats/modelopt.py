"""NVIDIA ModelOpt's Hugging Face export: NVFP4, FP8, MXFP8, MXFP4, INT8, INT4, AWQ, SmoothQuant, SVDQuant, KV.

Sources (nvidia-modelopt 0.45 and 0.47, modelopt/torch/):
- `weight`, `weight_scale`, `weight_scale_2`, `input_scale`: export/unified_export_hf.py
  `_export_quantized_weight`. Formats with one level of scales (FP8 per tensor, channel or 2-D block, MXFP8,
  MXFP4, INT8, INT4) write no `_2`.
- `output_scale`: export/unified_export_megatron.py (written unless told to skip it); name in
  quantization/utils/core_utils.py `quantizer_attr_names`.
- `pre_quant_scale`: export/quant_utils.py `_KV_CACHE_REPLACEMENTS` (from `input_quantizer._pre_quant_scale`).
  It is divided into the weight when the export fuses or resmooths, hence ADJACENT.
- `weight_quantizer._svdquant_lora_a`, `_b`: state of the quantizer that the export leaves in the state dict;
  `svdquant_lora_a`, `_b`: the diffusers export promotes them (`unified_export_hf.py`). Factors of the weight.
- fused experts (Llama 4, gpt-oss): `quantizer_attr_names(weight_name)` prefixes the attribute with the
  parameter's name, `gate_up_proj_weight_scale`; export/unified_export_megatron.py `_pack_name_remapping`
  writes the same names.
- `k_proj.k_scale`, `v_proj.v_scale`, `k_proj.k_bias`, `v_proj.v_bias`: `_KV_CACHE_REPLACEMENTS`; the Megatron
  export writes `k_scale` and `v_scale` on the attention module itself (`_self_attention_scaling`). The biases
  are the centres of the affine KV formats: two of them have no common value, so they cannot be merged.

`*_amax` and other quantizer state are left over when an export went wrong; no consumer reads them and no
table lists them, so a tied module that has one is refused.
"""

from __future__ import annotations

from tierewrite.formats.family import Companion, Family, Role, Signs, activation, kv_cache, main, weight

FAMILY = Family(
    name="modelopt",
    signs=Signs(
        methods=("modelopt", "modelopt_fp4"),
        producers=("modelopt",),
        endings=("weight_scale_2", "pre_quant_scale", "svdquant_lora_a"),
        tails=("_weight_scale_2", "_svdquant_lora_a"),
    ),
    companions=(
        *main("weight"),
        *weight("weight_scale", "weight_scale_2"),
        *activation("max", "input_scale", "output_scale"),
        Companion("pre_quant_scale", Role.ADJACENT),
        *weight("weight_quantizer._svdquant_lora_a", "weight_quantizer._svdquant_lora_b"),
        *weight("svdquant_lora_a", "svdquant_lora_b"),
    ),
    fused=(
        *main("{leaf}"),
        *weight("{leaf}_weight_scale", "{leaf}_weight_scale_2"),
        *activation("max", "{leaf}_input_scale", "{leaf}_output_scale"),
    ),
    kv=(
        *kv_cache("max", "k_proj.k_scale", "v_proj.v_scale", "k_scale", "v_scale"),
        *kv_cache(None, "k_proj.k_bias", "v_proj.v_bias"),
    ),
)
