"""The command line. This module imports next to nothing: until `main` runs, a signal meets Python's own handlers."""

from __future__ import annotations

import sys

__all__ = ["main", "run"]


def run(arguments: list[str]) -> int:
    """Runs the command line and returns its exit code. Only messages reach the user, never a traceback."""
    from tierewrite.cli.running import run as carry_out

    return carry_out(arguments)


def main() -> None:
    """Entry point of the `tierewrite` command."""
    try:
        from tierewrite.cli.process import exit_code

        code = exit_code(sys.argv[1:])
    except KeyboardInterrupt:  # before the handlers were there
        code = 130
    sys.exit(code)
