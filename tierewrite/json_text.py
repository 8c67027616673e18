"""JSON that people can read and that is written fast: one line an entry of the top-level lists.

It is strict JSON: a number that is not finite is null. `json.dumps(indent=...)` leaves CPython's C encoder and takes
seconds for the tensors of a large checkpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

_ENTRIES = 1000  # to a chunk: the text of a large plan takes as much memory as the plan
_encode = msgspec.json.Encoder().encode
_NOT_PLAIN = re.compile("[^ -~]+")  # what json.dumps(ensure_ascii=True) escapes


def dumps(data: Mapping[str, Any], ascii_only: bool = False) -> str:
    """`data` as JSON text that ends with a newline; each item of a list of objects stands on a line of its own."""
    return "".join(chunks(data, ascii_only))


def chunks(data: Mapping[str, Any], ascii_only: bool = False) -> Iterator[str]:
    """The text of `dumps`, chunk by chunk.

    Args:
        data: of what JSON knows, and of msgspec Structs.
        ascii_only: write other characters as escapes.
    """
    yield "{\n"
    before = " "
    for key, value in data.items():
        yield f"{before}{_line(key, ascii_only)}: "
        if isinstance(value, list) and value and isinstance(value[0], (dict, msgspec.Struct)):
            between = "[\n  "
            for at in range(0, len(value), _ENTRIES):
                yield between
                yield ",\n  ".join([_line(entry, ascii_only) for entry in value[at : at + _ENTRIES]])
                between = ",\n  "
            yield "\n ]"
        else:
            yield _line(value, ascii_only)
        before = ",\n "
    yield "\n}\n"


def _line(value: Any, ascii_only: bool) -> str:
    """A value on one line, with a space after each colon and comma."""
    try:
        text = msgspec.json.format(_encode(value), indent=0).decode()
    except UnicodeEncodeError:  # half a surrogate pair, in the name of a file that is no UTF-8: escapes can say it
        return json.dumps(value, ensure_ascii=ascii_only, allow_nan=False)
    return _NOT_PLAIN.sub(lambda found: json.dumps(found[0])[1:-1], text) if ascii_only else text
