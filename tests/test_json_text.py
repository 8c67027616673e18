"""JSON for people and programs: one line an entry, the same text whole or in pieces."""

from __future__ import annotations

import json

import pytest

from tierewrite.json_text import _LINES, JsonText, dumps, encode, pieces, quoted


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


def test_an_item_may_be_text_already() -> None:
    rows = [{"é": i, "more": [None, 0.5]} for i in range(3)]
    assert dumps({"rows": [JsonText(encode(row)) for row in rows]}) == dumps({"rows": rows})


@pytest.mark.parametrize("name", ["", "a.weight", 'a"b\\c', "é\u2028", "\x00\x1f\x7f\n", "\U0001f600"])
def test_a_quoted_string_is_what_the_encoder_writes(name: str) -> None:
    assert quoted(name) == encode(name) == json.dumps(name, ensure_ascii=False)
