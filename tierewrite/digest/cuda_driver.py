"""Putting a copy to a GPU in line, by the CUDA driver itself, without letting go of the interpreter's lock.

CuPy lets go of the lock around `memcpyAsync`, which takes microseconds; where eight threads read files meanwhile,
getting it back takes longer (tests/benchmarks/README.md).

Source of names and arguments: CUDA driver API, "Primary Context Management", "Context Management" and "Memory
Management"; a device's primary context is the one that CuPy works in ("Interoperability between Runtime and Driver
APIs").
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable


class Copies:
    """Copies to one device.

    Args:
        device: its number, CuPy's.

    Raises:
        OSError: there is no CUDA driver. RuntimeError: it refuses.
    """

    def __init__(self, device: int) -> None:
        library = ctypes.PyDLL("libcuda.so.1")  # a PyDLL's functions keep the lock
        pointer, out = ctypes.c_void_p, ctypes.POINTER

        def function(name: str, *arguments: type) -> Callable[..., int]:
            found = getattr(library, name)
            found.argtypes = arguments
            return found  # type: ignore[no-any-return]

        self._text = function("cuGetErrorString", ctypes.c_int, out(ctypes.c_char_p))
        self._push = function("cuCtxPushCurrent_v2", pointer)
        self._pop = function("cuCtxPopCurrent_v2", out(pointer))
        self._copy = function("cuMemcpyHtoDAsync_v2", ctypes.c_uint64, pointer, ctypes.c_size_t, pointer)
        self._context, self._popped, handle = pointer(), pointer(), ctypes.c_int()
        self._check(function("cuDeviceGet", out(ctypes.c_int), ctypes.c_int)(handle, device))
        self._check(function("cuDevicePrimaryCtxRetain", out(pointer), ctypes.c_int)(self._context, handle))

    def put(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Puts a copy in line, from any thread; returns at once.

        Args:
            target: a device address. source: an address in pinned host memory. stream: a handle.

        Raises:
            RuntimeError: the driver refuses, or an earlier work on the device failed.
        """
        self._check(self._push(self._context))  # a call is carried out in the thread's current context
        try:
            self._check(self._copy(target, source, nbytes, stream))
        finally:
            self._pop(self._popped)

    def _check(self, result: int) -> None:
        if result:
            text = ctypes.c_char_p()
            self._text(result, text)
            raise RuntimeError(f"CUDA error {result}: {(text.value or b'it has no text').decode()}")
