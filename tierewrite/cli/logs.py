"""What `--verbose` shows: our own log on standard error, and warnings of libraries only where they were asked for."""

from __future__ import annotations

import logging

import click

from tierewrite.cli.terminal import LogHandler

_TIMES = "tierewrite.verbose"


def say_more(ctx: click.Context, times: int) -> None:
    """Sets how much is logged: `times` counts further -v of a command line, before or after the command."""
    total = ctx.meta[_TIMES] = ctx.meta.get(_TIMES, 0) + times
    root = logging.getLogger()
    ours = [handler for handler in root.handlers if isinstance(handler, LogHandler)]
    if not ours:
        ours = [LogHandler()]
        ours[0].setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        logging.basicConfig(handlers=ours)
    # What libraries log of a failure, tracebacks and all, our error says in a line.
    ours[0].only_ours = total == 0
    # Not the root: the libraries that talk to stores log requests with their signatures.
    level = {0: logging.WARNING, 1: logging.INFO}.get(total, logging.DEBUG)
    logging.getLogger("tierewrite").setLevel(level)
