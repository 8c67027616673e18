"""What became of every checkpoint of a batch, as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tierewrite.batches.results import BatchReport, BatchResult
from tierewrite.errors import shown
from tierewrite.tables import seconds, table, text
from tierewrite.units import percent, size

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text


def batch_lines(report: BatchReport) -> Iterator[RenderableType]:
    """What `tierewrite batch` shows."""
    folder = _common_folder([result.src for result in report.results])
    last = ("saved", "unconfirmed") if report.plan_only else ("kept", "scales (median, max)", "time")
    made = table("checkpoint", "", "before", "after", "", *last, left=2)
    made.columns[0].overflow, made.columns[0].min_width = "fold", 16
    for column in made.columns[1:]:
        column.no_wrap = True
    for result in report.results:
        made.add_row(*_cells(result, folder, report.plan_only))
    if folder:
        yield text(f"In {shown(folder)}:")
    yield made
    for result in report.results:
        if result.skipped is not None:
            yield text(f"{shown(result.src)}: {result.one_line()}")
        elif result.error is not None:
            named = result.reason.startswith(shown(result.src))
            yield text(result.reason if named else f"{shown(result.src)}: {result.reason}", "red")
        elif result.consumer_errors:
            yield text(f"{shown(result.src)}: {result.left_errors}", "red")
    if any(result.status == "refused" for result in report.results):
        keep = "A refused tie stays on every side with --on-mismatch keep"
        yield text(f"{keep}; `tierewrite rewrite` says what each may mean.")
    yield text(report.one_line(), "red" if report.failed else "green")


def _cells(result: BatchResult, folder: str, plan_only: bool) -> list[Text]:
    """A checkpoint's row."""
    style = "" if result.skipped else ("yellow" if result.kept else "green") if result.ok else "red"
    cells = [text(shown(result.src[len(folder) :])), text(result.status, style)]
    if result.before_bytes is not None and result.after_bytes is not None:
        change = percent(result.before_bytes, result.after_bytes)
        cells += map(text, (size(result.before_bytes), size(result.after_bytes), change))
    else:
        cells += [text("")] * 3
    kept = text(f"{result.kept:,}" if result.kept else "")
    if plan_only:
        return [*cells, text(size(result.saved_bytes) if result.ok else ""), kept]
    ratios = f" ({result.median_ratio:.2f}x, {result.max_ratio:.2f}x)" if result.max_ratio is not None else ""
    scales = f"{result.merged_scales:,}{ratios}" if result.merged_scales else ""
    return [*cells, kept, text(scales), text(seconds(result.seconds))]


def _common_folder(places: Sequence[str]) -> str:
    """What all of them begin with, up to a slash, so that a table need not say it in every row."""
    first, last = min(places), max(places)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[: first.rfind("/", 0, same) + 1]
