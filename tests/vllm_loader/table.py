"""The tables of consumers/README.md, in Markdown: `python -m tests.vllm_loader.table`; with `--write`, put there.

The rules come from their records; the defects from tests/defects.py, with what the real loader did with each.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import tierewrite
from tests.defects import DEFECTS
from tests.vllm_loader.behaviour import RECORD
from tierewrite.consumers import CONSUMERS
from tierewrite.consumers.explain import holders, table
from tierewrite.consumers.vllm import VLLM

README = Path(tierewrite.__file__).parent / "consumers" / "README.md"


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


def rows() -> list[str]:
    """The table in Markdown, one line an entry."""
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))["variants"]
    lines = [f"| defect | vLLM {VLLM.version} | check says | rewrite --for vllm fixes it |", "|---|---|---|---|"]
    for defect in DEFECTS:
        fixed = "yes" if defect.fixed else "no"
        if defect.fixed and defect.fix_options:
            fixed = "with --" + ", --".join(name.replace("_", "-") for name in defect.fix_options)
        name = defect.name.replace("-", " ")
        lines.append(f"| {name} | {does(recorded[defect.name])} | {defect.severity} `{defect.finding}` | {fixed} |")
    return lines


def tables() -> str:
    """All tables of consumers/README.md."""
    titled = [(f"### {holder.name} {holder.version}".rstrip(), table(holder.records)) for holder in holders()]
    parts = ["\n\n".join((title, "\n".join(lines))) for title, lines in titled]
    return "\n\n".join([*parts, "### What the real loader of vLLM does\n\n" + "\n".join(rows())]) + "\n"


def write() -> None:
    """Puts the tables at the end of consumers/README.md, in the place of those that are there."""
    text = README.read_text(encoding="utf-8")
    first = next(iter(CONSUMERS.values()))
    before = text[: text.index(f"### {first.name} ")]
    README.write_text(before + tables(), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        write()
    else:
        sys.stdout.write(tables())
