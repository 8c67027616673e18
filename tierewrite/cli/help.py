"""How `--help` looks: options in groups, lines as wide as the terminal, headings in bold where colours are shown."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from typing import Any

import click

from tierewrite.cli.terminal import Door

CONTEXT: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 1000}
"""For every command: click writes lines of the terminal's width, or of this many columns if that is less."""

_HEADING = re.compile(r"^(\S[^\n]*:)(?=\n|$)|^(Usage:)", re.MULTILINE)


class GroupedOption(click.Option):
    """An option that is listed below a heading of its own."""

    def __init__(self, *args: Any, heading: str = "Options", **rest: Any) -> None:
        super().__init__(*args, **rest)
        self.heading = heading


class DescribedArgument(click.Argument):
    """An argument that `--help` explains, as it does options."""

    heading = "Arguments"

    def __init__(self, *args: Any, said: str, **rest: Any) -> None:
        super().__init__(*args, **rest)
        self.said = said

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        """Its name, without the brackets of one that may be left out, and what it is."""
        return (self.metavar or (self.name or "").upper()).strip("[]"), self.said


def argument(name: str, said: str, **rest: Any) -> Callable[[Any], Any]:
    """`click.argument`, of which `--help` says what it is."""
    return click.argument(name, cls=DescribedArgument, said=said, **rest)


def option(*names: str, heading: str = "Options", **rest: Any) -> Callable[[Any], Any]:
    """`click.option`, listed below `heading`."""
    return click.option(*names, cls=GroupedOption, heading=heading, **rest)


class HelpfulCommand(click.Command):
    """A command whose help lists its options in groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options below their headings, in the order in which each heading comes first; "Options" comes last."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                sections.setdefault(getattr(parameter, "heading", "Options"), []).append(record)
        for heading in sorted(sections, key=lambda name: name == "Options"):
            with formatter.section(heading):
                formatter.write_dl(sections[heading])

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        """click's own, which prints what `show` makes of the text."""
        found = super().get_help_option(ctx)
        if found is not None:
            found.callback = _show
        return found


class HelpfulGroup(HelpfulCommand, click.Group):
    """Commands, all of which are helpful."""

    command_class = HelpfulCommand

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options, then the commands."""
        HelpfulCommand.format_options(self, ctx, formatter)
        self.format_commands(ctx, formatter)


def _show(ctx: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    """Prints the help and ends. Our own text holds nothing of strangers, so its colours may pass the door."""
    if not wanted or ctx.resilient_parsing:
        return
    text = ctx.get_help() + "\n"
    if isinstance(sys.stdout, Door) and sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        sys.stdout.pass_on(_HEADING.sub(lambda found: click.style(found[0], bold=True), text))
    else:
        sys.stdout.write(text)
    ctx.exit()
