"""The process of a command: its signals and its standard streams, before anything heavy is imported."""

from __future__ import annotations

import contextlib
import gc
import os

from tierewrite import interrupts
from tierewrite.errors import Interrupted

_ALLOCATIONS = 100_000
"""Containers between two looks of the cyclic collector: with Python's 700 it scans what is made of a large checkpoint's
tensors again and again, which takes a quarter of the time."""


def exit_code(arguments: list[str]) -> int:
    """Carries out a command line as the only thing that this process does."""
    try:
        interrupts.install()
        gc.set_threshold(_ALLOCATIONS, 20, 100)
        _occupy_standard_files()
        from tierewrite.cli.running import run

        code = run(arguments)
        interrupts.end()
        # What torch and transformers made goes with the process: a last search for garbage takes half a second.
        gc.freeze()
    except Interrupted as stopped:  # while modules were imported, or a message was printed
        interrupts.end()
        with contextlib.suppress(OSError):
            os.write(2, f"tierewrite: {stopped}\n".encode())
        return stopped.exit_code
    return code


def _occupy_standard_files() -> None:
    """Where standard input, output or error is closed, no file of ours may take its number: libraries print there."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
