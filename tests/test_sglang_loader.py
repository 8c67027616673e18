"""SGLang 0.5.23's real loader, on the CPU: the judge of what `check --for sglang` says, by rules and by the dry load.

Needs the venv that tests/sglang_loader/setup.sh makes, named by TIEREWRITE_SGLANG_VENV:

    tests/sglang_loader/setup.sh DIR && TIEREWRITE_SGLANG_VENV=DIR pytest tests/test_sglang_loader.py -m sglang
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tierewrite
from tests.checkpoints import FIXTURES
from tests.sglang_defects import VARIANTS, Variant, make_all
from tests.sglang_loader.behaviour import RECORD, VENV_VARIABLE, facts, load, python
from tierewrite import consumers
from tierewrite.consumers import check
from tierewrite.consumers.dry_load import LoaderOptions, dry_load
from tierewrite.consumers.loaded import DryLoad
from tierewrite.consumers.sglang import SGLANG

RECORDED: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
INTERPRETER = python()
REASON = f"{VENV_VARIABLE} names no venv of SGLang; tests/sglang_loader/setup.sh DIR makes one"
pytestmark = [pytest.mark.sglang, pytest.mark.skipif(INTERPRETER is None, reason=REASON)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_all(tmp_path_factory.mktemp("variants"))


@pytest.fixture(scope="module")
def dry(folders: dict[str, Path]) -> dict[str, DryLoad]:
    """What the dry load says of every variant; one process for all."""
    assert SGLANG.dry_loader is not None
    names = {path: name for name, path in folders.items()}
    found = dry_load(SGLANG.dry_loader, names, LoaderOptions("require", INTERPRETER))
    return dict(zip(folders, found, strict=True))


@pytest.mark.long
def test_real_loader_behaves_as_recorded(folders: dict[str, Path]) -> None:
    """Minutes: every variant is loaded three times, with real bytes."""
    assert INTERPRETER is not None
    real = load(INTERPRETER, folders.values())
    assert real["sglang"] == RECORDED["sglang"]
    found = {v.name: facts(real[v.name], real[f"{v.base}-unchanged"]) for v in VARIANTS}
    assert found == RECORDED["variants"]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_dry_load_finds_what_the_real_loader_does(variant: Variant, dry: dict[str, DryLoad]) -> None:
    """Refused where it refuses, aborted at the same key, and the same parameters unfilled, element by element."""
    real, one = RECORDED["variants"][variant.name], dry[variant.name]
    if real["outcome"] == "refused":
        assert one.outcome == "refused"
        return
    assert one.outcome == "loaded", one.reason
    rank = one.ranks[0]
    assert (rank.refused[0].key if rank.refused else None) == real.get("key")
    assert rank.failed is None
    if real["outcome"] != "aborts":
        assert {u.parameter: u.missing for u in rank.unfilled} == real.get("unfilled", {})
    assert rank.unknown == ()


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_check_with_the_loader_has_an_error_where_the_real_one_fails(
    variant: Variant,
    folders: dict[str, Path],
    dry: dict[str, DryLoad],
    monkeypatch: pytest.MonkeyPatch,
    remembered_ties: None,
) -> None:
    """No false alarm and no miss."""
    monkeypatch.setattr(consumers, "dry_load", lambda *_: [dry[variant.name]])  # loaded once for all
    report = check(folders[variant.name], "sglang", loader="require", consumer_python=INTERPRETER)
    outcome = RECORDED["variants"][variant.name]["outcome"]
    fails = outcome in ("refused", "aborts", "unfilled") and variant.name != "qwen3-weight-only"  # reads no input scale
    expected = fails or (variant.finding is not None and variant.severity == "error")
    assert bool(report.errors) == expected, [str(finding) for finding in report.findings]
    assert report.consumer_version == RECORDED["sglang"]


def test_a_rewrite_is_checked_by_the_loader(tmp_path: Path) -> None:
    src = FIXTURES / "mixtral_tied_bf16" / "naive"
    report = tierewrite.rewrite(src, tmp_path / "out", consumer="sglang", loader="require", consumer_python=INTERPRETER)
    assert report.readiness is not None
    assert report.readiness.findings == ()


def test_ranks_share_what_there_is(folders: dict[str, Path]) -> None:
    assert SGLANG.dry_loader is not None
    options = LoaderOptions("require", INTERPRETER, tensor_parallel_size=2)
    (found,) = dry_load(SGLANG.dry_loader, {folders["qwen3-unchanged"]: "qwen3"}, options)
    assert (found.outcome, found.reason) == ("loaded", "")
    assert [rank.rank for rank in found.ranks] == [0, 1]
    assert all(not rank.unfilled and not rank.refused for rank in found.ranks)
