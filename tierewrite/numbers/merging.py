"""One range for every side: merging activation scales that were calibrated per side.

A scale says how large an activation may become before it clips. Where one tensor takes the place of several,
its range has to cover all of theirs: the largest scale, or the smallest where a format stores the reciprocal.
The result is rounded towards the larger range when the stored dtype cannot hold it exactly. Values that
calibration never touched take no part.

Refused (ValueError): dtypes whose values are not known here, sides of different shape, a result that the
stored dtype cannot represent. Ask `mergeable` with the headers alone to know beforehand.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tierewrite.formats import Companion
from tierewrite.numbers.float8 import float8_values

_F64 = npt.NDArray[np.float64]
_Bool = npt.NDArray[np.bool_]


class Side(NamedTuple):
    """One side's scale: its key, dtype as in the safetensors header, shape, and little-endian bytes.

    A tuple, as `MergeResult`: there is one an expert."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes


class MergeResult(NamedTuple):
    """One scale for all sides.

    Attributes:
        data: little-endian bytes, in `dtype` and `shape`, those of the first side.
        calibrated: some side had a value that calibration set. If not, `data` are the first side's bytes.
        taken_from: the first key whose values are exactly the result; None if they come from several sides or
            had to be rounded.
        ratio: the largest valid side over the smallest, the largest such ratio of all elements; None where
            fewer than two sides are valid.
        equal: all sides had the same dtype and bytes.
        invalid: keys of which at least one element took no part.
    """

    data: bytes
    dtype: str
    shape: tuple[int, ...]
    calibrated: bool
    taken_from: str | None
    ratio: float | None
    equal: bool
    invalid: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Codec:
    """How one dtype becomes float64 (exactly) and back (rounded to the wanted side). `itemsize` in bytes."""

    itemsize: int
    raw: str  # NumPy dtype of the bytes
    normal: float  # the smallest normal value


# Smallest normals: IEEE 754 for F64, F32, F16; BF16 has F32's exponent; OCP 8-bit formats, and E8M0, which
# has no subnormals but whose 2^-127 is below anything that a calibration gives.
_CODECS = {
    "F64": _Codec(8, "<f8", 2.0**-1022),
    "F32": _Codec(4, "<f4", 2.0**-126),
    "BF16": _Codec(2, "<u2", 2.0**-126),
    "F16": _Codec(2, "<f2", 2.0**-14),
    "F8_E4M3": _Codec(1, "u1", 2.0**-6),
    "F8_E5M2": _Codec(1, "u1", 2.0**-14),
    "F8_E8M0": _Codec(1, "u1", 2.0**-126),
}


def _decode(dtype: str, data: bytes) -> _F64:
    """The values of `data` as float64; exact for every dtype."""
    codec = _CODECS[dtype]
    raw = np.frombuffer(data, dtype=codec.raw)
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if codec.itemsize == 1:
        return np.take(float8_values(dtype), raw)
    # NumPy warns of a signalling NaN, which uninitialised values may hold.
    with np.errstate(invalid="ignore"):
        return raw.astype(np.float64)


def _encode(dtype: str, values: _F64, up: bool) -> npt.NDArray[np.uint8]:
    """Positive finite `values` [n, m] in `dtype`, rounded up or down where inexact: bytes [n, m * itemsize].

    What the dtype cannot hold comes out as infinite, NaN or zero, for the caller to notice.
    """
    codec = _CODECS[dtype]
    if codec.itemsize == 1:
        table = float8_values(dtype)[:255]
        codes = np.flatnonzero(np.isfinite(table) & (table > 0)).astype(np.uint8)  # ascending with the value
        at = np.searchsorted(table[codes], values, side="left" if up else "right") - (0 if up else 1)
        # 0xFF is NaN in all of these formats.
        fits = (at >= 0) & (at < len(codes))
        return np.where(fits, codes[np.where(fits, at, 0)], np.uint8(0xFF)).reshape(len(values), -1)
    wanted = np.inf if up else 0.0
    if dtype == "BF16":
        single = _encode("F32", values, up).view("<u4")
        # Dropping the low half rounds a positive number down; the next code is the next number up.
        half = (single >> 16) + ((single & 0xFFFF != 0) if up else 0)
        return half.astype("<u2").view(np.uint8).reshape(len(values), -1)
    with np.errstate(over="ignore", under="ignore"):
        near = values.astype(codec.raw)
    wrong = near.astype(np.float64) < values if up else near.astype(np.float64) > values
    near = np.where(wrong, np.nextafter(near, near.dtype.type(wanted)), near).astype(codec.raw)
    return near.view(np.uint8).reshape(len(values), -1)


def mergeable(headers: Sequence[tuple[str, tuple[int, ...]]]) -> str | None:
    """Why scales with these (dtype, shape) headers cannot be merged; None if they can.

    Dtypes may differ (the first side's is kept). Shapes may differ only by axes of length one: () and (1,),
    or (8,) and (8, 1).
    """
    for dtype, shape in headers:
        if dtype not in _CODECS:
            return f"a scale of dtype {dtype} cannot be merged (known: {', '.join(_CODECS)})"
        if 0 in shape:
            return f"a scale of shape {list(shape)} holds no value"
    if len({tuple(size for size in shape if size != 1) for _, shape in headers}) > 1:
        return f"scales of different shapes: {', '.join(str(list(shape)) for _, shape in headers)}"
    return None


def _elements_checked(sides: Sequence[Side], companion: Companion) -> int:
    """The element count of a scale's sides, having checked that such sides can be merged (ValueError)."""
    if not sides:
        raise ValueError(f"no side to merge for '{companion.suffix}'")
    dtype, shape = sides[0].dtype, sides[0].shape
    reason = None
    if companion.merge is None:
        reason = f"'{companion.suffix}' has no merging rule; its sides must be equal"
    elif dtype not in _CODECS or 0 in shape or any(s.dtype != dtype or s.shape != shape for s in sides):
        reason = mergeable([(side.dtype, side.shape) for side in sides])
    if reason is None:
        return math.prod(shape)
    raise ValueError(f"{', '.join(repr(side.key) for side in sides)}: {reason}")


def _valid(dtype: str, values: _F64, companion: Companion) -> _Bool:
    """Which values calibration set: positive, finite, normal, and none of the companion's own defaults.

    F16 reaches down to 2^-14 only, where a quiet layer's scale (amax 0.02 / 448) is a legitimate subnormal.
    For a maximum it can do no harm, so it counts; as a reciprocal it would mean an absurd range, so it does
    not.
    """
    floor = 2.0**-24 if dtype == "F16" and companion.merge == "max" else _CODECS[dtype].normal
    valid = (values >= floor) & (values < np.inf)  # NaN compares false
    for default in companion.uncalibrated:
        valid &= values != default
    return valid


def merge_many(scales: Sequence[tuple[Sequence[Side], Companion]]) -> list[MergeResult]:
    """Merge the sides of each scale into one; the first side gives dtype and shape.

    Result: elementwise `companion.merge` over the valid sides, in the first side's dtype, rounded up for
    "max" and down for "min", so that its range is never smaller than any valid side's. An element that no
    side has validly keeps the first side's bits. Vectorised over all scales of like dtypes and sizes.

    Raises:
        ValueError: a companion without a merging rule, sides that are not `mergeable`, data of the wrong length, or a
            result that the first side's dtype cannot represent (a BF16 maximum stored as F16).
    """
    alike: dict[tuple[object, ...], list[int]] = defaultdict(list)
    # There is a scale an expert, and few kinds of them: what depends on the headers is worked out once a kind.
    kinds: dict[tuple[object, ...], tuple[list[int], list[int]]] = {}
    for at, (sides, companion) in enumerate(scales):
        kind = (companion.merge, companion.uncalibrated, *[side[1:3] for side in sides])  # dtypes and shapes
        known = kinds.get(kind)
        if known is None:
            elements = _elements_checked(sides, companion)
            dtypes = tuple([side.dtype for side in sides])
            sizes = [elements * _CODECS[dtype].itemsize for dtype in dtypes]
            known = kinds[kind] = alike[(dtypes, elements, companion.merge, companion.uncalibrated)], sizes
        together, sizes = known
        if [len(side.data) for side in sides] != sizes:
            side = next(side for side, size in zip(sides, sizes, strict=True) if len(side.data) != size)
            raise ValueError(f"'{side.key}': {len(side.data)} bytes do not fill {side.dtype} {list(side.shape)}")
        together.append(at)
    merged: list[MergeResult | None] = [None] * len(scales)
    for indices in alike.values():
        for at, result in zip(indices, _merge_alike([scales[at] for at in indices]), strict=True):
            merged[at] = result
    return [result for result in merged if result is not None]


def _merge_alike(scales: Sequence[tuple[Sequence[Side], Companion]]) -> list[MergeResult]:
    """`merge_many` for scales that agree in dtypes, element count and rule. Arrays are [side, scale, element]."""
    first, companion = scales[0]
    dtype = first[0].dtype
    up = companion.merge == "max"
    shape = (len(scales), math.prod(first[0].shape))
    columns = [b"".join(sides[s].data for sides, _ in scales) for s in range(len(first))]
    values: _F64 = np.stack(
        [_decode(side.dtype, column).reshape(shape) for side, column in zip(first, columns, strict=True)]
    )
    valid: _Bool = np.stack([_valid(side.dtype, value, companion) for side, value in zip(first, values, strict=True)])
    high = np.where(valid, values, 0.0).max(axis=0)
    low = np.where(valid, values, np.inf).min(axis=0)
    any_valid = np.asarray(valid.any(axis=0))
    best = np.where(any_valid, high if up else low, 1.0)

    size = _CODECS[dtype].itemsize
    kept = np.frombuffer(columns[0], np.uint8).reshape(*shape, size)
    data = _encode(dtype, best, up).reshape(*shape, size)
    stored = _decode(dtype, data.tobytes()).reshape(shape)
    lost = ~(np.isfinite(stored) & (stored > 0)).all(axis=1)
    if lost.any():
        at = int(lost.argmax())
        keys = ", ".join(f"'{side.key}'" for side in scales[at][0])
        raise ValueError(f"{keys}: the merged scale does not fit into {dtype}, the dtype of the first")
    data = np.where(any_valid[..., None], data, kept)

    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        ratios = np.where(valid.sum(axis=0) > 1, high / low, 0.0).max(axis=1)
    calibrated: list[bool] = np.asarray(any_valid.any(axis=1)).tolist()
    same = (valid & (values == stored)) | ~any_valid
    whole = np.asarray(same.all(axis=2) & valid.any(axis=2))
    if all(side.dtype == dtype for side in first):
        raw = np.stack([np.frombuffer(column, np.uint8).reshape(len(scales), -1) for column in columns])
        equal: list[bool] = (raw == raw[0]).all(axis=(0, 2)).tolist()
    else:
        equal = [False] * len(scales)
    source = np.where(whole.any(axis=0), whole.argmax(axis=0), -1).tolist()
    partial = np.asarray((~valid).any(axis=2))
    touched: list[bool] = np.asarray(partial.any(axis=0)).tolist()
    blob, step = data.tobytes(), shape[1] * size
    return [
        MergeResult(  # by position, which takes half the time
            blob[at * step : (at + 1) * step],
            dtype,
            sides[0].shape,
            calibrated[at],
            sides[source[at]].key if source[at] >= 0 else None,
            ratio if ratio > 0 else None,
            equal[at],
            tuple([side.key for s, side in enumerate(sides) if partial[s, at]]) if touched[at] else (),
        )
        for at, ((sides, _), ratio) in enumerate(zip(scales, ratios.tolist(), strict=True))
    ]
