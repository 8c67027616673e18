"""Tables for people on a terminal. Everything shown is a view of a report; nothing is decided here."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tierewrite.errors import shown
from tierewrite.units import percent, size

if TYPE_CHECKING:
    from tierewrite.batches.results import BatchReport, BatchResult
    from tierewrite.inspection import Inspection
    from tierewrite.planning.plan import GroupPlan, RewritePlan
    from tierewrite.proof.verify import Verification
    from tierewrite.report import Readiness, Report

_WARNINGS_SHOWN = 10
_NOTHING = "Nothing to do: every tied tensor is stored once, under its canonical name."


def show_plan(console: Console, plan: RewritePlan) -> None:
    """The summary of a plan."""
    tensors = plan.total_tensors
    console.print(
        _sizes(plan.source_bytes, len(plan.tensors), plan.source_shards, plan.total_bytes, tensors, len(plan.shards))
    )
    _say_ties(console, plan.ties_source, plan.ties_detail, plan.unpaired)
    table = Table("tied parameters", title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name in ("groups", "unconfirmed", "tensors dropped", "bytes dropped"):
        table.add_column(name, justify="right")
    worth_a_row, folded = _folded(plan.groups)
    for kind, rows in worth_a_row.items():
        table.add_row(
            Text(shown(kind)),
            str(len(rows)),
            str(sum(g.status == "unconfirmed" for g in rows)),
            f"{sum(g.dropped for g in rows):,}",
            size(sum(g.dropped_bytes for g in rows)),
        )
    if worth_a_row:
        console.print(table)
    _say_folded(console, folded)
    _say_dropped(console, plan.groups)
    _say_kept(console, plan.unconfirmed(), "not confirmed" if plan.confirmed else "not confirmed by the headers")
    _say_differing(console, plan.planned())
    _say_warnings(console, plan.warnings)
    if not plan.changes_anything():
        console.print(_NOTHING, style="green")
    elif plan.confirmed:
        console.print("Confirmed: the tied tensors were hashed, and a rewrite will do exactly this.", style="green")
    else:
        console.print("From headers alone: a rewrite does this if the bytes confirm it (--confirm hashes them).")


def show_report(console: Console, report: Report) -> None:
    """The summary of a rewrite."""
    console.print(
        _sizes(
            report.before_bytes,
            report.before_tensors,
            len(report.before_shards),
            report.after_bytes,
            report.after_tensors,
            len(report.after_shards),
        )
    )
    _say_ties(console, report.ties_source, report.ties_detail, report.unpaired)
    table = Table("tied parameters", box=None, pad_edge=False, header_style="bold")
    for name in ("groups", "kept", "tensors dropped", "bytes dropped", "scales merged", "ratio (median, max)"):
        table.add_column(name, justify="right")
    by_id = {group.group.id: group for group in report.groups}
    worth_a_row, folded = _folded([group.group for group in report.groups])
    for kind, rows in worth_a_row.items():
        reports = [by_id[g.id] for g in rows]
        merged = [scale for r in reports for scale in r.scales]
        ratios = [scale.ratio for scale in merged if scale.ratio is not None]
        table.add_row(
            Text(shown(kind)),
            str(len(rows)),
            str(sum(r.status == "kept" for r in reports)),
            f"{sum(g.dropped for g in rows):,}",
            size(sum(g.dropped_bytes for g in rows)),
            f"{len(merged):,}" if merged else "",
            f"{statistics.median(ratios):.2f}x, {max(ratios):.2f}x" if ratios else "",
        )
    if worth_a_row:
        console.print(table)
    _say_folded(console, folded)
    _say_dropped(console, [group.group for group in report.groups if group.status == "rewritten"])
    _say_kept(console, [g.group for g in report.groups if g.status == "kept"], "kept on every side")
    _say_differing(console, [g.group for g in report.groups if g.status == "rewritten"])
    never = sum(not scale.calibrated for scale in report.scales)
    if never:
        console.print(f"{never} scale{'s were' if never > 1 else ' was'} never calibrated on any side.", style="yellow")
    if report.filled:
        console.print(f"{len(report.filled)} experts' scales filled in from their layer's others.", style="yellow")
    if report.reencoded:
        largest = max(job.largest or 0.0 for job in report.reencoded)
        console.print(f"{len(report.reencoded)} NVFP4 weights re-encoded; an element moved by {largest:.3g} at most.")
    _say_warnings(console, report.warnings)
    if report.readiness is not None:
        show_readiness(console, report.readiness)
    if not report.changed_anything():
        console.print(_NOTHING, style="green")
    rate = f", {size(round(report.after_bytes / report.seconds))}/s" if report.seconds else ""
    console.print(
        Text(
            f"{shown(report.dst)} is written: {size(report.before_bytes)} -> {size(report.after_bytes)} in "
            f"{_seconds(report.seconds)}{rate}; {'verified' if report.verified else 'not verified'}; hashed on "
            f"{report.device}.",
            style="green",
        )
    )


def show_inspection(console: Console, inspection: Inspection) -> None:
    """The summary of a look at a checkpoint."""
    checkpoint = inspection.checkpoint
    console.print(
        Text(
            f"{shown(checkpoint.place)}: {len(checkpoint.tensors):,} tensors, {size(checkpoint.total_bytes)}, "
            f"formats: {', '.join(inspection.families)}"
        )
    )
    shards = Table("shard", box=None, pad_edge=False, header_style="bold")
    for name in ("tensors", "file size"):
        shards.add_column(name, justify="right")
    for shard, count in zip(checkpoint.shards, inspection.shard_counts, strict=True):
        shards.add_row(Text(shown(shard.name)), f"{count:,}", size(shard.size))
    console.print(shards)
    dtypes = Table("dtype", box=None, pad_edge=False, header_style="bold")
    for name in ("tensors", "bytes"):
        dtypes.add_column(name, justify="right")
    for dtype, (count, nbytes) in inspection.dtypes.items():
        dtypes.add_row(Text(shown(dtype)), f"{count:,}", size(nbytes))
    console.print(dtypes)
    if inspection.ties is not None and inspection.disk is not None:
        _say_ties(console, inspection.ties.source, inspection.ties.detail, inspection.ties.unpaired)
        table = Table("alias", "canonical", "declared by", box=None, pad_edge=False, header_style="bold")
        for group in inspection.disk.groups:
            for alias, origin in zip(group.aliases, group.origins, strict=True):
                table.add_row(Text(shown(alias)), Text(shown(group.canonical)), Text(shown(origin)))
        if inspection.disk.groups:
            console.print(table)
    _say_warnings(console, (*checkpoint.warnings, *(inspection.ties.warnings if inspection.ties is not None else ())))


def show_verification(console: Console, verification: Verification) -> None:
    """The outcome of a verification."""
    data = verification.to_json()
    counts = data.get("counts", {})
    if counts:
        console.print(Text(", ".join(f"{value:,} {name}" for name, value in counts.items())))
    for problem in verification.problems[:50]:
        where = shown(problem.where)
        message = problem.message.removeprefix(f"{where}: ")  # an error's own text begins with its file
        console.print(Text(f"{problem.id}: {where}: {message}", style="red"))
    if len(verification.problems) > 50:
        console.print(Text(f"... and {len(verification.problems) - 50} more (all of them with --json)", style="red"))
    if verification.ok:
        console.print("OK: DST is exactly what rewriting SRC gives.", style="green")
    else:
        console.print(f"{_count(len(verification.problems), 'problem')} found.", style="red")


def show_readiness(console: Console, report: Readiness) -> None:
    """What a consumer will do with a checkpoint."""
    for finding in report.findings:
        style = "red" if finding.severity == "error" else "yellow"
        where = ", ".join(shown(name) for name in finding.where[:3])
        more = f" and {len(finding.where) - 3} more" if len(finding.where) > 3 else ""
        console.print(Text(f"{finding.severity}: {finding.id}: {finding.found}", style=style))
        console.print(Text(f"    where: {where}{more}"))
        console.print(Text(f"    {report.consumer}: {finding.consequence}"))
        if finding.mend:
            console.print(Text(f"    fix: {finding.mend}"))
    for note in report.notes:
        console.print(Text(f"note: {note}"))
    counts = f"{_count(len(report.errors), 'error')}, {_count(len(report.warnings), 'warning')}"
    verdict = f"{report.consumer} {report.consumer_version}: {counts}"
    console.print(Text(f"{verdict} in {report.tensors:,} tensors", style="red" if report.errors else "green"))


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def show_batch(console: Console, report: BatchReport) -> None:
    """What became of every checkpoint of a batch."""
    folder = _common_folder([result.src for result in report.results])
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("checkpoint", overflow="fold", min_width=16)
    table.add_column("", no_wrap=True)
    last = ("saved", "unconfirmed") if report.plan_only else ("kept", "scales (median, max)", "time")
    for name in ("before", "after", "", *last):
        table.add_column(name, justify="right", no_wrap=True)
    for result in report.results:
        cells = [Text(shown(result.src[len(folder) :])), Text(result.status, style=_style(result))]
        if result.before_bytes is not None and result.after_bytes is not None:
            change = percent(result.before_bytes, result.after_bytes)
            cells += map(Text, (size(result.before_bytes), size(result.after_bytes), change))
        else:
            cells += [Text()] * 3
        kept = Text(f"{result.kept:,}" if result.kept else "")
        if report.plan_only:
            cells += [Text(size(result.saved_bytes) if result.ok else ""), kept]
        else:
            ratios = f" ({result.median_ratio:.2f}x, {result.max_ratio:.2f}x)" if result.max_ratio is not None else ""
            scales = f"{result.merged_scales:,}{ratios}" if result.merged_scales else ""
            cells += [kept, Text(scales), Text(_seconds(result.seconds))]
        table.add_row(*cells)
    if folder:
        console.print(Text(f"In {shown(folder)}:"))
    console.print(table)
    for result in report.results:
        if result.error is not None:
            console.print(Text(f"{shown(result.src)}: {_reason(result)}", style="red"))
        elif result.consumer_errors:
            console.print(Text(f"{shown(result.src)}: {_left_errors(result)}", style="red"))
    counts = ", ".join(f"{count} {status}" for status, count in report.counts().items() if count)
    total = f"{size(report.before_bytes)} -> {size(report.after_bytes)}"
    saved = f"{size(report.before_bytes - report.after_bytes)} {'could be ' if report.plan_only else ''}saved"
    style = "red" if report.failed else "green"
    console.print(Text(f"{counts}; {total}, {saved}; {_seconds(report.seconds)}", style=style))


def _common_folder(places: Sequence[str]) -> str:
    """What all of them begin with, up to a slash, so that a table need not say it in every row."""
    first, last = min(places), max(places)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[: first.rfind("/", 0, same) + 1]


def _style(result: BatchResult) -> str:
    if result.ok:
        return "yellow" if result.kept else "green"
    return "red"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:,.0f} min"


def _reason(result: BatchResult) -> str:
    """Why a checkpoint failed, on one line."""
    assert result.error is not None
    first, *rest = str(result.error["message"]).split("\n")
    # A line that ends with a colon says nothing without the first of what follows.
    return shown(f"{first} {rest[0].strip()}" if rest and first.endswith(":") else first)


def _left_errors(result: BatchResult) -> str:
    return f"written, with {result.consumer_errors} errors left for its consumer (tierewrite check lists them)"


def outcome(result: BatchResult) -> str:
    """How a checkpoint of a batch ended, on one line."""
    if result.error is not None:
        return f"{result.status}: {_reason(result)}"
    assert result.before_bytes is not None
    assert result.after_bytes is not None
    change = f"{size(result.before_bytes)} -> {size(result.after_bytes)}"
    line = f"{result.status}, {change} ({percent(result.before_bytes, result.after_bytes)})"
    return f"{line}; {_left_errors(result)}" if result.consumer_errors else line


def _sizes(
    before: int, before_tensors: int, before_shards: int, after: int, after_tensors: int, after_shards: int
) -> Table:
    table = Table("", box=None, pad_edge=False, header_style="bold")
    for name in ("tensor bytes", "tensors", "shards"):
        table.add_column(name, justify="right")
    table.add_row("before", size(before), f"{before_tensors:,}", str(before_shards))
    table.add_row("after", f"{size(after)}", f"{after_tensors:,}", str(after_shards))
    table.add_row("", percent(before, after), percent(before_tensors, after_tensors), "")
    return table


def _by_kind(groups: Sequence[GroupPlan]) -> dict[str, list[GroupPlan]]:
    kinds: dict[str, list[GroupPlan]] = {}
    for group in groups:
        kinds.setdefault(group.kind, []).append(group)
    return dict(sorted(kinds.items(), key=lambda item: -sum(g.dropped_bytes for g in item[1])))


def _folded(groups: Sequence[GroupPlan]) -> tuple[dict[str, list[GroupPlan]], list[GroupPlan]]:
    """The kinds of `groups` of which something is dropped or kept, for a table; and the other groups."""
    kinds = _by_kind(groups)
    worth = {kind: rows for kind, rows in kinds.items() if any(g.dropped or g.status == "unconfirmed" for g in rows)}
    return worth, [group for kind, rows in kinds.items() if kind not in worth for group in rows]


def _say_folded(console: Console, groups: Sequence[GroupPlan]) -> None:
    """One line for the ties that are stored once already, and one for those whose name changes."""
    for status, what in (("canonical", "stored once already"), ("planned", "stored once under an alias, now renamed")):
        rows = [group for group in groups if group.status == status]
        if rows:
            kinds = [*dict.fromkeys(shown(group.kind) for group in rows)]
            more = f" and {_count(len(kinds) - 3, 'other kind')}" if len(kinds) > 3 else ""
            console.print(Text(f"{_count(len(rows), 'tie')} {what}: {', '.join(kinds[:3])}{more}."))


def _say_dropped(console: Console, groups: Sequence[GroupPlan]) -> None:
    """The parameters that are stored no more, those of all layers as one; their scales go with them."""
    names = [alias for group in groups if group.dropped and group.status == "planned" for alias in group.aliases]
    kinds = [*dict.fromkeys(re.sub(r"(?<=\.)[0-9]+(?=\.)", "*", shown(name)) for name in names)]
    if kinds:
        more = f" and {len(kinds) - 3:,} more (all of them with --json)" if len(kinds) > 3 else ""
        console.print(Text(f"Names that go: {', '.join(kinds[:3])}{more}."))


def _say_ties(console: Console, source: str, detail: str, unpaired: Sequence[str]) -> None:
    who = {
        "class": "the model class",
        "config": "config.json",
        "ties-file": "the ties file",
        "none": "nobody: the model declares no ties",
    }.get(source, source)
    console.print(Text(f"Ties declared by {who}{f' ({shown(detail)})' if detail else ''}."))
    for alias in unpaired:
        console.print(Text(f"'{shown(alias)}' is declared tied, but nothing says to what: it is kept.", style="yellow"))


def _say_kept(console: Console, groups: Sequence[GroupPlan], what: str) -> None:
    if not groups:
        return
    console.print(Text(f"{len(groups)} group{'s' if len(groups) > 1 else ''} {what}:", style="yellow"))
    for group in groups[:_WARNINGS_SHOWN]:
        console.print(Text(f"  {shown(group.canonical)}: {group.reason}", style="yellow"))
    if len(groups) > _WARNINGS_SHOWN:
        console.print(Text(f"  ... and {len(groups) - _WARNINGS_SHOWN} more (all of them with --json)", style="yellow"))


def _say_differing(console: Console, groups: Sequence[GroupPlan]) -> None:
    """The sides of rewritten groups that are kept since they differ."""
    for alias, reason in [entry for group in groups for entry in group.differing_aliases.items()][:_WARNINGS_SHOWN]:
        console.print(Text(f"kept beside the others: {shown(alias)}: {reason}", style="yellow"))


def _say_warnings(console: Console, warnings: Sequence[str]) -> None:
    for warning in warnings[:_WARNINGS_SHOWN]:
        console.print(Text(f"warning: {warning}", style="yellow"))
    if len(warnings) > _WARNINGS_SHOWN:
        rest = len(warnings) - _WARNINGS_SHOWN
        console.print(Text(f"... and {rest} more warnings (all of them with --json)", style="yellow"))
