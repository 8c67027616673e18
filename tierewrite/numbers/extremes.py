"""The largest magnitude in each row of a tensor: NaN, infinities and zeros show in it.

Without the sign, the bits of a float have the order of the values, infinity above all numbers and NaN above infinity.
So one integer maximum a row says whether the row holds a NaN or an infinity, whether all of it is zero, and how far its
values reach. NumPy and CuPy give the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
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
        at_limit: [rows], elements that are the largest number of the dtype, of either sign; None if not counted.
        at_bottom: [rows], elements that are zero or the smallest number of the dtype, likewise.
    """

    largest: Magnitudes
    at_limit: Magnitudes | None = None
    at_bottom: Magnitudes | None = None

    def split(self, rows: Sequence[int]) -> list[Extremes]:
        """Those of the first `rows[0]` rows, of the next `rows[1]`, and so on."""
        if len(rows) == 1:
            return [self]
        ends = list(itertools.accumulate(rows))
        return [self.mapped(itemgetter(slice(end - count, end))) for end, count in zip(ends, rows, strict=True)]

    @classmethod
    def joined(cls, parts: Sequence[Extremes]) -> Extremes:
        """Those of all parts, one after the other; all of them are counted, or none is."""
        if len(parts) == 1:
            return parts[0]
        limits = [part.at_limit for part in parts if part.at_limit is not None]
        bottoms = [part.at_bottom for part in parts if part.at_bottom is not None]
        return cls(
            np.concatenate([part.largest for part in parts]),
            np.concatenate(limits) if limits else None,
            np.concatenate(bottoms) if bottoms else None,
        )

    def mapped(self, function: Callable[[Any], Any]) -> Extremes:
        """This with `function` of each column that there is."""
        counts = (None if column is None else function(column) for column in (self.at_limit, self.at_bottom))
        return Extremes(function(self.largest), *counts)


def extremes(data: Array, dtype: str, columns: int, *, count: bool = False) -> Extremes:
    """The extremes of rows that follow each other.

    Args:
        data: uint8 [bytes], whole rows, contiguous, aligned for the dtype.
        dtype: one of `LAYOUTS`.
        columns: elements in a row (bytes for "E2M1"), at least 1.
        count: of 8-bit floats, count those at the limits too.
    """
    xp, layout = array_module(data), LAYOUTS[dtype]
    bits = data.view(layout.raw).reshape(-1, columns)
    step = len(bits) if xp is not np else max(1, _BLOCK_BYTES // (bits.itemsize * columns))
    parts = [_of_block(bits[at : at + step], dtype, layout, count) for at in range(0, len(bits), max(1, step))]
    if not parts:
        return Extremes(np.zeros(0, layout.raw))
    if xp is np:
        return Extremes.joined(parts)
    (found,) = parts
    return found.mapped(lambda column: column.get())


def _of_block(bits: Array, dtype: str, layout: Layout, count: bool) -> Extremes:
    """The extremes of a few rows; arrays of the device that they are on."""
    if dtype == "I8":
        return Extremes(_largest_int8(bits))
    if bits.shape[1] == 1 and not count:
        return Extremes(bits[:, 0] & layout.raw(layout.mask))
    magnitude = bits & layout.raw(layout.mask)
    largest = magnitude.max(axis=1)
    if not count:
        return Extremes(largest)
    xp = array_module(bits)
    at_limit, at_bottom = xp.count_nonzero(magnitude == layout.limit, 1), xp.count_nonzero(magnitude <= 1, 1)
    return Extremes(largest, at_limit, at_bottom)


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
