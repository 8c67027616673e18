"""Patterns of strangers: the same matches as Python's `re`, and an end whatever the pattern is."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tierewrite
from tests.checkpoints import write_checkpoint
from tierewrite import bounded_regex
from tierewrite.bounded_regex import BadPattern, BoundedRegex, is_simple
from tierewrite.errors import EXIT_SOURCE, EXIT_USAGE, ConfigError, TieFileError
from tierewrite.formats.ignore_lists import inconsistencies
from tierewrite.ties.tie_map import TieMap

ENDLESS = (r"(a|aa)+\$", r"(a+a+)+y", r"(a|a)+b", r"(a?){200}(a|aa)+!", r"^(([a-z])+.)+[A-Z]([a-z])+$", "a*" * 40 + "y")
LONG = "a" * 3_000 + "!"
WEIGHT = ("F32", [1], b"1234")


@pytest.fixture
def _short_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_regex, "SECONDS_A_NAME", 0.05)
    monkeypatch.setattr(bounded_regex, "SECONDS", 0.5)


@pytest.mark.parametrize(
    "pattern",
    [
        "lm_head", r"model\.decoder\.(.*)", r"^class_embed.0", r"class_embed.(?![0])\d+", r"layers\.(\d+)\.(.*)",
        r"decoder.layers\.(?:[^.]+\.)*weight", r"(a|b)\.weight", r"a{1,3}", "a{e<=1}", "[{]x", r"\{x\}", "(?i)A+",
    ],
)  # fmt: skip
@pytest.mark.parametrize("anywhere", [False, True])
def test_the_same_names_as_with_re(pattern: str, anywhere: bool) -> None:
    names = [
        "lm_head", "class_embed.0", "class_embed.10", "class_embed.2.weight", "model.decoder.layers.3.weight",
        "decoder.layers.0.mlp.weight", "a.weight", "aaa", "a{e<=1}", "a{e<=1}x", "ab", "{x}", "[{]x", "AAA", LONG, "",
    ]  # fmt: skip
    look = re.compile(pattern).search if anywhere else re.compile(pattern).match
    assert BoundedRegex(pattern).matching(names, anywhere=anywhere) == [name for name in names if look(name)]


@given(
    st.lists(
        st.sampled_from(["a", "b", ".", r"\.", "a{e<=1}", "x{2}", r"\d", "[^.]+", "(?:a|ab)", "(?!b)", ".*", "?", "+"]),
        max_size=6,
    ),
    st.text("ab.x0{e<=1}", max_size=12),
)
def test_any_pattern_matches_as_with_re(parts: list[str], name: str) -> None:
    pattern = "".join(parts)
    try:
        expected = re.compile(pattern).match(name) is not None
    except re.error:
        with pytest.raises(BadPattern):
            BoundedRegex(pattern)
        return
    assert BoundedRegex(pattern).matching([name]) == ([name] if expected else [])


@pytest.mark.parametrize("pattern", ENDLESS)
@pytest.mark.usefixtures("_short_timeout")
def test_an_endless_match_ends(pattern: str) -> None:
    assert not is_simple(pattern)
    with contextlib.suppress(BadPattern):  # unless the engine is clever enough to say no at once
        assert BoundedRegex(pattern).matching([LONG], anywhere=True) in ([], [LONG])


@pytest.mark.usefixtures("_short_timeout")
def test_many_slow_names_end_too() -> None:
    quadratic = BoundedRegex(r"(.*)(.*)z")
    assert quadratic.simple
    with pytest.raises(BadPattern, match="too long"):
        quadratic.matching("b" * 900 + str(number) for number in range(10**9))


def test_simple_is_what_cannot_be_slow() -> None:
    for pattern in ("", "lm_head", r"^model\.(\d+)\.(.*)$", "(?:a.*)b", "[^.]+", r"layers\.(?:[^.]+\.)*weight"):
        assert is_simple(pattern), pattern
    repeated = (r"(?:[^.]+\.)*(?:[^.]+\.)*", r"a*(?:[^.]+\.)*", r"(?:[^.]+)*", r"(?:(?:[^.]+\.)*)*", r"(?:[^.]+.)*")
    others = ("a|b", "(a)+", "(a*)*", "a*a*a*", r"(a)\1", "a{2}", "(?=a)", "[[:alpha:]]", "a" * 10_001)
    for pattern in (*ENDLESS, *repeated, *others):
        assert not is_simple(pattern), pattern


@pytest.mark.parametrize(
    "pattern", ["(", "[", "a{99999999999}", "(" * 5_000 + ")" * 5_000, "a" * 10_001, "x[[:alpha:]]", "(?P<a>x)(?P<a>y)"]
)
def test_what_is_no_pattern_is_said(pattern: str) -> None:
    with pytest.raises(BadPattern):
        BoundedRegex(pattern)


def hostile(folder: Path, config: dict[str, Any]) -> Path:
    return write_checkpoint(folder / "src", {LONG: WEIGHT, "b.weight": WEIGHT, "lm_head.weight": WEIGHT}, config=config)


@pytest.mark.usefixtures("_short_timeout")
def test_a_slow_pattern_of_a_ties_file_is_named(tmp_path: Path) -> None:
    src, ties = hostile(tmp_path, {}), tmp_path / "ties.json"
    ties.write_text(json.dumps({"(a|aa)+$": "b.weight"}))
    with pytest.raises(TieFileError, match=r"\(a\|aa\)\+\$.*too long") as caught:
        tierewrite.plan(src, ties=ties)
    assert caught.value.exit_code == EXIT_USAGE
    assert caught.value.file == str(ties)


@pytest.mark.usefixtures("_short_timeout")
def test_a_slow_pattern_of_a_mapping_is_named() -> None:
    with pytest.raises(TieFileError, match="too long"):
        TieMap.from_mapping({"(a|aa)+$": "b.weight"}, [LONG, "b.weight"])


@pytest.mark.usefixtures("_short_timeout")
def test_a_slow_pattern_of_config_json_is_named(tmp_path: Path) -> None:
    src = hostile(tmp_path, {"model_type": "qwen3", "_tied_weights_keys": {"(a|aa)+$": "b.weight"}})
    with pytest.raises(ConfigError, match="too long") as caught:
        tierewrite.plan(src)
    assert caught.value.exit_code == EXIT_SOURCE


@pytest.mark.usefixtures("_short_timeout")
@pytest.mark.parametrize("key", ["ignore", "modules_to_not_convert"])
def test_a_slow_entry_of_an_ignore_list_is_named(key: str) -> None:
    entry = "re:(a|aa)+$" if key == "ignore" else "(a|aa)+$"
    config = {"quantization_config": {"quant_method": "compressed-tensors", key: [entry, "b"]}}
    with pytest.raises(ConfigError, match=r"\(a\|aa\)\+\$.*too long"):
        inconsistencies(config, {}, [("c", "b")], {"b"}, {LONG})


def test_an_entry_of_an_ignore_list_that_is_no_pattern_covers_nothing() -> None:
    config = {"quantization_config": {"quant_method": "compressed-tensors", "ignore": ["re:(", "re:" + "(" * 4_000]}}
    assert inconsistencies(config, {}, [("c", "b")], {"b"}, {"d"}) == ()
