"""Putting a copy to a GPU in line, by the CUDA driver itself, without letting go of the interpreter's lock.

CuPy lets go of the lock while `memcpyAsync` runs, which takes microseconds; where eight threads read files meanwhile,
getting it back takes longer (tests/benchmarks/README.md: 38 and 43 GB/s).

Source of names and arguments: CUDA driver API, "Context Management" and "Memory Management".
"""

from __future__ import annotations

import ctypes


class Copies:
    """Copies to the device that is current where this is made.

    Raises:
        OSError: there is no CUDA driver. RuntimeError: it refuses.
    """

    def __init__(self) -> None:
        driver = ctypes.PyDLL("libcuda.so.1")  # a PyDLL's functions keep the lock
        pointer = ctypes.c_void_p
        self._push = driver.cuCtxPushCurrent_v2
        self._push.argtypes = [pointer]
        self._pop = driver.cuCtxPopCurrent_v2
        self._pop.argtypes = [ctypes.POINTER(pointer)]
        self._copy = driver.cuMemcpyHtoDAsync_v2
        self._copy.argtypes = [ctypes.c_uint64, pointer, ctypes.c_size_t, pointer]
        self._text = driver.cuGetErrorString
        self._text.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
        self._context = pointer()
        self._check(driver.cuCtxGetCurrent(ctypes.byref(self._context)))

    def put(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Puts a copy in line, from any thread; returns at once.

        Args:
            target: a device address. source: an address in pinned host memory. stream: a handle.
        """
        self._check(self._push(self._context))  # a call is carried out in the thread's current context
        try:
            self._check(self._copy(target, source, nbytes, stream))
        finally:
            self._pop(ctypes.byref(ctypes.c_void_p()))

    def _check(self, result: int) -> None:
        if result:
            text = ctypes.c_char_p()
            self._text(result, ctypes.byref(text))
            raise RuntimeError(f"CUDA error {result}: {(text.value or b'unknown').decode()}")
