"""MXFP4 experts as gpt-oss ships them: blocks of 32 E2M1 codes and E8M0 scales, both U8.

Source: transformers 5.17 integrations/mxfp4.py `Mxfp4Deserialize` and `Mxfp4ReverseDeserialize`: the fused
parameter `gate_up_proj` becomes `gate_up_proj_blocks` [E, 2I, H/32, 16] and `gate_up_proj_scales` [E, 2I,
H/32]; the same for `down_proj`. `gate_up_proj_bias` is a parameter of its own.
"""

from __future__ import annotations

from tierewrite.formats.family import Family, Signs, main, weight

FAMILY = Family(
    name="mxfp4",
    signs=Signs(methods=("mxfp4",), tails=("_blocks",)),
    fused=(*main("{leaf}_blocks"), *weight("{leaf}_scales")),
)
