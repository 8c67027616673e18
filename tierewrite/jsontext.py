"""JSON that people can read and that is written fast: one line an entry of the top-level lists.

`json.dumps(indent=...)` leaves CPython's C encoder and takes seconds for the tensors of a large checkpoint.
"""

from __future__ import annotations

import json
from typing import Any


def dumps(data: dict[str, Any], ascii_only: bool = False) -> str:
    """`data` as JSON text that ends with a newline; each item of a list of objects stands on a line of its own."""
    encode = json.JSONEncoder(ensure_ascii=ascii_only).encode
    members = []
    for key, value in data.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            lines = ",\n  ".join(map(encode, value))
            members.append(f" {encode(key)}: [\n  {lines}\n ]")
        else:
            members.append(f" {encode(key)}: {encode(value)}")
    return "{\n" + ",\n".join(members) + "\n}\n"
