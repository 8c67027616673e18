"""The process of a command: its signals and its standard streams, before anything heavy is imported."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import sys

from tierewrite import interrupts
from tierewrite.errors import Interrupted

_ALLOCATIONS = 100_000
"""Containers between two looks of the cyclic collector: with Python's 700 it scans what is made of a large checkpoint's
tensors again and again, which takes a quarter of the time."""


def exit_code(arguments: list[str]) -> int:
    """Carries out a command line as the only thing that this process does.

    Once it is over the process may only end: it does so with this code, after what libraries want done at the end.
    """
    code: list[int] = []
    # What is registered first is called last: after what the libraries register that a command imports.
    atexit.register(_end_at_once, code)
    try:
        interrupts.install()
        gc.set_threshold(_ALLOCATIONS, 20, 100)
        _occupy_standard_files()
        from tierewrite.cli.running import run

        code.append(run(arguments))
        interrupts.end()
    except Interrupted as stopped:  # while modules were imported, or a message was printed
        interrupts.end()
        with contextlib.suppress(OSError):
            os.write(2, f"tierewrite: {stopped}\n".encode())
        code[:] = [stopped.exit_code]
    return code[0]


def _end_at_once(code: list[int]) -> None:
    """The process ends here, if the command has: to take apart what torch and transformers made takes 0.2 s more.

    Its memory goes with the process; the command has closed its files.
    """
    if code:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # closed, or nobody reads it; the command has said so
                stream.flush()
        os._exit(code[0])


def _occupy_standard_files() -> None:
    """Where standard input, output or error is closed, no file of ours may take its number: libraries print there."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
