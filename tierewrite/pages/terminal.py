"""The same facts on a terminal: key figures, and how much each projection's scales differed."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tierewrite.errors import shown
from tierewrite.pages.charts import key_figures
from tierewrite.pages.facts import Facts
from tierewrite.pages.style import times
from tierewrite.tables import of_which

_ROWS_SHOWN = 40
_KEPT_SHOWN = 10


_ASCII = str.maketrans({"×": "x", "−": "-", "–": "-", "∞": "inf"})


def _plain(text: str) -> str:
    """In characters that every terminal's encoding has."""
    return text.translate(_ASCII)


def show(console: Console, facts: Facts, worst: int) -> None:
    """Prints the facts."""
    figures = Table(box=None, pad_edge=False, show_header=False)
    for name, value, remark in key_figures(facts):
        figures.add_row(name, Text(_plain(value), style="bold", justify="right"), Text(_plain(remark), style="dim"))
    console.print(figures)
    if facts.scales:
        table = Table("projection", box=None, pad_edge=False, header_style="bold")
        for name in ("scales", "median", "p90", "max", "one side only", "never calibrated"):
            table.add_column(name, justify="right")
        for d in facts.divergence[:_ROWS_SHOWN]:
            table.add_row(
                Text(shown(d.projection)),
                f"{len(d.scales):,}",
                _plain(times(d.median)),
                _plain(times(d.p90)),
                _plain(times(d.max)),
                f"{d.one_sided:,}",
                f"{d.never:,}",
            )
        console.print(table)
        if len(facts.divergence) > _ROWS_SHOWN:
            console.print(f"... and {len(facts.divergence) - _ROWS_SHOWN} more projections (all of them with --json)")
    found = facts.worst(worst)
    if found:
        console.print(Text("Largest differences:", style="bold"))
        for scale in found:
            console.print(Text(f"  {_plain(times(scale.ratio)):>8}  {shown(scale.name)}"))
    for group in facts.kept[:_KEPT_SHOWN]:
        said = of_which(shown(group.canonical), (group.canonical,), shown(group.reason))
        console.print(Text(f"kept: {said}", style="yellow"))
    if len(facts.kept) > _KEPT_SHOWN:
        console.print(f"... and {len(facts.kept) - _KEPT_SHOWN} more groups were kept (all of them with --json)")
    for report in facts.consumers:
        for finding in report.findings[:_ROWS_SHOWN]:
            console.print(Text(str(finding), style="red" if finding.severity == "error" else "yellow"))
        if not report.findings:
            who = shown(report.consumer)
            console.print(Text(f"Nothing found that {who} would stumble over.", style="green"))
