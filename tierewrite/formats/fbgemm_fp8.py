"""FP8 per row as transformers' FBGEMM integration writes it (the FP8 Llama 3.1 and Llama 4 releases).

Sources: transformers 5.17 integrations/fbgemm_fp8.py: `weight_scale` F32 [out, 1] (`FbgemmFp8Linear`), and
for Llama 4's fused experts `gate_up_proj_scale`, `down_proj_scale` (`FbgemmFp8Llama4TextExperts`).
`input_scale_ub` F32 (1,) is the configured upper bound of dynamic activation scales, not a calibrated one; it
was persistent before transformers 5.
"""

from __future__ import annotations

from tierewrite.formats.family import Family, Signs, main, weight

FAMILY = Family(
    name="fbgemm-fp8",
    signs=Signs(methods=("fbgemm_fp8",), endings=("input_scale_ub",)),
    companions=(*main("weight"), *weight("weight_scale", "input_scale_ub")),
    fused=(*main("{leaf}"), *weight("{leaf}_scale")),
)
