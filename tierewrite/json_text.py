"""JSON that people can read and that is written fast: one line an entry of the top-level lists.

`json.dumps(indent=...)` leaves CPython's C encoder and takes seconds for the tensors of a large checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from json.encoder import encode_basestring
from typing import Any

encode = json.JSONEncoder(ensure_ascii=False).encode
"""One value as `dumps` writes it."""
quoted = encode_basestring
"""`encode` for a string, at a third of the cost."""


class JsonText(str):
    """An item of a list that is JSON text already, as `encode` writes it.

    Half a million small objects take seconds to build and to encode.
    """


_LINES = 1000  # encoded at a time: the text of a large plan takes as much memory as the plan


def dumps(data: dict[str, Any], ascii_only: bool = False) -> str:
    """`data` as JSON text that ends with a newline; each item of a list of objects stands on a line of its own."""
    return "".join(pieces(data, ascii_only))


def pieces(data: dict[str, Any], ascii_only: bool = False) -> Iterator[str]:
    """The text of `dumps`, piece by piece."""
    to_text = json.JSONEncoder(ensure_ascii=ascii_only).encode
    yield "{\n"
    before = " "
    for key, value in data.items():
        yield f"{before}{to_text(key)}: "
        if isinstance(value, list) and value and isinstance(value[0], (dict, JsonText)):
            done = isinstance(value[0], JsonText)
            between = "[\n  "
            for at in range(0, len(value), _LINES):
                some = value[at : at + _LINES]
                yield between
                yield ",\n  ".join(some if done else map(to_text, some))
                between = ",\n  "
            yield "\n ]"
        else:
            yield to_text(value)
        before = ",\n "
    yield "\n}\n"
