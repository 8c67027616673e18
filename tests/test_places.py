"""Names of places that no file can have: a documented error of every function, before anything else happens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import tierewrite
from tests.checkpoints import FIXTURES
from tierewrite.errors import EXIT_SOURCE, EXIT_USAGE, TierewriteError
from tierewrite.stores.places import located

SRC = FIXTURES / "qwen3_tied_bf16" / "naive"
IMPOSSIBLE = {
    "empty": "", "NUL": "a\0b", "NUL in a URL": "memory://a\0b", "NUL in a hub id": "org/na\0me",
    "surrogate": "a\ud800b", "long part": "x" * 256, "long": "x/" * 3000, "surrogate in a URL": "s3://bucket/\udcff",
    "bytes": b"a",
}  # fmt: skip


@pytest.mark.parametrize("name", IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
@pytest.mark.parametrize(
    "call",
    [
        lambda name, out: tierewrite.plan(name),
        lambda name, out: tierewrite.plan(SRC, ties=name),
        lambda name, out: tierewrite.rewrite(name, out),
        lambda name, out: tierewrite.rewrite(SRC, name),
        lambda name, out: tierewrite.verify(name, SRC),
        lambda name, out: tierewrite.inspect(name),
        lambda name, out: tierewrite.check(name),
        lambda name, out: tierewrite.check(SRC, backbone=name),
        lambda name, out: tierewrite.batch([name], into=out),
        lambda name, out: tierewrite.batch([SRC], into=name),
        lambda name, out: tierewrite.batch([{"src": SRC, "dst": name}]),
    ],
)
def test_an_impossible_name_is_a_documented_error(
    call: Callable[[str, Path], object], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TierewriteError) as error:
        call(name, tmp_path / "out")
    assert error.value.exit_code in (EXIT_USAGE, EXIT_SOURCE)
    assert str(error.value).isprintable() or "\n" in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "/".join(["y" * 200] * 20), "s3://bucket/" + "k" * 255])
def test_long_names_that_can_be_are_places(name: str) -> None:
    assert str(located(name)) == name
