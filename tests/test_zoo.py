"""Every class of the installed transformers that declares ties: its naive checkpoint is planned without a mistake.

Headers only (sparse files); the right answers come from transformers (see zoo.py). The counts are printed, and every
class that is skipped is listed with its reason.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests import zoo

WORKERS = 2
# What the default configs of transformers 5.17 to 5.23 give; a sudden fall means that the zoo itself broke.
FEWEST_DECLARED, FEWEST_BUILT, FEWEST_ACTIVE = 340, 310, 190


def _share(index: int, classes: list[tuple[str, str]], folder: str) -> list[dict[str, Any]]:
    with zoo.quiet():
        return [zoo.judge(name, module, Path(folder)) for name, module in classes[index::WORKERS]]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    classes = sorted(zoo.declared_classes().items())
    folder = str(tmp_path_factory.mktemp("zoo"))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(WORKERS, mp_context=context) as pool:
        shares = [pool.submit(_share, i, classes, folder) for i in range(WORKERS)]
        yield sorted((r for share in shares for r in share.result()), key=lambda r: str(r["name"]))


@pytest.fixture(scope="module")
def counts(records: list[dict[str, Any]]) -> dict[str, int]:
    return {
        "declared": len(records),
        "built": sum(r["skipped"] is None for r in records),
        "active": sum(r["active"] for r in records),
        "plans": sum(r["plans"] for r in records),
        "wrong": sum(bool(r["wrong"]) for r in records),
    }


def test_every_plan_drops_exactly_the_alias_names_and_keeps_every_other_key(
    records: list[dict[str, Any]], counts: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    with capsys.disabled():
        print(
            f"\n{counts['declared']} classes declare ties, {counts['built']} build from their default config, "
            f"{counts['active']} then have active ties; {counts['plans']} plans, {counts['wrong']} classes wrong"
        )
        for record in records:
            if record["skipped"]:
                print(f"  skipped {record['name']}: {record['skipped']}")
    assert {r["name"]: r["wrong"] for r in records if r["wrong"]} == {}


def test_the_zoo_is_as_large_as_transformers(counts: dict[str, int]) -> None:
    assert counts["declared"] >= FEWEST_DECLARED
    assert counts["built"] >= FEWEST_BUILT
    assert counts["active"] >= FEWEST_ACTIVE


def test_every_skipped_class_fails_in_transformers_itself(records: list[dict[str, Any]]) -> None:
    ours = [r for r in records if r["skipped"] and ("tierewrite" in r["skipped"] or r["plans"])]
    assert ours == []
