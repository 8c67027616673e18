"""FP8 with 2-D block scales as DeepSeek-V3 ships it, and what transformers and AutoFP8 write under its name.

Sources:
- `weight_scale_inv` F32 or E8M0 [ceil(out/128), ceil(in/128)]: the DeepSeek-V3 repository's README_WEIGHTS;
  despite the name it multiplies the weight. transformers 5.17 integrations/finegrained_fp8.py `FP8Linear`.
- `activation_scale` F32 (): the same file, for the static activation scheme.
- fused experts: the same file, `FP8Experts`: `gate_up_proj_scale_inv`, `down_proj_scale_inv`, and per expert
  [E] `gate_up_proj_activation_scale`, `down_proj_activation_scale`.
- `weight_scale`: the same file, `FP8Embedding`; also AutoFP8, which with vLLM's `fp8` method
  (vllm/model_executor/layers/quantization/fp8.py) uses `weight_scale`, `input_scale` and, on the attention
  module, `kv_scale` (vllm/model_executor/model_loader/weight_utils.py `maybe_remap_kv_scale_name`).
"""

from __future__ import annotations

from tierewrite.formats.family import Family, Signs, activation, kv_cache, main, weight

FAMILY = Family(
    name="deepseek-fp8",
    signs=Signs(methods=("fp8",), endings=("weight_scale_inv", "_scale_inv")),
    companions=(
        *main("weight"),
        *weight("weight_scale_inv", "weight_scale"),
        *activation("max", "activation_scale", "input_scale"),
    ),
    fused=(
        *main("{leaf}"),
        *weight("{leaf}_scale_inv"),
        *activation("max", "{leaf}_activation_scale"),
    ),
    kv=kv_cache("max", "k_scale", "v_scale", "kv_scale"),
)
