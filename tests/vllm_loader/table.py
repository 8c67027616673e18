"""The README's table of defects, in Markdown: `python -m tests.vllm_loader.table`."""

from __future__ import annotations

import json
import sys
from typing import Any

from tests.defects import DEFECTS
from tests.vllm_loader.behaviour import RECORD


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
        after = ", then fails" if facts.get("fails") else ", without a word"
        return f"leaves parameters unfilled{after}"
    if facts.get("sampler"):
        return "loads, fails when served"
    if facts.get("ignored"):
        return "ignores it, without a word"
    if outcome == "changed":
        return "loads other numbers" + (", with a warning" if facts.get("warns") else ", without a word")
    return "loads it right" + (", with a warning" if facts.get("warns") else "")


def rows() -> list[str]:
    """The table in Markdown, one line an entry."""
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))["variants"]
    lines = ["| defect | vLLM 0.33 | check says | rewrite --for vllm mends it |", "|---|---|---|---|"]
    for defect in DEFECTS:
        mended = "yes" if defect.mended else "no"
        if defect.mended and defect.mend_options:
            mended = "with --" + ", --".join(name.replace("_", "-") for name in defect.mend_options)
        name = defect.name.replace("-", " ")
        lines.append(f"| {name} | {does(recorded[defect.name])} | {defect.severity} `{defect.finding}` | {mended} |")
    return lines


if __name__ == "__main__":
    sys.stdout.write("\n".join(rows()) + "\n")
