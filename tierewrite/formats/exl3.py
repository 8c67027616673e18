"""ExLlamaV3's EXL3: trellis-coded weights between two Hadamard transforms.

Sources (exllamav3 1.6, exllamav3/):
- modules/quant/exl3.py `LinearEXL3.get_tensors`: `trellis` I16, `suh` and `svh` F16 (signs and scales of inputs and
  outputs; `su` and `sv` I16, packed, in early versions), and `mcg` or `mul1` I32, which name the codebook.
- conversion/quant_config.py: `update_config` sets tie_word_embeddings to false, since the head is always stored;
  quantization_config.json lists all tensors: see `formats.descriptions`.
"""

from __future__ import annotations

from tierewrite.formats.family import Family, Signs, main, weight

FAMILY = Family(
    name="exl3",
    signs=Signs(methods=("exl3",), endings=("trellis", "suh", "svh")),
    companions=(*main("trellis"), *weight("suh", "svh", "su", "sv", "mcg", "mul1")),
)
