"""The command line: `run` parses, carries a command out, and turns whatever happens into a message and an exit code."""

from __future__ import annotations

import logging
import os
import signal
import sys
from types import FrameType

import click

from tierewrite.cli.commands import cli
from tierewrite.cli.terminal import print_json
from tierewrite.errors import (
    EXIT_OK,
    EXIT_SYSTEM,
    EXIT_USAGE,
    Interrupted,
    TierewriteError,
    UsageError,
    to_tierewrite_error,
)

__all__ = ["cli", "main", "run"]

ERROR_SCHEMA = "tierewrite/error/1"


def _stop(signum: int, frame: FrameType | None) -> None:
    """Raises in the main thread, once: the clean-up that follows is not to be interrupted."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Interrupted(signum)


def _failed(error: TierewriteError, as_json: bool) -> int:
    print(f"tierewrite: {error}", file=sys.stderr)
    if as_json:
        print_json({"schema": ERROR_SCHEMA, "error": error.to_json()})
    return error.exit_code


def run(arguments: list[str]) -> int:
    """Runs the command line and returns its exit code. Only messages reach the user, never a traceback."""
    as_json = "--json" in arguments
    try:
        code = cli.main(args=arguments, prog_name="tierewrite", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else EXIT_OK
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        error.show()
        if as_json:
            usage = UsageError(error.format_message())
            print_json({"schema": ERROR_SCHEMA, "error": usage.to_json()})
        return EXIT_USAGE
    except (click.Abort, KeyboardInterrupt):
        return _failed(Interrupted(signal.SIGINT), as_json)
    except BrokenPipeError:
        # The reader of the output has gone: there is no place for a message.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_SYSTEM
    except Exception as error:
        if not isinstance(error, TierewriteError):
            logging.getLogger(__name__).debug("internal error", exc_info=True)
        return _failed(to_tierewrite_error(error), as_json)


def main() -> None:
    """Entry point of the `tierewrite` command."""
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    try:
        code = run(sys.argv[1:])
    except Interrupted as stopped:  # while the message of an error was printed
        code = stopped.exit_code
    sys.exit(code)
