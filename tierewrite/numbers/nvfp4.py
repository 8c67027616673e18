"""The NVFP4 codec: decode, encode and re-encode packed weights without the exporter that wrote them.

A weight of shape [..., out, in] is stored as three tensors:

* `weight`, uint8 [..., out, in/2]: two E2M1 codes a byte, the even element in the low nibble; a code is a
  magnitude index (0, .5, 1, 1.5, 2, 3, 4, 6) with the sign in bit 3;
* `weight_scale`, E4M3 [..., out, in/16], here always as its raw bytes (uint8): one scale for 16 elements
  along the last axis (ModelOpt's W4A8_NVFP4_FP8: [..., out, in/32]; the shapes tell which);
* `weight_scale_2`, float32, a single value.  element = magnitude * weight_scale * weight_scale_2.

compressed-tensors (nvfp4-pack-quantized) stores the same codes and block scales as `weight_packed` and
`weight_scale`, and the reciprocal of the third: `weight_global_scale` = 448*6/amax, and element = magnitude *
(weight_scale / weight_global_scale).  Every function takes `reciprocal=True` for that form.

All arithmetic is float32 in the order of ModelOpt's `NVFP4QTensor` (nvidia-modelopt 0.45 to 0.47,
torch/quantization/qtensor/nvfp4_tensor.py; run on a CPU), so `encode` gives its bytes and `decode` its bits.
Arrays are NumPy's; CuPy arrays are taken as well, stay on their device and give the same bytes.  Work is done
in chunks of blocks, so that no temporary grows with the tensor.

Refused: a last axis that is no multiple of the block, shapes that do not belong together, and re-encoding from or to
a scale that is zero, negative, infinite or NaN (ModelOpt writes such scales for a tensor of zeros: what they
were meant to say is not in the file, so nothing new is made of them).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tierewrite.numbers.arithmetic import (
    INFINITY,
    NO_SIGN,
    Array,
    array_module,
    divide,
    float32_bits,
    multiply,
    quiet,
)
from tierewrite.numbers.float8 import e4m3_to_float32, float32_to_e4m3

BLOCK = 16
"""Elements that share one block scale; ModelOpt's W4A8_NVFP4_FP8 shares one among 32."""
_BLOCKS = (16, 32)

E2M1_MAX = np.float32(6.0)
E4M3_MAX = np.float32(448.0)
E4M3_MIN = np.float32(2.0**-9)
"""The smallest positive E4M3 value: ModelOpt's floor for block scales, so that none becomes 0."""

CHUNK_BLOCKS = 1 << 15
"""Blocks handled at a time: 256 KiB of codes, 2 MiB for each float32 temporary. A GPU gets 16 times as many."""

_MAGNITUDES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=np.float32)
# Halfway points between neighbouring magnitudes, as the bits of their float32. A value that is one goes to the
# code below where that is even, else to the code above.
_EVEN_BELOW = [np.uint32(np.float32(x).view(np.uint32)) for x in (0.25, 1.25, 2.5, 5.0)]
_EVEN_ABOVE = [np.uint32(np.float32(x).view(np.uint32)) for x in (0.75, 1.75, 3.5)]
_CELL_LOW = np.array([0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
_CELL_HIGH = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])

_NAN_BYTE = 0xFF  # what ModelOpt on x86 writes for 0/0, its result for a tensor of zeros


class Packed(NamedTuple):
    """One encoded weight: codes, block scales (E4M3 bytes), and the whole tensor's scale in its own form."""

    weight: Array
    weight_scale: Array
    scale: Array


class Change(NamedTuple):
    """How much two decoded weights differ: largest absolute and root-mean-square difference."""

    largest: float
    rms: float


@dataclass(frozen=True, slots=True)
class Agreement:
    """The answer of `agree_up_to_scaling`, true or false, with its evidence.

    Attributes:
        agrees: no element lies outside the rounding of both encodings.
        elements: how many elements were compared.
        outside: how many of them cannot stem from one source weight.
        first: index of the first such element in the decoded weight, or None.
        worst: largest |a - b| in units of the coarser block scale (rounding is 0.25 to 1 of these).
    """

    agrees: bool
    elements: int
    outside: int
    first: tuple[int, ...] | None
    worst: float

    def __bool__(self) -> bool:
        return self.agrees


def _pair_values() -> np.ndarray:
    """float32 [256, 2]: the two elements of each byte.  Code 8 (-0) decodes to +0.0, as in ModelOpt."""
    signed = np.concatenate([_MAGNITUDES, -_MAGNITUDES])
    signed[8] = 0.0
    byte = np.arange(256)
    return np.stack([signed[byte & 15], signed[byte >> 4]], axis=1)


_PAIRS = _pair_values()


def _scalar(value: Array, what: str) -> np.float32:
    """One float32 on the host, from a Python float, a 0-d or a one-element array on either device."""
    if array_module(value) is not np:
        value = value.get()
    array = np.asarray(value)
    if array.size != 1:
        raise ValueError(f"{what} has shape {list(array.shape)}; one value was expected")
    if (array.dtype.kind == "f" and array.dtype != np.float32) or array.dtype.kind in "iu":
        array = array.astype(np.float32)
    if array.dtype != np.float32:
        raise ValueError(f"{what} has dtype {array.dtype}; float32 was expected")
    value_32: np.float32 = array.reshape(-1)[0]
    return value_32


def _blocks(weight: Array, weight_scale: Array) -> tuple[Array, Array]:
    """Codes as [blocks, 8] ([blocks, 16] for blocks of 32) and block scales as [blocks].

    Views where the memory allows it. Raises ValueError where dtype or shape is not that of an NVFP4 pair.
    """
    for name, array in (("weight", weight), ("weight_scale", weight_scale)):
        if array.dtype != np.uint8:
            raise ValueError(f"{name} has dtype {array.dtype}; the raw bytes (uint8) were expected")
        if array.ndim < 1:
            raise ValueError(f"{name} is a scalar; a block format needs a last axis")
    elements = weight.shape[-1] * 2
    if elements % BLOCK:
        raise ValueError(
            f"weight of shape {list(weight.shape)} holds {elements} elements along its last axis, which is no "
            f"multiple of {BLOCK}"
        )
    for block in _BLOCKS:
        if elements % block == 0 and tuple(weight_scale.shape) == (*weight.shape[:-1], elements // block):
            xp = array_module(weight)
            codes = xp.ascontiguousarray(weight).reshape(-1, block // 2)
            return codes, xp.ascontiguousarray(weight_scale).reshape(-1)
    raise ValueError(
        f"weight_scale has shape {list(weight_scale.shape)}; {[*weight.shape[:-1], elements // BLOCK]} belongs to "
        f"a weight of shape {list(weight.shape)}"
    )


def _chunks(blocks: int, xp: Any) -> Iterator[slice]:
    step = CHUNK_BLOCKS if xp is np else 16 * CHUNK_BLOCKS
    for start in range(0, blocks, step):
        yield slice(start, min(start + step, blocks))


def _multiplier(scale_bytes: Array, scale: np.float32, reciprocal: bool) -> Array:
    """float32 [blocks]: what the magnitudes of each block are multiplied with, in the exporter's order."""
    block = e4m3_to_float32(scale_bytes)
    return divide(block, scale) if reciprocal else multiply(block, scale)


def _magnitudes(codes: Array) -> Array:
    """float32 [blocks, 16]: the two signed E2M1 values of each byte of codes."""
    return array_module(codes).asarray(_PAIRS)[codes].reshape(codes.shape[0], -1)


def _decode_blocks(codes: Array, multiplier: Array) -> Array:
    """float32 [blocks, 16]."""
    return multiply(_magnitudes(codes), multiplier[:, None])


def _magnitude_codes(bits: Array) -> Array:
    """uint8 0..7 from the bits of float32 >= 0: nearest magnitude, ties to the even code.

    NaN gives 7, as in ModelOpt.
    """
    codes = array_module(bits).zeros(bits.shape, dtype=np.uint8)
    for bound in _EVEN_BELOW:
        codes += bits > bound
    for bound in _EVEN_ABOVE:
        codes += bits >= bound
    return codes


def decode(weight: Array, weight_scale: Array, weight_scale_2: Array, *, reciprocal: bool = False) -> Array:
    """The weight that the three tensors stand for.

    Args:
        weight: uint8 [..., out, in/2].
        weight_scale: E4M3 bytes, uint8 [..., out, in/16].
        weight_scale_2: float32, one value; with `reciprocal`, compressed-tensors' weight_global_scale.

    Returns:
        float32 [..., out, in], bit for bit `NVFP4QTensor.dequantize(torch.float32, ...)`: magnitude *
        (weight_scale * weight_scale_2).  Code 8 gives +0.0.

    Raises:
        ValueError: a last axis that is no multiple of 16, or dtypes and shapes that do not belong together.
    """
    xp = array_module(weight)
    scale = _scalar(weight_scale_2, "weight_global_scale" if reciprocal else "weight_scale_2")
    codes, scales = _blocks(weight, weight_scale)
    out = xp.empty((codes.shape[0], codes.shape[1] * 2), dtype=np.float32)
    with quiet(xp):
        for part in _chunks(codes.shape[0], xp):
            out[part] = _decode_blocks(codes[part], _multiplier(scales[part], scale, reciprocal))
    return out.reshape(*weight.shape[:-1], weight.shape[-1] * 2)


def encode(weight: Array, weight_scale_2: Array | None = None, *, block: int = BLOCK) -> tuple[Array, Array, Array]:
    """Encode a weight as ModelOpt's dynamic NVFP4 quantizer does, byte for byte.

    weight_scale_2 = amax / (6*448); weight_scale = block amax / (6 * weight_scale_2), 1.0 where that is 0,
    clamped to [2^-9, 448], then E4M3; codes = element / (weight_scale * weight_scale_2), nearest, ties to the
    even code, sign bit set for elements < 0 (so -0.0 gets code 0 and a tiny negative code 8).  ModelOpt on a
    GPU may write a weight_scale_2 one last place away, since torch multiplies by a reciprocal there; hand it
    in to get the rest.

    Args:
        weight: float32 or float16 [..., out, in].
        weight_scale_2: float32, one value, or None to take it from the weight's largest magnitude.
        block: elements that share a block scale, 16 or 32.

    Returns:
        (weight uint8 [..., out, in/2], weight_scale E4M3 bytes uint8 [..., out, in/16], weight_scale_2
        float32 []).  A weight of zeros gives weight_scale_2 = 0 and NaN block scales (0xFF): ModelOpt's
        result, kept for comparison; `repack` never makes one.

    Raises:
        ValueError: a last axis that is no multiple of 16, an empty weight, another dtype.
    """
    xp = array_module(weight)
    if weight.dtype not in (np.float32, np.float16):
        raise ValueError(f"weight has dtype {weight.dtype}; float32 was expected")
    if block not in _BLOCKS:
        raise ValueError(f"blocks of {block} elements; 16 or 32 was expected")
    if weight.ndim < 1 or weight.shape[-1] % block:
        raise ValueError(f"weight has shape {list(weight.shape)}; its last axis must be a multiple of {block}")
    if weight.size == 0:
        raise ValueError(f"weight has shape {list(weight.shape)}; an empty weight has no scale")
    rows = xp.ascontiguousarray(weight, dtype=np.float32).reshape(-1, block)
    blocks = rows.shape[0]
    with quiet(xp):
        if weight_scale_2 is None:
            largest = max(int((float32_bits(rows[part]) & NO_SIGN).max()) for part in _chunks(blocks, xp))
            amax = np.array(largest, np.uint32).view(np.float32)
            scale = np.float32(amax / np.float32(6.0 * 448.0))
        else:
            scale = _scalar(weight_scale_2, "weight_scale_2")
        codes = xp.empty((blocks, block // 2), dtype=np.uint8)
        scales = xp.empty(blocks, dtype=np.uint8)
        for part in _chunks(blocks, xp):
            values = rows[part]
            block_amax = (float32_bits(values) & NO_SIGN).max(axis=1).view(np.float32)
            block_scale = divide(block_amax, np.float32(E2M1_MAX * scale))
            block_scale[float32_bits(block_scale) == 0] = 1.0
            scale_bytes = float32_to_e4m3(xp.clip(block_scale, E4M3_MIN, E4M3_MAX))
            # The sign of 0/0 differs between processors; one byte for all keeps the result the same.
            scale_bytes[xp.isnan(block_scale)] = _NAN_BYTE
            scaled = float32_bits(divide(values, multiply(e4m3_to_float32(scale_bytes), scale)[:, None]))
            magnitude = scaled & NO_SIGN
            negative = (scaled > NO_SIGN) & (magnitude > 0) & (magnitude <= INFINITY)
            nibbles = _magnitude_codes(magnitude) | (negative.astype(np.uint8) << np.uint8(3))
            codes[part] = nibbles[:, 0::2] | (nibbles[:, 1::2] << np.uint8(4))
            scales[part] = scale_bytes
    lead = weight.shape[:-1]
    return (
        codes.reshape(*lead, weight.shape[-1] // 2),
        scales.reshape(*lead, weight.shape[-1] // block),
        xp.asarray(scale).reshape(()),
    )


def widest(scales: Iterable[Array], *, reciprocal: bool = False) -> np.float32:
    """The scale that covers every one: the largest weight_scale_2, or the smallest weight_global_scale.

    Raises ValueError where there is none, or where one is zero, negative, infinite or NaN.
    """
    what = "weight_global_scale" if reciprocal else "weight_scale_2"
    values = [_positive(_scalar(scale, what), what) for scale in scales]
    if not values:
        raise ValueError(f"no {what} to choose from")
    return min(values) if reciprocal else max(values)


def _positive(scale: np.float32, what: str) -> np.float32:
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"{what} is {scale!s}; a finite positive value was expected")
    return scale


def are_sound(weight_scale: Array) -> bool:
    """Whether block scales (E4M3 bytes) are neither NaN nor negative, minus zero included: `repack` takes no others."""
    return not bool((weight_scale >= np.uint8(0x7F)).any())


def repack(
    weight: Array,
    weight_scale: Array,
    weight_scale_2: Array,
    new_weight_scale_2: Array,
    *,
    reciprocal: bool = False,
) -> tuple[Array, Array]:
    """The same weight, re-encoded to another weight_scale_2, working on the codes.

    New block scale = E4M3(weight_scale * weight_scale_2 / new_weight_scale_2), clamped to [2^-9, 448]; each
    element is rounded again, against it, (nearest, ties to the even code) and keeps its sign bit, that of code 8
    included.  With `reciprocal` the values are compressed-tensors' weight_global_scale, and the new block
    scale is E4M3(weight_scale * new / old).  An equal scale returns the two arrays handed in.

    Going to a larger weight_scale_2 (a smaller weight_global_scale), an element moves by at most max(new
    block scale, 3 * 2^-9) * new_weight_scale_2.  Going to a smaller one, blocks whose scale would pass 448
    saturate; `change` gives what that costs.

    Args:
        weight: uint8 [..., out, in/2].
        weight_scale: E4M3 bytes, uint8 [..., out, in/16].
        weight_scale_2, new_weight_scale_2: float32, one value each.

    Returns:
        (weight, weight_scale), shapes and dtypes as handed in; never a NaN scale.

    Raises:
        ValueError: as `decode`; also a scale that is zero, negative, infinite or NaN, or a block scale that
            is negative or NaN.
    """
    what = "weight_global_scale" if reciprocal else "weight_scale_2"
    old, new = _scalar(weight_scale_2, what), _scalar(new_weight_scale_2, f"new {what}")
    codes, scales = _blocks(weight, weight_scale)
    if old.tobytes() == new.tobytes():
        return weight, weight_scale
    _positive(old, what)
    _positive(new, f"new {what}")
    xp = array_module(weight)
    new_codes = xp.empty(codes.shape, dtype=np.uint8)
    new_scales = xp.empty(scales.shape, dtype=np.uint8)
    with quiet(xp):
        for part in _chunks(codes.shape[0], xp):
            old_bytes = scales[part]
            if not are_sound(old_bytes):
                raise ValueError("weight_scale holds a NaN or a negative scale; such a weight is not re-encoded")
            block = e4m3_to_float32(old_bytes)
            up, down = (new, old) if reciprocal else (old, new)
            wanted = divide(multiply(block, up), down)
            scale_bytes = float32_to_e4m3(xp.clip(wanted, E4M3_MIN, E4M3_MAX))
            values = _decode_blocks(codes[part], _multiplier(old_bytes, old, reciprocal))
            scaled = divide(values, _multiplier(scale_bytes, new, reciprocal)[:, None])
            nibbles = _magnitude_codes(float32_bits(scaled) & NO_SIGN)
            signs = codes[part] & np.uint8(0x88)
            new_codes[part] = nibbles[:, 0::2] | (nibbles[:, 1::2] << np.uint8(4)) | signs
            new_scales[part] = scale_bytes
    return new_codes.reshape(weight.shape), new_scales.reshape(weight_scale.shape)


def _same_shapes(a: Packed, b: Packed) -> None:
    for what, left, right in (("weights", a.weight, b.weight), ("block scales", a.weight_scale, b.weight_scale)):
        if tuple(left.shape) != tuple(right.shape):
            raise ValueError(f"{what} of shapes {list(left.shape)} and {list(right.shape)} cannot be compared")


def change(a: tuple[Array, Array, Array], b: tuple[Array, Array, Array], *, reciprocal: bool = False) -> Change:
    """How much the decoded weights of two encodings differ.

    Args:
        a, b: (weight, weight_scale, weight_scale_2) each, as for `decode`, of equal shapes.

    Returns:
        Change(largest, rms): of |decode(a) - decode(b)|, in float64, chunk by chunk.  NaN where either side
        is.

    Raises:
        ValueError: as `decode`, or shapes that differ.
    """
    a, b = Packed(*a), Packed(*b)
    _same_shapes(a, b)
    xp = array_module(a.weight)
    scale_a, scale_b = _scalar(a.scale, "weight scale of a"), _scalar(b.scale, "weight scale of b")
    codes_a, scales_a = _blocks(a.weight, a.weight_scale)
    codes_b, scales_b = _blocks(b.weight, b.weight_scale)
    largest, squares = 0.0, 0.0
    with quiet(xp):
        for part in _chunks(codes_a.shape[0], xp):
            left = _decode_blocks(codes_a[part], _multiplier(scales_a[part], scale_a, reciprocal))
            right = _decode_blocks(codes_b[part], _multiplier(scales_b[part], scale_b, reciprocal))
            difference = xp.abs(left.astype(np.float64) - right)
            largest = float(np.maximum(largest, float(difference.max())))
            squares += float((difference * difference).sum())
    elements = codes_a.size * 2
    return Change(largest, math.sqrt(squares / elements) if elements else 0.0)


def _cells(codes: Array, scale_bytes: Array, scale: np.float32, reciprocal: bool) -> tuple[Array, Array, Array, Array]:
    """For each element the range of source weights that this encoding rounds to the stored code.

    Returns (low, high) float64 [blocks, 16], the signed codes with code 8 read as 0, uint8 [blocks, 16], and
    the block multiplier, float64 [blocks].
    """
    xp = array_module(codes)
    # Values of E4M3 and the float32 scale are exact in float64, and so is their product.
    block = e4m3_to_float32(scale_bytes).astype(np.float64)
    unit = 1.0 / float(scale) if reciprocal else float(scale)
    multiplier = block * unit
    nibbles = xp.empty((codes.shape[0], codes.shape[1] * 2), dtype=np.uint8)
    nibbles[:, 0::2] = codes & np.uint8(15)
    nibbles[:, 1::2] = codes >> np.uint8(4)
    index = nibbles & np.uint8(7)
    low = xp.asarray(_CELL_LOW)[index] * multiplier[:, None]
    high = xp.asarray(_CELL_HIGH)[index] * multiplier[:, None]
    # The top code also takes what the rounding of the block scale to E4M3 cut off.
    next_up = e4m3_to_float32(xp.minimum(scale_bytes + np.uint8(1), np.uint8(0x7E))).astype(np.float64)
    next_up = xp.where(scale_bytes >= np.uint8(0x7E), 480.0, next_up)
    top = 6.0 * (block + next_up) / 2 * unit
    high = xp.where(index == 7, top[:, None], high)
    # A block without any code other than zero: its source was zero, or so small that its scale fell below
    # 2^-9.
    empty = (index == 0).all(axis=1)
    narrow = xp.minimum(0.25 * block, 6.0 * 2.0**-10) * unit
    high = xp.where(empty[:, None], narrow[:, None], high)
    zero = index == 0
    low = xp.where(zero, -high, low)
    negative = (nibbles >= 8) & ~zero
    low, high = xp.where(negative, -high, low), xp.where(negative, -low, high)
    return low, high, xp.where(zero, np.uint8(0), nibbles), multiplier


def agree_up_to_scaling(
    a: tuple[Array, Array, Array], b: tuple[Array, Array, Array], *, reciprocal: bool = False
) -> Agreement:
    """Whether two encodings can stand for one weight, differing only by how it was scaled and rounded.

    Each stored code stands for a range of source weights: those that the encoding rounds to it (half a step
    to either side, where a step is the gap to the next magnitude times the block's scale; the top code
    reaches as far as the rounding of its block scale could have cut off).  Two elements agree when their
    ranges overlap, which keeps the decoded values within the rounding of the coarser encoding: closer than
    half a step of one plus half a step of the other.  Where both blocks are scaled alike, the codes must be
    equal.

    Args:
        a, b: (weight, weight_scale, weight_scale_2) each, as for `decode`, of equal shapes.

    Returns:
        an Agreement; a side with NaN, infinite or negative scales agrees with nothing.

    Raises:
        ValueError: as `decode`, or shapes that differ.
    """
    a, b = Packed(*a), Packed(*b)
    _same_shapes(a, b)
    xp = array_module(a.weight)
    scale_a, scale_b = _scalar(a.scale, "weight scale of a"), _scalar(b.scale, "weight scale of b")
    codes_a, scales_a = _blocks(a.weight, a.weight_scale)
    codes_b, scales_b = _blocks(b.weight, b.weight_scale)
    elements = codes_a.size * 2
    sound = all(math.isfinite(scale) and scale > 0 for scale in (scale_a, scale_b))
    outside, first, worst = 0, -1, 0.0
    with quiet(xp):
        for part in _chunks(codes_a.shape[0], xp):
            low_a, high_a, code_a, unit_a = _cells(codes_a[part], scales_a[part], scale_a, reciprocal)
            low_b, high_b, code_b, unit_b = _cells(codes_b[part], scales_b[part], scale_b, reciprocal)
            coarser = xp.maximum(unit_a, unit_b)
            # The exporters divide in float32, so a code may lie a few last places across a halfway point.
            slack = 2.0**-21 * xp.maximum(xp.abs(high_a), xp.abs(low_a))
            overlap = xp.minimum(high_a, high_b) - xp.maximum(low_a, low_b) > -slack
            alike = xp.abs(unit_a - unit_b) <= 2.0**-20 * coarser
            fine = xp.where(alike[:, None], code_a == code_b, overlap)
            fine |= (code_a == 0) & (code_b == 0)
            # From 0x7F on, E4M3 bytes are NaN or negative.
            positive = (scales_a[part] < np.uint8(0x7F)) & (scales_b[part] < np.uint8(0x7F))
            bad = ~(fine & (sound & positive)[:, None])
            count = int(bad.sum())
            if count and first < 0:
                first = part.start * codes_a.shape[1] * 2 + int(bad.reshape(-1).argmax())
            outside += count
            left, right = _magnitudes(codes_a[part]) * unit_a[:, None], _magnitudes(codes_b[part]) * unit_b[:, None]
            steps = xp.where(left == right, 0.0, xp.abs(left - right) / coarser[:, None])
            worst = max(worst, float(xp.nan_to_num(steps, nan=math.inf, posinf=math.inf).max()))
    shape = (*a.weight.shape[:-1], a.weight.shape[-1] * 2)
    where = tuple(int(i) for i in np.unravel_index(first, shape)) if first >= 0 else None
    return Agreement(sound and outside == 0, elements, outside, where, worst)
