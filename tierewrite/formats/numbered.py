"""Names that differ in numbers alone, such as those of all layers: `model.layers.*.self_attn.q_proj.weight`."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def pattern_of(name: str) -> str:
    """The name with every word that is a number replaced by `*`."""
    return _NUMBER.sub("*", name)


def with_numbers(pattern: str, name: str) -> str:
    """`pattern` with its wildcards replaced by the numbers of `name`, from left to right."""
    numbers = iter(_NUMBER.findall(name))
    return re.sub(r"\*", lambda match: next(numbers, match[0]), pattern)
