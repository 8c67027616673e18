"""GPTQ and AWQ integers packed into I32: AutoGPTQ, GPTQModel, AutoAWQ, and exports of others in their layout.

Sources:
- `qweight`, `qzeros`, `scales`, `g_idx`: GPTQModel 7.7 gptqmodel/nn_modules/qlinear/; AutoAWQ 0.2.9
  awq/modules/linear/gemm.py, gemv.py (no `g_idx`); AMD Quark's `AWQ_SAVE_MAP` (quark/torch/export/constants.py).
- AWQ multiplies a norm's or a previous linear's scales into these weights (awq/quantize/scale.py), leaving no
  tensor of its own: see `formats.smoothing`.

Repacked kernels (Marlin's `B` and `s`, workspaces, sorted indices) exist at run time only and are not listed.
"""

from __future__ import annotations

from tierewrite.formats.family import Family, Signs, main, weight

FAMILY = Family(
    name="gptq-awq",
    signs=Signs(methods=("gptq", "awq"), endings=("qweight", "qzeros")),
    companions=(*main("qweight"), *weight("qzeros", "scales", "g_idx")),
)
