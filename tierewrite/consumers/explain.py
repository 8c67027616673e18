"""What the records of rules say, as text for `tierewrite explain` and as Markdown for consumers/README.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tierewrite.consumers import CONSUMERS
from tierewrite.consumers.consumer import Consumer
from tierewrite.consumers.rules import Rule
from tierewrite.errors import UsageError, shown

EXPLAIN_SCHEMA = "tierewrite/rules/1"


def explained(id: str) -> str:
    """What the rule `id` means for each consumer that has it, what happens, how to fix it and where that was read.

    Raises:
        UsageError: no consumer has a rule of that id.
    """
    found = [
        "\n".join(_lines(consumer, rules))
        for consumer in CONSUMERS.values()
        if (rules := [rule for rule in consumer.records if rule.id == id])
    ]
    if not found:
        raise UsageError(f"there is no rule or topic '{shown(id)}'; `tierewrite explain --list` names them all")
    return f"{id}\n\n" + "\n\n".join(found)


def _lines(consumer: Consumer[Any], rules: Sequence[Rule]) -> Iterator[str]:
    yield f"{consumer.name} {consumer.version}: {rules[0].title}"
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
    for consumer in CONSUMERS.values():
        for rule in consumer.records:
            rows.setdefault(rule.id, (rule.title, []))[1].append(consumer.name)
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
                "consumer": consumer.name,
                "consumer_version": consumer.version,
                "id": rule.id,
                "title": rule.title,
                "when": rule.when,
                "severity": rule.severity,
                "consequence": rule.consequence,
                "fix": rule.fix,
                "fixed_by": rule.fixed_by,
                "source": rule.source,
            }
            for consumer in CONSUMERS.values()
            for rule in consumer.records
            if id in (None, rule.id)
        ],
    }


def table(consumer: Consumer[Any]) -> list[str]:
    """The rules of a consumer as a table in Markdown, one line a record."""
    lines = ["| rule | what is wrong | severity | what happens | fix |", "|---|---|---|---|---|"]
    for rule in consumer.records:
        what = f"{rule.title}; {rule.when}" if rule.when else rule.title
        fix = f"{rule.fix} (`{rule.fixed_by}`)" if rule.fixed_by else rule.fix
        lines.append(f"| `{rule.id}` | {what} | {rule.severity} | {rule.consequence} | {fix} |")
    return lines
