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
_encoder = msgspec.json.Encoder()
_NOT_PLAIN = re.compile("[^\n -~]+")  # what json.dumps(ensure_ascii=True) escapes; newlines stand between entries only


class Compact(list[msgspec.Struct]):
    """Entries that are written without spaces: where there are as many as tensors, spacing them would take longest."""


def plain_text(text: str) -> str:
    """`text` as a `str` and no subclass of it, which NumPy's and enumerations are and no encoder takes."""
    return str.__str__(text)


def dumps(data: Mapping[str, Any], ascii_only: bool = False) -> str:
    """`data` as JSON text that ends with a newline; each item of a list of objects stands on a line of its own."""
    return "".join(chunks(data, ascii_only))


def chunks(data: Mapping[str, Any], ascii_only: bool = False) -> Iterator[str]:
    """The text of `dumps`, chunk by chunk.

    Args:
        data: of what JSON knows, of msgspec Structs, and `Compact` lists of them.
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
                some = value[at : at + _ENTRIES]
                if isinstance(value, Compact):
                    text = _encoder.encode_lines(some).decode().rstrip("\n").replace("\n", ",\n  ")
                    yield _escaped(text) if ascii_only else text
                else:
                    yield ",\n  ".join([_line(entry, ascii_only) for entry in some])
                between = ",\n  "
            yield "\n ]"
        else:
            yield _line(value, ascii_only)
        before = ",\n "
    yield "\n}\n"


def in_style_of(text: str, data: Any) -> str:
    """`data` as JSON text that looks like the JSON `text`, as far as JSON has a style.

    Kept: the indentation of the first indented line, escapes or their absence, the final newline.
    """
    indented = re.search(r"\n([ \t]+)\S", text)
    new = json.dumps(data, indent=indented.group(1) if indented else None, ensure_ascii=text.isascii())
    return new + text[len(text.rstrip()) :]


def _line(value: Any, ascii_only: bool) -> str:
    """A value on one line, with a space after each colon and comma."""
    try:
        text = msgspec.json.format(_encoder.encode(value), indent=0).decode()
    except UnicodeEncodeError:  # half a surrogate pair, in the name of a file that is no UTF-8: escapes can say it
        return json.dumps(value, ensure_ascii=ascii_only, allow_nan=False)
    return _escaped(text) if ascii_only else text


def _escaped(text: str) -> str:
    """JSON text with escapes for all that is not printable ASCII: such characters stand in strings alone."""
    if text.isascii() and "\x7f" not in text:  # as it mostly is; the search takes ten times as long
        return text
    return _NOT_PLAIN.sub(lambda found: json.dumps(found[0])[1:-1], text)
