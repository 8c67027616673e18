"""The largest magnitude in each row of a tensor: NaN, infinities and zeros show in it.

Without the sign, the bits of a float have the order of the values, infinity above all numbers and NaN above infinity.
So one integer maximum a row says whether the row holds a NaN or an infinity, whether all of it is zero, and how far its
values reach. NumPy and CuPy give the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tierewrite.numbers.arithmetic import Array, array_module
from tierewrite.numbers.float8 import float8_values

Magnitudes = npt.NDArray[Any]
"""Unsigned integers: the bits of numbers without their sign."""
_BLOCK_BYTES = 1 << 19
"""Bytes that a CPU looks at at a time: they and a temporary of that size stay in its cache."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How the elements of a dtype are read.

    Attributes:
        raw: of the bits.
        mask: the bits without the sign; for "packed" codes those of both elements of a byte.
        infinity: magnitude of infinity; above it all is NaN. Beyond all magnitudes where there is none.
        limit: the largest magnitude that is a number.
        zero: the magnitude of zero; -1 where the format has none.
    """

    raw: Any
    mask: int
    infinity: int
    limit: int
    zero: int = 0


LAYOUTS = {
    "F64": Layout(np.uint64, (1 << 63) - 1, 0x7FF << 52, (0x7FF << 52) - 1),
    "F32": Layout(np.uint32, 0x7FFFFFFF, 0x7F800000, 0x7F7FFFFF),
    "F16": Layout(np.uint16, 0x7FFF, 0x7C00, 0x7BFF),
    "BF16": Layout(np.uint16, 0x7FFF, 0x7F80, 0x7F7F),
    "F8_E4M3": Layout(np.uint8, 0x7F, 0x7E, 0x7E),  # OFP8: no infinity, 0x7F is NaN
    "F8_E5M2": Layout(np.uint8, 0x7F, 0x7C, 0x7B),
    "F8_E8M0": Layout(np.uint8, 0xFF, 0xFE, 0xFE, zero=-1),  # MX: powers of two, 0xFF is NaN, no sign
    "I8": Layout(np.uint8, 0xFF, 0xFF, 0x7F),  # magnitudes are taken below; -128 is 0x80
    "E2M1": Layout(np.uint8, 0x77, 0xFF, 0x77),  # two codes a byte; only zero or not is told of them
}
"""By the names of safetensors' headers, and "E2M1" for the codes of NVFP4, which headers call U8."""


@dataclass(frozen=True, slots=True)
class Extremes:
    """What the rows of a piece of a tensor hold.

    Attributes:
        largest: [rows], the largest magnitude of each row, as bits.
        at_limit: elements that are the largest number of the dtype, of either sign; 0 where they are not counted.
        at_bottom: elements that are zero or the smallest number of the dtype, likewise.
    """

    largest: Magnitudes
    at_limit: int
    at_bottom: int


def extremes(data: Array, dtype: str, columns: int, *, count: bool = False) -> Extremes:
    """The extremes of rows that follow each other.

    Args:
        data: uint8 [bytes], whole rows, contiguous.
        dtype: one of `LAYOUTS`.
        columns: elements in a row (bytes for "E2M1"), at least 1.
        count: of 8-bit floats, count those at the limits too.
    """
    xp, layout = array_module(data), LAYOUTS[dtype]
    bits = data.view(layout.raw).reshape(-1, columns)
    step = len(bits) if xp is not np else max(1, _BLOCK_BYTES // max(1, bits.itemsize * columns))
    largest, at_limit, at_bottom = [], 0, 0
    for start in range(0, len(bits), max(step, 1)):
        if dtype == "I8":
            largest.append(_largest_int8(bits[start : start + step]))
            continue
        magnitude = bits[start : start + step] & layout.raw(layout.mask)
        largest.append(magnitude.max(axis=1))
        if count and layout.raw is np.uint8:
            at_limit += int(xp.count_nonzero(magnitude == layout.limit))
            at_bottom += int(xp.count_nonzero(magnitude <= 1))
    found = xp.concatenate(largest) if largest else xp.zeros(0, layout.raw)
    return Extremes(found if xp is np else found.get(), at_limit, at_bottom)


def _largest_int8(bits: Array) -> Array:
    """Of each row, without a temporary; the magnitude of -128 is 0x80."""
    xp, signed, zero = array_module(bits), bits.view(np.int8), np.int8(0)
    above = xp.maximum(signed.max(axis=1), zero).view(np.uint8)
    below = (-xp.minimum(signed.min(axis=1), zero)).view(np.uint8)
    return xp.maximum(above, below)


def values_of(magnitudes: Magnitudes, dtype: str) -> npt.NDArray[np.float64]:
    """The numbers that magnitudes of `dtype` are, float64; of "E2M1" 1.0 where it is not zero."""
    if dtype == "BF16":
        wide = magnitudes.astype(np.uint32) << np.uint32(16)
        from_bf16: npt.NDArray[np.float64] = wide.view(np.float32).astype(np.float64)
        return from_bf16
    if dtype in ("F64", "F32", "F16"):
        with np.errstate(invalid="ignore"):
            floats: npt.NDArray[np.float64] = magnitudes.view(f"<f{magnitudes.itemsize}").astype(np.float64)
            return floats
    if dtype in ("I8", "E2M1"):
        whole: npt.NDArray[np.float64] = (magnitudes if dtype == "I8" else magnitudes != 0).astype(np.float64)
        return whole
    table: npt.NDArray[np.float64] = float8_values(dtype)[magnitudes]
    return table
