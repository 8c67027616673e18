"""Every class of the installed transformers that declares ties: its naive checkpoint is planned without a mistake.

Headers only (sparse files); the right answers come from transformers (see zoo.py). The counts are printed, and every
class that is skipped is listed with its reason.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests import zoo, zoo_odd

WORKERS = os.cpu_count() or 1
PARTS = 100
"""So many tests share all classes of transformers, each a few minutes long: `-n auto --dist load`."""
# What the default configs of transformers 5.17 to 5.23 give; a sudden fall means that the zoo itself broke.
FEWEST_DECLARED, FEWEST_BUILT, FEWEST_ACTIVE = 340, 310, 190


def _share(index: int, step: int, folder: str) -> list[dict[str, Any]]:
    """Of every step-th package, so that each process imports only its own."""
    with zoo.quiet():
        classes = sorted(zoo.declared_classes(index, step).items())
        return [zoo.judge(name, module, Path(folder)) for name, module in classes]


PACKAGES = [pytest.param(3, id="a third"), pytest.param(1, id="all", marks=pytest.mark.long)]
"""Classes of every third package of transformers, or of all."""


@pytest.fixture(scope="module", params=PACKAGES)
def step(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def records(step: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    folder = str(tmp_path_factory.mktemp("zoo"))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(WORKERS, mp_context=context) as pool:
        shares = [pool.submit(_share, i * step, WORKERS * step, folder) for i in range(WORKERS)]
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


def test_the_zoo_is_as_large_as_transformers(step: int, counts: dict[str, int]) -> None:
    share = 1 if step == 1 else 5  # packages are not of one size
    assert counts["declared"] >= FEWEST_DECLARED / share
    assert counts["built"] >= FEWEST_BUILT / share
    assert counts["active"] >= FEWEST_ACTIVE / share


def test_every_skipped_class_fails_in_transformers_itself(records: list[dict[str, Any]]) -> None:
    ours = [r for r in records if r["skipped"] and ("tierewrite" in r["skipped"] or r["plans"])]
    assert ours == []


# --- odd config.json files (see zoo_odd.py)

SAMPLE = (
    "BarkFineModel",
    "BartForConditionalGeneration",
    "BertForMaskedLM",
    "LlavaForConditionalGeneration",
    "MptForCausalLM",
    "Qwen3_5MoeForCausalLM",
    "T5Model",
)
MAY_BE_REFUSED = {"architectures absent", "architectures an early spelling", "architectures unknown, then right"}
MAY_BE_REFUSED |= {"architectures of another family", "unknown class in auto_map"}
"""Kinds of config.json that do not name the class: it is found only where an AutoModel class has it."""


def _odd_summary(records: list[dict[str, str]]) -> str:
    outcomes = Counter(record["outcome"] for record in records if record["outcome"] != "skipped")
    classes = len({record["class"] for record in records if record["outcome"] != "skipped"})
    listed = ", ".join(f"{number} {outcome}" for outcome, number in outcomes.most_common())
    return f"{classes} classes, {sum(outcomes.values())} odd configs: {listed}"


def test_no_odd_config_of_a_few_classes_gives_a_wrong_plan(tmp_path: Path) -> None:
    every = zoo_odd.all_classes(SAMPLE)
    assert every.keys() == set(SAMPLE)
    records = [record for name in SAMPLE for record in zoo_odd.judge(name, every[name], tmp_path)]
    assert [record for record in records if record["outcome"] in ("wrong", "skipped", "said")] == []
    assert {record["kind"] for record in records if record["outcome"] == "refused"} <= MAY_BE_REFUSED
    assert {record["kind"] for record in records} == {kind.name for kind in zoo_odd.KINDS}


@cache
def _every_class() -> list[tuple[str, str]]:
    return sorted(zoo_odd.all_classes().items())


@pytest.mark.long
@pytest.mark.parametrize("part", range(PARTS))
def test_no_odd_config_of_any_class_gives_a_wrong_plan(
    part: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    classes = _every_class()[part::PARTS]
    records = [record for name, module in classes for record in zoo_odd.judge(name, module, tmp_path)]
    record_property(f"part {part}", _odd_summary(records))  # with --junit-xml=FILE
    assert [record for record in records if record["outcome"] == "wrong"] == []
    assert {record["kind"] for record in records if record["outcome"] == "refused"} <= MAY_BE_REFUSED
