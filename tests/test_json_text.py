"""JSON for people and programs: one line an entry, the same text whole or in pieces."""

from __future__ import annotations

import json

import msgspec
import orjson
import pytest

from tierewrite.json_text import _ENTRIES, chunks, dumps


@pytest.mark.parametrize("count", [0, 1, _ENTRIES - 1, _ENTRIES, _ENTRIES + 1, 2 * _ENTRIES + 1])
def test_each_item_of_a_list_of_objects_has_a_line(count: int) -> None:
    rows = [{"name": f"n{i}", "more": [{"é": None}]} for i in range(count)]
    data = {"schema": "x", "rows": rows, "names": ["a", "b"], "last": True}
    text = dumps(data)
    assert json.loads(text) == data
    assert text.endswith(' "last": true\n}\n')
    assert text.splitlines().count('  {"name": "n0", "more": [{"é": null}]}' + "," * (count > 1)) == min(count, 1)
    assert len(text.splitlines()) == (6 if not count else 7 + count)
    assert "".join(chunks(data, ascii_only=True)) == dumps(data, ascii_only=True)
    assert dumps(data, ascii_only=True).isascii()


def test_an_item_may_be_a_struct() -> None:
    class Row(msgspec.Struct):
        é: int
        more: list[float | None]

    rows = [Row(i, [None, 0.5]) for i in range(3)]
    assert dumps({"rows": rows}) == dumps({"rows": [{"é": i, "more": [None, 0.5]} for i in range(3)]})


@pytest.mark.parametrize("ascii_only", [False, True])
@pytest.mark.parametrize(
    "value", ["", "a.weight", 'a"b\\c', "é\u2028", "\x00\x1f\x7f\n", "\U0001f600", {"é": [1, 0.5, 2**70, None, True]}]
)
def test_a_value_is_written_as_the_standard_library_writes_it(value: object, ascii_only: bool) -> None:
    lines = dumps({"a": value}, ascii_only=ascii_only).split("\n")
    assert lines == ["{", f' "a": {json.dumps(value, ensure_ascii=ascii_only)}', "}", ""]


def test_half_a_surrogate_pair_is_written_as_an_escape() -> None:
    assert json.loads(dumps({"file": "\udc80"}, ascii_only=True)) == {"file": "\udc80"}


@pytest.mark.parametrize("number", [float("inf"), -float("inf"), float("nan")])
def test_a_number_that_is_not_finite_is_null(number: float) -> None:
    text = dumps({"a": number, "rows": [{"b": [number]}]}, ascii_only=True)
    assert orjson.loads(text) == {"a": None, "rows": [{"b": [None]}]}
