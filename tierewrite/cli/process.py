"""The process of a command: its signals and its standard streams, before anything heavy is imported."""

from __future__ import annotations

import contextlib
import os

from tierewrite import interrupts
from tierewrite.errors import Interrupted


def exit_code(arguments: list[str]) -> int:
    """Carries out a command line as the only thing that this process does."""
    try:
        interrupts.install()
        _occupy_standard_files()
        from tierewrite.cli.running import run

        code = run(arguments)
        interrupts.end()
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
