"""float32 arithmetic that gives the same bits on both devices, NumPy's and CuPy's, denormals included."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import numpy as np

Array = Any
"""A numpy.ndarray or a cupy.ndarray."""

NO_SIGN = np.uint32(0x7FFFFFFF)
"""Mask of a float32's bits without its sign."""
INFINITY = np.uint32(0x7F800000)
"""The bits of float32 infinity."""

# CuPy compiles its kernels with -ftz=true, which reads and writes denormal float32 as zero; ModelOpt does not. So
# the two operations that can meet a denormal are PTX here, and comparisons are made on the bits, which order
# non-negative floats as the floats themselves (a NaN above infinity).
_PTX = {operation: f'asm("{operation}.rn.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y))' for operation in ("mul", "div")}
_kernels: dict[str, Any] = {}


def _arithmetic(operation: str, left: Array, right: Array | np.float32) -> Array:
    xp = array_module(left)
    if xp is np:
        return np.multiply(left, right) if operation == "mul" else np.divide(left, right)
    if operation not in _kernels:
        _kernels[operation] = xp.ElementwiseKernel(
            "float32 x, float32 y", "float32 z", _PTX[operation], f"tierewrite_{operation}"
        )
    return _kernels[operation](left, right)


def multiply(left: Array, right: Array | np.float32) -> Array:
    """float32 product with denormals, on either device."""
    return _arithmetic("mul", left, right)


def divide(left: Array, right: Array | np.float32) -> Array:
    """float32 quotient, correctly rounded and with denormals, on either device."""
    return _arithmetic("div", left, right)


def float32_bits(values: Array) -> Array:
    """The float32 bits of an array, uint32 of the same shape."""
    return array_module(values).ascontiguousarray(values).view(np.uint32).reshape(values.shape)


def array_module(array: Array) -> Any:
    """The array's own module: cupy for a cupy array, numpy for all else.  Never imports cupy itself."""
    if type(array).__module__.partition(".")[0] == "cupy":
        return sys.modules["cupy"]
    return np


def device_arrays(device: str) -> Any:
    """The module whose arrays are on the wanted device: cupy, or numpy.

    Args:
        device: "cpu"; "cuda": cupy, or ImportError where there is none; "auto": cupy where it is and has a device.
    """
    if device == "cpu":
        return np
    try:
        import cupy

        if cupy.cuda.runtime.getDeviceCount() > 0:
            return cupy
    except Exception:  # no CuPy, no driver, no device: CuPy has an error of its own for each
        if device == "cuda":
            raise
    return np


def host_buffer(xp: Any, nbytes: int) -> np.ndarray:
    """uint8 [nbytes] on the host, from which arrays of the module are quickly made: for cupy it is pinned memory."""
    if xp is np:
        return np.empty(nbytes, np.uint8)
    return np.frombuffer(xp.cuda.alloc_pinned_memory(nbytes), np.uint8, nbytes)


def quiet(xp: Any) -> contextlib.AbstractContextManager[Any]:
    """A context in which dividing by zero warns of nothing, on either device."""
    # 0/0 and x/0 are part of ModelOpt's arithmetic here; NumPy would warn, CuPy never does.
    return np.errstate(all="ignore") if xp is np else contextlib.nullcontext()
