"""JSON for people and programs: one line an entry, the same text whole or in pieces."""

from __future__ import annotations

import json

import pytest

from tierewrite.jsontext import _LINES, dumps, pieces


@pytest.mark.parametrize("count", [0, 1, _LINES - 1, _LINES, _LINES + 1, 2 * _LINES + 1])
def test_each_item_of_a_list_of_objects_has_a_line(count: int) -> None:
    rows = [{"name": f"n{i}", "more": [{"é": None}]} for i in range(count)]
    data = {"schema": "x", "rows": rows, "names": ["a", "b"], "last": True}
    text = dumps(data)
    assert json.loads(text) == data
    assert text.endswith(' "last": true\n}\n')
    assert text.splitlines().count('  {"name": "n0", "more": [{"é": null}]}' + "," * (count > 1)) == min(count, 1)
    assert len(text.splitlines()) == (6 if not count else 7 + count)
    assert "".join(pieces(data, ascii_only=True)) == dumps(data, ascii_only=True)
    assert dumps(data, ascii_only=True).isascii()
