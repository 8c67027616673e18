"""Which of two digesters is the faster one here: tried in turn on the work itself, by the bytes that it moves.

A GPU hashes many times faster than CPUs, but its bytes have to get there: with sixteen cores, a fast page cache or a
slow bus it may be the slower way. No table of devices knows that; half a second of each does. And it has to be prepared
(CuPy imported, kernels loaded), which pays only where the CPU would be busy for longer than that.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from tierewrite.digest import Digester

SETTLES = 0.2
"""Seconds in which a digester that takes over fills its buffers, and what was begun before it is finished."""
LASTS = 0.3
"""Seconds that are measured of each digester."""
PAYS = 3.0
"""Seconds of work that the CPU must have before it for a GPU to be prepared: preparing and trying one takes 1 to 2."""
_WORTH = 0.9
"""The GPU stays unless it moves less than this share of what the CPU moves: it leaves the CPU to others."""


@dataclass
class _Tried:
    """How long a digester has been at work, and what it moved once it had settled."""

    seconds: float = 0.0
    counted: float = 0.0
    nbytes: int = 0

    @property
    def enough(self) -> bool:
        return self.counted >= LASTS

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.nbytes / self.counted


class Trial:
    """Says which of the two hashes the next task: the CPU first; the GPU where much is left; then the faster one.

    Args:
        cpu: hashes from the beginning.
        gpu: begins to prepare the other one when it is first called; gives it once it is ready, until then None. Its
            errors pass. It may be the CPU again.
        clock: seconds.
    """

    def __init__(
        self, cpu: Digester, gpu: Callable[[], Digester | None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._cpu = cpu
        self._ready = gpu
        self._gpu: Digester | None = None
        self._clock = clock
        self._lock = threading.Lock()
        self._tried = {False: _Tried(), True: _Tried()}  # by whether it is the GPU
        self._on_gpu = False
        self._left = 0
        self._pays = False  # to prepare a GPU, as was found once
        self._last = clock()
        self.chosen: Digester | None = None

    def begin(self, nbytes: int) -> None:
        """A pass of `nbytes` bytes begins; a pause before it does not count."""
        with self._lock:
            self._left, self._last = nbytes, self._clock()

    def moved(self, nbytes: int) -> None:
        """`nbytes` more bytes were read, and hashed or written."""
        with self._lock:
            tried, now = self._tried[self._on_gpu], self._clock()
            passed, self._last = now - self._last, now
            self._left -= nbytes
            tried.seconds += passed
            if tried.seconds > SETTLES:
                tried.counted += passed
                tried.nbytes += nbytes

    def next(self) -> Digester:
        """Who hashes the next task. Raises what `gpu` raises."""
        if self.chosen is not None:
            return self.chosen
        with self._lock:
            cpu, gpu = self._tried[False], self._tried[True]
            self._pays = self._pays or (cpu.enough and self._left > PAYS * cpu.rate)
            if self._gpu is None and self._pays:
                self._gpu = self._ready()
            if self._gpu is None:
                return self._cpu
            if self._gpu.device == "cpu":
                self.chosen = self._gpu
            elif gpu.enough:
                self.chosen = self._cpu if gpu.rate < _WORTH * cpu.rate else self._gpu
            now = self.chosen or self._gpu
            self._on_gpu = now.device != "cpu"
            return now
