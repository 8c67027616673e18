"""The 8-bit floating-point formats: what each of the 256 codes means.

Sources: OCP 8-bit Floating Point Specification (OFP8), section 5.2, for E4M3 and E5M2; OCP Microscaling Formats,
section 5.4.1, for E8M0. The proof keeps its own tables on purpose (`proof/values.py`).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from tierewrite.numbers.arithmetic import INFINITY, NO_SIGN, Array, array_module, float32_bits

Values = npt.NDArray[np.float64]


def _small_float(mantissa: int, bias: int, *, inf: bool) -> Values:
    """All 256 values of an OCP FP8 format ("OFP8", section 5.2): only E5M2 has infinities."""
    code = np.arange(256)
    exponent = ((code & 0x7F) >> mantissa).astype(np.float64)
    fraction = (code & ((1 << mantissa) - 1)) / float(1 << mantissa)
    value = np.where(exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent - bias))
    top = (1 << (7 - mantissa)) - 1
    if inf:
        value = np.where(exponent == top, np.where(fraction == 0, np.inf, np.nan), value)
    else:
        value = np.where((code & 0x7F) == 0x7F, np.nan, value)
    return np.where(code & 0x80, -value, value)


@lru_cache(maxsize=3)
def float8_values(dtype: str) -> Values:
    """The 256 values of an 8-bit dtype as float64, by code; read-only.

    Args:
        dtype: "F8_E4M3" (no infinities; 0x7F and 0xFF are NaN), "F8_E5M2" or "F8_E8M0" (powers of two; 0xFF is NaN).
    """
    if dtype == "F8_E4M3":
        values = _small_float(3, 7, inf=False)
    elif dtype == "F8_E5M2":
        values = _small_float(2, 15, inf=True)
    elif dtype == "F8_E8M0":
        values = np.exp2(np.arange(256) - 127.0)
        values[255] = np.nan
    else:
        raise ValueError(f"{dtype} is no 8-bit floating-point format; expected F8_E4M3, F8_E5M2 or F8_E8M0")
    values.flags.writeable = False
    return values


@lru_cache(maxsize=1)
def _e4m3_as_float32() -> npt.NDArray[np.float32]:
    """The 256 values of E4M3 (FN: no infinities, S.1111.111 is NaN), float32, indexed by the byte."""
    table = float8_values("F8_E4M3").astype(np.float32)
    table.view(np.uint32)[[0x7F, 0xFF]] = 0x7FF00000, 0xFFF00000  # the bits that torch gives a NaN
    return table


def e4m3_to_float32(bits: Array) -> Array:
    """E4M3 bytes (uint8, any shape) to float32; 0x7F and 0xFF are NaN."""
    xp = array_module(bits)
    return xp.asarray(_e4m3_as_float32())[bits]


def float32_to_e4m3(values: Array) -> Array:
    """float32 (any shape) to E4M3 bytes (uint8): nearest, ties to even, saturating at +-448.

    NaN becomes 0x7F, with the sign bit of the NaN.  Within +-464 the bytes are those of
    `tensor.to(torch.float8_e4m3fn)`; beyond it torch gives NaN (ModelOpt clamps to 448 first).
    """
    xp = array_module(values)
    bits = float32_bits(values)
    magnitude = bits & NO_SIGN
    # Normal numbers: add half of the last kept place (less one where the kept mantissa is even), then cut.
    rounded = magnitude + np.uint32(0x7FFFF) + ((magnitude >> np.uint32(20)) & np.uint32(1))
    normal = (rounded >> np.uint32(20)).astype(np.int32) - ((127 - 7) << 3)
    # Below 2^-6 the places are multiples of 2^-9, which float32 scales to integers without loss.
    is_small = magnitude < np.uint32(0x3C800000)
    small = xp.rint(xp.where(is_small, magnitude.view(np.float32), np.float32(0)) * np.float32(512))
    code = xp.where(is_small, small.astype(np.int32), xp.minimum(normal, 0x7E))
    code = xp.where(magnitude > INFINITY, 0x7F, code)
    sign = (bits >> np.uint32(24)).astype(np.uint8) & np.uint8(0x80)
    return code.astype(np.uint8) | sign
