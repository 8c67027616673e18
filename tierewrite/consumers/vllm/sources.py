"""Files of vLLM 0.33 that rules were read in, below vllm/ of the package; and what a rewrite can fix."""

from __future__ import annotations

from tierewrite.consumers.findings import FixingRewrite

DEFAULT_LOADER = "model_executor/model_loader/default_loader.py"
KV_CACHE = "model_executor/layers/quantization/kv_cache.py"
MODELOPT = "model_executor/layers/quantization/modelopt.py"
MODEL_UTILS = "model_executor/models/utils.py"
QUANTIZATION_UTILS = "model_executor/layers/quantization/utils"
WEIGHT_UTILS = "model_executor/model_loader/weight_utils.py"

# models/qwen3_moe.py, lfm2_moe.py and others hand `.weight_scale` and `.input_scale` to `ignore_unexpected_suffixes`.
SCALES_OF_PLAIN = (
    "the load aborts at their scales; classes that pass over scales, such as Qwen3-MoE's, take FP8 and INT8 weights "
    "unscaled"
)

REWRITE: FixingRewrite = "rewrite"
FILL: FixingRewrite = "rewrite --fill-missing-scales"
FOR_VLLM: FixingRewrite = "rewrite --for vllm"
