"""The three tensors that an NVFP4 weight is, and the linears whose NVFP4 weights consumers load into one parameter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from tierewrite.formats.fused import FusedSets
from tierewrite.source.table import TensorEntry

_BLOBS = (
    ("weight", "weight_scale", "weight_scale_2"),  # ModelOpt: nvidia-modelopt, export/quant_utils.py
    ("weight_packed", "weight_scale", "weight_global_scale"),  # compressed-tensors: nvfp4-pack-quantized
)


def blob_of(key: str, entries: Mapping[str, TensorEntry]) -> tuple[str, tuple[str, str, str] | None]:
    """The module of `key`, and the names of the three tensors if they are an NVFP4 weight that `key` is part of."""
    module, _, part = key.rpartition(".")
    for parts in _BLOBS:
        if part in parts:
            found = [entries.get(f"{module}.{name}") for name in parts]
            codes, scales, scale = found
            if (
                codes is not None
                and scales is not None
                and scale is not None
                and (codes.dtype, scales.dtype, scale.dtype) == ("U8", "F8_E4M3", "F32")
                and math.prod(scale.shape) == 1
                and codes.shape[:-1] == scales.shape[:-1]
                and scales.nbytes
                and codes.nbytes in (8 * scales.nbytes, 16 * scales.nbytes)
            ):
                return module, parts
    return module, None


def fused_sets(tensors: Mapping[str, TensorEntry], sets: FusedSets) -> Iterator[dict[str, tuple[str, str, str]]]:
    """NVFP4 projections that a consumer loads into one parameter: module -> names of its three tensors, per set.

    Args:
        tensors: key -> header, of one side or of the output.
        sets: those of the model class.
    """
    for key in sorted(tensors):
        module, _, part = key.rpartition(".")
        parent, _, word = module.rpartition(".")
        if part != "weight_scale":
            continue
        for words in sets.below(parent):
            if word not in words or any(
                f"{parent}.{earlier}.weight_scale" in tensors for earlier in words[: words.index(word)]
            ):
                continue  # the set is found at its first member
            found: dict[str, tuple[str, str, str]] = {}
            for sibling in words:
                name = f"{parent}.{sibling}" if parent else sibling
                _, parts = blob_of(f"{name}.weight_scale", tensors)
                if parts is not None:
                    found[name] = parts
            if len(found) > 1 and len(set(found.values())) == 1:
                yield found
