"""What a quantized linear module has on disk, for the quantization algorithms that vLLM's rules know.

Read in vLLM 0.33, model_executor/layers/quantization/: modelopt.py, compressed_tensors/schemes/, fp8.py,
auto_awq.py, quark/.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True)
class Scheme:
    """What a quantized linear module has on disk. Sizes are [out, in] of the unquantized weight.

    Attributes:
        family: what `VllmSubject.on_disk_format` calls it; "" where that cannot tell it.
        weight: leaf and dtype of the weight; `pack` elements of the last axis in one on disk.
        block: leaf of the F8_E4M3 scales [out, in / group], or None.
        scalars: leaves of the other scales that must be there: F32 scalars, where `detailed`.
        optional: leaves that are read if there, or dropped.
        shared: the scalar that the shards of a fused parameter must have in common, or None.
        detailed: shapes and dtypes are known too.
        covers: of schemes that are not `detailed`, the leaf of the weight's scales, and how many rows and columns one
            of them is for; 0 for all. None where that is not known.
    """

    family: Literal["nvfp4", "nvfp4-packed", "fp8", ""]
    weight: str
    dtype: str
    pack: int
    block: str | None
    scalars: tuple[str, ...]
    optional: tuple[str, ...] = ()
    shared: str | None = None
    detailed: bool = True
    covers: tuple[str, int, int] | None = None

    def scale_shapes(self, rows: int, columns: int) -> tuple[tuple[int, ...], ...]:
        """The shapes that the scales of a weight may have, by `covers`; parameter.py asserts that they are equal."""
        assert self.covers is not None
        _, high, wide = self.covers
        if not high and not wide:
            return (), (1,)
        return ((-(-rows // high) if high else 1, -(-columns // wide) if wide else 1),)

    @property
    def whole_elements(self) -> bool:
        """Whether the weight has an element on disk for each of its own: FP8 and INT8, not what is packed."""
        return self.weight == "weight" and self.pack == 1

    @property
    def leaves(self) -> tuple[str, ...]:
        """Every leaf that the consumer has a parameter for."""
        return (self.weight, *((self.block,) if self.block else ()), *self.scalars, *self.optional)


_TWO = "weight_scale_2"
_GLOBAL = "weight_global_scale"
SCHEMES: Mapping[str, Scheme] = {
    "NVFP4": Scheme("nvfp4", "weight", "U8", 2, "weight_scale", (_TWO, "input_scale"), shared=_TWO),
    "W4A16_NVFP4": Scheme("nvfp4", "weight", "U8", 2, "weight_scale", (_TWO,), ("input_scale",), shared=_TWO),
    # Fused shards of other scales are requantized to the largest (KFp8StaticTensor.process): no harm done.
    "FP8": Scheme("fp8", "weight", "F8_E4M3", 1, None, ("weight_scale", "input_scale")),
    "nvfp4-pack-quantized": Scheme(
        "nvfp4-packed", "weight_packed", "U8", 2, "weight_scale", (_GLOBAL, "input_global_scale"), shared=_GLOBAL
    ),
}


def _scales_only(weight: str, dtype: str, scalars: tuple[str, ...], *optional: str) -> Scheme:
    family: Literal["fp8", ""] = "fp8" if dtype == "F8_E4M3" else ""
    return Scheme(family, weight, dtype, 1, None, scalars, optional, detailed=False)


def scheme_of(method: str, algo: str, config: Mapping[str, Any]) -> Scheme | None:
    """What modules have on disk; None for what is not checked in detail.

    Args:
        method: quant_method.
        algo: ModelOpt's algorithm as vLLM takes it; compressed-tensors' format.
        config: the quantization config.
    """
    if algo == "nvfp4-pack-quantized" and not _has_inputs(config):
        packed = SCHEMES[algo]
        return replace(packed, scalars=(_GLOBAL,), optional=("input_global_scale",))
    if algo in SCHEMES:
        return SCHEMES[algo]
    if method == "compressed-tensors":
        return _compressed(algo, config)
    if method == "fp8":
        blocks = config.get("weight_block_size")
        if blocks:
            known = _scales_only("weight", "F8_E4M3", ("weight_scale_inv",), "input_scale", "weight_scale")
            return replace(known, covers=_blocks("weight_scale_inv", blocks))
        static = config.get("activation_scheme") == "static"
        inputs = ("input_scale",)
        known = _scales_only("weight", "F8_E4M3", ("weight_scale", *(inputs if static else ())), *inputs)
        return replace(known, covers=("weight_scale", 0, 0))
    if method == "quark":
        return _quark(config)
    if method == "awq":
        zeros = ("qzeros",) if config.get("zero_point", True) else ()
        return _scales_only("qweight", "I32", ("scales", *zeros), "qzeros")
    return None


def _quark(config: Mapping[str, Any]) -> Scheme | None:
    """Quark's FP8 where it is the same for every layer (quark/quark.py `_is_fp8_w8a8`); None for anything else."""
    if config.get("layer_quant_config") or config.get("layer_type_quant_config"):
        return None
    everywhere = config.get("global_quant_config")
    weights, inputs = (
        everywhere.get(e) if isinstance(everywhere, Mapping) else None for e in ("weight", "input_tensors")
    )
    if not isinstance(weights, Mapping) or not isinstance(inputs, Mapping):
        return None
    if (weights.get("dtype"), inputs.get("dtype")) != ("fp8_e4m3", "fp8_e4m3") or weights.get("is_dynamic"):
        return None
    static = ("input_scale",) if not inputs.get("is_dynamic") else ()
    if weights.get("qscheme") not in ("per_tensor", "per_channel"):
        return None
    known = _scales_only("weight", "F8_E4M3", ("weight_scale", *static), "input_scale")
    return replace(known, covers=("weight_scale", 0, 0)) if weights["qscheme"] == "per_tensor" else known


def _has_inputs(config: Mapping[str, Any]) -> bool:
    """Whether compressed-tensors' config quantizes activations in some group."""
    groups = config.get("config_groups")
    found = groups.values() if isinstance(groups, Mapping) else ()
    return not found or any(isinstance(group, Mapping) and group.get("input_activations") for group in found)


def _compressed(algo: str, config: Mapping[str, Any]) -> Scheme | None:
    """compressed-tensors: by the one scheme that all groups have; None where they differ."""
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        return None
    found = {_of_group(algo, group) for group in groups.values() if isinstance(group, Mapping)}
    return found.pop() if len(found) == 1 else None


def _of_group(algo: str, group: Mapping[str, Any]) -> Scheme | None:
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, Mapping):
        return None
    static = isinstance(inputs, Mapping) and not inputs.get("dynamic")
    scales = ("weight_scale", *(("input_scale",) if static else ()))
    bits = weights.get("num_bits")
    kind = (weights.get("type"), bits)
    covers = _covered(weights)
    if algo in ("float-quantized", "naive-quantized") and kind == ("float", 8):
        return replace(_scales_only("weight", "F8_E4M3", scales), covers=covers)
    if algo == "int-quantized" and kind == ("int", 8):
        known = _scales_only("weight", "I8", scales, "weight_zero_point", "input_zero_point")
        return replace(known, covers=covers)
    if algo == "pack-quantized":
        zeros = () if weights.get("symmetric", True) else ("weight_zero_point",)
        shape = ("weight_shape", "weight_g_idx", "weight_zero_point")
        known = _scales_only("weight_packed", "I32", ("weight_scale", *zeros), *shape)
        return replace(known, pack=32 // bits, covers=covers) if bits in (4, 8) else known
    return None


def _covered(weights: Mapping[str, Any]) -> tuple[str, int, int] | None:
    """By compressed-tensors' strategy, what one scale is for."""
    strategy, group = weights.get("strategy"), weights.get("group_size")
    if strategy == "block":
        return _blocks("weight_scale", weights.get("block_structure"))
    if strategy == "group" and isinstance(group, int) and group > 0:
        return "weight_scale", 1, group
    return {"tensor": ("weight_scale", 0, 0), "channel": ("weight_scale", 1, 0)}.get(str(strategy))


def _blocks(leaf: str, blocks: object) -> tuple[str, int, int] | None:
    """Of blocks as a config gives them, [rows, columns]."""
    if not isinstance(blocks, list) or len(blocks) != 2 or not all(isinstance(b, int) and b > 0 for b in blocks):
        return None
    return leaf, blocks[0], blocks[1]
