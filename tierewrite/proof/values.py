"""Numbers: whether a merged scale covers its sides, and what an NVFP4 blob is.

Refused: nothing; a tensor whose dtype has no value here is compared by its bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from tierewrite.formats import Companion
from tierewrite.source.table import TensorEntry

_F64 = npt.NDArray[np.float64]

# dtype -> NumPy dtype of its bits, smallest value that calibration can have given (a denormal is none, but see _valid)
_SCALARS: Mapping[str, tuple[str, float]] = {
    "F64": ("<u8", 2.0**-1022),
    "F32": ("<u4", 2.0**-126),
    "BF16": ("<u2", 2.0**-126),
    "F16": ("<u2", 2.0**-14),
    "F8_E4M3": ("u1", 2.0**-6),
    "F8_E5M2": ("u1", 2.0**-14),
    "F8_E8M0": ("u1", 2.0**-126),
}


@lru_cache(maxsize=4)
def _float8(dtype: str) -> _F64:
    """The 256 values of an 8-bit float (OCP OFP8 1.0 section 5.2; E8M0: OCP Microscaling 1.0 section 5.4.1)."""
    values = []
    for code in range(256):
        if dtype == "F8_E8M0":
            values.append(2.0 ** (code - 127) if code < 255 else np.nan)
            continue
        mantissa_bits, bias = (3, 7) if dtype == "F8_E4M3" else (2, 15)
        exponent, mantissa = (code & 127) >> mantissa_bits, code & (2**mantissa_bits - 1)
        if dtype == "F8_E5M2" and exponent == 31:
            value = np.nan if mantissa else np.inf
        elif dtype == "F8_E4M3" and code & 127 == 127:
            value = np.nan
        elif exponent:
            value = (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)
        else:
            value = mantissa / 2**mantissa_bits * 2.0 ** (1 - bias)
        values.append(-value if code & 128 else value)
    return np.array(values)


def _numbers(dtype: str, bits: npt.NDArray[Any]) -> _F64:
    """The values of bit patterns, exactly."""
    if dtype == "BF16":
        with np.errstate(invalid="ignore"):
            return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype.startswith("F8_"):
        return _float8(dtype)[bits]
    with np.errstate(invalid="ignore"):
        return bits.view({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float64)


def _bits(dtype: str, data: bytes) -> npt.NDArray[Any]:
    return np.frombuffer(data, _SCALARS[dtype][0])


def why_no_value(entries: Sequence[TensorEntry]) -> str | None:
    """Why tensors cannot have one value that covers them all, by their headers."""
    for entry in entries:
        if entry.dtype not in _SCALARS or 0 in entry.shape:
            return f"{entry.dtype} {list(entry.shape)} is no scale"
    if len({tuple(dim for dim in entry.shape if dim != 1) for entry in entries}) > 1:
        return "scales of different shapes"
    return None


def _valid(dtype: str, numbers: _F64, companion: Companion) -> npt.NDArray[np.bool_]:
    """Which values calibration has set. A subnormal F16 is small but true where the largest counts."""
    floor = 2.0**-24 if dtype == "F16" and companion.merge == "max" else _SCALARS[dtype][1]
    valid = np.isfinite(numbers) & (numbers >= floor)
    for default in companion.uncalibrated:
        valid &= numbers != default
    return valid


@dataclass(frozen=True, slots=True)
class Scale:
    """How a merged value compares with its sides: `right`, else `why` not; `ratio` between the sides; `calibrated`."""

    right: bool
    why: str
    ratio: float | None
    calibrated: bool


def check_merge(companion: Companion, sides: Sequence[tuple[TensorEntry, bytes]], dtype: str, data: bytes) -> Scale:
    """Whether `data` is the value that covers all sides: the nearest of its dtype that is not smaller in range.

    Nothing is encoded here: of a positive float the bit pattern plus or minus one is its neighbour, so the value is
    right if it reaches the extreme of the sides and its neighbour on the other side of the extreme does not.
    """
    up = companion.merge == "max"
    values = np.stack([_numbers(entry.dtype, _bits(entry.dtype, raw)).ravel() for entry, raw in sides])
    valid = np.stack([_valid(entry.dtype, row, companion) for (entry, _), row in zip(sides, values, strict=True)])
    largest = np.where(valid, values, -np.inf).max(axis=0)
    smallest = np.where(valid, values, np.inf).min(axis=0)
    several = valid.sum(axis=0) > 1
    with np.errstate(over="ignore"):
        ratio = float((largest[several] / smallest[several]).max()) if several.any() else None
    calibrated = bool(valid.any())

    bits = _bits(dtype, data)
    first = _bits(sides[0][0].dtype, sides[0][1])
    found = _numbers(dtype, bits)
    extreme = largest if up else smallest
    neighbour = _numbers(dtype, bits - 1 if up else bits + 1)
    with np.errstate(invalid="ignore"):
        covers = (found >= extreme) & ~(neighbour >= extreme) if up else (found <= extreme) & ~(neighbour <= extreme)
    right = np.where(valid.any(axis=0), np.isfinite(found) & (found > 0) & covers, bits == first)
    if right.all():
        return Scale(True, "", ratio, calibrated)
    at = int(np.argmin(right))
    if not valid[:, at].any():
        why = "no side was calibrated: expected the bytes of the side that stays"
    else:
        said = ", ".join(f"{entry.name} {row[at]:.9g}" for (entry, _), row in zip(sides, values, strict=True))
        why = f"holds {found[at]:.9g}; expected {extreme[at]:.9g} or the next {dtype} beyond ({said})"
    return Scale(False, why, ratio, calibrated)


# The three tensors of an encoded weight: ModelOpt's, and compressed-tensors', whose last one is the reciprocal.
FUSED = (("gate_proj", "up_proj"), ("w1", "w3"), ("q_proj", "k_proj", "v_proj"))
BLOBS = (("weight", "weight_scale", "weight_scale_2"), ("weight_packed", "weight_scale", "weight_global_scale"))


def is_blob(entries: Sequence[TensorEntry]) -> bool:
    codes, scales, scale = entries
    one = all(dim == 1 for dim in scale.shape)
    return (codes.dtype, scales.dtype, scale.dtype) == ("U8", "F8_E4M3", "F32") and one and bool(codes.shape)
