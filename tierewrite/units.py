"""Numbers as people read them."""

from __future__ import annotations

import re


def size(nbytes: float) -> str:
    """Bytes in powers of 1024: "16.47 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:,.0f} {unit}" if unit == "B" else f"{nbytes:,.2f} {unit}"
        nbytes /= 1024
    return f"{nbytes:,.2f} TiB"


def percent(before: int, after: int) -> str:
    """The change from `before` to `after`: "-42.1%"."""
    return f"{100 * (after - before) / before:+.1f}%" if before else "0%"


_NOUNS = "entries|experts|files|layers|modules|names|parameters|patterns|rows|scales|tensors|weights"
_VERBS = {
    "are": "is",
    "have": "has",
    **{verb: f"{verb}s" for verb in ("belong", "exclude", "hold", "meet", "name")},
    "match": "matches",
}
_COUNTED = re.compile(rf"(?<![\w.,-])1 ((?:(?!of |that )[A-Za-z'-]+ ){{0,2}}?)({_NOUNS})\b")
_VERB = re.compile(rf"\b(?<!not )({'|'.join(_VERBS)})\b")


def with_one(sentence: str) -> str:
    """A sentence of counts with the grammar of one: "1 tensors are missing" becomes "1 tensor is missing".

    For the sentences of rules, whose words are the same for any number. The verb is the next one behind the noun. What
    somebody else `says: ` stays as it is.
    """
    ours, says, theirs = sentence.partition(" says: ")
    parts: list[str] = []
    at = 0
    while (found := _COUNTED.search(ours, at)) is not None:
        noun = found[2].removesuffix("s")
        parts.append(f"{ours[at : found.start()]}1 {found[1]}{'entry' if noun == 'entrie' else noun}")
        another = _COUNTED.search(ours, found.end())
        at = another.start() if another is not None else len(ours)
        rest = ours[found.end() : at]
        verb = _VERB.search(rest)
        if verb is not None:
            rest = f"{rest[: verb.start()]}{_VERBS[verb[1]]}{re.sub('theirs?', 'its', rest[verb.end() :], count=1)}"
        parts.append(rest)
    return "".join(parts) + ours[at:] + says + theirs
