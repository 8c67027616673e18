"""Carries out one command line, and turns whatever happens into a message and an exit code."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
from typing import TextIO, cast

import click

from tierewrite import interrupts
from tierewrite.cli.commands import cli
from tierewrite.cli.terminal import Door, print_json
from tierewrite.errors import (
    EXIT_OK,
    EXIT_USAGE,
    Interrupted,
    TierewriteError,
    Undelivered,
    UsageError,
    to_tierewrite_error,
)
from tierewrite.spelling import of_a_command

ERROR_SCHEMA = "tierewrite/error/1"


def run(arguments: list[str]) -> int:
    """See `tierewrite.cli.run`."""
    as_json = "--json" in arguments
    out, err = Door(sys.stdout, must_arrive=True), Door(sys.stderr)
    redirected = contextlib.redirect_stdout(cast(TextIO, out)), contextlib.redirect_stderr(cast(TextIO, err))
    with redirected[0], redirected[1], of_a_command():
        try:
            code = _carried_out(arguments, as_json)
            try:
                out.flush()
            except Undelivered as error:
                code = code or _failed(error, False)
            return code
        finally:
            err.flush()


def _carried_out(arguments: list[str], as_json: bool) -> int:
    try:
        code = cli.main(args=arguments, prog_name="tierewrite", standalone_mode=False)
        if not code:  # a batch that was stopped has said so
            interrupts.check()
        return code if isinstance(code, int) else EXIT_OK
    except click.ClickException as error:
        error.show()
        _print_error(UsageError(error.format_message()), as_json)
        return EXIT_USAGE
    except Interrupted as stopped:
        return _failed(stopped, as_json)
    except BaseException as error:
        stopped_by = interrupts.pending()
        if stopped_by is not None:  # whoever swallowed the signal made another error of it
            return _failed(stopped_by, as_json)
        if isinstance(error, (click.Abort, KeyboardInterrupt)):
            return _failed(Interrupted(signal.SIGINT), as_json)
        if isinstance(error, SystemExit) and isinstance(error.__context__, OSError):
            error = error.__context__  # click takes every EPIPE for one of standard output, which a Door has seen to
        if not isinstance(error, TierewriteError):
            logging.getLogger(__name__).debug("internal error", exc_info=True)
        return _failed(to_tierewrite_error(error), as_json)


def _failed(error: TierewriteError | Interrupted, as_json: bool) -> int:
    if not (isinstance(error, Undelivered) and error.reader_gone):  # who has gone away knows
        print(f"tierewrite: {error}", file=sys.stderr)
    _print_error(error, as_json)
    return error.exit_code


def _print_error(error: TierewriteError | Interrupted, as_json: bool) -> None:
    """The error's own exit code stands, whether or not its JSON arrives.

    One object is printed: behind a result that was begun (a signal came late) the error's would make both unreadable.
    """
    if as_json and not (isinstance(sys.stdout, Door) and sys.stdout.object_begun):
        with contextlib.suppress(Undelivered):
            print_json({"schema": ERROR_SCHEMA, "error": error.to_json()})
            sys.stdout.flush()
