"""Numbers: the one value that covers several scales, and what an NVFP4 blob is.

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

_FLOATS: Mapping[str, str] = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
"""dtype -> NumPy's name, where NumPy has it."""


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
        values: _F64 = _float8(dtype)[bits]
        return values
    with np.errstate(invalid="ignore"):
        return bits.view(_FLOATS[dtype]).astype(np.float64)


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
class Value:
    """The one value that covers all sides.

    Attributes:
        data: its little-endian bytes; elements that no side has validly keep the first side's bits.
        ratio: the largest side over the smallest, the largest of all elements; None where fewer than two are valid.
        calibrated: some element of some side was set by calibration.
        invalid: names of the sides of which some element was not.
        said: the sides' values, for people.
    """

    data: bytes
    ratio: float | None
    calibrated: bool
    invalid: frozenset[str]
    said: str


def covering(companion: Companion, sides: Sequence[tuple[TensorEntry, bytes]]) -> Value | None:
    """The value that covers `sides`, in the first one's dtype: the nearest that is not smaller in range.

    Returns:
        None where the dtype has no such value (a BF16 maximum beyond F16's largest).
    """
    up = companion.merge == "max"
    dtype = sides[0][0].dtype
    values = np.stack([_numbers(entry.dtype, _bits(entry.dtype, raw)).ravel() for entry, raw in sides])
    valid = np.stack([_valid(entry.dtype, row, companion) for (entry, _), row in zip(sides, values, strict=True)])
    largest = np.where(valid, values, -np.inf).max(axis=0)
    smallest = np.where(valid, values, np.inf).min(axis=0)
    several = valid.sum(axis=0) > 1
    with np.errstate(over="ignore"):
        ratio = float((largest[several] / smallest[several]).max()) if several.any() else None
    any_valid = valid.any(axis=0)
    wanted = np.where(any_valid, largest if up else smallest, 1.0)
    bits = np.where(any_valid, _nearest(dtype, wanted, up), _bits(dtype, sides[0][1])).astype(_SCALARS[dtype][0])
    found = _numbers(dtype, bits)
    with np.errstate(invalid="ignore"):
        covers = np.isfinite(found) & (found > 0) & (found >= wanted if up else found <= wanted)
    if not covers[any_valid].all():
        return None
    said = ", ".join(f"{entry.name} {row.flat[0]:.9g}" for (entry, _), row in zip(sides, values, strict=True))
    invalid = frozenset(entry.name for (entry, _), row in zip(sides, valid, strict=True) if not row.all())
    return Value(bits.tobytes(), ratio, bool(any_valid.any()), invalid, said)


def _nearest(dtype: str, wanted: _F64, up: bool) -> npt.NDArray[Any]:
    """Bits of the values of `dtype` next to `wanted` (positive), from above or from below.

    Of positive floats of one dtype the bit patterns have the order of the values: the next value has the next pattern.
    """
    below = _at_most(dtype, wanted)
    if not up:
        return below
    return np.where(_numbers(dtype, below) >= wanted, below, below + below.dtype.type(1))


def _at_most(dtype: str, wanted: _F64) -> npt.NDArray[Any]:
    """Bits of the largest values of `dtype` that are at most `wanted` (positive); where there is none, the bits 0."""
    if dtype.startswith("F8_"):
        positive = _float8(dtype)[: 256 if dtype == "F8_E8M0" else 128]
        count = np.searchsorted(positive[np.isfinite(positive)], wanted, side="right")
        return np.maximum(count - 1, 0).astype(np.uint8)
    if dtype == "BF16":  # the upper half of an F32
        return (_at_most("F32", wanted) >> 16).astype(np.uint16)
    with np.errstate(over="ignore", under="ignore"):
        rounded = wanted.astype(_FLOATS[dtype])
    bits: npt.NDArray[Any] = rounded.view(_SCALARS[dtype][0])
    beyond = rounded.astype(np.float64) > wanted
    return np.where(beyond, bits - bits.dtype.type(1), bits)


# The three tensors of an encoded weight: ModelOpt's, and compressed-tensors', whose last one is the reciprocal.
BLOBS = (("weight", "weight_scale", "weight_scale_2"), ("weight_packed", "weight_scale", "weight_global_scale"))


def is_blob(entries: Sequence[TensorEntry]) -> bool:
    """Whether codes, block scales and scale are an NVFP4 weight: one E4M3 for 16 or 32 values of 4 bits each."""
    codes, scales, scale = entries
    one = all(dim == 1 for dim in scale.shape)
    dtypes = (codes.dtype, scales.dtype, scale.dtype) == ("U8", "F8_E4M3", "F32")
    rows = bool(codes.shape) and codes.shape[:-1] == scales.shape[:-1]
    return dtypes and one and rows and scales.nbytes > 0 and codes.nbytes in (8 * scales.nbytes, 16 * scales.nbytes)
