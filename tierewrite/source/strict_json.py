"""JSON as safetensors' own reader takes it: no key twice, no half of a surrogate pair, bounded nesting."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from tierewrite.errors import shown

MAX_DEPTH = 127  # serde_json refuses the 128th nested container


class BadJson(ValueError):
    """Why a text is not the JSON we accept."""


def repeated_key(members: Sequence[tuple[str, Any]]) -> str | None:
    """The first key that comes a second time among the members of a JSON object; None if each comes once."""
    if len(dict(members)) == len(members):
        return None
    seen: set[str] = set()
    for key, _ in members:
        if key in seen:
            return key
        seen.add(key)
    return None


def unique_members(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object from its members: an `object_pairs_hook` for `json`.

    Raises:
        BadJson: a key comes twice.
    """
    key = repeated_key(members)
    if key is not None:
        raise BadJson(f"'{shown(key)}' comes twice in one object")
    return dict(members)


def kind_of_json(value: Any) -> str:
    """What a JSON value is, for messages."""
    if value is None:
        return "null"
    if type(value) is tuple:
        return "an object"
    names = {
        bool: "a boolean",
        int: "a number",
        float: "a fraction",
        str: "a string",
        list: "an array",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)


_FIELDS = ("dtype", "shape", "data_offsets")


def as_dict(fields: tuple[Any, ...]) -> dict[str, Any]:
    """The object that `strict_json` gives as a tuple."""
    return dict(zip(_FIELDS, fields, strict=True))


def _whole(digits: str) -> int | float:
    return -0.0 if digits == "-0" else int(digits)  # serde_json reads -0 as a fraction


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | tuple[Any, Any, Any]:
    """An object from its members, none of which may come twice.

    A tensor's three fields in their usual order become a tuple: a header has up to half a million of them,
    and a dictionary each would take 500 MB. Nothing else in parsed JSON is a tuple.
    """
    if len(pairs) == 3:
        (a, first), (b, second), (c, third) = pairs
        if a == "dtype" and b == "shape" and c == "data_offsets":
            return first, second, third
    return unique_members(pairs)


def _no_constant(found: str) -> NoReturn:
    raise BadJson(f"{found} is not JSON")


_STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


def strict_json(text: str) -> Any:
    """Parse JSON as serde_json does, but refuse an object with a key twice. Tensor objects come as tuples.

    Raises:
        BadJson: with the reason.
    """
    if text.startswith("\ufeff"):
        raise BadJson("it begins with a byte order mark, which JSON has not: save it as UTF-8 without one")
    try:
        found = _parsed(text)
        if _SURROGATE.search(text):
            _refuse_half_pairs(text)
        return found
    except RecursionError:
        raise BadJson(f"nested more than {MAX_DEPTH} deep") from None
    except json.JSONDecodeError as e:
        raise BadJson(f"{e.msg} at character {e.pos}") from None
    except BadJson:
        raise
    except ValueError as e:  # an integer of more digits than Python converts
        raise BadJson(str(e)) from None


def _parsed(text: str) -> Any:
    if "-0" in text:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant, parse_int=_whole)
    return _STRICT.decode(text)


def _refuse_half_pairs(text: str) -> None:
    """Python accepts half a surrogate pair in a string, which is no Unicode text and could not be written again."""
    for match in _STRING.finditer(text):
        token = match.group()
        if _SURROGATE.search(token):
            try:
                json.loads(token).encode("utf-8")
            except UnicodeEncodeError:
                raise BadJson(f"half a surrogate pair in a string at character {match.start()}") from None
