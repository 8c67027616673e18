"""How many threads are worth starting here."""

from __future__ import annotations

import os


def usable_cpus() -> int:
    """The CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def io_threads() -> int:
    """Workers enough to overlap reading, hashing and writing on this machine: 2 to 8."""
    return max(2, min(8, usable_cpus()))
