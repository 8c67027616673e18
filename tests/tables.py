"""The tables of documents that are made from records: `python -m tests.tables` writes them; a test holds them.

In a document a table stands between two comments, `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.defects import DEFECTS
from tests.vllm_loader.behaviour import RECORD
from tierewrite.cli.topics import exit_codes_table, formats_table, parts_table, schemas_table
from tierewrite.consumers.explain import holders, table
from tierewrite.consumers.vllm import VLLM

ROOT = Path(__file__).parent.parent


def rules_tables() -> list[str]:
    """The rules of every consumer from their records, a heading and a table each."""
    titled = [(f"## {holder.name} {holder.version}".rstrip(), table(holder.records)) for holder in holders()]
    return [line for title, lines in titled for line in (title, "", *lines, "")][:-1]


def does(facts: dict[str, Any]) -> str:
    """What the real loader did, in a few words."""
    outcome = facts["outcome"]
    if outcome == "refused":
        return "refuses to load"
    if outcome == "aborts":
        return "aborts the load"
    if outcome == "fails":
        return "fails after loading"
    if outcome == "unfilled":
        after = ", then fails" if facts.get("fails") else ", without a warning"
        return f"leaves parameters unfilled{after}"
    if facts.get("sampler"):
        return "loads, fails when served"
    if facts.get("ignored"):
        return "ignores it, without a warning"
    if outcome == "changed":
        return "loads other numbers" + (", with a warning" if facts.get("warns") else ", without a warning")
    return "loads it right" + (", with a warning" if facts.get("warns") else "")


def defects_table() -> list[str]:
    """Each defect, with what the real loader did with it (tests/vllm_behaviour.json) and what `check` says."""
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))["variants"]
    lines = [f"| defect | vLLM {VLLM.version} | check says | rewrite --for vllm fixes it |", "|---|---|---|---|"]
    for defect in DEFECTS:
        fixed = "yes" if defect.fixed else "no"
        if defect.fixed and defect.fix_options:
            fixed = "with --" + ", --".join(name.replace("_", "-") for name in defect.fix_options)
        name = defect.name.replace("-", " ")
        lines.append(f"| {name} | {does(recorded[defect.name])} | {defect.severity} `{defect.finding}` | {fixed} |")
    return lines


TABLES: Mapping[str, tuple[str, Callable[[], list[str]]]] = {
    "formats": ("tierewrite/formats/FAMILIES.md", formats_table),
    "schemas": ("tierewrite/cli/JSON_AND_EXIT_CODES.md", schemas_table),
    "parts": ("tierewrite/cli/JSON_AND_EXIT_CODES.md", parts_table),
    "exit codes": ("tierewrite/cli/JSON_AND_EXIT_CODES.md", exit_codes_table),
    "rules": ("tierewrite/consumers/RULES.md", rules_tables),
    "defects": ("tierewrite/consumers/RULES.md", defects_table),
}
"""Name -> the document that it stands in, and what makes it."""


def with_tables(readme: str, text: str) -> str:
    """`text` of a README with each of its tables as the records have it now."""
    for name, (place, made) in TABLES.items():
        if place == readme:
            table = "\n".join([f"<!-- table: {name} -->", "", *made(), "", "<!-- end -->"])
            text, count = re.subn(
                rf"<!-- table: {name} -->.*?<!-- end -->", lambda _, t=table: t, text, flags=re.DOTALL
            )
            assert count == 1, (readme, name)
    return text


def write() -> None:
    """Puts all tables in their places."""
    for readme in {place for place, _ in TABLES.values()}:
        path = ROOT / readme
        path.write_text(with_tables(readme, path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write()
