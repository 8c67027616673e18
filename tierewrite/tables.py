"""Results as people see them: one line in an interpreter, a table where it is printed, the same in a notebook."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from tierewrite.errors import shown
from tierewrite.spelling import spelled
from tierewrite.units import percent, size

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table
    from rich.text import Text

_SHOWN = 10
_REPR = 180
_NAME = 24
"""A name of so many letters leaves room for six numbers in 80 columns."""
_WIDTH = 200
"""Columns where nobody's terminal says how wide it is: lines are not cut for scripts."""


class Summary:
    """A result that people look at. A subclass says what it is in `one_line` and in `lines`."""

    __slots__ = ()

    def one_line(self) -> str:
        """What matters most, for `repr`."""
        raise NotImplementedError

    def lines(self) -> Iterator[RenderableType]:
        """What `print` and the command line show: texts and tables of rich."""
        raise NotImplementedError

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        return self.lines()

    def __repr__(self) -> str:
        return repr_of(self, self.one_line())

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=_WIDTH, highlight=False, color_system=None, soft_wrap=True).print(self)
        return "\n".join(spelled(line.rstrip()) for line in text.getvalue().splitlines())

    def _repr_html_(self) -> str:
        """For notebooks."""
        from rich.console import Console

        console = Console(file=io.StringIO(), record=True, width=_WIDTH, highlight=False, soft_wrap=True)
        console.print(self)
        return spelled(console.export_html(inline_styles=True, code_format="<pre>{code}</pre>"))


def repr_of(result: object, line: str) -> str:
    """What an interpreter shows of `result`: its type and what matters most of it, cut to one line."""
    return f"<{type(result).__name__}: {line if len(line) <= _REPR else line[: _REPR - 3] + '...'}>"


def text(line: str, style: str = "") -> Text:
    """A line; nothing in it is taken for markup."""
    from rich.text import Text

    return Text(line, style=style)


def table(*columns: str, left: int = 1) -> Table:
    """An empty table without lines, of which the first `left` columns are texts and the others numbers.

    Where the terminal is too narrow a name goes on in the next line: it is never cut.
    """
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(columns):
        made.add_column(name, justify="left" if number < left else "right", overflow="fold")
    return made


def tied_parameters(kinds: Iterable[str], *columns: str) -> Table:
    """An empty table of these kinds of tied parameters, with numbers in `columns`; these give way to the names."""
    made = table("tied parameters", *columns)
    made.columns[0].no_wrap = max(map(len, kinds), default=0) <= _NAME
    return made


def sizes(before: tuple[int, int, int], after: tuple[int, int, int]) -> Table:
    """Bytes, tensors and shards, before and after; what is in memory has no shards."""
    in_files = bool(before[2] or after[2])
    made = table("", "tensor bytes", "tensors", *(["shards"] if in_files else []))
    for name, (nbytes, tensors, shards) in (("before", before), ("after", after)):
        made.add_row(name, size(nbytes), f"{tensors:,}", *([f"{shards:,}"] if in_files else []))
    made.add_row("", percent(before[0], after[0]), percent(before[1], after[1]))
    return made


def change(before: int, after: int) -> str:
    """ "245.54 KiB -> 186.75 KiB (-23.9%)"."""
    return f"{size(before)} -> {size(after)} ({percent(before, after)})"


def count(number: int, noun: str, nouns: str = "") -> str:
    """ "1 error", "2 errors"; `nouns` where a plural takes more than an s."""
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"


def seconds(duration: float) -> str:
    """ "1.2 s", "3 min"."""
    return f"{duration:.1f} s" if duration < 120 else f"{duration / 60:,.0f} min"


def some(names: Sequence[str], most: int = 3) -> str:
    """The first few of `names`, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return f"{', '.join(shown(name) for name in names[:most])}{more}"


_DECLARERS = {
    "class": "the model class",
    "config": "config.json",
    "ties-file": "the ties file",
    "mapping": "the mapping that was given",
    "none": "nobody: the model declares no ties",
}


def declarer(source: str) -> str:
    """Who declared the ties, from the `source` of JSON's `ties`."""
    return _DECLARERS.get(source, source)


def ties_lines(source: str, detail: str, unpaired: Sequence[str]) -> Iterator[Text]:
    """Who declared the ties, and what is declared without a partner."""
    yield text(f"Ties declared by {declarer(source)}{f' ({shown(detail)})' if detail else ''}.")
    for alias in unpaired:
        yield text(f"'{shown(alias)}' is declared tied, but nothing says to what: it is kept.", "yellow")


def warning_lines(warnings: Sequence[str]) -> Iterator[Text]:
    """The first warnings, and how many more there are."""
    for warning in warnings[:_SHOWN]:
        yield text(f"warning: {warning}", "yellow")
    if len(warnings) > _SHOWN:
        yield text(f"... and {count(len(warnings) - _SHOWN, 'more warning')} (all of them with --json)", "yellow")


def of_which(lead: str, names: Iterable[str], reason: str) -> str:
    """`reason` behind the `names` that it is about, written as `lead`; alone where it names all of them itself."""
    return reason if all(f"'{shown(name)}'" in reason for name in names) else f"{lead}: {reason}"


def kept_lines(reasons: Sequence[tuple[str, str | None]], what: str) -> Iterator[Text]:
    """The groups that stay whole, by their canonical name, each with its reason.

    Args:
        what: what is said of all of them: "not confirmed by the headers".
    """
    if reasons:
        yield text(f"{count(len(reasons), 'group')} {what}:", "yellow")
        for name, reason in reasons[:_SHOWN]:
            yield text(f"  {of_which(shown(name), (name,), reason or '')}", "yellow")
        if len(reasons) > _SHOWN:
            yield text(f"  ... and {len(reasons) - _SHOWN} more (all of them with --json)", "yellow")
