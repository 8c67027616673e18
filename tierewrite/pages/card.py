"""A few lines of Markdown about a rewrite, for the model card (README.md) of the checkpoint."""

from __future__ import annotations

from tierewrite.errors import shown
from tierewrite.pages.charts import verdict
from tierewrite.pages.facts import Facts
from tierewrite.pages.style import change, times
from tierewrite.tables import count, some
from tierewrite.units import size


def card(facts: Facts) -> str:
    """What was done with the checkpoint, in Markdown; names of strangers stand in code spans."""
    lines = ["## Tied weights", ""]
    stored = f"Every tied weight{' whose bytes agree' if facts.kept else ''} is stored once, under its canonical name"
    if facts.sizes is not None:
        total = facts.sizes.total
        tensors = f"{total.before_tensors:,} to {total.after_tensors:,} tensors"
        bytes_ = f"{size(total.before_bytes)} to {size(total.after_bytes)}"
        less = "" if total.before_bytes == total.after_bytes else f" ({change(total.before_bytes, total.after_bytes)})"
        lines.append(f"{stored}: {tensors}, {bytes_}{less}.")
    else:
        lines.append(f"{stored}.")
    if facts.ties_detail:
        who = _code(facts.ties_detail)
        confirmed = "where their bytes (BLAKE3) confirm it" if facts.kept else "each confirmed by its bytes (BLAKE3)"
        lines.append(f"The ties are those that {who} declares, {confirmed}.")
    if facts.scales:
        overall = facts.overall
        differ = f": the sides differed by {times(overall.median)} (median), at most {times(overall.max)}"
        lines.append(f"{count(len(facts.scales), 'activation scale')} merged{differ if overall.ratios else ''}.")
    if facts.kept:
        names = [_code(alias) for group in facts.kept for alias in group.aliases]
        lines.append(f"Not confirmed, and kept beside their canonical names: {some(names)}.")
    if facts.hub is not None:
        lines.append(f"Made from {_code(facts.hub[0])} at commit {_code(facts.hub[1])}.")
    lines += ["", f"Written by tierewrite {shown(facts.version)}; `tierewrite.json` records what was done."]
    options = ", ".join(f"{name}={value}" for name, value in facts.options.items() if value not in (None, False, []))
    if options:
        lines.append(f"Options: {_code(options)}.")
    lines += [f"Checked for {verdict(report)}." for report in facts.consumers]
    return "\n".join(lines) + "\n"


def _code(text: object) -> str:
    """A code span: whatever stands in it is no Markdown, and no HTML."""
    return f"`{shown(text).replace('`', chr(39))}`"
