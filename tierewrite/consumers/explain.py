"""What the records of rules say, as text for `tierewrite explain` and as Markdown for consumers/RULES.md."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tierewrite.consumers import CONSUMERS
from tierewrite.consumers.rules import Rule
from tierewrite.consumers.value_rules import VALUE_RULES
from tierewrite.errors import UsageError, shown

EXPLAIN_SCHEMA = "tierewrite/rules/1"


class Holder(NamedTuple):
    """Whose rules they are: a consumer's, or those on values, which hold whoever loads them."""

    name: str
    version: str
    records: Sequence[Rule]


def holders() -> list[Holder]:
    """All that have rules."""
    consumers = [Holder(one.name, one.version, tuple(one.records)) for one in CONSUMERS.values()]
    return [*consumers, Holder("check --values", "", VALUE_RULES.records)]


def explained(id: str, topics: Sequence[str] = ()) -> str:
    """What the rule `id` means for each consumer that has it, what happens, how to fix it and where that was read.

    Args:
        topics: what else can be explained, and a mistyped `id` may have meant.

    Raises:
        UsageError: no consumer has a rule of that id.
    """
    found = [
        "\n".join(_lines(holder, rules))
        for holder in holders()
        if (rules := [rule for rule in holder.records if rule.id == id])
    ]
    if not found:
        known = [*topics, *(rule.id for holder in holders() for rule in holder.records)]
        meant = difflib.get_close_matches(id, dict.fromkeys(known), n=1)
        hint = f"; did you mean '{meant[0]}'?" if meant else ""
        raise UsageError(f"there is no rule or topic '{shown(id)}'{hint}; `tierewrite explain --list` names them all")
    return f"{id}\n\n" + "\n\n".join(found)


def _lines(holder: Holder, rules: Sequence[Rule]) -> Iterator[str]:
    yield f"{holder.name} {holder.version}".rstrip() + f": {rules[0].title}"
    for rule in rules:
        yield f"  {rule.severity}" + (f", {rule.when}:" if rule.when else ":")
        yield f"    what happens: {rule.consequence}"
        if rule.fix:
            yield f"    fix: {rule.fix}"
        if rule.fixed_by is not None:
            yield f"    fixed by: tierewrite {rule.fixed_by}"
        yield f"    read in: {rule.source}"


def listed() -> str:
    """A line for each rule: id, who has it, what it means."""
    rows: dict[str, tuple[str, list[str]]] = {}
    for holder in holders():
        for rule in holder.records:
            rows.setdefault(rule.id, (rule.title, []))[1].append(holder.name)
    lines = [(id, ", ".join(dict.fromkeys(names)), title) for id, (title, names) in sorted(rows.items())]
    widths = [max(len(line[column]) for line in lines) for column in (0, 1)]
    return "\n".join(f"{id:<{widths[0]}}  {names:<{widths[1]}}  {title}" for id, names, title in lines)


def to_json(id: str | None = None) -> dict[str, Any]:
    """All records, or those of one id.

    Raises:
        UsageError: no consumer has a rule of that id.
    """
    if id is not None:
        explained(id)
    return {
        "schema": EXPLAIN_SCHEMA,
        "rules": [
            {
                "consumer": holder.name,
                "consumer_version": holder.version,
                "id": rule.id,
                "title": rule.title,
                "when": rule.when,
                "severity": rule.severity,
                "consequence": rule.consequence,
                "fix": rule.fix,
                "fixed_by": rule.fixed_by,
                "source": rule.source,
            }
            for holder in holders()
            for rule in holder.records
            if id in (None, rule.id)
        ],
    }


def table(records: Sequence[Rule]) -> list[str]:
    """Rules as a table in Markdown, one line a record."""
    lines = ["| rule | what is wrong | severity | what happens | fix |", "|---|---|---|---|---|"]
    for rule in records:
        what = f"{rule.title}; {rule.when}" if rule.when else rule.title
        fix = f"{rule.fix} (`{rule.fixed_by}`)" if rule.fixed_by else rule.fix
        lines.append(f"| `{rule.id}` | {what} | {rule.severity} | {rule.consequence} | {fix} |")
    return lines
