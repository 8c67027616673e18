"""MLX's quantized layers, and the Metal kernels' of transformers: packed U32 weights with a scale and a bias a group.

Sources:
- mlx 0.32, python/mlx/nn/layers/quantized.py `QuantizedLinear`, `QuantizedEmbedding`: `weight` U32, `scales`, and in
  mode "affine" `biases`; in modes "mxfp4", "mxfp8" and "nvfp4" `scales` U8 alone. A layer's own `bias` is no part.
- mlx-lm 0.32, utils.py `save_config`: `quantization` in config.json, and a copy of it as `quantization_config`, both
  without a quant_method. AutoRound's export_to_mlx writes the same.
- transformers 5.17, integrations/metal_quantization.py `MetalLinear`: `weight`, `scales`, `qbiases`.
"""

from __future__ import annotations

from tierewrite.formats.family import Family, Signs, main, weight

FAMILY = Family(
    name="mlx",
    signs=Signs(methods=("metal", "mlx"), members=("quantization",), endings=("biases", "qbiases")),
    companions=(*main("weight"), *weight("scales", "biases", "qbiases")),
)
