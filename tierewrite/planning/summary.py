"""A plan for people: what is dropped of which kind of parameter, and what stays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tierewrite.errors import shown
from tierewrite.formats.numbered import pattern_of
from tierewrite.planning.plan import GroupPlan, RewritePlan
from tierewrite.tables import count, kept_lines, of_which, sizes, some, text, tied_parameters, ties_lines, warning_lines
from tierewrite.units import size

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

_SHOWN = 10
NOTHING_TO_DO = "Nothing to do: every tied tensor is stored once, under its canonical name."


def plan_lines(plan: RewritePlan) -> Iterator[RenderableType]:
    """What `tierewrite plan` shows."""
    before = (plan.source_bytes, len(plan.tensors), plan.source_shards)
    yield sizes(before, (plan.total_bytes, plan.total_tensors, len(plan.shards)))
    yield from ties_lines(plan.ties_source, plan.ties_detail, plan.unpaired)
    changed, others = changed_kinds(plan.groups)
    made = tied_parameters(changed, "groups", "unconfirmed", "tensors dropped", "bytes dropped")
    for kind, rows in changed.items():
        made.add_row(
            text(shown(kind)),
            str(len(rows)),
            str(sum(group.status == "unconfirmed" for group in rows)),
            f"{sum(group.dropped for group in rows):,}",
            size(sum(group.dropped_bytes for group in rows)),
        )
    if changed:
        yield made
    yield from unchanged_lines(others)
    yield from dropped_lines(plan.groups)
    unconfirmed = [(group.canonical, group.reason) for group in plan.unconfirmed()]
    yield from kept_lines(unconfirmed, "not confirmed" if plan.confirmed else "not confirmed by the headers")
    yield from differing_lines(plan.planned())
    yield from warning_lines(plan.warnings)
    if not plan.changes_anything():
        yield text(NOTHING_TO_DO, "green")
    elif plan.confirmed:
        yield text("Confirmed: the tied tensors were hashed, and a rewrite will do exactly this.", "green")
    elif unconfirmed and plan.policy.on_mismatch != "keep":
        yield text(
            "A rewrite refuses this (exit code 3); with --on-mismatch keep it leaves such groups as they are.", "yellow"
        )
    else:
        yield text("From headers alone: a rewrite does this if the bytes confirm it (--confirm hashes them).")


def changed_kinds(groups: Sequence[GroupPlan]) -> tuple[dict[str, list[GroupPlan]], list[GroupPlan]]:
    """The kinds of `groups` of which something is dropped or unconfirmed, the most bytes first; and the others."""
    kinds: dict[str, list[GroupPlan]] = {}
    for group in groups:
        kinds.setdefault(group.kind, []).append(group)
    kinds = dict(sorted(kinds.items(), key=lambda item: -sum(group.dropped_bytes for group in item[1])))
    changed = {kind: rows for kind, rows in kinds.items() if any(g.dropped or g.status == "unconfirmed" for g in rows)}
    return changed, [group for kind, rows in kinds.items() if kind not in changed for group in rows]


def unchanged_lines(groups: Sequence[GroupPlan]) -> Iterator[Text]:
    """One line for the ties that are stored once already, and one for those whose name changes."""
    for status, what in (("canonical", "stored once already"), ("planned", "stored once under an alias, now renamed")):
        kinds = [group.kind for group in groups if group.status == status]
        if kinds:
            yield text(f"{count(len(kinds), 'tie')} {what}: {some([*dict.fromkeys(kinds)])}.")


def differing_lines(groups: Sequence[GroupPlan]) -> Iterator[Text]:
    """The sides of rewritten groups that are kept since they differ."""
    for alias, reason in [entry for group in groups for entry in group.differing_aliases.items()][:_SHOWN]:
        yield text(f"kept beside the others: {of_which(shown(alias), (alias,), reason)}", "yellow")


def dropped_lines(groups: Sequence[GroupPlan]) -> Iterator[Text]:
    """The parameters that are stored no more, those of all layers as one; their scales go with them."""
    going = [group for group in groups if group.dropped and group.status == "planned"]
    names = [name for group in going for name in group.side_names[1:] if name not in group.kept_names]
    if names:
        kinds = [*dict.fromkeys(map(pattern_of, names))]
        yield text(f"Names that go: {some(kinds)}.")
