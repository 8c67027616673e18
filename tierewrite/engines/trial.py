"""Which of two digesters is the faster one here: tried in turn on the work itself, by the bytes that it moves.

A GPU hashes many times faster than CPUs, but its bytes have to get there: with sixteen cores, a fast page cache or a
slow bus it may be the slower way. No table of devices knows that; half a second of each does.
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
    """Says which of the two hashes the next task: the CPU until the GPU is there, then each until enough is known.

    Args:
        cpu: hashes from the beginning.
        gpu: the other one once it is ready, until then None; its errors pass. May be the CPU again.
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
        self._last = clock()
        self.chosen: Digester | None = None

    def begin(self) -> None:
        """Work begins, or goes on after a pause that does not count."""
        with self._lock:
            self._last = self._clock()

    def moved(self, nbytes: int) -> None:
        """`nbytes` more bytes were read, and hashed or written."""
        with self._lock:
            tried, now = self._tried[self._on_gpu], self._clock()
            passed, self._last = now - self._last, now
            tried.seconds += passed
            if tried.seconds > SETTLES:
                tried.counted += passed
                tried.nbytes += nbytes

    def next(self) -> Digester:
        """Who hashes the next task. Raises what `gpu` raises."""
        if self.chosen is not None:
            return self.chosen
        if self._gpu is None:
            self._gpu = self._ready()
        with self._lock:
            cpu, gpu = self._tried[False], self._tried[True]
            if self._gpu is None or self._gpu.device == "cpu":
                self.chosen = self._gpu
                return self._cpu
            if cpu.enough and gpu.enough:
                self.chosen = self._cpu if gpu.rate < _WORTH * cpu.rate else self._gpu
                return self.chosen
            self._on_gpu = not gpu.enough
            return self._gpu if self._on_gpu else self._cpu
